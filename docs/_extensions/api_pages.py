"""Writes an API page out. A page names a module and its names, one a line:

    ```{api} jax_ls.priors
    unigram
    similarity
    ```

That becomes a table of the names with their first lines, and each docstring below. In the text of every page, a public
name in backticks leads to its docstring.
"""

from __future__ import annotations

import inspect
import re

import public_names
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import jax_ls

BLOCK = re.compile(r"^```\{api\} (?P<module>\S+)\n(?P<names>.*?)^```$", re.DOTALL | re.MULTILINE)

# A class is shown with its methods and those of its private bases, but not with those of these bases.
DOCUMENTED_ELSEWHERE = "Metric, Module, Variable, tuple, object"


def written_out(block: re.Match) -> str:
    module, names = block["module"], block["names"].split()
    lines = [f".. currentmodule:: {module}", "", ".. autosummary::", "   :nosignatures:", ""]
    lines += [f"   {name}" for name in names]
    for name in names:
        thing = getattr(__import__(module, fromlist=[name]), name)
        if inspect.isclass(thing):
            lines += ["", f".. autoclass:: {name}"]
            if thing.__base__ is not jax_ls.Target:  # a kind of target has the methods of `Target`
                lines += ["   :members:", f"   :inherited-members: {DOCUMENTED_ELSEWHERE}"]
        else:
            lines += ["", f".. autofunction:: {name}"]
    return "\n".join(["```{eval-rst}", *lines, "```"])


def write_out(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = BLOCK.sub(written_out, source[0])


class LinkPublicNames(SphinxTransform):
    """Makes a literal that is a public name a link to its docstring, except in headings and links."""

    default_priority = 500

    def apply(self, **_: object) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            text = literal.astext()
            target = text if text in public_names.MODULES[1:] else public_names.resolve(text)
            if target is None or isinstance(literal.parent, (nodes.title, nodes.reference, addnodes.pending_xref)):
                continue
            link = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=target, refwarn=True)
            literal.replace_self(link)
            link += literal


def setup(app: Sphinx) -> dict:
    app.connect("source-read", write_out)
    app.add_transform(LinkPublicNames)
    return {"parallel_read_safe": True}
