"""Derivatives of scalars over bins and back, against differences of the float64 definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import reference_values as ref

from jax_ls.values import Support, categorical_projection, expected_value, hl_gauss, two_hot

LOW, HIGH, B = -3.0, 5.0, 17
ATOMS = ref.atoms(LOW, HIGH, B)
EDGES = ref.edges_between(ATOMS)
SUPPORT = Support(LOW, HIGH, B)
WEIGHTS = np.random.default_rng(0).normal(size=B).astype(np.float32)
# On edges and atoms too, where a side changes.
RETURNS = np.array([-2.75, -2.0, 0.0, 0.25, 1.37, 4.75], np.float32)

histogram = jax.jit(lambda t, ratio: hl_gauss(t, SUPPORT, sigma_ratio=ratio).probs(B))


@pytest.mark.parametrize("ratio", [0.3, 0.75])
def test_of_the_histogram_in_returns(ratio):
    expected = [ref.hl_gauss_slope(float(x), ATOMS, EDGES, ratio) for x in RETURNS]
    forward = jax.vmap(jax.jacfwd(histogram), (0, None))(RETURNS, ratio)
    np.testing.assert_allclose(forward, expected, rtol=1e-4, atol=1e-5)
    backward = jax.vmap(jax.jacrev(histogram), (0, None))(RETURNS, ratio)
    np.testing.assert_allclose(backward, forward, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.3, 0.75])
def test_of_the_histogram_in_sigma(ratio):
    def difference(t, h=1e-6):
        up, down = (ref.hl_gauss(t, ATOMS, EDGES, ratio + d) for d in (h, -h))
        return (up - down) / (2 * h)

    actual = jax.vmap(jax.jacfwd(histogram, 1), (0, None))(RETURNS, ratio)
    np.testing.assert_allclose(actual, [difference(float(t)) for t in RETURNS], rtol=1e-4, atol=1e-5)


def test_far_outside_they_are_zero():
    slopes = jax.grad(lambda t: jnp.sum(histogram(t, 0.75) @ WEIGHTS))(jnp.array([1e6, -1e6, 5.3]))
    assert slopes.tolist() == [0, 0, 0]


def test_of_two_hot():
    """Between atoms; on one, the slope is that of the bin above."""
    t = np.array([-2.9, -1.03, 0.02, 1.37, 4.4], np.float32)
    slopes = jax.vmap(jax.grad(lambda t: two_hot(t, SUPPORT).dot(WEIGHTS)))(t)
    h = 1e-4
    up, down = (np.array([ref.two_hot(float(x) + d, ATOMS) @ WEIGHTS for x in t]) for d in (h, -h))
    np.testing.assert_allclose(slopes, (up - down) / (2 * h), rtol=1e-4)
    outside = jax.vmap(jax.grad(lambda t: two_hot(t, SUPPORT).dot(WEIGHTS)))(jnp.array([-4.0, 6.0]))
    assert outside.tolist() == [0, 0]


def test_of_the_projection_and_of_the_mean():
    rng = np.random.default_rng(1)
    t, p = (rng.uniform(-2.9, 4.9, 5).astype(np.float32), rng.dirichlet(np.ones(5)).astype(np.float32))
    by_t, by_p = jax.grad(lambda t, p: categorical_projection(t, p, SUPPORT).dot(WEIGHTS), (0, 1))(t, p)
    hot = np.array([ref.two_hot(float(x), ATOMS) for x in t])
    np.testing.assert_allclose(by_p, hot @ WEIGHTS, rtol=1e-4, atol=1e-5)
    width = ATOMS[1] - ATOMS[0]
    index = np.floor((t.astype(float) - LOW) / width).astype(int)
    np.testing.assert_allclose(by_t, p * (WEIGHTS[index + 1] - WEIGHTS[index]) / width, rtol=1e-4)

    def mean(z):
        e = np.exp(z)
        return (e @ ATOMS) / e.sum()

    z = rng.normal(size=B).astype(np.float32)
    slope = jax.grad(lambda z: expected_value(z, SUPPORT))(z)
    np.testing.assert_allclose(slope, reference.gradient(mean, z.astype(float)), rtol=1e-4, atol=1e-6)
