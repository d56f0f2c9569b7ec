"""The bins of a scalar and the scales of returns: formulas, inverses, and what bad input gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_values as ref

from jax_ls.values import Support, signed_hyperbolic, signed_parabolic, symexp, symlog, two_hot

LOW, HIGH, B = -3.0, 5.0, 17
WIDTH = (HIGH - LOW) / (B - 1)

PAIRS = [(symlog, symexp), (signed_hyperbolic, signed_parabolic)]
SCALARS = np.array([0.0, 1e-6, -1e-3, 0.5, -2.0, 30.0, -1e4, 1e6], np.float32)


@pytest.mark.parametrize(("forward", "backward"), PAIRS)
def test_transforms_invert_each_other(forward, backward):
    np.testing.assert_allclose(backward(forward(SCALARS)), SCALARS, rtol=2e-5)
    slopes = jax.vmap(jax.grad(forward))(jnp.asarray(SCALARS)) * jax.vmap(jax.grad(backward))(forward(SCALARS))
    np.testing.assert_allclose(slopes, 1, rtol=2e-5)


def test_transforms_are_their_formulas():
    x = SCALARS.astype(float)
    np.testing.assert_allclose(symlog(SCALARS), np.sign(x) * np.log1p(abs(x)), rtol=1e-6)
    hyperbolic = np.sign(x) * (np.sqrt(abs(x) + 1) - 1) + 0.01 * x
    np.testing.assert_allclose(signed_hyperbolic(SCALARS, 0.01), hyperbolic, rtol=1e-6)
    small = SCALARS[:6]
    np.testing.assert_allclose(symexp(small), np.sign(x[:6]) * np.expm1(abs(x[:6])), rtol=4e-6)
    eps = np.float64(0.01)
    root = (np.sqrt(1 + 4 * eps * (eps + 1 + abs(x[3:]))) - 1) / (2 * eps)
    np.testing.assert_allclose(signed_parabolic(SCALARS[3:], eps), np.sign(x[3:]) * (root**2 - 1), rtol=1e-5)
    assert signed_parabolic(jnp.float32(3.0), 0.0) == 15


def test_padding_and_other_supports():
    padded = Support(LOW, HIGH, B).pad(2)
    same = Support(LOW - 2 * WIDTH, HIGH + 2 * WIDTH, B + 4)
    assert padded.num_bins == B + 4
    np.testing.assert_allclose(padded.atoms, same.atoms, rtol=1e-6)
    np.testing.assert_allclose(padded.edges, same.edges, rtol=1e-6)
    grid = symexp(jnp.linspace(-5.0, 5.0, 31))
    uneven = Support.from_atoms(grid)
    np.testing.assert_allclose(uneven.edges, ref.edges_between(np.asarray(grid, float)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(two_hot(jnp.float32(40.0), uneven).dot(grid), 40, rtol=1e-6)


def test_what_cannot_be_checked_is_nan():
    edges = jax.jit(lambda e: Support.from_edges(e).atoms)(jnp.array([0.0, 2.0, 1.0]))
    assert np.isnan(edges).all()
    # 1 and 1 + 1e-9 are one number in float32.
    close = jax.jit(lambda high: Support(1.0, high, 3))(1.0 + 1e-9)
    assert np.isnan(close.atoms).all()
    assert np.isnan(close.edges).all()
    assert np.isnan(jax.jit(lambda low: Support(low, low + 1, 51))(1e6).atoms).all()


BAD = [
    ("low", lambda: Support(1, 1, 5), "1 and 1"),
    ("low", lambda: Support(jnp.array([0.0, 1.0]), 2, 5), r"float32 \(2,\)"),
    ("high", lambda: Support(0, jnp.inf, 5), "inf"),
    ("num_bins", lambda: Support(0, 1, 1), "1"),
    ("num_bins", lambda: Support(0, 1, 5.0), "5.0"),
    ("low", lambda: Support(1.0, 1.0 + 1e-9, 3), "3 from 1.0 to 1.0"),
    ("low", lambda: Support(1e6, 1e6 + 1, 51), "51 from 1000000.0 to 1000001.0"),
    ("low", lambda: jax.jit(lambda: Support(1e6, 1e6 + 1, 51))(), "51 from 1000000.0 to 1000001.0"),
    ("high", lambda: Support(0.0, 1e300, 3), "1e.300 in float32"),
    ("edges", lambda: Support.from_edges(jnp.array([0.0, 1.0, 1.0])), "1. 1."),
    ("edges", lambda: Support.from_edges(np.array([1.0, 1 + 1e-9, 1 + 2e-9])), "from 1.0 to 1.0"),
    ("edges", lambda: Support.from_edges(jnp.array([0.0, 1.0])), "2"),
    ("atoms", lambda: Support.from_atoms(jnp.ones((2, 2))), r"float32 \(2, 2\)"),
    ("bins", lambda: Support(0, 1, 5).pad(-1), "-1"),
    ("epsilon", lambda: signed_hyperbolic(1.0, -1.0), "-1.0"),
]


@pytest.mark.parametrize(("name", "call", "came"), BAD, ids=range(len(BAD)))
def test_bad_input_is_told_by_name(name, call, came):
    with pytest.raises((AssertionError, TypeError, ValueError), match=rf"(?s){name}: expected.*{came}"):
        call()


@pytest.mark.parametrize("x64", [False, True])
def test_integers_and_real_numbers_make_the_same_support(x64):
    with jax.enable_x64(x64):
        real = Support(-10.0, 10.0, 51)
        assert real.atoms.dtype == jnp.result_type(float)
        for low, high in ((-10, 10), (np.int32(-10), np.int8(10)), (-10, 10.0), (jnp.asarray(-10), jnp.asarray(10))):
            other = Support(low, high, 51)
            assert other.atoms.dtype == other.edges.dtype == real.atoms.dtype
            np.testing.assert_array_equal(other.atoms, real.atoms)
        traced = jax.jit(lambda low: Support(low, 10, 51).atoms)(-10)
        assert traced.dtype == real.atoms.dtype
        assert (
            Support.from_atoms([0, 1, 3]).atoms.dtype == Support.from_edges([0, 1, 3]).atoms.dtype == real.atoms.dtype
        )
