"""Schedules of ε: values at every corner, steps and ε traced."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_ls import schedules, smoothed_cross_entropy, with_label_smoothing

STEPS = [0, 1, 49, 50, 75, 100, 150, 151, 1000]


def cosine(t):
    return 0.5 * (1 + np.cos(np.pi * t))


CASES = {
    "linear": (lambda e: schedules.to_zero(e, 100), lambda s: 1 - min(s, 100) / 100),
    "linear later": (lambda e: schedules.to_zero(e, 100, begin=50), lambda s: 1 - np.clip((s - 50) / 100, 0, 1)),
    "cosine": (lambda e: schedules.to_zero(e, 100, shape="cosine"), lambda s: cosine(min(s, 100) / 100)),
    "cosine later": (
        lambda e: schedules.to_zero(e, 100, begin=50, shape="cosine"),
        lambda s: cosine(np.clip((s - 50) / 100, 0, 1)),
    ),
    "warmup": (lambda e: schedules.warmup(e, 100), lambda s: min(s, 100) / 100),
    "warmup later": (lambda e: schedules.warmup(e, 100, begin=50), lambda s: np.clip((s - 50) / 100, 0, 1)),
    "two stage": (lambda e: schedules.two_stage(e, 50), lambda s: float(s < 50)),
    "two stage at once": (lambda e: schedules.two_stage(e, 0), lambda s: 0.0),
}


@pytest.mark.parametrize("epsilon", [0.2, -0.5])
@pytest.mark.parametrize("name", CASES)
def test_values(name, epsilon):
    make, share = CASES[name]
    expected = [epsilon * share(step) for step in STEPS]
    schedule = make(epsilon)
    np.testing.assert_allclose([schedule(step) for step in STEPS], expected, rtol=1e-5, atol=1e-7)
    traced = jax.jit(jax.vmap(schedule))(jnp.array(STEPS))
    np.testing.assert_allclose(traced * jnp.ones(len(STEPS)), expected, rtol=1e-5, atol=1e-7)
    both = jax.jit(jax.vmap(lambda e: make(e)(jnp.array(75)) * jnp.ones(())))(jnp.array([epsilon, 2 * epsilon]))
    np.testing.assert_allclose(both, epsilon * share(75) * np.array([1, 2]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_zero_is_zero(shape):
    schedule = jax.jit(schedules.to_zero(-0.5, 49, begin=3, shape=shape))
    assert [schedule(jnp.array(step)) for step in (52, 53, 1000)] == [0, 0, 0]
    assert schedule(jnp.array(51)) != 0


def test_plain_then_negative():
    schedule = schedules.plain_then_negative(-0.5, 50)
    np.testing.assert_allclose([schedule(step) for step in STEPS], [0, 0, 0] + [-0.5] * 6)
    both = jax.vmap(lambda e: schedules.plain_then_negative(e, 50)(60))(jnp.array([-1.0, 1.0]))
    np.testing.assert_array_equal(both, [-1, np.nan])
    assert schedules.plain_then_negative(-0.5, 0)(0) == -0.5


def test_schedules_go_into_losses():
    z, y = jnp.array([[2.0, -1.0, 0.5]]), jnp.array([0])
    schedule = schedules.to_zero(0.2, 100)
    step = jax.jit(lambda step: smoothed_cross_entropy(z, y, schedule(step)))
    np.testing.assert_allclose(step(50), smoothed_cross_entropy(z, y, 0.1), rtol=1e-6)
    wrapped = with_label_smoothing(optax.safe_softmax_cross_entropy, schedule)
    np.testing.assert_allclose(wrapped(z, y, step=50), step(50), rtol=1e-6)


MISTAKES = [
    (lambda: schedules.to_zero(0.1, 0), r"steps: expected a positive integer, got 0"),
    (lambda: schedules.to_zero(0.1, 2.5), r"steps: .*got 2.5"),
    (lambda: schedules.to_zero(0.1, 9, begin=-1), r"begin: expected a step, 0 or later, got -1"),
    (lambda: schedules.to_zero(0.1, 9, shape="square"), r"shape: .*got 'square'"),
    (lambda: schedules.to_zero("much", 9), r"smoothing: .*got 'much'"),
    (lambda: schedules.warmup(jnp.ones(2), 9), r"smoothing: expected a number, got float32 \(2,\)"),
    (lambda: schedules.warmup(0.1, 9, begin=0.5), r"begin: expected an integer, got 0.5"),
    (lambda: schedules.two_stage(0.1, -3), r"drop_at: .*got -3"),
    (lambda: schedules.plain_then_negative(0.1, 9), r"smoothing: expected a negative number, got 0.1"),
    (lambda: schedules.plain_then_negative(-0.1, None), r"switch_at: expected an integer, got None"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[message[:30] for _, message in MISTAKES])
def test_bad_input_raises_at_once(mistake, message):
    with pytest.raises((AssertionError, TypeError, ValueError), match=message):
        mistake()
