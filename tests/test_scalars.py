"""Parameters that are one number: arrays are refused by name, and no size of them makes NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ls import (
    Dense,
    OneHot,
    adaptive,
    asymmetric_loss,
    cross_entropy,
    focal_loss,
    linear_cross_entropy,
    penalties,
    priors,
    schedules,
    sigmoid_cross_entropy,
    smooth,
    smooth_labels,
    smoothed_cross_entropy,
)

K = 5
LABELS = jnp.arange(K)
Z = jnp.eye(K)
SCALARS = {
    "pseudo_count": lambda x: priors.unigram(jnp.ones(K), pseudo_count=x),
    "temperature": lambda x: priors.unigram(jnp.arange(1.0, K + 1), temperature=x),
    "temperature of similarity": lambda x: priors.similarity(jnp.eye(K) + 0.1, temperature=x),
    "temperature of teacher": lambda x: priors.teacher(Z, temperature=x).probabilities,
    "beta": lambda x: priors.hierarchy(1 - jnp.eye(K), beta=x),
    "beta of sord": lambda x: priors.sord(K, beta=x),
    "sigma": lambda x: priors.gaussian(K, sigma=x),
    "sigma of spatial": lambda x: priors.spatial(LABELS[None], sigma=x).weights,
    "sigma of spatial, ndim=1": lambda x: priors.spatial(LABELS, sigma=x, ndim=1).weights,
    "sigma of spatial, where": lambda x: priors.spatial(LABELS[None], sigma=x, where=LABELS[None] > 1).weights,
    "margin": lambda x: priors.binomial(K, margin=x),
    "alpha": lambda x: priors.triangular(K, alpha=x),
    "smoothing of plain_then_negative": lambda x: schedules.plain_then_negative(-x, 3)(0),
    "smoothing of warmup": lambda x: schedules.warmup(x, 3)(0),
}
POSITIVE = [name for name in SCALARS if "sigma" in name or "temperature" in name]


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("shape", [(1,), (K,), (K, K)])
def test_an_array_is_refused_by_name(name, shape):
    message = rf"(?s){name.split()[0]}: expected a number, got float32 {str(shape).replace('(', '.').replace(')', '.')}"
    for call in (SCALARS[name], jax.jit(SCALARS[name])):
        with pytest.raises(AssertionError, match=message):
            call(jnp.full(shape, 0.25))


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("x", [2e-38, 1e-20, 1e20, 3e38])
def test_no_size_makes_nan(name, x):
    """A small σ or T is the limit of the nearest, a large one of them all alike."""
    for table in (SCALARS[name](x), jax.jit(SCALARS[name])(jnp.float32(x))):
        rows = np.atleast_2d(table)
        assert np.isfinite(rows).all()
        np.testing.assert_allclose(rows.sum(-1), 1, rtol=1e-6)
    slope = jax.grad(lambda x: jnp.sum(SCALARS[name](x)[..., 0]))(jnp.float32(x))
    assert x < 1 or np.isfinite(slope)


@pytest.mark.parametrize("name", POSITIVE)
def test_a_traced_number_out_of_range_makes_nan(name):
    rows = np.isnan(jax.jit(SCALARS[name])(-1.0)).any(-1)
    assert rows.all() or (name == "sigma of spatial, where" and rows.any())  # without a vote there is no σ


@pytest.mark.parametrize("size", [10, 50, 400])
@pytest.mark.parametrize("margin", [0.01, 0.1, 0.4])
def test_what_a_binomial_promises(size, margin):
    """The mean of row y is y + margin (K - 1 - 2y); with a margin of 1/(2K) it peaks at y."""
    y, table = np.arange(size), np.asarray(priors.binomial(size, margin=margin), float)
    np.testing.assert_allclose(table @ y, y + margin * (size - 1 - 2 * y), rtol=1e-3)
    assert (np.asarray(priors.binomial(size, margin=0.5 / size)).argmax(-1) == y).all()
    spread = np.sqrt(table @ y**2 - (table @ y) ** 2)
    assert abs(spread.argmax() - (size - 1) / 2) <= max(1, 0.02 * size)


LARGE = [2**32 + 1, -(2**32) + 1, 2**31 + 1]


Z2 = np.zeros((2, K), np.float32)
OF_LABELS = {
    "OneHot": lambda y: cross_entropy(Z2, OneHot(y)),
    "cross_entropy": lambda y: cross_entropy(Z2, y),
    "smoothed_cross_entropy": lambda y: smoothed_cross_entropy(Z2, y),
    "focal_loss": lambda y: focal_loss(Z2, y),
    "smooth": lambda y: cross_entropy(Z2, smooth(y, 0.1)),
    "smooth_labels": lambda y: smooth_labels(y, 0.1, num_classes=K).sum(-1),
    "mix": lambda y: cross_entropy(Z2, priors.mix(y, y, 0.5)),
    "linear_cross_entropy": lambda y: linear_cross_entropy(Z2, Z2.T @ Z2, y, reduction="none"),
}


@pytest.mark.parametrize("name", OF_LABELS)
@pytest.mark.parametrize("x64", [False, True])
def test_numpy_labels_beyond_32_bits_are_no_class(name, x64):
    """They would wrap to class 1."""
    with jax.enable_x64(x64):
        for label in LARGE:
            losses = OF_LABELS[name](np.array([label, 1]))
            assert np.isnan(losses[0]), label
            assert np.isfinite(losses[1])


def test_numpy_counts_beyond_32_bits_are_not_wrapped():
    few, many = np.array([1, 2, 2**33]), np.array([1.0, 2.0, 2.0**33], np.float32)
    labels = jnp.arange(3)
    for shape in ("sine", "linear"):
        ours, expected = (adaptive.label_aware(labels, counts, shape=shape) for counts in (few, many))
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("ignore_index", [2**31, -(2**31) - 1, 2**70])
@pytest.mark.parametrize(
    "loss",
    [
        lambda **options: cross_entropy(Z2, np.array([0, 1]), **options),
        lambda **options: sigmoid_cross_entropy(Z2, np.zeros((2, K), np.int32), **options),
        lambda **options: asymmetric_loss(Z2, np.zeros((2, K), np.int32), **options),
        lambda **options: linear_cross_entropy(Z2, Z2.T @ Z2, np.array([0, 1]), **options),
    ],
)
def test_an_ignore_index_that_no_label_can_be_is_named(loss, ignore_index):
    with pytest.raises(ValueError, match=rf"^ignore_index: expected an integer of 32 bits, got {ignore_index}"):
        loss(ignore_index=ignore_index)


def test_labels_of_few_bits_may_have_any_ignore_index():
    """A number that the labels cannot hold is the label of nobody."""
    y = np.zeros((2, K), np.uint8)
    for loss in (sigmoid_cross_entropy, asymmetric_loss):
        np.testing.assert_array_equal(loss(Z2, y, ignore_index=-1), loss(Z2, y))


@pytest.mark.parametrize("where", [None, np.array([True, False, True])])
def test_a_concentration_out_of_range_makes_nan_of_what_counts(where):
    draw = jax.jit(lambda a: adaptive.beta(jax.random.key(0), Z[0, :3], 0.1, concentration=a, where=where))
    counted = np.ones(3, bool) if where is None else where
    for a in (-1.0, 0.0, np.inf, np.nan):
        np.testing.assert_array_equal(np.isnan(draw(a)), counted)
        np.testing.assert_array_equal(draw(a)[~counted], 0)


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_unsigned_labels_do_not_become_negative(dtype):
    """2³² - 100 is not `ignore_index`."""
    large = np.array([np.iinfo(dtype).max - 99], dtype)
    assert OneHot(large).labels.min() > 0
    assert OneHot(jnp.asarray(np.array([2**32 - 100], np.uint32))).labels.min() > 0
    assert OneHot(np.array([3], dtype)).labels.tolist() == [3]


BAD = [
    ("temperature", lambda: priors.teacher(Z, temperature=1e-39), r"1e-39|9\.99999\d*e-40"),
    ("offsets", lambda: priors.neighbors(LABELS, offsets=3), "3"),
    ("offsets", lambda: priors.neighbors(LABELS, offsets=(), weights=()), r"\(\)"),
    ("offsets", lambda: priors.neighbors(LABELS, offsets=None), "None"),
    ("offsets", lambda: priors.neighbors(LABELS, offsets=(1.5,), weights=(1.0,)), r"1\.5"),
    ("parents", lambda: priors.tree_distances([]), r"\[\]"),
    ("parents", lambda: priors.tree_distances([[1], [1, 2]]), r"\[\[1\], \[1, 2\]\]"),
    ("parents", lambda: priors.tree_distances(None), "None"),
    ("parents", lambda: priors.tree_distances("abc"), "abc"),
    ("counts", lambda: priors.unigram(jnp.zeros(0)), r"float32 \(0,\)"),
    ("sigma", lambda: priors.gaussian(K, sigma=0.0), r"0\.0"),
    ("lam", lambda: priors.mix(LABELS, LABELS, "half"), "half"),
    ("lam", lambda: priors.mix(LABELS, LABELS, jnp.ones(3)), r"float32 \(3,\)"),
    ("lam", lambda: priors.mix(smooth(LABELS, 0.1), LABELS, Z), r"float32 \(5, 5\)"),
    ("target_b", lambda: priors.mix(LABELS, LABELS[:3], 0.5), r"\(3,\)"),
    ("target_a", lambda: priors.mix("cat", LABELS, 0.5), "cat"),
    ("smoothing", lambda: smooth(0.5 * OneHot(LABELS) + 0.5 * Dense(Z), jnp.ones(3)), r"float32 \(3,\)"),
    ("prior", lambda: penalties.jensen(Z, 0.5, prior=jnp.ones((3, K))), r"float32 \(3, 5\)"),
    ("prior", lambda: penalties.jensen(Z, 0.5, prior=jnp.ones(3)), r"float32 \(3,\)"),
    ("target", lambda: penalties.jensen(Z[:1], 0.5, prior=Dense(jnp.ones((3, K)))), r"float32 \(3, 5\)"),
    ("target", lambda: cross_entropy(Z, [2**40] * K), r"1099511627776"),
]


@pytest.mark.parametrize(("name", "call", "got"), BAD)
def test_bad_input_is_named(name, call, got):
    with pytest.raises((AssertionError, TypeError, ValueError), match=rf"(?s)^.*{name}: expected .*{got}"):
        call()
