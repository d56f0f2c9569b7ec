"""Turns our docstrings, plain text with Google's sections, into reStructuredText.

Napoleon would take `smoothing, prior: ε and u` for two arguments, `Losses (*batch,): ...` for a type, and `|k − y|` for
a substitution. Here a backtick means code, or a link if it holds a public name, and every other mark is itself.
"""

from __future__ import annotations

import inspect
import re
import textwrap

import public_names
from sphinx.application import Sphinx

SECTION = re.compile(r"^(Args|Returns|Raises|References|Example):$")
CODE = re.compile(r"`([^`]+)`")
MARKS = re.compile(r"([*|\\]|(?<=\w)_(?!\w))")


def inline(text: str, module: str) -> str:
    """Plain text -> reStructuredText: backticks become code or links, and other marks are escaped."""

    def code(span: str) -> str:
        target = public_names.resolve(span, module)
        return rf"\ :py:obj:`{span} <{target}>`\ " if target else rf"\ ``{span}``\ "

    pieces = CODE.split(text)  # text, code, text, ...
    return "".join(code(piece) if place % 2 else MARKS.sub(r"\\\1", piece) for place, piece in enumerate(pieces))


def prose(lines: list[str], module: str) -> list[str]:
    """Paragraphs and lists; an indented block is code."""
    written, paragraph = [], []

    def close() -> None:
        if paragraph:
            written.extend([*inline("\n".join(paragraph), module).split("\n"), ""])
            paragraph.clear()

    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    for block in blocks:
        indented = all(line.startswith("    ") for line in block.split("\n"))
        if indented or block.lstrip().startswith(">>>"):
            close()
            head = [".. code-block:: python", ""] if indented else []
            written += [*head, *textwrap.indent(textwrap.dedent(block), "   " if indented else "").split("\n"), ""]
        else:
            paragraph += block.split("\n")
            close()
    return written


def entries(lines: list[str]) -> list[tuple[str, list[str]]]:
    """`name, other: text` and the lines that go on, deeper -> (names, text)."""
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        if line and not line.startswith(" "):
            names, _, text = line.partition(": ")
            found.append((names, [text]))
        elif found:
            found[-1][1].append(line.strip())
    return found


def section(title: str, body: list[str], module: str) -> list[str]:
    lines = textwrap.dedent("\n".join(body)).strip("\n").split("\n")
    if title == "Example":
        return [".. rubric:: Example", "", *lines, ""]
    if title in ("Args", "Raises"):
        written = []
        for names, text in entries(lines):
            mark = "**" if title == "Args" else "*"
            head = mark + MARKS.sub(r"\\\1", names) + mark
            written += [head, *textwrap.indent(inline("\n".join(text), module), "  ").split("\n"), ""]
    else:
        written = prose(lines, module)
    return [f":{title}:", *(f"   {line}" if line else "" for line in written), ""]


def translate(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    module = name if what == "module" else name.rpartition(".")[0]
    if what in ("method", "attribute", "property"):
        module = module.rpartition(".")[0]
    parts: list[tuple[str, list[str]]] = [("", [])]
    for line in lines:
        if match := SECTION.match(line):
            parts.append((match[1], []))
        else:
            parts[-1][1].append(line)
    written = prose(parts[0][1], module)
    for title, body in parts[1:]:
        written += section(title, body, module)
    lines[:] = written


def constructor(app: Sphinx, what: str, name: str, thing: object, *_: object) -> tuple[str, None] | None:
    """The signature of a class whose metaclass takes (*args, **kwargs), as Flax's does: that of its __init__."""
    if what != "class" or "*args" not in str(inspect.signature(thing)):  # type: ignore[arg-type]
        return None
    own = inspect.signature(thing.__init__)  # type: ignore[misc]
    parameters = [parameter.replace(annotation=parameter.empty) for parameter in list(own.parameters.values())[1:]]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return "", None
    return str(inspect.Signature(parameters)), None


def skip_fields(app: Sphinx, what: str, name: str, thing: object, *_: object) -> bool | None:
    """The fields of a named tuple are in the docstring of its class; Python's own words for them say nothing."""
    return True if (getattr(thing, "__doc__", None) or "").startswith("Alias for field") else None


def setup(app: Sphinx) -> dict:
    app.connect("autodoc-process-docstring", translate)
    app.connect("autodoc-process-signature", constructor)
    app.connect("autodoc-skip-member", skip_fields)
    return {"parallel_read_safe": True}
