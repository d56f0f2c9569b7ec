"""Every python block of README and docs runs: all of a page in one namespace, or each alone where readers paste it."""

import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jax_ls

ROOT = Path(__file__).parents[1]
ALONE = ["README.md", "training-steps.md"]  # pages whose blocks are pasted one at a time
PAGES = [path for path in [ROOT / "README.md", *sorted(ROOT.glob("*/*.md"))] if "```python" in path.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page):
    text = page.read_text()
    namespace: dict = {}
    # Users do not run under this suite's strict settings.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            namespace = {} if page.name in ALONE else namespace
            line = text[: block.start()].count("\n") + 1
            exec(compile("\n" * line + block.group(1), str(page), "exec"), namespace)


@pytest.mark.parametrize(
    "page",
    [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/*.md")), *sorted(ROOT.glob("docs/api/*.md"))],
    ids=lambda page: page.name,
)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_readme_is_short_and_its_code_is_in_sight():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    code = re.findall(r"^```python\n(.*?)^```", "\n".join(lines), re.DOTALL | re.MULTILINE)
    assert max(len(line) for line in "".join(code).splitlines()) <= 90


def test_the_readme_names_the_versions_that_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [oldest] = [need.removeprefix("jax>=") for need in project["dependencies"] if need.startswith("jax>=")]
    pythons = [x.rpartition(" ")[2] for x in project["classifiers"] if re.search(r"Python :: 3\.\d+$", x)]
    words = f"Python {', '.join(pythons[:-1])} or {pythons[-1]} and jax {oldest} or newer."
    assert words in (ROOT / "README.md").read_text()
    assert project["requires-python"] == f">={pythons[0]}"


def test_the_example_is_as_short_as_the_readme_says():
    assert "[150 lines](examples/mnist.py)" in (ROOT / "README.md").read_text()
    assert len((ROOT / "examples" / "mnist.py").read_text().splitlines()) <= 150


def test_error_messages_are_those_of_the_page():
    rows = re.findall(r"^\| `(.*)` \| `(.*)` \|$", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    names = {"jax": jax, "priors": jax_ls.priors, "calibration": jax_ls.calibration}
    given = {"z": jnp.zeros((8, 4)), "y": jnp.zeros(8, int), "ce": jax_ls.smoothed_cross_entropy}
    assert len(rows) > 10
    for call, message in rows:
        with pytest.raises((AssertionError, TypeError, ValueError)) as raised:
            eval(call, {"jnp": jnp, "jax_ls": jax_ls, **names, **given})
        assert message.replace("\\|", "|") in str(raised.value)


@pytest.mark.parametrize(
    "command",
    [
        'pip install -e ".[examples]" && python examples/mnist.py',
        'pip install -e ".[test]" && pytest',
        'pip install -e ".[docs]" && sphinx-build -W -c docs . build/site',
    ],
)
def test_readme_commands_stand_alone(command):
    assert f"\n{command}\n" in (ROOT / "README.md").read_text()


def test_the_release_is_the_same_everywhere():
    version = re.escape(jax_ls.__version__)
    [date] = re.findall(rf"^## {version} \((\d{{4}}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {jax_ls.__version__}\ndate-released: {date}\n" in citation
    bibtex = (ROOT / "docs" / "citing.md").read_text()
    assert f"version = {{{jax_ls.__version__}}}" in bibtex
    assert f"year    = {{{date[:4]}}}" in bibtex
