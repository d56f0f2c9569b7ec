"""Numbers at their limits: offsets, many classes in half precision, nearly equal logits, infinities, lost labels."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jax_ls import Dense, OneHot, Sparse, Uniform, cross_entropy, kl_divergence, smooth, smoothed_cross_entropy

NAN, INF = np.nan, np.inf


@functools.partial(jax.jit, static_argnames=("spread", "loss"))
def value_and_slope(logits, labels, epsilon, prior=None, class_where=None, spread="all", loss=smoothed_cross_entropy):
    def total(z, epsilon):
        losses = loss(z, labels, epsilon, prior=prior, class_where=class_where, spread=spread)
        return jnp.sum(losses), losses

    (_, losses), slopes = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(logits, epsilon)
    return losses, slopes


@pytest.mark.parametrize("offset", [1e6, -1e6])
@pytest.mark.parametrize("words", ["", "others", "prior", "prior others", "class_where", "dense"])
def test_a_common_offset_changes_nothing(words, offset):
    floats, fixed, static = cases.draw(cases.Case(words, (4,), 13))
    # Multiples of 1/8 below 2^24/8 are exact in float32: the offset logits hold the same differences.
    z = np.round(8 * floats["logits"]) / 8
    labels = floats.get("labels", fixed.get("labels")).astype(np.float32 if "dense" in words else np.int32)
    options = {"spread": static.get("spread", "all"), "class_where": fixed.get("class_where")}
    prior = floats["prior"].astype(np.float32) if "prior" in words else None
    shifted = (z + offset).astype(np.float32)
    assert np.array_equal(shifted.astype(np.float64) - offset, z)
    losses, slopes = value_and_slope(z.astype(np.float32), labels, 0.25, prior, **options)
    moved_losses, moved_slopes = value_and_slope(shifted, labels, 0.25, prior, **options)
    expected = reference.losses(z, labels, 0.25, prior=prior, **options)
    cases.assert_close(moved_losses, expected, size=4)
    np.testing.assert_allclose(moved_losses, losses, rtol=1e-6)
    np.testing.assert_allclose(moved_slopes[0], slopes[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(moved_slopes[1], slopes[1], rtol=1e-6)


@pytest.mark.parametrize("offset", [1e6, 0.0])
def test_offsets_leave_other_targets_alone(offset):
    z = np.array([[1.5, -0.25, 3.0, 0.125]])
    for target, q in [
        (Sparse(jnp.array([[0, 3]]), jnp.array([[0.75, 0.25]])), [0.75, 0, 0, 0.25]),
        (1.5 * Dense(jnp.array([0.1, 0.2, 0.3, 0.4])) + -0.5 * Uniform(), [0.025, 0.175, 0.325, 0.475]),
        (OneHot(jnp.array([2])).weighted(jnp.array([1.0, 1.0, 3.0, 1.0])), [0, 0, 3, 0]),
    ]:
        expected = reference.cross_entropy(z[0], np.array(q))
        actual = jax.jit(cross_entropy)(jnp.asarray(z + offset, jnp.float32), target)
        np.testing.assert_allclose(actual, [expected], rtol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("spread", ["all", "others"])
def test_every_row_is_right_to_1e_5_over_50257_classes(dtype, spread):
    """Sums over K in half precision lose all of it: optax, on bfloat16 logits, is wrong by more than a tenth."""
    rng = np.random.default_rng(7)
    z = jnp.asarray(rng.normal(size=(6, 50257)) * np.array([0.01, 1, 1, 3, 3, 10])[:, None], dtype)
    labels = rng.integers(0, 50257, 6)
    exact = np.asarray(z).astype(np.float64)
    losses, (slope, _) = value_and_slope(z, labels, 0.1, spread=spread)
    expected = reference.losses(exact, labels, 0.1, spread=spread)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    p = np.exp([reference.log_softmax(row) for row in exact])
    q = np.array([reference.smooth(y, 0.1, 50257, spread=spread) for y in labels])
    # float16 has no numbers between 0 and 6e-8.
    tiny = 6e-8 if dtype == "float16" else 1e-10
    np.testing.assert_allclose(slope.astype(jnp.float32), p - q, rtol=max(1e-5, float(jnp.finfo(dtype).eps)), atol=tiny)


@pytest.mark.parametrize("size", [2, 13, 127, 1009, 50257])
def test_nearly_equal_logits_and_a_prime_number_of_classes(size):
    """Where the loss is near log K, a class too many or too few shows."""
    z = (1e-3 * np.random.default_rng(8).normal(size=(3, size))).astype(np.float32)
    labels = np.array([0, size // 2, size - 1])
    exists = np.arange(size) < size - size // 3
    labels_kept = np.minimum(labels, exists.sum() - 1)
    for epsilon in (0.0, 0.3, 1.0):
        losses, _ = value_and_slope(z, labels, epsilon)
        np.testing.assert_allclose(losses, reference.losses(z.astype(np.float64), labels, epsilon), rtol=2e-6)
        losses, _ = value_and_slope(z, labels_kept, epsilon, class_where=exists)
        expected = reference.losses(z.astype(np.float64), labels_kept, epsilon, class_where=exists)
        np.testing.assert_allclose(losses, expected, rtol=2e-6)


@pytest.mark.parametrize("low", [-INF, np.finfo(np.float32).min, -1e30])
@pytest.mark.parametrize(
    "target",
    [
        lambda e: smooth(jnp.array([0]), e),
        lambda e: smooth(jnp.array([0]), 0.5 + e, prior=jnp.array([0.5, 0.25, 0, 0.25])),
        lambda e: smooth(jnp.array([0]), 0.5 + e, prior=jnp.array([0.5, 0.25, 0, 0.25]), spread="others"),
        lambda e: smooth(jnp.array([0]), e, spread="others"),
        lambda e: Sparse(jnp.array([[0, 2]]), jnp.array([[1.0, 0.0]])) + e * Uniform(),
        lambda e: OneHot(jnp.array([2])) * jnp.array([0.0]) + OneHot(jnp.array([1])) + 0.0 * e * Uniform(),
        lambda e: smooth(jnp.array([[0.5, 0.5, 0.0, 0.0]]), 0.0) + e * OneHot(jnp.array([1])),
    ],
)
def test_a_class_without_mass_may_have_no_chance(target, low):
    """A logit of −inf, or as good as that: with no mass on its class the loss and its gradients are finite."""
    z = jnp.array([[1.0, 2.0, low, 0.5]], jnp.float32)
    q = np.asarray(target(0.0).probs(4), np.float64)
    assert q[0, 2] == 0
    loss, slopes = jax.jit(jax.value_and_grad(lambda z, e: cross_entropy(z, target(e))[0], (0, 1)))(z, 0.0)
    np.testing.assert_allclose(loss, reference.cross_entropy(np.array([1, 2, -INF, 0.5]), q[0]), rtol=1e-6)
    p = np.exp(reference.log_softmax(np.array([1, 2, -INF, 0.5])))
    np.testing.assert_allclose(slopes[0], [p * q.sum() - q[0]], rtol=1e-5, atol=1e-7)
    assert np.isfinite(slopes[1]) or low != -INF


@pytest.mark.parametrize(
    "target",
    [
        lambda: smooth(jnp.array([0]), 0.1),
        lambda: smooth(jnp.array([2]), 0.0),
        lambda: smooth(jnp.array([0]), 0.1, spread="others"),
        lambda: smooth(jnp.array([0]), 0.1, prior=jnp.array([0.5, 0.0, 0.001, 0.499])),
        lambda: Dense(jnp.array([[0.5, 0.25, 0.25, 0.0]])),
        lambda: Dense(jnp.array([1.0, 0.0, 1e-18, 0.0])),
        lambda: Sparse(jnp.array([[0, 2]]), jnp.array([[0.5, 0.5]])),
        lambda: Uniform(jnp.array([True, False, True, True])),
    ],
)
def test_a_class_with_mass_and_no_chance_is_an_infinite_loss(target):
    z = jnp.array([[1.0, 2.0, -INF, 0.5]])
    np.testing.assert_array_equal(jax.jit(cross_entropy)(z, target()), [INF])
    np.testing.assert_array_equal(jax.jit(kl_divergence)(z, target()), [INF])


@pytest.mark.parametrize("spread", ["all", "others"])
@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
def test_a_label_of_no_class_is_nan_for_its_example_alone(epsilon, spread, with_prior):
    exists = jnp.arange(9) < 7
    prior = jnp.full(9, 1 / 9) if with_prior else None
    z, labels = jnp.zeros((6, 9)), jnp.array([0, -1, 9, -100, 7, 6])
    for where, bad in [(None, [0, 1, 1, 1, 0, 0]), (exists, [0, 1, 1, 1, 1, 0])]:
        losses, (slope, _) = value_and_slope(z, labels, jnp.full(6, epsilon), prior, where, spread)
        np.testing.assert_array_equal(np.isnan(losses), np.array(bad, bool))
        np.testing.assert_array_equal(np.isnan(slope).any(axis=-1), np.array(bad, bool))
        counted = slope[:, :7] if where is not None else slope
        np.testing.assert_array_equal(np.isnan(counted).all(axis=-1), np.array(bad, bool))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64"])
def test_labels_of_any_integer_dtype(dtype):
    with cases.precision("float64" if dtype == "int64" else "float32"):
        labels = np.array([0, 127, 100], dtype)
        z = np.random.default_rng(9).normal(size=(3, 1000)).astype(np.float32)
        losses, _ = value_and_slope(jnp.asarray(z), jnp.asarray(labels), jnp.float32(0.1))
        assert losses.dtype == jnp.float32
        cases.assert_close(losses, reference.losses(z.astype(np.float64), labels, np.float32(0.1)), size=4)
