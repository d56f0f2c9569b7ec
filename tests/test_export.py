"""`jax.export` with a symbolic batch: one program for any number of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jax_ls import linear_cross_entropy, smoothed_cross_entropy

D, K = 8, 24
KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(D, K)), jnp.float32)
OPTIONS = {"ignore_index": -100, "z_loss": 0.01}


def on_logits(hidden, kernel, labels):
    return smoothed_cross_entropy(hidden @ kernel, labels, 0.1, reduction="mean", **OPTIONS)


@pytest.mark.parametrize("loss", [functools.partial(linear_cross_entropy, smoothing=0.1, **OPTIONS), on_logits])
def test_a_symbolic_batch(loss):
    (batch,) = export.symbolic_shape("batch")
    step = jax.jit(jax.value_and_grad(lambda h, k, y: loss(h, k, y), argnums=(0, 1)))
    shapes = (
        jax.ShapeDtypeStruct((batch, 3, D), jnp.float32),
        jax.ShapeDtypeStruct((D, K), jnp.float32),
        jax.ShapeDtypeStruct((batch, 3), jnp.int32),
    )
    program = export.export(step)(*shapes)
    rng = np.random.default_rng(1)
    for size in (1, 5):
        hidden = jnp.asarray(rng.normal(size=(size, 3, D)), jnp.float32)
        labels = jnp.asarray(rng.integers(0, K, (size, 3)), jnp.int32).at[0, 0].set(-100)
        value, slopes = program.call(hidden, KERNEL, labels)
        expected = jax.value_and_grad(on_logits, argnums=(0, 1))(hidden, KERNEL, labels)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        for ours, theirs in zip(slopes, expected[1], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
