"""Scalars over bins and back: the definition, its tails, its laws, what it costs, and what bad input gets."""

import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_values as ref
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_ls import Target, cross_entropy
from jax_ls.values import (
    Support,
    categorical_projection,
    expected_value,
    hl_gauss,
    signed_hyperbolic,
    signed_parabolic,
    symexp,
    symlog,
    two_hot,
)

LOW, HIGH, B = -3.0, 5.0, 17
ATOMS = ref.atoms(LOW, HIGH, B)
# Atoms, edges, between both, the ends, and far outside.
RETURNS = np.array([-3.0, -2.75, -2.8, 0.0, 0.1, 1.37, 4.99, 5.0, 5.3, -7.0, 1e6, -1e6, np.inf, -np.inf], np.float32)
INSIDE = np.array([-2.9, -1.03, 0.02, 0.26, 1.37, 3.999, 4.4], np.float32)

histogram = jax.jit(
    lambda t, low, high, ratio, padding=0: hl_gauss(t, Support(low, high, B), sigma_ratio=ratio, padding=padding).probs(
        B
    ),
    static_argnames="padding",
)

hot = jax.jit(lambda t, support: two_hot(t, support).probs(support.num_bins))
projected = jax.jit(lambda t, p, support: categorical_projection(t, p, support).probs(support.num_bins))


@pytest.mark.parametrize("ratio", [0.1, 0.75, 2.0])
@pytest.mark.parametrize("padding", [0, 3])
def test_the_histogram_is_its_definition_in_both_tails(ratio, padding):
    edges = ref.edges_between(ATOMS)
    expected = [ref.hl_gauss(float(t), ATOMS, edges, ratio, padding) for t in RETURNS]
    actual = np.asarray(histogram(RETURNS, LOW, HIGH, ratio, padding), float)
    np.testing.assert_allclose(actual.sum(axis=-1), 1, rtol=1e-6)
    # Relative, down to the least of floats: x² has 24 digits, so its exponential loses x² of them.
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-36)
    assert (actual >= 0).all()


def test_the_histogram_over_any_edges_and_any_dtype():
    edges = np.array([-2.0, -1.0, 0.5, 0.75, 3.0])
    z = (edges[1:] + edges[:-1]) / 2
    t = np.array([[-1.2, 0.6], [0.0, 2.5]])
    expected = [[ref.hl_gauss(x, z, edges, 0.5) for x in row] for row in t]
    with cases.precision("float64"):
        actual = hl_gauss(jnp.asarray(t), Support.from_edges(jnp.asarray(edges)), sigma_ratio=0.5).probs(4)
        assert actual.dtype == jnp.float64
        np.testing.assert_allclose(actual, expected, rtol=1e-12)
        assert hl_gauss(jnp.asarray(t), Support(-2, 3, 5)).probs(5).dtype == jnp.float64
    support = Support.from_edges(jnp.asarray(edges, jnp.float32))
    for dtype in ("float32", "bfloat16", "float16"):
        rounded = jnp.asarray(t, dtype)
        exact = [[ref.hl_gauss(float(x), z, edges, 0.5) for x in row] for row in np.asarray(rounded, float)]
        actual = hl_gauss(rounded, support, sigma_ratio=0.5).probs(4)
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, exact, rtol=2e-6, atol=1e-7)


def test_parameters_may_be_mapped_over():
    lows, ratios = jnp.array([-3.0, -2.0]), jnp.array([0.75, 1.5])
    mapped = jax.vmap(histogram, (None, 0, None, 0))(INSIDE, lows, HIGH, ratios)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], histogram(INSIDE, lows[i], HIGH, ratios[i]), rtol=1e-6, atol=1e-12)
    supports = jax.vmap(lambda low: Support(low, HIGH, B))(lows)
    np.testing.assert_allclose(jax.vmap(lambda s: hot(INSIDE, s))(supports)[1], hot(INSIDE, Support(-2, 5, B)))
    each = hl_gauss(INSIDE, Support(LOW, HIGH, B), sigma_ratio=jnp.linspace(0.5, 2, len(INSIDE))).probs(B)
    np.testing.assert_allclose(each[-1:], histogram(INSIDE[-1:], LOW, HIGH, 2.0), rtol=1e-5, atol=1e-12)


@jax.jit
def mean_inside(t, low, high, ratio):
    """Of a histogram with 8 bins of padding."""
    support = Support(low, high, B).pad(8)
    return expected_value(jnp.log(hl_gauss(t, support, sigma_ratio=ratio, padding=8).probs(B + 16)), support)


@settings(max_examples=30)
@given(
    st.floats(-1e6, 1e6, width=32),
    st.floats(-100, 100, width=32),
    st.floats(0.125, 1000, width=32),
    st.floats(0.75, 2, width=32),
)
def test_with_padding_the_mean_is_the_clipped_return(t, low, length, ratio):
    """σ ≤ 2 bins: 8 bins of padding hold 4σ."""
    width, rounding = length / (B - 1), 4e-7 * (abs(low) + length)
    mean = float(mean_inside(np.float32(t), np.float32(low), np.float32(low + length), np.float32(ratio)))
    assert abs(mean - np.clip(t, low, low + length)) < 1e-4 * width + rounding


def test_without_padding_the_cut_tail_draws_the_ends_in():
    support = Support.from_edges(jnp.linspace(-10.0, 10.0, 52))
    width = 20 / 51
    mean = expected_value(jnp.log(hl_gauss(jnp.array([9.99, 2.0]), support).probs(51)), support)
    assert 0.2 < (9.99 - float(mean[0])) / width < 1.1
    assert abs(2 - float(mean[1])) / width < 1e-4


def test_a_narrow_histogram_is_the_nearest_bin_of_two_hot():
    narrow = np.asarray(histogram(INSIDE, LOW, HIGH, 1e-3))
    nearest = np.asarray(hot(INSIDE, Support(LOW, HIGH, B))).argmax(axis=-1)
    np.testing.assert_allclose(narrow, np.eye(B)[nearest], atol=1e-6)


def test_two_hot_is_its_definition_and_exact_at_atoms():
    support = Support(LOW, HIGH, B)
    finite = RETURNS[:12]
    actual = hot(finite, support)
    np.testing.assert_allclose(actual, [ref.two_hot(float(t), ATOMS) for t in finite], atol=1e-5)
    assert (hot(support.atoms, support) == np.eye(B)).all()
    np.testing.assert_allclose(actual @ support.atoms, np.clip(finite, LOW, HIGH), rtol=1e-6, atol=1e-6)


# rlax 0.1.9, transform_to_2hot(t, -2, 2, 5): it adds 1e-5 to the width of a bin, which is 1 here.
RLAX_RETURNS = [-2.5, -1.75, -0.3, 0.4, 1.99, 3.0]
RLAX_TWO_HOT = [
    [1.0, 0.0, 0.0, 0.0, 0.0],
    [0.7499925, 0.2500075, 0.0, 0.0, 0.0],
    [0.0, 0.299997, 0.700003, 0.0, 0.0],
    [0.0, 0.0, 0.599994, 0.400006, 0.0],
    [0.0, 0.0, 0.0, 0.00999989, 0.9900001],
    [0.0, 0.0, 0.0, 0.0, 1.0],
]
# rlax 0.1.9, categorical_l2_project(z_p, probs, z_q) with z_p, probs and z_q as below.
RLAX_ATOMS = [-1.0, 0.0, 0.5, 2.0]
RLAX_Z, RLAX_PROBS = [-3.0, -0.4, 0.2, 1.1, 9.0], [0.1, 0.2, 0.3, 0.25, 0.15]
RLAX_PROJECTED = [0.18, 0.3, 0.27, 0.25]


def test_two_hot_agrees_with_rlax():
    actual = hot(jnp.array(RLAX_RETURNS), Support(-2, 2, 5))
    np.testing.assert_allclose(actual, RLAX_TWO_HOT, atol=1.1e-5)


def test_the_projection_agrees_with_rlax():
    support = Support.from_atoms(jnp.array(RLAX_ATOMS))
    actual = projected(jnp.array(RLAX_Z), jnp.array(RLAX_PROBS), support)
    np.testing.assert_allclose(actual, RLAX_PROJECTED, atol=1e-6)


def test_the_projection_is_its_definition_and_keeps_the_mean():
    rng = np.random.default_rng(0)
    t, p = rng.uniform(-4, 6, (3, 2, 5)), rng.dirichlet(np.ones(5), (3, 2))
    support = Support(LOW, HIGH, B)
    t32, p32 = t.astype(np.float32), p.astype(np.float32)
    actual = np.asarray(projected(t32, p32, support))
    expected = [[ref.categorical(t[i, j], p[i, j], ATOMS) for j in range(2)] for i in range(3)]
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    np.testing.assert_allclose(actual.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(actual @ ATOMS, (np.clip(t, LOW, HIGH) * p).sum(axis=-1), atol=1e-5)
    shared = projected(t32[0, 0], p32, support)
    np.testing.assert_allclose(shared[2, 1], ref.categorical(t[0, 0], p[2, 1], ATOMS), atol=1e-5)


METHODS = {
    "hl_gauss": hl_gauss,
    "two_hot": two_hot,
    "projection": lambda t, s: categorical_projection(t[..., None], jnp.ones((*t.shape, 1)), s),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_cross_entropy_takes_them(method):
    support = Support(LOW, HIGH, B)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(len(INSIDE), B)), jnp.float32)
    target = method(jnp.asarray(INSIDE), support)
    assert isinstance(target, Target)
    q = np.asarray(target.probs(B), float)
    value, slope = jax.value_and_grad(lambda z: cross_entropy(z, target).sum())(z)
    p = np.asarray(jax.nn.softmax(z), float)
    np.testing.assert_allclose(value, -(q * np.log(p)).sum(), rtol=1e-5)
    np.testing.assert_allclose(slope, p - q, atol=1e-5)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_nan_return_poisons_its_own_row_alone(method):
    t = jnp.array([0.3, jnp.nan, 1.2])
    support, z = Support(LOW, HIGH, B), jnp.ones((3, B))

    def loss(z, t):
        losses = cross_entropy(z, method(t, support))
        return losses.sum(), losses

    (_, losses), slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(z, t)
    assert np.isnan(losses).tolist() == [False, True, False]
    assert np.isnan(method(t, support).probs(B)).all(axis=-1).tolist() == [False, True, False]
    assert np.isfinite(slopes[0][np.array([0, 2])]).all()
    assert np.isfinite(slopes[1][np.array([0, 2])]).all()
    assert (cross_entropy(z, method(t, support), where=jnp.array([True, False, True]))[1]) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_expected_values(dtype):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, B)), dtype)
    exact = np.exp(np.asarray(logits, float))
    actual = expected_value(logits, Support(LOW, HIGH, B))
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, exact @ ATOMS / exact.sum(axis=-1), rtol=2e-6, atol=2e-6)
    # A common offset of all logits, and values far from 0, leave no trace.
    np.testing.assert_allclose(expected_value(logits.astype(jnp.float32) + 1000, Support(LOW, HIGH, B)), actual, 1e-3)
    far = expected_value(logits, Support(1e6 + LOW, 1e6 + HIGH, B))
    np.testing.assert_allclose(far, np.asarray(actual) + 1e6, atol=0.0625)


BAD = [
    ("sigma_ratio", lambda: hl_gauss(jnp.zeros(2), Support(0, 1, 5), sigma_ratio=0.0), "0.0"),
    ("sigma_ratio", lambda: hl_gauss(jnp.zeros(2), Support(0, 1, 5), sigma_ratio=jnp.ones(3)), r"float32 \(3,\)"),
    ("padding", lambda: hl_gauss(jnp.zeros(2), Support(0, 1, 4), padding=2), "2"),
    ("padding", lambda: hl_gauss(jnp.zeros(2), Support(0, 1, 4), padding=0.5), "0.5"),
    ("returns", lambda: two_hot("many", Support(0, 1, 5)), "'many'"),
    ("returns", lambda: categorical_projection(jnp.zeros(3), jnp.ones((2, 4)), Support(0, 1, 5)), r"float32 \(3,\)"),
    ("logits", lambda: expected_value(jnp.zeros((2, 4)), Support(0, 1, 5)), r"float32 \(2, 4\)"),
    ("logits", lambda: expected_value(None, Support(0, 1, 5)), "None"),
    ("probs", lambda: categorical_projection(jnp.zeros(3), None, Support(0, 1, 5)), "None"),
    *(("support", lambda f=f: f(jnp.zeros(2), (0, 1, 5)), "0, 1, 5") for f in (hl_gauss, two_hot, expected_value)),
    ("target", lambda: cross_entropy(jnp.zeros((2, 6)), two_hot(jnp.zeros(2), Support(0, 1, 5))), "5"),
    ("target", lambda: two_hot(jnp.zeros(2), Support(0, 1, 5)).probs(4), "5"),
    ("target", lambda: cross_entropy(jnp.zeros((2, 4)), METHODS["projection"](jnp.zeros(2), Support(0, 1, 5))), "5"),
]


@pytest.mark.parametrize(("name", "call", "came"), BAD, ids=range(len(BAD)))
def test_bad_input_is_told_by_name(name, call, came):
    with pytest.raises((AssertionError, TypeError, ValueError), match=rf"(?s){name}: expected.*{came}"):
        call()


def test_equal_logits_make_no_nan_on_the_way():
    with jax.debug_nans(True):
        cross_entropy(jnp.zeros((1, B)), hl_gauss(jnp.array([0.3]), Support(LOW, HIGH, B)))


def test_what_cannot_be_checked_is_nan():
    assert np.isnan(histogram(INSIDE, 2.0, 1.0, 0.75)).all()
    assert np.isnan(histogram(INSIDE, LOW, HIGH, -1.0)).all()


def test_the_loss_of_two_hot_allocates_nothing_of_the_size_of_the_bins():
    n, bins = 4096, 601
    shapes = jax.ShapeDtypeStruct((n, bins), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.float32)
    support = Support(-300, 300, bins)

    def temporaries(target):
        step = jax.value_and_grad(lambda z, t: cross_entropy(z, target(t, support)).mean())
        return jax.jit(step).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(two_hot) < 0.05 * 4 * n * bins
    # The measure sees what a target that is written out costs.
    assert temporaries(lambda t, s: two_hot(t, s).probs(bins)) > 0.9 * 4 * n * bins


def test_infinite_returns_stay_infinite():
    """With and without ε, and back."""
    ends = jnp.array([jnp.inf, -jnp.inf, jnp.nan])
    for epsilon in (0.0, 1e-3):
        for transform in (lambda x: signed_hyperbolic(x, epsilon), lambda x: signed_parabolic(x, epsilon)):  # noqa: B023
            np.testing.assert_array_equal(jax.jit(transform)(ends), ends)
            slopes = jax.vmap(jax.grad(lambda x: transform(x)))(ends[:2])  # noqa: B023
            assert np.isfinite(slopes).all()
    for transform in (symlog, symexp):
        np.testing.assert_array_equal(transform(ends), ends)


@pytest.mark.parametrize("ratio", [30.0, 60.0, 300.0, 1e4, 1e6])
def test_a_wide_gaussian_keeps_its_digits(ratio):
    """Between bins that are narrow beside σ a float32 distribution function has no digits left."""
    support = Support(LOW, HIGH, 51)
    t, edges = np.array([0.3, 4.9], np.float32), np.asarray(support.edges, float)
    x = (edges - t[:, None].astype(float)) / (ratio * (edges[-1] - edges[0]) / 51)
    cdf = np.vectorize(lambda x: math.erf(x / math.sqrt(2)))(x)
    expected = np.diff(cdf) / (cdf[:, -1:] - cdf[:, :1])
    found = jax.jit(lambda t, r: hl_gauss(t, support, sigma_ratio=r).probs(51))(t, jnp.float32(ratio))
    np.testing.assert_allclose(found, expected, rtol=3e-5)
    if ratio == 1e6:
        np.testing.assert_allclose(found, 1 / 51, rtol=1e-5)


def test_slopes_of_a_wide_gaussian():
    """Σ_i w_i dp_i/dt = −Cov(w, x) / σ² where a Gaussian is nearly flat."""
    support, weights = Support(-1, 1, 21), jnp.linspace(-1, 1, 21)
    slope = jax.grad(lambda t: jnp.dot(hl_gauss(t, support, sigma_ratio=1e3).probs(21), weights))(jnp.float32(0.1))
    sigma = 1e3 * 2 * 21 / 20 / 21
    np.testing.assert_allclose(slope, np.var(np.linspace(-1, 1, 21)) / sigma**2, rtol=1e-3)
