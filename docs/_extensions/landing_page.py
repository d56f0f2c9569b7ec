"""README.md is the landing page: it gets the site's table of contents, docs/contents.md, and the address index.html."""

from __future__ import annotations

import pathlib
import shutil

from sphinx.application import Sphinx


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    if page == app.config.root_doc:
        source[0] += "\n" + (pathlib.Path(app.confdir) / "contents.md").read_text()
    if page.startswith("docs/evidence/"):  # tables that docs/evidence.md and the gallery lead to
        app.env.metadata[page]["orphan"] = ""


def copy_to_index(app: Sphinx, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        shutil.copy(pathlib.Path(app.outdir) / f"{app.config.root_doc}.html", pathlib.Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> dict:
    app.connect("source-read", add_contents)
    app.connect("build-finished", copy_to_index)
    return {"parallel_read_safe": True}
