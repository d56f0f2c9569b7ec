"""Policies smoothed over legal actions: the definition, the moments of the noise, and what bad input gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jax_ls import Uniform, cross_entropy
from jax_ls.preferences import dirichlet_noise, epsilon_greedy, smooth_policy

PROBS = np.array([[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]], np.float32)
LEGAL = np.array([[True, True, False, True], [False, False, True, True]])


def exact_policy(probs, epsilon, legal):
    pure = probs * legal / (probs * legal).sum(axis=-1, keepdims=True)
    return (1 - epsilon) * pure + epsilon * legal / legal.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, np.array([0.1, 1.0], np.float32)], ids=["0", "0.3", "each"])
def test_smooth_policies(epsilon):
    column = np.reshape(epsilon, (-1, 1)) if np.ndim(epsilon) else epsilon
    actual = jax.jit(smooth_policy)(PROBS, epsilon, legal_actions=LEGAL)
    np.testing.assert_allclose(actual, exact_policy(PROBS, column, LEGAL), rtol=1e-6)
    assert (actual[~LEGAL] == 0).all()
    every = np.ones(4, bool)
    np.testing.assert_allclose(smooth_policy(PROBS, epsilon), exact_policy(PROBS, column, every[None]), rtol=1e-6)
    shared = smooth_policy(PROBS, epsilon, legal_actions=LEGAL[0])
    np.testing.assert_allclose(shared, exact_policy(PROBS, column, LEGAL[:1]), rtol=1e-6)
    logits = np.where(LEGAL, np.log(np.maximum(PROBS, 1e-30)), np.nan)
    from_logits = smooth_policy(logits.astype(np.float32), epsilon, legal_actions=LEGAL, from_logits=True)
    np.testing.assert_allclose(from_logits, actual, rtol=1e-6, atol=1e-12)


def test_policies_are_targets():
    target = smooth_policy(PROBS, 0.3, legal_actions=LEGAL)
    losses = cross_entropy(np.where(LEGAL, 0.0, -np.inf).astype(np.float32), target, class_where=LEGAL)
    np.testing.assert_allclose(losses, np.log([3, 2]), rtol=1e-6)


def test_slopes_of_a_smooth_policy():
    weights = np.arange(8.0).reshape(2, 4)
    slopes = jax.grad(
        lambda p, e: jnp.sum(smooth_policy(p, e, legal_actions=LEGAL) * weights.astype(np.float32)), (0, 1)
    )
    by_probs, by_epsilon = slopes(PROBS, 0.3)
    exact = reference.gradient(lambda p: (exact_policy(p, 0.3, LEGAL) * weights).sum(), PROBS.astype(float))
    np.testing.assert_allclose(by_probs, exact, rtol=1e-5, atol=1e-5)
    exact = reference.gradient(lambda e: (exact_policy(PROBS.astype(float), e, LEGAL) * weights).sum(), np.array(0.3))
    np.testing.assert_allclose(by_epsilon, exact, rtol=1e-5)


def test_epsilon_greedy_is_the_smoothing_of_the_greedy_policy():
    values = np.array([[1.0, 5.0, 9.0, 5.0], [7.0, 8.0, -2.0, -1.0]], np.float32)
    greedy = np.array([[0, 0.5, 0, 0.5], [0, 0, 0, 1.0]])
    actual = epsilon_greedy(values, 0.2, legal_actions=LEGAL)
    np.testing.assert_allclose(actual, exact_policy(greedy, 0.2, LEGAL), rtol=1e-6)
    np.testing.assert_allclose(epsilon_greedy(values, 0.2)[0], [0.05, 0.05, 0.85, 0.05], rtol=1e-6)
    spoilt = values.copy()
    spoilt[0, 0] = np.nan
    assert np.isnan(epsilon_greedy(spoilt, 0.2, legal_actions=LEGAL)).all(axis=-1).tolist() == [True, False]


def test_no_legal_action_makes_its_own_row_nan():
    legal = LEGAL & np.array([[False], [True]])
    for call in (
        lambda: smooth_policy(PROBS, 0.3, legal_actions=legal),
        lambda: smooth_policy(PROBS, 0.3, legal_actions=legal, from_logits=True),
        lambda: epsilon_greedy(PROBS, 0.3, legal_actions=legal),
        lambda: dirichlet_noise(jax.random.key(0), PROBS, legal_actions=legal),
    ):
        assert np.isnan(call()).all(axis=-1).tolist() == [True, False]


def test_no_legal_action_leaves_other_rows_their_slopes():
    """In an ε that all rows share."""

    def total(epsilon, legal, rows):
        policy = smooth_policy(PROBS[rows], epsilon, legal_actions=legal[rows])
        return jnp.sum(jnp.where(legal.any(axis=-1)[rows, None], policy, 0) @ np.arange(4, dtype=np.float32))

    spoilt = LEGAL & np.array([[False], [True]])
    slope = jax.grad(total)(0.3, spoilt, slice(None))
    np.testing.assert_allclose(slope, jax.grad(total)(0.3, spoilt, slice(1, 2)), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_policies_are_widened(dtype):
    narrow = jnp.asarray(PROBS, dtype)
    actual = smooth_policy(narrow, 0.3, legal_actions=LEGAL)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, exact_policy(np.asarray(narrow, float), 0.3, LEGAL), rtol=1e-6)
    assert {f.dtype for f in (epsilon_greedy(narrow, 0.1), dirichlet_noise(KEY, narrow))} == {jnp.dtype("float32")}


def test_dirichlet_noise_has_its_mean_and_variance_over_legal_actions():
    draws, alpha, fraction = 20_000, 0.3, 0.25
    probs, legal = np.array([0.2, 0.5, 0.3, 0.0], np.float32), np.array([True, True, True, False])
    keys = jax.random.split(jax.random.key(0), draws)
    noisy = jax.vmap(lambda key: dirichlet_noise(key, probs, fraction=fraction, alpha=alpha, legal_actions=legal))(keys)
    np.testing.assert_allclose(noisy.sum(axis=-1), 1, rtol=1e-5)
    assert (noisy[:, 3] == 0).all()
    np.testing.assert_allclose(noisy.mean(axis=0)[:3], 0.75 * probs[:3] + 0.25 / 3, atol=0.005)
    variance = fraction**2 * (1 / 3 * 2 / 3) / (3 * alpha + 1)
    np.testing.assert_allclose(noisy.var(axis=0)[:3], variance, rtol=0.05)
    tiny = dirichlet_noise(jax.random.key(1), probs, alpha=1e-4)
    np.testing.assert_allclose(tiny.sum(), 1, rtol=1e-6)


ONES, KEY = jnp.ones(3), jax.random.key(0)
BAD = [
    ("smoothing", lambda: smooth_policy(PROBS, ONES), r"float32 \(3,\)"),
    ("legal_actions", lambda: smooth_policy(PROBS, 0.1, legal_actions=jnp.ones(3, bool)), r"bool \(3,\)"),
    ("prior", lambda: smooth_policy(PROBS, 0.1, prior=ONES), r"float32 \(3,\)"),
    ("action_values", lambda: epsilon_greedy(jnp.ones(4, int), 0.1), r"int32 \(4,\)"),
    ("alpha", lambda: dirichlet_noise(KEY, PROBS, alpha=0.0), "0.0"),
    ("probs", lambda: dirichlet_noise(KEY, jnp.array(1.0)), r"float32 \(\)"),
    ("fraction", lambda: dirichlet_noise(KEY, PROBS, fraction=ONES), r"float32 \(3,\)"),
    ("fraction", lambda: dirichlet_noise(KEY, PROBS, fraction="much"), "much"),
    ("action_values", lambda: epsilon_greedy(None, 0.1), "None"),
    ("legal_actions", lambda: smooth_policy(PROBS, 0.1, legal_actions="all"), "all"),
    ("prior", lambda: smooth_policy(PROBS, 0.1, prior=Uniform()), "Uniform"),
]


@pytest.mark.parametrize(("name", "call", "came"), BAD, ids=range(len(BAD)))
def test_bad_input_is_told_by_name(name, call, came):
    with pytest.raises((AssertionError, TypeError, ValueError), match=rf"(?s){name}: expected.*{came}"):
        call()
