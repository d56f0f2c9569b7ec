"""The public names of jax_ls: what is documented, and where a name in backticks leads."""

from __future__ import annotations

import collections
import importlib
import inspect

import jax_ls

OPTIONAL = ["nnx", "plotting"]
MODULES = ["jax_ls"]
MODULES += [f"jax_ls.{name}" for name in jax_ls.__all__ if inspect.ismodule(getattr(jax_ls, name))]
MODULES += [f"jax_ls.{name}" for name in OPTIONAL if f"jax_ls.{name}" not in MODULES]


def names_of(module: str) -> list[str]:
    """The public functions and classes of a module."""
    namespace = importlib.import_module(module)
    return [name for name in namespace.__all__ if not inspect.ismodule(getattr(namespace, name))]


NAMES = {f"{module}.{name}" for module in MODULES for name in names_of(module)}


def parameters_of(name: str) -> set[str]:
    module, _, short = name.rpartition(".")
    thing = getattr(importlib.import_module(module), short)
    return set(inspect.signature(thing).parameters)


# Names that say which module they are of: `unigram` does, `beta` is of two modules, and `margin` is also an argument.
ARGUMENTS = set().union(*(parameters_of(name) for name in NAMES))
SHORT = collections.Counter(name.rpartition(".")[2] for name in NAMES)
UNIQUE = {
    short: name
    for name in NAMES
    if SHORT[short := name.rpartition(".")[2]] == 1 and short not in ARGUMENTS and len(short) > 3
}


def resolve(text: str, module: str = "") -> str | None:
    """The full name that `text` means, as seen from `module`; None if it means no public name."""
    text = text.removesuffix("()")
    candidates = [f"{module}.{text}", f"jax_ls.{text}", text]
    return next((name for name in candidates if name in NAMES), UNIQUE.get(text))
