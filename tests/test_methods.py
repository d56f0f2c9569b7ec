"""Losses of other shapes, robust ones, rules, mixing, CTC: values, gradients, limits, masks, meshes, bad input."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import reference_methods as ref

import jax_ls
from jax_ls import (
    Dense,
    OneHot,
    adaptive,
    bi_tempered_loss,
    cross_entropy,
    kl_divergence,
    mixing,
    noise,
    online,
    priors,
    sigmoid_cross_entropy,
    smooth,
    smoothed_cross_entropy,
    smoothed_ctc_loss,
)

K, BATCH = 8, (2, 3)
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 4, BATCH)
PRIOR = RNG.dirichlet(np.ones(K)).astype(np.float32)
AVERAGE = (0.8 * RNG.dirichlet(np.ones(K))).astype(np.float32)
POLY = np.array([1.0, 0.5, -0.25], np.float32)


def of_classes(x, z, options):
    """What the loss of z sees of an array over all classes."""
    if (name := options.get("class_axis_name")) is None:
        return jnp.asarray(x[: z.shape[options.get("axis", -1)]])
    size = z.shape[-1]
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), jax.lax.axis_index(name) * size, size)


def with_prior(loss, z, y, a, spread="all", **options):
    u = of_classes(PRIOR, z, options)
    u = u if "class_axis_name" in options else u / u.sum()
    return loss(z, y, a, 0.2, prior=u, spread=spread, **options)


def smoothed(y, n, prior=False, spread="all"):
    epsilon = np.float32(0.2).astype(float)
    u = PRIOR[:n].astype(float) / PRIOR[:n].sum(dtype=float) if prior else None
    return reference.smooth(y, epsilon, n, prior=u, spread=spread)


# The parameter that is differentiated and differs by example comes third.
LOSSES = {
    "focal": (jax_ls.focal_loss, lambda z, y, g: ref.focal(z, reference.one_hot(y, len(z)), g), 2.0),
    "focal, γ < 1": (jax_ls.focal_loss, lambda z, y, g: ref.focal(z, reference.one_hot(y, len(z)), g), 0.5),
    "focal, smoothed": (
        lambda z, y, g, **kw: jax_ls.focal_loss(z, y, g, 0.2, **kw),
        lambda z, y, g: ref.focal(z, smoothed(y, len(z)), g),
        3.0,
    ),
    "focal, others by a prior": (
        functools.partial(with_prior, jax_ls.focal_loss, spread="others"),
        lambda z, y, g: ref.focal(z, smoothed(y, len(z), True, "others"), g),
        1.5,
    ),
    "poly-1": (jax_ls.poly_loss, lambda z, y, c: ref.poly(z, reference.one_hot(y, len(z)), [c]), 2.0),
    "poly-1, smoothed": (
        lambda z, y, c, **kw: jax_ls.poly_loss(z, y, c, 0.2, **kw),
        lambda z, y, c: ref.poly(z, smoothed(y, len(z)), [c]),
        -0.5,
    ),
    "poly-3, prior": (
        lambda z, y, c, **kw: with_prior(
            lambda z, y, c, *a, **k: jax_ls.poly_loss(z, y, c * POLY, *a, **k), z, y, c, **kw
        ),
        lambda z, y, c: ref.poly(z, smoothed(y, len(z), True), c * POLY.astype(float)),
        1.0,
    ),
    "logit norm": (jax_ls.logit_norm_loss, lambda z, y, t: ref.logit_norm(z, reference.one_hot(y, len(z)), t), 0.5),
    "logit norm, prior": (
        functools.partial(with_prior, jax_ls.logit_norm_loss),
        lambda z, y, t: ref.logit_norm(z, smoothed(y, len(z), True), t),
        0.3,
    ),
    "bi-tempered t1": (
        jax_ls.bi_tempered_loss,
        lambda z, y, t: ref.bi_tempered(z, reference.one_hot(y, len(z)), t, np.float32(1.2).astype(float)),
        0.7,
    ),
    "bi-tempered t2, others": (
        lambda z, y, t, **kw: jax_ls.bi_tempered_loss(z, y, 0.5, t, 0.2, spread="others", **kw),
        lambda z, y, t: ref.bi_tempered(z, smoothed(y, len(z), spread="others"), 0.5, t),
        1.75,
    ),
    "generalized": (noise.generalized_cross_entropy, ref.generalized_cross_entropy, 0.7),
    "truncated": (
        lambda z, y, r, **kw: noise.generalized_cross_entropy(z, y, r, truncation=0.25, **kw),
        lambda z, y, r: ref.generalized_cross_entropy(z, y, r, 0.25),
        0.5,
    ),
    "symmetric": (noise.symmetric_cross_entropy, ref.symmetric_cross_entropy, 0.3),
    "early learning": (
        lambda z, y, w, **kw: noise.early_learning(z, y, Dense(of_classes(AVERAGE, z, kw)), w, **kw),
        lambda z, y, w: ref.early_learning(z, y, AVERAGE[: len(z)].astype(float), w),
        3.0,
    ),
}
# One parameter for all examples: the coefficients of poly are no array over the batch.
SHARED = {"poly-1", "poly-1, smoothed", "poly-3, prior"}


def weighted(loss):
    def total(z, y, parameter):
        losses = loss(z, y, parameter)
        return jnp.sum(losses * cases.cotangent(losses.shape).astype(losses.dtype)), losses

    return jax.jit(jax.value_and_grad(total, argnums=(0, 2), has_aux=True))


JITTED = {name: weighted(loss) for name, (loss, _, _) in LOSSES.items()}


def by_definition(row, z, y, parameter):
    share, shared = cases.cotangent(z.shape[:-1]), np.ndim(parameter) == 0
    losses, slopes, turns = np.zeros(z.shape[:-1]), np.zeros(z.shape), np.zeros(np.shape(parameter))
    for i in np.ndindex(losses.shape):
        own = parameter if shared else parameter[i]
        losses[i] = np.real(row(z[i], y[i], own))
        slopes[i] = share[i] * reference.gradient(lambda x, i=i, own=own: row(x, y[i], own), z[i])
        turns[... if shared else i] += share[i] * reference.gradient(lambda a, i=i: row(z[i], y[i], a[()]), own)
    return losses, slopes, turns


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name, scale):
    _, row, parameter = LOSSES[name]
    z = np.asarray(scale * RNG.normal(size=(*BATCH, K)), np.float32)
    each = np.full(BATCH, parameter) * (1 if name in SHARED else np.linspace(0.9, 1.1, 6).reshape(BATCH))
    given = jnp.asarray(parameter if name in SHARED else each, jnp.float32)
    (_, losses), (slopes, turns) = JITTED[name](z, LABELS, given)
    expected = by_definition(row, z.astype(float), LABELS, np.asarray(given, float))
    for ours, theirs in zip((losses, slopes, turns), expected, strict=True):
        cases.assert_close(ours, theirs, 16 * np.abs(theirs).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("name", LOSSES)
def test_dtypes(name, dtype):
    loss, row, parameter = LOSSES[name]
    with cases.precision(dtype):
        z = jnp.asarray(RNG.normal(size=(*BATCH, K)), dtype)
        losses = jax.jit(loss)(z, LABELS, jnp.float32(parameter))
        assert losses.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        expected = by_definition(row, np.asarray(z, float), LABELS, np.float32(parameter).astype(float))[0]
        np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_and_second_derivatives(name):
    loss, _, parameter = LOSSES[name]
    z, y = jnp.asarray([[1.0, -0.5, 0.25]]), jnp.array([1])
    given = parameter * jnp.array([0.95, 1.0])
    batched = jax.vmap(lambda a: loss(z, y, a))(given)
    np.testing.assert_allclose(batched, [loss(z, y, a) for a in given], rtol=1e-5, atol=1e-6)
    total = lambda z: loss(z, y, parameter).sum()  # noqa: E731
    slope = jax.jit(jax.grad(total))
    steps = 1e-2 * jnp.eye(3)[:, None]
    numeric = jnp.stack([(slope(z + step) - slope(z - step)) / 2e-2 for step in steps])[:, 0]
    np.testing.assert_allclose(jax.hessian(total)(z)[0, :, 0], numeric, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_masks_and_axis(name):
    loss, _, parameter = LOSSES[name]
    z = jnp.asarray(RNG.normal(size=(4, K)), jnp.float32)
    y, where, exists = jnp.array([0, 1, 2, 1]), jnp.array([True, False, True, True]), jnp.arange(K) < 4
    spoilt, wrong = z.at[1].set(jnp.nan).at[:, 4:].set(jnp.nan), y.at[1].set(99)
    kept = np.flatnonzero(where)

    def masked(z):
        return loss(z, wrong, parameter, class_where=exists, where=where).sum()

    value, slopes = jax.value_and_grad(masked)(spoilt)
    expected, ours = jax.value_and_grad(lambda z: loss(z, y[kept], parameter).sum())(z[kept][:, :4])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(slopes[kept][:, :4], ours, rtol=1e-4, atol=2e-6)
    assert not slopes[1].any()
    assert not slopes[:, 4:].any()
    by_label = loss(z, wrong, parameter, ignore_index=99)
    np.testing.assert_allclose(by_label[kept], loss(z, y, parameter)[kept], rtol=1e-5)
    assert by_label[1] == 0
    assert jnp.isnan(loss(z, wrong, parameter)).tolist() == [False, True, False, False]
    np.testing.assert_allclose(loss(z.T, y, parameter, axis=0), loss(z, y, parameter), rtol=1e-5)
    with_term = loss(z, y, parameter, z_loss=0.5) - loss(z, y, parameter)
    np.testing.assert_allclose(with_term, 0.5 * jax.nn.logsumexp(z, axis=-1) ** 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_classes_split_over_eight_devices(name):
    loss, _, parameter = LOSSES[name]
    mesh = jax.make_mesh((8,), ("k",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, y = jax.sharding.PartitionSpec, jnp.array([0, 7, 3])
    z = jnp.asarray(RNG.normal(size=(3, K)), jnp.float32)
    split = jax.shard_map(
        lambda z: loss(z, y, parameter, class_axis_name="k"), mesh=mesh, in_specs=spec(None, "k"), out_specs=spec()
    )
    ours = jax.jit(jax.value_and_grad(lambda z: split(z).sum()))(z)
    whole = jax.value_and_grad(lambda z: loss(z, y, parameter).sum())(z)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=3e-6), ours, whole)


LIMITS = {
    "focal, γ = 0": (lambda z, y: jax_ls.focal_loss(z, y, 0.0), cross_entropy),
    "focal, γ = 0, smoothed": (lambda z, y: jax_ls.focal_loss(z, y, 0.0, 0.1), smoothed_cross_entropy),
    "poly of no coefficient": (lambda z, y: jax_ls.poly_loss(z, y, 0.0, 0.1), smoothed_cross_entropy),
    "generalized, r → 0": (lambda z, y: noise.generalized_cross_entropy(z, y, 1e-7), cross_entropy),
    "bi-tempered, t1 = t2 = 1": (lambda z, y: jax_ls.bi_tempered_loss(z, y, 1.0, 1.0), cross_entropy),
    "bi-tempered, near 1": (lambda z, y: jax_ls.bi_tempered_loss(z, y, 1 - 1e-6, 1 + 1e-6), cross_entropy),
    "bi-tempered, smoothed": (
        lambda z, y: jax_ls.bi_tempered_loss(z, y, 1.0, 1.0, 0.1),
        lambda z, y: kl_divergence(z, smooth(y, 0.1)),
    ),
    "logit norm, τ = 1": (
        lambda z, y: jax_ls.logit_norm_loss(z, y, 1.0, 0.1),
        lambda z, y: smoothed_cross_entropy(z / jnp.linalg.norm(z, axis=-1, keepdims=True), y),
    ),
    "symmetric, β = 0": (lambda z, y: noise.symmetric_cross_entropy(z, y, 1.0, 0.0), cross_entropy),
    "early learning, λ = 0": (lambda z, y: noise.early_learning(z, y, jnp.ones_like(z), 0.0), cross_entropy),
    "label-aware, ε_head = ε_tail": (
        lambda z, y: smoothed_cross_entropy(z, y, adaptive.label_aware(y, np.arange(5), 0.1, 0.1)),
        smoothed_cross_entropy,
    ),
    "logit adjustment of equal counts": (
        lambda z, y: cross_entropy(z + priors.logit_adjustment(np.full(5, 7))[None], y),
        cross_entropy,
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name):
    z = jnp.asarray(4 * RNG.normal(size=(4, 5)), jnp.float32).at[0].set(jnp.array([200.0, 0.0, 0.0, -200.0, 1.0]))
    y = jnp.array([0, 3, 4, 1])
    ours, expected = (jax.value_and_grad(lambda z, f=f: f(z, y).sum())(z) for f in LIMITS[name])
    np.testing.assert_allclose(ours[0], expected[0], rtol=2e-5)
    np.testing.assert_allclose(ours[1], expected[1], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("loss", [jax_ls.focal_loss, jax_ls.poly_loss, jax_ls.logit_norm_loss])
def test_class_weights_multiply_the_target(loss):
    z, y, w = jnp.asarray(RNG.normal(size=(3, K)), jnp.float32), jnp.array([0, 5, 2]), jnp.linspace(0.5, 2, K)
    np.testing.assert_allclose(loss(z, y, class_weights=w), w[y] * loss(z, y), rtol=1e-5)
    weighted = loss(z, Dense(smooth(y, 0.1).probs(K) * w[None]))
    np.testing.assert_allclose(loss(z, y, smoothing=0.1, class_weights=w), weighted, rtol=1e-5)
    mixture = 0.25 * OneHot(y) + 0.75 * OneHot(y[::-1])
    parts = 0.25 * loss(z, y) + 0.75 * loss(z, y[::-1])
    np.testing.assert_allclose(loss(z, mixture), parts, rtol=1e-5)
    np.testing.assert_allclose(loss(z, mixture.probs(K)), parts, rtol=1e-5)


def test_poly_1_is_that_of_optax():
    z, y = jnp.asarray(RNG.normal(size=(3, K)), jnp.float32), jnp.array([0, 5, 2])
    q = smooth(y, 0.1).probs(K)
    np.testing.assert_allclose(
        jax_ls.poly_loss(z, y, 1.5, 0.1), optax.losses.poly_loss_cross_entropy(z, q, epsilon=1.5), rtol=1e-5
    )


def test_sure_and_hopeless_labels_have_finite_slopes():
    z = jnp.array([[1e4, 0.0, 0.0], [-1e4, 0.0, 0.0], [0.0, 0.0, 0.0], [30.0, -jnp.inf, 0.0]])
    y = jnp.zeros(4, int)
    for name, (loss, _, parameter) in LOSSES.items():
        finite = z if name not in ("logit norm", "logit norm, prior") else z[:3]
        if "smoothed" in name or "prior" in name or "others" in name:
            finite = finite[:3]
        labels = y[: len(finite)]
        slopes = jax.grad(lambda z, loss=loss, a=parameter, y=labels: loss(z, y, a).sum())(finite)
        assert np.isfinite(slopes).all(), name


def test_a_bad_label_costs_no_more_than_the_temperature_says():
    losses = jax_ls.bi_tempered_loss(jnp.array([[-1e6, 0.0, 0.0]]), jnp.array([0]), 0.5, 2.0)
    assert losses[0] < 1 / (1 - 0.5)


@pytest.mark.parametrize("size", [1, 2])
def test_few_classes(size):
    z, y = np.asarray(RNG.normal(size=(3, size)), np.float32), np.arange(3) % size
    for name, (_, row, parameter) in LOSSES.items():
        if size == 1 and ("others" in name or "logit norm" in name):
            continue
        (_, losses), (slopes, _) = JITTED[name](z, y, jnp.float32(parameter))
        expected = by_definition(row, z.astype(float), y, np.float32(parameter).astype(float))
        np.testing.assert_allclose(losses, expected[0], rtol=1e-5, atol=4e-6, err_msg=name)
        np.testing.assert_allclose(slopes, expected[1], rtol=1e-4, atol=1e-5, err_msg=name)


Z, Y = jnp.zeros((3, 4)), jnp.array([0, 1, 2])
OUT_OF_RANGE = {
    "gamma": (lambda a: jax_ls.focal_loss(Z, Y, a), -1.0),
    "temperature": (lambda a: jax_ls.logit_norm_loss(Z, Y, a), 0.0),
    "t1": (lambda a: jax_ls.bi_tempered_loss(Z, Y, a, 1.2), 1.1),
    "t2": (lambda a: jax_ls.bi_tempered_loss(Z, Y, 0.8, a), 0.9),
    "exponent": (lambda a: noise.generalized_cross_entropy(Z, Y, a), 0.0),
    "truncation": (lambda a: noise.generalized_cross_entropy(Z, Y, 0.7, truncation=a), 1.5),
    "alpha": (lambda a: noise.symmetric_cross_entropy(Z, Y, a), -0.1),
    "beta": (lambda a: noise.symmetric_cross_entropy(Z, Y, beta=a), -0.1),
    "log_zero": (lambda a: noise.symmetric_cross_entropy(Z, Y, log_zero=a), 1.0),
    "gamma_positive": (lambda a: jax_ls.asymmetric_loss(Z[:, 0], jnp.array([0, 1, 0]), gamma_positive=a), -0.5),
    "gamma_negative": (lambda a: jax_ls.asymmetric_loss(Z[:, 0], jnp.array([0, 1, 0]), gamma_negative=a), -2.0),
    "margin": (lambda a: jax_ls.asymmetric_loss(Z[:, 0], jnp.array([0, 1, 0]), margin=a), 1.0),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_numbers_out_of_range_raise_by_name_or_spoil_their_own_example(name):
    loss, bad = OUT_OF_RANGE[name]
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        loss(bad)
    good = {"log_zero": -4.0, "t2": 1.5, "gamma_negative": 2.0}.get(name, 0.5)
    losses = jax.jit(loss)(jnp.array([good, bad, good]))
    assert jnp.isnan(losses).tolist() == [False, True, False]


BAD = {
    "counts: expected": lambda: adaptive.label_aware(Y, [3, -1, 2]),
    "head: expected at least tail": lambda: adaptive.label_aware(Y, [3, 1, 2], 0.1, 0.2),
    "shape: expected": lambda: adaptive.label_aware(Y, [3, 1, 2], shape="cubic"),
    "counts: expected finite numbers > 0": lambda: priors.logit_adjustment([3, 0]),
    "counts: expected finite numbers ≥ 0": lambda: priors.logit_adjustment([3, -1]),
    "coefficients: expected": lambda: jax_ls.poly_loss(Z, Y, jnp.ones((2, 2))),
    "smoothing: expected": lambda: jax_ls.focal_loss(Z, Y, 2.0, 1.5),
    "averages: expected": lambda: noise.early_learning(Z, Y, jnp.ones((3, 3))),
    "decay: expected": lambda: online.average_predictions(Z, Y, Z, decay=1.0),
    "alpha: expected": lambda: mixing.mixup(jax.random.key(0), Z, Y, 0.0),
    r"axes\[0\]: expected": lambda: mixing.cutmix(jax.random.key(0), Z[..., None], Y, axes=(3, 2)),
    "labels: expected integers": lambda: smoothed_ctc_loss(Z[None], jnp.zeros((1, 3)), Y, Y),
    "pos_weight: expected": lambda: sigmoid_cross_entropy(Z, Z, pos_weight=jnp.ones(3)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((AssertionError, TypeError, ValueError), match=message):
        BAD[message]()


@pytest.mark.parametrize("shape", ["sine", "linear", "quadratic", "cosine"])
def test_label_aware_smoothing(shape):
    counts = np.array([500, 120, 30, 5])
    table = ref.label_aware(counts.astype(float), 0.3, 0.1, shape)
    ours = adaptive.label_aware(jnp.array([[0, 1], [2, 3]]), counts, 0.3, 0.1, shape=shape)
    np.testing.assert_allclose(ours, table.reshape(2, 2), rtol=1e-5)
    assert jnp.isnan(adaptive.label_aware(jnp.array([4, -1]), counts, shape=shape)).all()
    heads = jax.vmap(lambda head: adaptive.label_aware(Y, counts, head, 0.1, shape=shape))(jnp.array([0.3, 0.0]))
    assert jnp.isnan(heads).tolist() == [[False] * 3, [True] * 3]


def test_focal_gamma_is_flsd_53():
    z = jnp.log(jnp.array([[0.15, 0.85], [0.25, 0.75], [0.9, 0.1]]))
    gamma = adaptive.focal_gamma(z, jnp.zeros(3, int))
    assert gamma.tolist() == [5.0, 3.0, 3.0]
    assert not jax.grad(lambda z: adaptive.focal_gamma(z, jnp.zeros(3, int)).sum())(z).any()


def test_logit_adjustment_is_the_log_of_the_frequencies():
    counts = np.array([2**34, 2**33, 2**10])
    expected = np.log(counts / counts.sum())
    np.testing.assert_allclose(priors.logit_adjustment(counts), expected, rtol=1e-6)
    np.testing.assert_allclose(
        priors.logit_adjustment([3, 0], pseudo_count=1.0, strength=2.0), 2 * np.log([0.8, 0.2]), rtol=1e-6
    )
    assert jnp.isnan(jax.jit(priors.logit_adjustment)(jnp.array([3.0, -1.0]))).any()


def test_adjusted_logits_are_smoothed_towards_the_frequencies():
    """The mass that leaves the label pulls z to 0 there, and with a uniform prior to −log π, the reverse ranking."""
    counts = np.array([400, 60, 4])
    adjust = priors.logit_adjustment(counts)
    prior = priors.unigram(counts, pseudo_count=0.0)

    def slope(z, prior):
        losses = lambda z: smoothed_cross_entropy((z + adjust)[None], jnp.array([0]), 1.0, prior=prior).sum()  # noqa: E731
        return jax.grad(losses)(z)

    np.testing.assert_allclose(slope(jnp.zeros(3), prior), 0, atol=1e-6)
    np.testing.assert_allclose(slope(-adjust, None), 0, atol=1e-6)
    assert slope(jnp.zeros(3), None)[0] > 0.5


def test_predictions_are_averaged_by_example():
    averages, where = jnp.zeros((4, 3), jnp.bfloat16), jnp.array([True, False, True])
    z = jnp.asarray(RNG.normal(size=(3, 3)), jnp.float32).at[1].set(jnp.nan)
    step = jax.jit(lambda t: online.average_predictions(t, jnp.array([3, 0, 99]), z, decay=0.5, where=where))
    twice = step(step(averages))
    assert twice.dtype == jnp.bfloat16
    np.testing.assert_allclose(twice[3].astype(jnp.float32), 0.75 * jax.nn.softmax(z[0]), rtol=2e-2)
    assert not twice[:3].any()
    exists = jnp.array([True, True, False])
    last = online.average_predictions(averages, jnp.array([1]), z[:1], decay=0.0, class_where=exists)
    np.testing.assert_allclose(last[1].astype(jnp.float32), [*jax.nn.softmax(z[0, :2]), 0], rtol=1e-2)


def test_predictions_are_averaged_where_classes_are_split():
    mesh = jax.make_mesh((8,), ("k",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, "k")
    averages, z = (jnp.asarray(RNG.uniform(size=(n, K)), jnp.float32) for n in (5, 2))
    exists = jnp.arange(K) < 6
    step = functools.partial(online.average_predictions, decay=0.5)
    split = jax.shard_map(
        lambda t, z, exists: step(t, jnp.array([4, 1]), z, class_where=exists, class_axis_name="k"),
        mesh=mesh,
        in_specs=(spec, spec, jax.sharding.PartitionSpec("k")),
        out_specs=spec,
    )
    whole = step(averages, jnp.array([4, 1]), z, class_where=exists)
    np.testing.assert_allclose(jax.jit(split)(averages, z, exists), whole, rtol=1e-6)
    expected = np.exp(reference.log_softmax(np.asarray(z[0, :6], float)))
    np.testing.assert_allclose(whole[4], 0.5 * averages[4] + 0.5 * np.array([*expected, 0, 0]), rtol=1e-5)


def test_asymmetric_loss():
    z = np.asarray([-6.0, -2.0, -1.0, 0.5, 3.0, 8.0], np.float32)
    y = np.array([0, 0, 1, 0, 1, 0])
    q = 0.9 * y + 0.05
    for up, down, margin in ((1.0, 4.0, 0.05), (0.0, 2.0, 0.0), (2.0, 1.0, 0.2)):
        loss = functools.partial(jax_ls.asymmetric_loss, gamma_positive=up, gamma_negative=down, margin=margin)
        row = functools.partial(ref.asymmetric, up=up, down=down, margin=margin)
        rows = [row(x, t) for x, t in zip(z.astype(float), q, strict=True)]
        slopes = [reference.gradient(lambda x, t=t, row=row: row(x[()], t), x) for x, t in zip(z, q, strict=True)]
        value = jax.value_and_grad(lambda z, loss=loss: loss(z, y, 0.1).sum())(z)
        np.testing.assert_allclose(loss(z, y, 0.1), rows, rtol=3e-5, atol=1e-6)
        np.testing.assert_allclose(value[1], slopes, rtol=1e-4, atol=1e-5)


def test_asymmetric_loss_without_asymmetry_is_binary_cross_entropy():
    z, y = jnp.array([-200.0, -2.0, 0.5, 200.0, jnp.nan]), jnp.array([1, 0, 1, 0, 0])
    where = ~jnp.isnan(z)
    plain = {"gamma_positive": 0.0, "gamma_negative": 0.0, "margin": 0.0}
    ours = jax.value_and_grad(lambda z: jax_ls.asymmetric_loss(z, y, 0.1, where=where, **plain).sum())(z)
    expected = jax.value_and_grad(lambda z: sigmoid_cross_entropy(z, y, 0.1, where=where).sum())(z)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), ours, expected)
    assert jax_ls.asymmetric_loss(z, y, where=where)[4] == 0
    pair, weights = jnp.stack([z[:4], z[:4]], axis=-1), jnp.array([2.0, 0.5])
    ours = jax_ls.asymmetric_loss(
        pair, jnp.stack([y[:4], -jnp.ones(4, int)], axis=-1), ignore_index=-1, class_weights=weights
    )
    np.testing.assert_allclose(ours[:, 0], 2 * jax_ls.asymmetric_loss(z[:4], y[:4]), rtol=1e-6)
    assert not ours[:, 1].any()


def test_pos_weight_multiplies_the_positive_term():
    z, y, w = jnp.array([-2.0, 0.5, jnp.nan]), jnp.array([1.0, 0.0, 1.0]), jnp.array([3.0, 3.0, jnp.nan])
    where = jnp.array([True, True, False])
    ours = jax.value_and_grad(lambda z: sigmoid_cross_entropy(z, y, 0.2, pos_weight=w, where=where).sum())(z)
    q = 0.8 * y + 0.1
    losses = lambda z: -3 * q[:2] * jax.nn.log_sigmoid(z) - (1 - q[:2]) * jax.nn.log_sigmoid(-z)  # noqa: E731
    expected = jax.value_and_grad(lambda z: losses(z).sum())(z[:2])
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1], [*expected[1], 0], rtol=1e-6)


def ctc_loss(frames, labels, epsilon, weights):
    divergences = sum(reference.cross_entropy(row, weights, relative=True) for row in frames)
    return (1 - epsilon) * ref.ctc(frames, labels) + epsilon * divergences


def test_ctc_is_the_sum_over_all_paths_and_a_divergence_of_each_real_frame():
    z = RNG.normal(size=(2, 4, 3)).astype(np.float32)
    labels, label_paddings = jnp.array([[1, 2], [2, 99]]), jnp.array([[0.0, 0.0], [0.0, 1.0]])
    paddings = jnp.array([[0.0] * 4, [0.0, 0.0, 0.0, 1.0]])
    u, epsilon = np.array([0.0, 0.25, 0.75], np.float32), jnp.array([0.1, 0.3])
    frames = [z[0].astype(float), z[1, :3].astype(float)]
    spoilt = jnp.asarray(z).at[1, 3].set(jnp.nan)
    for prior in (None, u):
        weights = np.full(3, 1 / 3) if prior is None else u.astype(float)
        expected = [
            ctc_loss(f, y, e, weights)
            for f, y, e in zip(frames, [[1, 2], [2]], np.asarray(epsilon, float), strict=True)
        ]

        def losses(z, prior=prior):
            return smoothed_ctc_loss(z, paddings, labels, label_paddings, epsilon, prior=prior)

        np.testing.assert_allclose(losses(spoilt), expected, rtol=1e-4)
        slopes = jax.grad(lambda z: losses(z).sum())(spoilt)
        assert not slopes[1, 3].any()
        for i, (f, y, e) in enumerate(zip(frames, [[1, 2], [2]], np.asarray(epsilon, float), strict=True)):
            exact = reference.gradient(lambda f, y=y, e=e, weights=weights: ctc_loss(f, y, e, weights), f)
            np.testing.assert_allclose(slopes[i, : len(f)], exact, rtol=1e-3, atol=1e-5)
    plain = smoothed_ctc_loss(z, paddings, labels, label_paddings, 0.0)
    np.testing.assert_allclose(plain, optax.ctc_loss(jnp.asarray(z), paddings, labels, label_paddings), rtol=1e-5)
    where = jnp.array([True, False])
    masked = jax.value_and_grad(
        lambda z: smoothed_ctc_loss(z, paddings, labels, label_paddings, epsilon, where=where).sum()
    )(spoilt.at[1].set(jnp.nan))
    np.testing.assert_allclose(masked[0], smoothed_ctc_loss(z, paddings, labels, label_paddings, epsilon)[0], rtol=1e-5)
    assert not masked[1][1].any()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_inputs_are_mixed_as_the_labels_are(kind):
    size, count = 12, 64
    y = jnp.arange(count)
    images = jnp.broadcast_to(jnp.eye(count)[:, None, None], (count, size, size, count))
    where = jnp.arange(count) % 8 != 3
    images = images.at[3].set(jnp.nan)
    mix = jax.jit(lambda key: getattr(mixing, kind)(key, images, y, 1.0, where=where))
    mixed, target = mix(jax.random.key(1))
    shares = mixed.mean(axis=(1, 2))
    np.testing.assert_allclose(jnp.delete(shares, 3, 0), jnp.delete(target.probs(count), 3, 0), atol=1e-5)
    alone = ~where
    assert target.weights[alone].tolist() == [[1.0, 0.0]] * int(alone.sum())
    assert set(target.indices[where][:, 1].tolist()) == set(y[where].tolist())
    lam = target.weights[where][:, 0]
    assert 0 < lam.min() < 0.3
    assert lam.max() > 0.7
    other, _ = mix(jax.random.key(2))
    assert not jnp.allclose(other[0], mixed[0])
    if kind == "cutmix":
        assert set(np.unique(jnp.delete(mixed, 3, 0)).tolist()) == {0.0, 1.0}


def test_cutmix_knows_other_layouts_and_integers():
    images = jnp.broadcast_to(jnp.arange(4, dtype=jnp.uint8)[:, None, None, None], (4, 3, 16, 8))
    mixed, target = mixing.cutmix(jax.random.key(0), images, jnp.arange(4), axes=(2, 3))
    assert mixed.dtype == jnp.uint8
    assert (mixed == mixed[:, :1]).all()
    means = target.probs(4) @ jnp.arange(4.0)
    np.testing.assert_allclose(mixed.astype(jnp.float32).mean(axis=(1, 2, 3)), means, atol=1e-5)


def test_classes_that_do_not_exist_leave_the_slope_in_epsilon_finite():
    """Bi-tempered: 1 − (t − 1) z is negative for a class of z = 0 where all others are below −1 / (t − 1)."""
    z, exists = jnp.array([-4.0, -6.0, -5.0]), jnp.array([False, True, True])

    def loss(epsilon, z=z, **options):
        return bi_tempered_loss(z, 1, 0.5, 1.9, epsilon, **options)

    expected = jax.grad(lambda e: bi_tempered_loss(z[1:], 0, 0.5, 1.9, e))(0.3)
    np.testing.assert_allclose(jax.grad(loss)(0.3, class_where=exists), expected, rtol=1e-5)
