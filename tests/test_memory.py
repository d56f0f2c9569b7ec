"""What is held besides the logits. Compilers count bytes exactly, whatever mood the machine is in."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_ls import Sparse, cross_entropy, smooth, smoothed_cross_entropy

N, K = 256, 8000
LABELS = np.arange(N) % (K - 5)
PRIOR = np.full(K, 1 / K, np.float32)
EXISTS = np.arange(K) < K - 5
WHERE = np.arange(N) % 3 > 0

OPTIONS = {
    "uniform": {},
    "others": {"spread": "others"},
    "prior": {"prior": PRIOR},
    "prior others": {"prior": PRIOR, "spread": "others"},
    "class_where": {"class_where": EXISTS},
    "where": {"where": WHERE},
    "ignore_index": {"ignore_index": 0},
    "z_loss": {"z_loss": 0.1},
    "class_weights": {"class_weights": PRIOR},
    "all": {"prior": PRIOR, "spread": "others", "class_where": EXISTS, "where": WHERE, "class_weights": PRIOR},
}


def ours(name):
    if name == "sparse":
        indices, weights = np.stack([LABELS, LABELS + 1], axis=-1), np.full((N, 2), 0.5, np.float32)
        return lambda z: cross_entropy(z, smooth(LABELS, 0.1, prior=Sparse(indices, weights)))
    return lambda z: smoothed_cross_entropy(z, LABELS, 0.1, **OPTIONS[name])


def one_hot_route(z):
    return optax.softmax_cross_entropy(z, optax.smooth_labels(jax.nn.one_hot(LABELS, K, dtype=z.dtype), 0.1))


def temporaries(step, dtype):
    """Bytes that a compiled function of the logits needs for itself, in units of the logits."""
    z = jax.ShapeDtypeStruct((N, K), dtype)
    memory = jax.jit(step).lower(z).compile().memory_analysis()
    return memory.temp_size_in_bytes / z.size / z.dtype.itemsize


def value_and_gradient(loss):
    return jax.value_and_grad(lambda z: loss(z).mean())


def residuals(loss, dtype):
    """Bytes kept from the forward for the backward pass, in units of the logits."""
    z = jax.ShapeDtypeStruct((N, K), dtype)
    kept = jax.tree.leaves(jax.eval_shape(lambda z: jax.vjp(loss, z)[1], z))
    return sum(x.size * x.dtype.itemsize for x in kept) / z.size / z.dtype.itemsize


@pytest.mark.memory
@pytest.mark.parametrize("name", [*OPTIONS, "sparse"])
def test_no_temporaries_of_the_size_of_the_logits(name):
    assert temporaries(value_and_gradient(ours(name)), jnp.float32) <= 0.02


@pytest.mark.memory
@pytest.mark.parametrize("name", ["uniform", "others", "prior", "prior others", "z_loss", "class_weights", "sparse"])
def test_nor_in_the_loss_alone(name):
    """XLA on CPU writes z − max out as soon as two sums share it."""
    assert temporaries(ours(name), jnp.float32) <= 0.02


@pytest.mark.memory
def test_no_temporaries_with_epsilon_differentiated_too():
    def loss(z, epsilon):
        return smoothed_cross_entropy(z, LABELS, epsilon, prior=PRIOR, spread="others").mean()

    shapes = jax.ShapeDtypeStruct((N, K), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert step.memory_analysis().temp_size_in_bytes <= 0.02 * 4 * N * K


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", [*OPTIONS, "sparse"])
def test_the_backward_pass_keeps_the_logits_and_a_few_numbers_a_row(name, dtype):
    # What came in as an argument is not copied, and may be held on to.
    arguments = sum(np.asarray(x).nbytes for x in OPTIONS.get(name, {}).values())
    assert residuals(ours(name), dtype) <= 1.01 + arguments / (N * K * jnp.dtype(dtype).itemsize)


def test_the_measures_see_what_one_hot_targets_cost():
    assert temporaries(value_and_gradient(one_hot_route), jnp.float32) > 0.9
    assert temporaries(one_hot_route, jnp.float32) > 0.9
    for dtype in (jnp.float32, jnp.bfloat16):
        assert residuals(one_hot_route, dtype) > 1.9


def test_the_losses_measured_are_the_same():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(N, K)), jnp.float32)
    cases.assert_close(jax.jit(ours("uniform"))(z), np.asarray(jax.jit(one_hot_route)(z), float), size=16)


def test_a_target_is_of_the_size_of_the_labels():
    """ε as a number and labels as integers stay that; q is not written out until somebody asks."""
    target = smooth(LABELS, 0.1)
    assert sum(x.nbytes for x in jax.tree.leaves(target)) <= 4 * N + 16
