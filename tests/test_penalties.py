"""Penalties: values and gradients by definition, limits, offsets, ties, masks, memory, bad input."""

import functools

import cases
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import reference_noise
from hypothesis.extra import numpy as hnp

from jax_ls import chunked_loss, cross_entropy, noise, penalties, smoothed_cross_entropy
from jax_ls.logits import on_logits
from jax_ls.targets import Uniform

K, BATCH = 7, (2, 3)
RNG = np.random.default_rng(0)
PRIOR = RNG.dirichlet(np.ones(K)).astype(np.float32)


def prior_of(z):
    return PRIOR.astype(float) if len(z) == K else np.full(len(z), 1 / len(z))


# The parameter that is differentiated and ranges over examples comes second; 1 stands in where there is none.
PENALTIES = {
    "confidence": (penalties.confidence_penalty, reference_noise.confidence_penalty, 0.3),
    "hinge": (
        lambda z, t, **kw: penalties.confidence_penalty(z, 0.3, threshold=t, **kw),
        lambda z, t: reference_noise.confidence_penalty(z, np.float32(0.3).astype(float), t),
        1.25,
    ),
    "jensen low": (
        penalties.jensen,
        lambda z, a: reference_noise.jensen(z, a, np.full(len(z), 1 / len(z))),
        0.25,
    ),
    "jensen high": (
        lambda z, a, **kw: penalties.jensen(z, a, prior=PRIOR if z.shape[-1] == K and "axis" not in kw else None, **kw),
        lambda z, a: reference_noise.jensen(z, a, prior_of(z)),
        0.75,
    ),
    "max": (
        lambda z, b, **kw: b * penalties.max_suppression(z, **kw),
        lambda z, b: b * reference_noise.max_suppression(z),
        1.0,
    ),
    "margin": (penalties.margin, reference_noise.margin, 0.6),
    "conditional": (
        lambda z, b, **kw: penalties.conditional(z, 0.5, over=b, under=0.25, **kw),
        lambda z, b: reference_noise.conditional(z, 0.5, b, 0.25),
        1.5,
    ),
    "norm": (
        lambda z, b, **kw: b * penalties.squared_logits(z, **kw),
        lambda z, b: b * reference_noise.logit_norm(z),
        1.0,
    ),
    "z": (lambda z, b, **kw: b * penalties.z_loss(z, **kw), lambda z, b: b * reference_noise.z_loss(z), 1.0),
}
INVARIANT = [name for name in PENALTIES if name not in ("conditional", "norm", "z")]


def weighted(penalty):
    def total(z, parameter):
        each = penalty(z, parameter)
        return jnp.sum(each * cases.cotangent(each.shape).astype(each.dtype)), each

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


JITTED = {name: weighted(penalty) for name, (penalty, _, _) in PENALTIES.items()}


def by_definition(row, z, parameter):
    share = cases.cotangent(z.shape[:-1])
    each, slopes, turns = np.zeros(z.shape[:-1]), np.zeros(z.shape), np.zeros(np.shape(parameter))
    for i in np.ndindex(each.shape):
        own = parameter if np.ndim(parameter) == 0 else parameter[i]
        each[i] = np.real(row(z[i], own))
        slopes[i] = share[i] * reference.gradient(lambda x, own=own: row(x, own), z[i])
        turn = share[i] * reference.gradient(lambda a, i=i: row(z[i], a[()]), own)
        turns[... if np.ndim(parameter) == 0 else i] += turn
    return each, slopes, turns


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("name", PENALTIES)
def test_values_and_gradients(name, each, scale):
    _, row, parameter = PENALTIES[name]
    z = np.asarray(scale * RNG.normal(size=(*BATCH, K)), np.float32)
    given = jnp.asarray(parameter * (np.linspace(0.6, 1.3, 6).reshape(BATCH) if each else 1.0), jnp.float32)
    (_, ours), (slopes, turns) = JITTED[name](z, given)
    expected = by_definition(row, z.astype(float), np.asarray(given, float))
    cases.assert_close(ours, expected[0], 8 * np.abs(expected[0]).max())
    cases.assert_close(slopes, expected[1], 8 * max(1, np.abs(expected[1]).max(), scale))
    cases.assert_close(turns, expected[2], 8 * max(1, np.abs(expected[2]).max(), scale))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", PENALTIES)
def test_few_classes(name, size):
    _, row, parameter = PENALTIES[name]
    z = np.asarray(2 * RNG.normal(size=(3, size)), np.float32)
    (_, ours), (slopes, _) = JITTED[name](z, jnp.float32(parameter))
    expected = by_definition(row, z.astype(float), np.float32(parameter).astype(float))
    cases.assert_close(ours, expected[0], 8 * np.abs(expected[0]).max())
    cases.assert_close(slopes, expected[1], 8 * np.abs(expected[1]).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("name", PENALTIES)
def test_dtypes(name, dtype):
    penalty, row, parameter = PENALTIES[name]
    with cases.precision(dtype):
        z = jnp.asarray(RNG.normal(size=(*BATCH, K)), dtype)
        ours = jax.jit(penalty)(z, parameter)
        assert ours.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        expected = by_definition(row, np.asarray(z, float), parameter)[0]
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in PENALTIES if name != "conditional"])
def test_vmap_over_the_parameter_and_second_derivatives(name):
    penalty, _, parameter = PENALTIES[name]
    z, given = jnp.asarray([[1.0, -0.5, 0.25]]), parameter * jnp.array([0.5, 1.0, 1.2])
    batched = jax.vmap(lambda a: penalty(z, a))(given)
    np.testing.assert_allclose(batched, [penalty(z, a) for a in given], rtol=1e-5, atol=1e-6)
    total = lambda z: penalty(z, parameter).sum()  # noqa: E731
    slope = jax.jit(jax.grad(total))
    steps = 1e-2 * jnp.eye(3)[:, None]
    numeric = jnp.stack([(slope(z + step) - slope(z - step)) / 2e-2 for step in steps])[:, 0]
    np.testing.assert_allclose(jax.hessian(total)(z)[0, :, 0], numeric, rtol=5e-3, atol=2e-3)


@pytest.mark.parametrize("name", INVARIANT)
def test_a_common_offset_changes_nothing(name):
    parameter = PENALTIES[name][2]
    z = np.round(8 * RNG.normal(size=(6, K))).astype(np.float32)
    f = JITTED[name]
    for here, there in zip(*(jax.tree.leaves(f(x, parameter)) for x in (z, z + np.float32(2.0**20))), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-5)


@hypothesis.settings(max_examples=15)
@hypothesis.given(hnp.arrays(np.float32, (2, K), elements=st.floats(-200, 200, width=32)), st.booleans())
def test_the_two_limits_of_jensen(z, uniform):
    prior = None if uniform else PRIOR
    u = np.full(K, 1 / K, np.float32) if uniform else PRIOR
    f = jax.value_and_grad(lambda z, a: penalties.jensen(z, a, prior=prior).sum())
    negentropy = np.sum(u * np.log(u))
    smoothing = jax.value_and_grad(lambda z: (cross_entropy(z, np.stack([u, u])) + negentropy).sum())(z)
    negative_entropy = lambda z: -on_logits(lambda z: z.entropy(), z)  # noqa: E731
    confidence = jax.value_and_grad(lambda z: (negative_entropy(z) + penalty_of_prior(z, np.log(u))).sum())(z)
    for ours, expected in ((f(z, 1.0), smoothing), (f(z, 0.0), confidence)):
        np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(ours[1], expected[1], rtol=1e-4, atol=1e-4)
    for near, end in ((1e-4, 0.0), (1 - 1e-4, 1.0)):
        row = sum(reference_noise.jensen(x.astype(float), near, u.astype(float) / u.sum(dtype=float)) for x in z)
        np.testing.assert_allclose(f(z, near)[0], row, rtol=1e-3, atol=1e-3)
        assert np.isfinite(f(z, end)[1]).all()


@pytest.mark.parametrize("jit", [False, True])
def test_the_limits_of_jensen_where_a_class_has_no_mass(jit):
    """KL(p ‖ u) and KL(u ‖ p) are infinite there, and finite where that class has no mass in either."""
    f = jax.jit(penalties.jensen) if jit else penalties.jensen
    z, u, inf = jnp.array([1.0, 2.0, 0.5, 0.0]), jnp.array([0.5, 0.25, 0.25, 0.0]), jnp.inf
    without = z.at[3].set(-inf)
    assert f(z, 0.0, prior=u) == inf
    assert f(without, 1.0) == inf
    for alpha in (0.0, 0.25, 0.5, 1.0):
        expected = penalties.jensen(z[:3], alpha, prior=u[:3])
        np.testing.assert_allclose(f(without, alpha, prior=u), expected, rtol=1e-6)
    for alpha in (1e-6, 0.25, 0.75, 1.0):
        row = reference_noise.jensen(np.asarray(z, float), alpha, np.asarray(u, float))
        np.testing.assert_allclose(f(z, alpha, prior=u), row, rtol=1e-5)


def test_jensen_of_a_prior_far_below_every_probability():
    """log u is exact down to the least number that float32 has."""
    z, u = jnp.zeros(2), jnp.array([1.0, 1e-37])
    expected = np.log(0.5) - 0.5 * np.log(1e-37)
    np.testing.assert_allclose(penalties.jensen(z, 0.0, prior=u), expected, rtol=1e-6)


def penalty_of_prior(z, log_u):
    """−⟨p, log u⟩."""
    return -(jax.nn.softmax(z) * log_u[None]).sum(-1)


def test_of_logits_that_tie_for_the_largest_the_first_is_suppressed():
    slope = jax.grad(lambda z: penalties.max_suppression(z).sum())
    np.testing.assert_allclose(slope(jnp.array([[0.0, 1.0, 1.0, 0.0]])), [[-0.25, 0.75, -0.25, -0.25]])


def test_max_suppression_is_smoothing_with_the_largest_logit():
    z = jnp.asarray(RNG.normal(size=(5, K)), jnp.float32)
    smoothing_term = cross_entropy(z, Uniform()) - cross_entropy(z, z.argmax(-1))
    np.testing.assert_allclose(penalties.max_suppression(z), smoothing_term, rtol=1e-5)


@pytest.mark.parametrize("name", PENALTIES)
def test_masks_and_axis(name):
    penalty, _, parameter = PENALTIES[name]
    z = jnp.asarray(3 * RNG.normal(size=(4, 8)), jnp.float32)
    a, where = parameter * jnp.array([0.5, 1.0, 1.2, 0.8]), jnp.array([True, False, True, True])
    kept, exists = np.flatnonzero(where), jnp.arange(8) < 5
    spoilt = z.at[1].set(jnp.nan).at[:, 5:].set(jnp.nan)
    f = jax.value_and_grad(lambda z, a: penalty(z, a, where=where, class_where=exists).sum(), (0, 1))
    expected = jax.value_and_grad(lambda z, a: penalty(z, a).sum(), (0, 1))(z[kept][:, :5], a[kept])
    value, slopes = f(spoilt, a)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(slopes[0][kept][:, :5], expected[1][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slopes[1][kept], expected[1][1], rtol=1e-4, atol=1e-5)
    assert not slopes[0][1].any()
    assert not slopes[0][:, 5:].any()
    np.testing.assert_allclose(penalty(z.T, a, axis=0), penalty(z, a), rtol=1e-5, atol=1e-6)


def test_jensen_with_a_prior_and_classes_that_do_not_exist():
    z, exists = jnp.asarray(RNG.normal(size=(3, K)), jnp.float32), jnp.arange(K) < 4
    kept = PRIOR[:4] / PRIOR[:4].sum()
    for a in (0.0, 0.3, 0.7, 1.0):
        ours = penalties.jensen(z, a, prior=PRIOR, class_where=exists)
        np.testing.assert_allclose(ours, penalties.jensen(z[:, :4], a, prior=kept), rtol=1e-5, atol=1e-6)


def test_riding_on_chunks():
    hidden, kernel = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((7, 4), (4, K)))
    loss = lambda z, y: smoothed_cross_entropy(z, y, 0.1) + 0.2 * penalties.max_suppression(z)  # noqa: E731
    y, chunks = jnp.arange(7) % K, chunked_loss(loss, chunk_size=3)
    ours = jax.value_and_grad(lambda h, k: chunks(h, k, y), (0, 1))(hidden, kernel)
    whole = jax.value_and_grad(lambda h, k: loss(h @ k, y).mean(), (0, 1))(hidden, kernel)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), ours, whole)


N, WIDE = 256, 8000
FUSED = {
    **{name: functools.partial(lambda f, b, z: 0.1 * f(z, b), f, b) for name, (f, _, b) in PENALTIES.items()},
    "forward correction": lambda z: noise.forward_correction(z, jnp.arange(N), 0.2),
    "label relaxation": lambda z: noise.label_relaxation(z, jnp.arange(N), 0.2),
    "soft bootstrap": lambda z: noise.bootstrap(z, jnp.arange(N), 0.8),
    "hard bootstrap": lambda z: noise.bootstrap(z, jnp.arange(N), 0.8, kind="hard"),
}


@pytest.mark.memory
@pytest.mark.parametrize("name", FUSED)
def test_nothing_of_the_size_of_the_logits_is_kept_or_written(name):
    def loss(z):
        return (smoothed_cross_entropy(z, jnp.arange(N), 0.1) + FUSED[name](z)).mean()

    z = jax.ShapeDtypeStruct((N, WIDE), jnp.float32)
    memory = jax.jit(jax.value_and_grad(loss)).lower(z).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 0.05 * 4 * N * WIDE
    kept = jax.tree.leaves(jax.eval_shape(lambda z: jax.vjp(FUSED[name], z)[1], z))
    assert sum(x.size * x.dtype.itemsize for x in kept) <= 1.05 * 4 * N * WIDE


Z = jnp.zeros((3, 4))
BAD = {
    "alpha: expected numbers in": lambda: penalties.jensen(Z, 1.5),
    "beta: expected .*(3,)": lambda: penalties.confidence_penalty(Z, jnp.ones(4)),
    "threshold: expected": lambda: penalties.confidence_penalty(Z, 1.0, threshold=jnp.ones((3, 4))),
    "margin: expected real numbers|margin: expected a number": lambda: penalties.margin(Z, "wide"),
    "logits: expected real numbers": lambda: penalties.max_suppression(jnp.zeros((3, 4), int)),
    "where: expected booleans": lambda: penalties.squared_logits(Z, where=jnp.ones(4, bool)),
    "axis: expected one of": lambda: penalties.z_loss(Z, axis=2),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((AssertionError, ValueError, TypeError), match=message):
        BAD[message]()
