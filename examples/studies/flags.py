"""The command lines of the studies: numbers within bounds, and one line for whatever the user got wrong."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import interrupts

# More trainings, epochs or steps than anyone waits for. Their arrays of indices still fit into memory.
MOST = 100_000

# A longer word of an error message, a path for instance, is cut.
LONGEST = 200


class InputError(Exception):
    """What the user gave cannot be used; the message says why in one line."""


class OneLineParser(argparse.ArgumentParser):
    """argparse prints its usage before an error; here the error stands alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        words = (word if len(word) <= LONGEST else f"{word[:LONGEST]}..." for word in message.split())
        self.exit(2, f"{self.prog}: error: {' '.join(words)}\n")

    @contextlib.contextmanager
    def reporting(self, kept: str = "") -> Iterator[None]:
        """Whatever the user got wrong ends in one line and exit code 2. `kept` is what an interrupt leaves behind."""
        interrupts.kept = kept
        try:
            yield
        except InputError as error:
            self.error(str(error))


def number(
    convert: Callable[[str], float], accepts: Callable[[float], bool], expected: str, most: float = math.inf
) -> Callable[[str], float]:
    """An argparse type that takes the numbers `accepts` keeps (NaN fails every comparison), up to `most`."""

    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if value > most:
            raise argparse.ArgumentTypeError(f"expected at most {most:,}, got {text!r}")
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


COUNT = number(int, lambda n: n >= 1, "a whole number of at least 1", MOST)
SHARE = number(float, lambda x: 0 <= x < 1, "a share in [0, 1)")
SMOOTHING = number(float, lambda x: -1 <= x < 1, "a number in [-1, 1)")


def directory(text: str) -> Path:
    """An argparse type: the path of a directory, which need not exist."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a directory, got an empty name")
    try:
        Path(text).exists()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{error.strerror}: {text}") from error
    return Path(text)
