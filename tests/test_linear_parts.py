"""The parts of `linear_cross_entropy`, and its loss less the entropy of the target: those of the loss on logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ls import LossParts, linear_cross_entropy, smoothed_cross_entropy

RNG = np.random.default_rng(0)
BATCH, D, K = (2, 4), 8, 24
HIDDEN = jnp.asarray(RNG.normal(size=(*BATCH, D)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(D, K)), jnp.float32)
LABELS = jnp.array([[1, 0, -100, 3], [20, 7, 23, -100]])
PRIOR = jnp.asarray(RNG.dirichlet(np.ones(K)), jnp.float32)
EXISTS = jnp.arange(K) % 5 != 2
EACH = jnp.asarray(RNG.uniform(0, 0.5, BATCH), jnp.float32)

GIVEN = [
    {"smoothing": 0.1, "relative": True},
    {"smoothing": EACH, "relative": True, "spread": "others", "z_loss": 0.01},
    {"smoothing": 0.1, "relative": True, "class_where": EXISTS, "z_loss": 0.01},
    {"smoothing": 0.1, "prior": PRIOR, "z_loss": 0.01},
]
static = ("spread", "ignore_index", "relative", "reduction", "return_parts", "plan", "chunk_size", "block_size")
layer = functools.partial(jax.jit, static_argnames=static)(linear_cross_entropy)


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)


def on_logits(hidden, kernel, reduction, **given):
    return smoothed_cross_entropy(hidden @ kernel, LABELS, reduction=reduction, ignore_index=-100, **given)


@pytest.mark.parametrize("plan", [{"plan": "tokens", "chunk_size": 3}, {"plan": "classes", "block_size": 7}])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("given", GIVEN, ids=lambda given: "-".join(given))
def test_parts_are_those_of_the_loss_on_logits(given, reduction, plan):
    options = {"ignore_index": -100, "reduction": reduction} | given
    parts = layer(HIDDEN, KERNEL, LABELS, return_parts=True, **options, **plan)
    assert isinstance(parts, LossParts)
    jax.tree.map(close, parts, on_logits(HIDDEN, KERNEL, return_parts=True, reduction=reduction, **given))
    close(parts.loss, layer(HIDDEN, KERNEL, LABELS, **options, **plan))


@pytest.mark.parametrize("plan", [{"plan": "tokens", "chunk_size": 3}, {"plan": "classes", "block_size": 7}])
def test_the_loss_has_the_gradient_and_the_parts_come_beside_it(plan):
    given = GIVEN[1]

    def total(hidden, kernel):
        parts = layer(hidden, kernel, LABELS, return_parts=True, ignore_index=-100, **given, **plan)
        return parts.loss, parts

    (value, parts), slopes = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(HIDDEN, KERNEL)
    expected = functools.partial(on_logits, reduction="mean", **given)
    jax.tree.map(close, (value, *slopes), (expected(HIDDEN, KERNEL), *jax.grad(expected, (0, 1))(HIDDEN, KERNEL)))
    close(value, parts.loss)
    silent = jax.grad(lambda hidden: total(hidden, KERNEL)[1].z_loss)(HIDDEN)
    np.testing.assert_array_equal(silent, 0)


def test_an_entropy_that_is_a_sum_over_classes_takes_token_chunks():
    given = {"smoothing": 0.1, "prior": PRIOR, "relative": True}
    expected = on_logits(HIDDEN, KERNEL, "mean", **given)
    close(layer(HIDDEN, KERNEL, LABELS, ignore_index=-100, chunk_size=3, **given), expected)
    narrow = KERNEL.astype(jnp.bfloat16)
    layer(HIDDEN.astype(jnp.bfloat16), narrow, LABELS, ignore_index=-100, **given)
    with pytest.raises(TypeError, match=r"relative: expected integer labels, no prior.*plan=.tokens."):
        linear_cross_entropy(HIDDEN, KERNEL, LABELS, plan="classes", **given)


@pytest.mark.parametrize("plan", ["tokens", "classes"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind, plan):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    given = GIVEN[1] | {"smoothing": 0.1, "class_where": EXISTS, "ignore_index": -100, "return_parts": True}
    labels = jnp.where(LABELS % 5 == 2, 1, LABELS)
    expected = smoothed_cross_entropy(HIDDEN @ KERNEL, labels, reduction="mean", **given)
    specs = {"hidden_spec": P("data", None, None), "kernel_spec": P("data", "model")} if kind == AxisType.Auto else {}
    place = {"hidden": P("data"), "kernel": P("data", "model"), "labels": P("data")}
    with jax.set_mesh(mesh):
        h, k, y = (
            jax.device_put(x, jax.NamedSharding(mesh, place[name]))
            for name, x in (("hidden", HIDDEN), ("kernel", KERNEL), ("labels", labels))
        )
        parts = jax.jit(lambda h, k, y: linear_cross_entropy(h, k, y, plan=plan, **given, **specs))(h, k, y)
    jax.tree.map(close, parts, expected)
