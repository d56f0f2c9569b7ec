"""examples/studies/noisy_twonorm.py finds what the theory says, writes whole files, continues, says what is wrong."""

from __future__ import annotations

import importlib
import json
import math
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for package in ("mlxtend", "matplotlib"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "studies"))
twonorm = importlib.import_module("noisy_twonorm")

FILES = ["noisy_twonorm.json", "noisy_twonorm.md", "noisy_twonorm.png", "runs.jsonl"]


@pytest.fixture(autouse=True)
def as_a_user_has_it(monkeypatch):
    """One device: eight pretended ones on two cores mostly wait for each other. optax.adam mixes its dtypes."""
    sweep = twonorm.trials.sweep
    monkeypatch.setattr(
        twonorm.trials, "sweep", lambda *args, **options: sweep(*args, **options, devices=jax.devices()[:1])
    )
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_data_is_twonorm():
    inputs, labels = twonorm.twonorm(jax.random.key(0), 20_000)
    a = 2 / math.sqrt(20)
    for label, sign in ((1, 1), (0, -1)):
        rows = np.asarray(inputs)[np.asarray(labels) == label]
        assert len(rows) == pytest.approx(10_000, rel=0.05)
        np.testing.assert_allclose(rows.mean(axis=0), sign * a, atol=0.05)
        np.testing.assert_allclose(np.cov(rows.T), np.eye(20), atol=0.06)
    # Nothing beats the sign of Σ x, which is right at the Bayes rate.
    best = (np.asarray(inputs).sum(axis=1) > 0) == np.asarray(labels)
    assert best.mean() == pytest.approx(twonorm.BAYES, abs=0.004)
    assert pytest.approx(0.97725, abs=1e-5) == twonorm.BAYES


def test_the_theory_is_the_papers():
    noise = np.array(twonorm.NOISE)
    np.testing.assert_allclose(twonorm.best_smoothing(noise), -2 * noise / (1 - 2 * noise), rtol=1e-5)
    assert twonorm.row_of(-4.0) == 6
    assert twonorm.row_of(-3.0) == 5.5


@pytest.mark.reproduction
def test_quick_finds_the_jump_and_writes_everything(tmp_path, capsys):
    out = tmp_path / "new" / "run"
    twonorm.main(["--quick", "--out", str(out)])
    printed = capsys.readouterr()
    assert printed.err == ""
    assert sorted(path.name for path in out.iterdir()) == FILES
    record = json.loads((out / "noisy_twonorm.json").read_text())
    accuracy = np.array(record["accuracy"])
    assert accuracy.shape == (8, 5)
    np.testing.assert_array_equal(np.mean(record["runs"], axis=-1), accuracy)
    r, e = (record[name].index(value) for name, value in (("smoothing", -8.0), ("noise", 0.4)))
    zero = record["smoothing"].index(0.0)
    # Short as it is: with 40 % of the labels wrong, r = −8 nears the Bayes rate that r = 0 is far from.
    assert accuracy[r, e] > 0.94
    assert accuracy[zero, e] < 0.82
    assert accuracy[r, 0] == pytest.approx(twonorm.BAYES, abs=0.015)
    assert record["published"][zero][e] == 0.973
    table = (out / "noisy_twonorm.md").read_text()
    assert f"{accuracy[r, e]:.3f} (0.986)" in table
    assert table.split("\n\n")[1].strip() in printed.out
    png = (out / "noisy_twonorm.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">2I", png[16:24]) == (1200, 480)
    assert len(png) < 150_000

    # The same command again trains nothing and writes the same; other settings are refused and change nothing.
    before = {path: path.read_bytes() for path in out.iterdir()}
    twonorm.main(["--quick", "--out", str(out), "--batch", "7"])
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    capsys.readouterr()
    assert "runs.jsonl holds a sweep of other seeds" in refused(capsys, "--quick", "--seeds", "2", "--out", out)
    assert "runs.jsonl holds a sweep of other train" in refused(capsys, "--quick", "--epochs", "5", "--out", out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as exit_info:
        twonorm.main([*map(str, flags)])
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith("noisy_twonorm.py: error: ")
    assert error.count("\n") == 1
    return error


def test_bad_flags_and_paths_end_in_one_line(tmp_path, capsys):
    assert "--seeds: expected a whole number of at least 1, got '0'" in refused(capsys, "--seeds", "0")
    assert "unrecognized arguments: --noise" in refused(capsys, "--noise")
    (tmp_path / "file").write_text("mine")
    assert "cannot write to --out" in refused(capsys, "--out", tmp_path / "file")
    (tmp_path / "runs.jsonl").write_text("mine")
    assert "holds something else" in refused(capsys, "--quick", "--out", tmp_path)
    assert (tmp_path / "runs.jsonl").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "runs.jsonl"]


def test_a_training_is_the_same_function_of_its_key_alone():
    point = {"smoothing": jnp.float32(-1.0), "noise": jnp.float32(0.2)}
    train = jax.jit(lambda key: twonorm.train(key, point, epochs=1)["accuracy"])
    assert train(jax.random.key(1)) == train(jax.random.key(1)) != train(jax.random.key(2))
