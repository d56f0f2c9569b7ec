"""The site. From the root of the repository: `sphinx-build -W -c docs . build/site`; open build/site/index.html.

The source folder is the whole repository, so that links between README.md, docs/, examples/ and benchmarks/ work on the
site as they do in the files.
"""

from __future__ import annotations

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_extensions")]

import jax_ls  # noqa: E402

project = "jax_ls"
author = "The jax_ls authors"
copyright = "2026, the jax_ls authors"  # noqa: A001
version = release = jax_ls.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "api_pages",
    "docstrings",
    "landing_page",
]

root_doc = "README"
include_patterns = ["*.md", "docs/**", "examples/README.md", "examples/*.ipynb", "benchmarks/README.md"]
exclude_patterns = ["docs/contents.md", "docs/_*"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_merge_streams = True
nb_execution_mode = "off"  # the notebook holds what it printed; a test runs its cells

autodoc_typehints = "none"  # each docstring says dtypes and shapes, which Array does not
autodoc_member_order = "bysource"
autosummary_generate = False
viewcode_follow_imported_members = True
add_module_names = False
nitpicky = True
smartquotes = False  # a quotation mark in a docstring is code
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"jax_ls {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
