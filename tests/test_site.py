"""The site's pages, read as text: every public name has its place, and every page is in the table of contents."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest
from test_package import OPTIONAL, SUBMODULES, named

import jax_ls

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```\{api\} (\S+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHOWN = [
    (module, name)
    for page in sorted((DOCS / "api").glob("*.md"))
    for module, names in BLOCK.findall(page.read_text())
    for name in names.split()
]
MODULES = ["jax_ls", *(f"jax_ls.{name}" for name in [*SUBMODULES, *OPTIONAL])]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_one_place_on_the_api_pages(module):
    namespace = importlib.import_module(module)
    public = [name for name in namespace.__all__ if name not in (SUBMODULES if namespace is jax_ls else ())]
    assert sorted(name for place, name in SHOWN if place == module) == sorted(public)


def test_api_pages_show_nothing_else():
    assert {module for module, _ in SHOWN} == set(MODULES)


def test_every_page_is_in_the_table_of_contents():
    listed = re.findall(r"^(\S+/\S+|[A-Z]+)$", (DOCS / "contents.md").read_text(), re.MULTILINE)
    pages = [path.relative_to(ROOT).with_suffix("") for path in DOCS.rglob("*.md")]
    pages = [page for page in pages if page.parts[1] != "evidence" and page.name != "contents"]
    assert {str(page) for page in pages} <= set(listed)
    missing = [page for page in listed if not any((ROOT / f"{page}{end}").exists() for end in (".md", ".ipynb"))]
    assert not missing


def test_the_table_of_options_is_that_of_the_signatures():
    text = (DOCS / "shared-options.md").read_text().replace("<wbr>", "")  # where a long name may break
    header, *rows = re.findall(r"^\| (?=loss \||`[\w.]+`[^|]*\|(?: ✓? ?\|){9})(.*) \|$", text, re.MULTILINE)
    options = [cell.strip().split(", ") for cell in header.split("|")[1:]]
    assert len(rows) > 10
    for row in rows:
        names, *marks = row.split("|")
        for name in re.findall(r"`([\w.]+)`", names):
            parameters = inspect.signature(named(name)).parameters
            taken = [set(words) <= set(parameters) for words in options]
            assert [mark.strip() == "✓" for mark in marks] == taken, name


def test_the_gallery_shows_every_picture_once():
    shown = re.findall(r"!\[[^]]+\]\(evidence/(\S+)\)", (DOCS / "gallery.md").read_text())
    assert sorted(shown) == sorted(path.name for path in (DOCS / "evidence").glob("*.png"))


def test_the_commands_of_the_gallery_are_scripts():
    scripts = re.findall(r"^python (\S+)", (DOCS / "gallery.md").read_text(), re.MULTILINE)
    assert len(scripts) > 5
    assert all((ROOT / script).exists() for script in scripts)
