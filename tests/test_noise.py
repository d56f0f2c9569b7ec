"""Losses against wrong labels: values and gradients by definition, laws, edges, masks, labels made wrong."""

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

from jax_ls import chunked_loss, cross_entropy, noise, smoothed_cross_entropy

K, BATCH = 7, (2, 3)
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, K, BATCH)
MATRIX = 0.6 * np.eye(K) + 0.4 * RNG.dirichlet(np.ones(K), K)
RATES = RNG.uniform(0.05, 0.6, BATCH)

LOSSES = {
    "forward": (noise.forward_correction, lambda z, y, a: reference_noise.forward_correction(z, y, _symmetric(a, z))),
    "backward": (
        noise.backward_correction,
        lambda z, y, a: reference_noise.backward_correction(z, y, _symmetric(a, z)),
    ),
    "relaxation": (noise.label_relaxation, reference_noise.label_relaxation),
    "soft": (noise.bootstrap, lambda z, y, b: reference_noise.bootstrap(z, y, b, "soft")),
    "hard": (
        lambda z, y, b, **kw: noise.bootstrap(z, y, b, kind="hard", **kw),
        lambda z, y, b: reference_noise.bootstrap(z, y, b, "hard"),
    ),
}


def forward_by_matrix(z, y, matrix, **options):
    return noise.forward_correction(z, y, matrix=matrix, **options)


def backward_by_matrix(z, y, matrix, **options):
    return noise.backward_correction(z, y, matrix=matrix, **options)


MATRIX_LOSSES = {
    "forward": (forward_by_matrix, reference_noise.forward_correction),
    "backward": (backward_by_matrix, reference_noise.backward_correction),
}


def _symmetric(alpha, z):
    return reference_noise.symmetric(alpha, len(z))


def weighted(loss):
    """Σ w · loss with the losses beside it, jitted: a gradient that mixes examples up is seen."""

    def total(z, y, parameter):
        losses = loss(z, y, parameter)
        return jnp.sum(losses * cases.cotangent(losses.shape).astype(losses.dtype)), losses

    return jax.jit(jax.value_and_grad(total, argnums=(0, 2), has_aux=True))


JITTED = {name: weighted(loss) for name, (loss, _) in LOSSES.items()}
JITTED_MATRIX = {name: weighted(loss) for name, (loss, _) in MATRIX_LOSSES.items()}


def by_definition(row, z, y, parameter, event=0):
    """Losses and gradients in logits and parameter, weighted as `weighted` does."""
    share = cases.cotangent(z.shape[:-1])
    losses, slopes = np.zeros(z.shape[:-1]), np.zeros(z.shape)
    shared = np.ndim(parameter) == event
    turns = np.zeros(np.shape(parameter))
    for i in np.ndindex(losses.shape):
        own = parameter if shared else parameter[i]
        losses[i] = np.real(row(z[i], y[i], own))
        slopes[i] = share[i] * reference.gradient(lambda x, i=i, own=own: row(x, y[i], own), z[i])
        turn = share[i] * reference.gradient(lambda a, i=i: row(z[i], y[i], a[()] if event == 0 else a), own)
        turns[... if shared else i] += turn
    return losses, slopes, turns


@pytest.mark.parametrize("parameter", [0.3, RATES], ids=["shared", "each"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name, scale, parameter):
    z = np.asarray(scale * RNG.normal(size=(*BATCH, K)), np.float32)
    given = jnp.asarray(parameter, jnp.float32)
    (_, losses), (slopes, turns) = JITTED[name](z, LABELS, given)
    expected = by_definition(LOSSES[name][1], z.astype(float), LABELS, np.asarray(given, float))
    size = 4 * np.abs(expected[0]).max()
    cases.assert_close(losses, expected[0], size)
    cases.assert_close(slopes, expected[1], 4)
    cases.assert_close(turns, expected[2], 8 * np.abs(expected[2]).max())


@pytest.mark.parametrize("name", MATRIX_LOSSES)
def test_values_and_gradients_of_a_matrix(name):
    z = np.asarray(2 * RNG.normal(size=(*BATCH, K)), np.float32)
    given = jnp.asarray(MATRIX, jnp.float32)
    (_, losses), (slopes, turns) = JITTED_MATRIX[name](z, LABELS, given)
    row = MATRIX_LOSSES[name][1]
    losses64, slopes64, turns64 = by_definition(row, z.astype(float), LABELS, np.asarray(given, float), event=2)
    cases.assert_close(losses, losses64, 32)
    cases.assert_close(slopes, slopes64, 32)
    cases.assert_close(turns, turns64, 64 * np.abs(turns64).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", LOSSES)
def test_dtypes(name, dtype):
    with cases.precision(dtype):
        z = jnp.asarray(RNG.normal(size=(*BATCH, K)), dtype)
        losses = jax.jit(LOSSES[name][0])(z, LABELS, 0.3)
        assert losses.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        expected = by_definition(LOSSES[name][1], np.asarray(z, float), LABELS, np.float32(0.3).astype(float))
        cases.assert_close(losses, expected[0], 4 if dtype != "float64" else 1e9)


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_over_the_parameter(name):
    z = jnp.asarray(RNG.normal(size=(*BATCH, K)), jnp.float32)
    rates = jnp.array([0.0, 0.2, 0.5])
    batched = jax.jit(jax.vmap(lambda a: LOSSES[name][0](z, LABELS, a)))(rates)
    np.testing.assert_allclose(batched, [LOSSES[name][0](z, LABELS, a) for a in rates], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_and_hessian(name):
    z = jnp.asarray([1.0, -0.5, 0.25])
    loss = lambda z: LOSSES[name][0](z, jnp.array(1), 0.3)  # noqa: E731
    np.testing.assert_allclose(jax.jacfwd(loss)(z), jax.grad(loss)(z), rtol=1e-5, atol=1e-6)
    slope = jax.jit(jax.grad(loss))
    steps = 1e-2 * jnp.eye(3)
    numeric = jnp.stack([(slope(z + step) - slope(z - step)) / 2e-2 for step in steps])
    np.testing.assert_allclose(jax.hessian(loss)(z), numeric, rtol=5e-3, atol=2e-3)


finite = st.floats(-20, 20, width=32)
logits = hnp.arrays(np.float32, (4, 5), elements=finite)
rates = st.floats(0, 0.875, width=32)
Y = jnp.array([0, 3, 4, 1])


@hypothesis.given(logits, rates)
def test_backward_correction_is_smoothing_with_a_negative_epsilon(z, alpha):
    expected = smoothed_cross_entropy(z, Y, -alpha / (1 - alpha))
    np.testing.assert_allclose(noise.backward_correction(z, Y, alpha), expected, rtol=1e-5, atol=1e-4)
    matrix = jnp.asarray(reference_noise.symmetric(alpha, 5), jnp.float32)
    np.testing.assert_allclose(noise.backward_correction(z, Y, matrix=matrix), expected, rtol=1e-4, atol=1e-2)


@hypothesis.given(logits, rates)
def test_a_rate_is_its_matrix(z, alpha):
    matrix = jnp.asarray(reference_noise.symmetric(alpha, 5), jnp.float32)
    by_matrix = noise.forward_correction(z, Y, matrix=matrix)
    np.testing.assert_allclose(noise.forward_correction(z, Y, alpha), by_matrix, rtol=2e-5, atol=1e-5)


@jax.jit
def at_no_noise(z):
    """Value and gradient of cross-entropy, and of all that should equal it; the derivative in the rate."""
    calls = [(noise.forward_correction, 0.0), (noise.backward_correction, 0.0), (noise.label_relaxation, 0.0)]
    calls.append((forward_by_matrix, jnp.eye(5)))
    equal = [jax.value_and_grad(lambda z, f=f, a=a: f(z, Y, a).sum())(z) for f, a in calls]
    turn = jax.grad(lambda a: noise.forward_correction(z, Y, a).sum())(0.0)
    return jax.value_and_grad(lambda z: cross_entropy(z, Y).sum())(z), equal, turn


@hypothesis.given(hnp.arrays(np.float32, (4, 5), elements=st.floats(-1000, 1000, width=32)))
def test_without_noise_it_is_cross_entropy(z):
    (plain, slope), equal, turn = at_no_noise(z)
    for value, ours in equal:
        np.testing.assert_allclose(value, plain, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(ours, slope, rtol=1e-5, atol=2e-6)
    assert jnp.isfinite(turn)


@hypothesis.given(logits, rates.filter(lambda a: a > 1e-3))
def test_relaxation_is_zero_where_the_label_has_its_share_and_bounded_by_cross_entropy(z, alpha):
    loss, slope = jax.value_and_grad(lambda z: noise.label_relaxation(z, Y, alpha).sum())(z)
    nll = cross_entropy(z, Y)
    relaxed = np.exp(-np.asarray(nll, float)) >= 1 - alpha + 1e-5
    assert not noise.label_relaxation(z, Y, alpha)[relaxed].any()
    assert not slope[relaxed].any()
    assert -1e-5 <= loss <= nll.sum() + 1e-5


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5, 0.9])
def test_relaxation_is_continuous_at_its_edge(alpha):
    edge = np.log((1 - alpha) / alpha)
    steps = np.array([-1e-2, -1e-3, -1e-5, 0.0, 1e-5, 1e-3])
    z = jnp.asarray(np.stack([edge + steps, np.zeros(6)], axis=-1), jnp.float32)
    losses = noise.label_relaxation(z, jnp.zeros(6, int), alpha)
    slopes = jax.grad(lambda z: noise.label_relaxation(z, jnp.zeros(6, int), alpha).sum())(z)
    np.testing.assert_allclose(losses, 0.5 * alpha * (1 - alpha) * np.minimum(steps, 0) ** 2, atol=4e-7)
    np.testing.assert_allclose(slopes[:, 0], alpha * (1 - alpha) * np.minimum(steps, 0), atol=2e-4)
    assert not losses[5].any()
    assert not slopes[5].any()


@pytest.mark.parametrize("gap", [30.0, 69.0, 200.0, 1e4])
def test_hopeless_labels(gap):
    """p_y down to 1e-30 and below what float32 holds."""
    z, y = jnp.array([0.0, gap]), jnp.array(0)
    both = jax.value_and_grad(lambda z, a: noise.forward_correction(z, y, a), (0, 1))(z, 0.2)
    np.testing.assert_allclose(both[0], -np.log(0.1), rtol=1e-6)
    assert jnp.abs(both[1][0]).max() < 1e-9
    np.testing.assert_allclose(both[1][1], -5.0, rtol=1e-5)
    loss, slope = jax.value_and_grad(lambda z: noise.label_relaxation(z, y, 0.1))(z)
    np.testing.assert_allclose(loss, 0.9 * (np.log(0.9) + gap) + 0.1 * np.log(0.1), rtol=1e-6)
    np.testing.assert_allclose(slope, [-0.9, 0.9], rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_common_offset_changes_nothing(name):
    z = np.round(8 * RNG.normal(size=(6, K))).astype(np.float32)
    f = jax.jit(jax.value_and_grad(lambda z: LOSSES[name][0](z, jnp.arange(6), 0.3).sum()))
    for here, there in zip(jax.tree.leaves(f(z)), jax.tree.leaves(f(z + np.float32(2.0**20))), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_masks_and_axis(name):
    """What does not count is not seen, NaN or not; classes that do not exist are as if they were not there."""
    loss = LOSSES[name][0]
    z = jnp.asarray(RNG.normal(size=(4, K)), jnp.float32)
    y, a = jnp.array([0, 1, 2, 1]), jnp.array([0.1, 0.2, 0.3, 0.4])
    where, exists = jnp.array([True, False, True, True]), jnp.arange(K) < 4
    spoilt, wrong = z.at[1].set(jnp.nan).at[:, 4:].set(jnp.nan), y.at[1].set(99)

    def total(z, a, **options):
        return loss(z, wrong, a, class_where=exists, **options).sum()

    value, slopes = jax.value_and_grad(total, (0, 1))(spoilt, a.at[1].set(0.5), where=where)
    kept = np.flatnonzero(where)
    expected, ours = jax.value_and_grad(lambda z, a: loss(z, y[kept], a).sum(), (0, 1))(z[kept][:, :4], a[kept])
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    np.testing.assert_allclose(slopes[0][kept][:, :4], ours[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(slopes[1][kept], ours[1], rtol=1e-4, atol=1e-6)
    assert not slopes[0][1].any()
    assert not slopes[0][:, 4:].any()
    assert slopes[1][1] == 0
    np.testing.assert_allclose(loss(z.T, y, a, axis=0), loss(z, y, a), rtol=1e-6)
    each = jnp.broadcast_to(exists, z.shape)
    by_each = loss(z.T, y, a, axis=0, class_where=each.T)
    np.testing.assert_allclose(by_each, loss(z, y, a, class_where=exists), rtol=1e-6)


def test_a_matrix_with_masks():
    z, y = jnp.asarray(RNG.normal(size=(3, K)), jnp.float32), jnp.array([0, 99, 2])
    where, matrix = jnp.array([True, False, True]), jnp.asarray(MATRIX, jnp.float32)
    for loss in (forward_by_matrix, backward_by_matrix):
        given = loss(z.at[1].set(jnp.nan), y, matrix, where=where)
        np.testing.assert_allclose(given[::2], loss(z[::2], y[::2], matrix), rtol=1e-6)
        assert given[1] == 0
        assert jnp.isnan(loss(z, y, matrix)).tolist() == [False, True, False]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_few_classes(name, size):
    z = np.asarray(RNG.normal(size=(3, size)), np.float32)
    y = np.arange(3) % size
    (_, losses), (slopes, _) = JITTED[name](z, y, jnp.float32(0.3))
    expected = by_definition(LOSSES[name][1], z.astype(float), y, np.float32(0.3).astype(float))
    cases.assert_close(losses, expected[0])
    cases.assert_close(slopes, expected[1])


def test_a_traced_rate_out_of_range_spoils_its_own_example():
    rates = jnp.array([0.1, 1.5, -0.1, 0.2])
    for loss in (noise.forward_correction, noise.backward_correction, noise.label_relaxation):
        losses = jax.jit(loss)(jnp.zeros((4, 3)), jnp.zeros(4, int), rates)
        assert jnp.isnan(losses).tolist() == [False, True, True, False]
    assert jnp.isnan(jax.jit(lambda e: noise.optimal_smoothing(e, 2))(0.5))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["forward", "relaxation"])
def test_riding_on_chunks(name, reduction):
    hidden, kernel = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((7, 4), (4, K)))
    y, a = jnp.arange(7) % K, jnp.linspace(0.1, 0.5, 7)
    loss = LOSSES[name][0]
    chunks = chunked_loss(loss, reduction=reduction, chunk_size=3)
    ours = jax.jit(jax.value_and_grad(lambda h, k, a: chunks(h, k, y, a).mean(), (0, 1, 2)))(hidden, kernel, a)
    whole = jax.value_and_grad(lambda h, k, a: loss(h @ k, y, a).mean(), (0, 1, 2))(hidden, kernel, a)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), ours, whole)


def test_classes_split_over_devices():
    mesh = jax.make_mesh((2,), ("k",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, z = jax.sharding.PartitionSpec, jnp.asarray(RNG.normal(size=(3, 6)), jnp.float32)
    y, matrix = jnp.array([0, 5, 3]), jnp.asarray(0.7 * np.eye(6) + 0.05, jnp.float32)
    calls = [(loss, 0.3) for loss, _ in LOSSES.values()]
    calls += [(forward_by_matrix, matrix), (backward_by_matrix, matrix)]
    for loss, parameter in calls:
        split = jax.shard_map(
            lambda z, loss=loss, parameter=parameter: loss(z, y, parameter, class_axis_name="k"),
            mesh=mesh,
            in_specs=spec(None, "k"),
            out_specs=spec(),
        )
        ours = jax.jit(jax.value_and_grad(lambda z, split=split: split(z).sum()))(z)
        whole = jax.value_and_grad(lambda z, loss=loss, parameter=parameter: loss(z, y, parameter).sum())(z)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6), ours, whole)
