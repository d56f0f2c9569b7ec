"""Real text that every machine has: the source files of Python's standard library, as words of a vocabulary."""

from __future__ import annotations

import re
import sysconfig
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# A word with the space before it, a number, a mark, or a line's end with the indentation of the next line.
WORD = re.compile(r"\n[ \t]*| ?[^\W\d]\w*| ?\d+| ?[^\w\s]|\s")
WORDS = 32_000
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

# Words that are not in the vocabulary, and the end of a file, are entries 0 and 1.
UNKNOWN, END = 0, 1

# Matrix units and meshes like a vocabulary that is a multiple of this.
MULTIPLE = 128


class TextError(Exception):
    """The library holds too little text."""


@dataclass(frozen=True)
class Text:
    """Tokens as int32 (n,), one file after another; `counts` (K,) of the training tokens, K with its padding."""

    train: np.ndarray
    held_out: np.ndarray
    counts: np.ndarray
    words: int
    files: int

    def fingerprint(self) -> int:
        """Another Python has another library, which a run cannot be resumed on."""
        return zlib.crc32(self.held_out.tobytes(), zlib.crc32(self.train.tobytes()))

    def exists(self) -> np.ndarray:
        """(K,): which entries of the vocabulary are not padding."""
        return np.arange(len(self.counts)) < self.words

    def unigram(self) -> np.ndarray:
        """(K,): (counts + 1) over their sum; 0 for the padding."""
        counts = np.where(self.exists(), self.counts + 1.0, 0.0)
        return (counts / counts.sum()).astype(np.float32)

    def batch(self, seed: int, step: int, size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and the tokens that follow, (size, length): windows drawn by seed and step alone."""
        starts = np.random.default_rng((seed, step)).integers(len(self.train) - length, size=size)
        windows = self.train[starts[:, None] + np.arange(length + 1)]
        return windows[:, :-1], windows[:, 1:]

    def held_out_windows(self, tokens: int, length: int) -> np.ndarray:
        """(n, length + 1): about `tokens` targets, none in two windows, spread evenly over the held-out files."""
        whole = (len(self.held_out) - 1) // length
        count = min(max(1, tokens // length), whole)
        starts = length * np.linspace(0, whole - 1, count).astype(int)
        return self.held_out[starts[:, None] + np.arange(length + 1)]


def load(max_files: int | None, least: int) -> Text:
    """Every tenth file, by a hash of its path, is held out; `least` is what either part must hold."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    # In the order of the hash, a few files are a fair sample.
    hashes = sorted((zlib.crc32(path.as_posix().encode()), path) for path in paths if not SKIPPED & set(path.parts))
    train, held_out = [], []
    for code, path in hashes[:max_files]:
        part = held_out if code % 10 == 0 else train
        # A few old files are in Latin-1.
        part.append(WORD.findall((root / path).read_text(encoding="utf-8", errors="replace")))
    counts = Counter(word for words in train for word in words)
    # Ties in the order of the alphabet: the vocabulary does not depend on the order of the files.
    kept = sorted(counts, key=lambda word: (-counts[word], word))[:WORDS]
    index = {word: number for number, word in enumerate(kept, start=END + 1)}

    tokens, rest = encode(train, index), encode(held_out, index)
    for name, part in (("train on", tokens), ("hold out", rest)):
        if len(part) <= least:
            raise TextError(f"{len(hashes[:max_files])} source files in {root} leave {len(part)} tokens to {name}")
    words = len(index) + END + 1
    padded = -(-words // MULTIPLE) * MULTIPLE
    return Text(tokens, rest, np.bincount(tokens, minlength=padded), words, len(hashes[:max_files]))


def encode(files: list[list[str]], index: dict[str, int]) -> np.ndarray:
    """The numbers of the words, an END after each file."""
    numbers = [number for words in files for number in (*(index.get(word, UNKNOWN) for word in words), END)]
    return np.array(numbers, dtype=np.int32)
