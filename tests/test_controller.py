"""Two rules with a life of their own: beta smoothing, which draws, and the controller, which remembers."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_adaptive
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ls import adaptive, smoothed_cross_entropy
from jax_ls.adaptive import CalibrationController, CalibrationState
from jax_ls.logits import is_correct

KEY = jax.random.key(0)
AVERAGED = np.array([[0.2, 0.9, 0.5], [0.7, 0.1, 0.6]], np.float32)
COUNTED = np.array([[True, True, False], [True, True, True]])
beta = jax.jit(adaptive.beta)


def draws_of(key, size, a):
    """The inverse of P(b <= x) = x^a at uniform numbers."""
    uniform = jax.random.uniform(key, (size,), minval=jnp.finfo(jnp.float32).tiny)
    return np.asarray(uniform, np.float64) ** (1 / a)


@pytest.mark.parametrize("where", [np.ones((2, 3), bool), COUNTED])
def test_the_least_believed_get_the_smallest_draws(where):
    draws = draws_of(KEY, 6, 3.0)
    expected = reference_adaptive.beta(draws, AVERAGED.ravel(), 0.6, where.ravel()).reshape(2, 3)
    actual = beta(KEY, np.where(where, AVERAGED, np.nan), 0.6, where=where)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)
    # In a target: b on the label, the published one for ε = 1.
    target = jnp.zeros((6, 4)), jnp.zeros(6, jnp.int32)
    losses = smoothed_cross_entropy(*target, jnp.asarray(actual).reshape(-1), spread="others")
    np.testing.assert_allclose(losses, np.log(4), rtol=1e-6)


def test_only_the_order_of_beliefs_matters():
    np.testing.assert_array_equal(beta(KEY, AVERAGED, 1.0), beta(KEY, np.log(AVERAGED), 1.0))


@pytest.mark.parametrize("a", [0.5, 3.0])
def test_draws_follow_the_beta_distribution(a):
    b = np.sort(1 - np.asarray(beta(KEY, np.arange(4000.0, dtype=np.float32), 1.0, concentration=a)))
    distance = np.abs(b**a - (np.arange(4000) + 0.5) / 4000).max()
    assert distance < 1.63 / np.sqrt(4000)  # Kolmogorov and Smirnov, 1 %
    assert not np.array_equal(b, np.sort(1 - np.asarray(beta(jax.random.key(1), np.ones(4000, np.float32), 1.0))))


def test_beta_under_vmap_and_grad():
    concentrations = jnp.array([0.5, 1.0, 3.0])
    swept = jax.vmap(lambda a: beta(KEY, AVERAGED, 0.5, concentration=a))(concentrations)
    for row, a in zip(swept, concentrations, strict=True):
        np.testing.assert_allclose(row, beta(KEY, AVERAGED, 0.5, concentration=a), rtol=1e-6)
    slope = jax.grad(lambda e: jnp.sum(beta(KEY, AVERAGED, e)))(0.3)
    np.testing.assert_allclose(slope, jnp.sum(beta(KEY, AVERAGED, 1.0)), rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda p: jnp.sum(beta(KEY, p, 0.5)))(AVERAGED), np.zeros((2, 3)))


def test_beta_on_an_explicit_mesh():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    placed = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (AVERAGED, COUNTED)]
    with jax.set_mesh(mesh):
        found = beta(KEY, placed[0], 0.5, where=placed[1])
    np.testing.assert_array_equal(found, beta(KEY, AVERAGED, 0.5, where=COUNTED))


def test_a_belief_that_is_nan_spoils_its_own_example():
    lost = AVERAGED.copy()
    lost[0, 1] = np.nan
    np.testing.assert_array_equal(np.isnan(beta(KEY, lost, 0.5)), np.isnan(lost))


@pytest.mark.parametrize(
    ("name", "bad", "got"),
    [
        ("averaged", {"averaged": "much"}, "'much'"),
        ("smoothing", {"smoothing": np.zeros(3, np.float32)}, r"float32 \(3,\)"),
        ("where", {"where": np.ones(3, bool)}, r"bool \(3,\)"),
        ("concentration", {"concentration": 0.0}, "0.0"),
        ("concentration", {"concentration": np.ones(3, np.float32)}, r"float32 \(3,\)"),
    ],
)
def test_bad_input_of_beta(name, bad, got):
    with pytest.raises((AssertionError, TypeError, ValueError), match=rf"(?s){name}: expected .*{got}"):
        adaptive.beta(**({"key": KEY, "averaged": AVERAGED, "smoothing": 0.5} | bad))


# The controller: batches of 8 examples, of which some do not count, and in one none does.
K, STEPS = 5, 12
RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.normal(size=(STEPS, 8, K))).astype(np.float32)
LABELS = np.where(RNG.random((STEPS, 8)) < 0.4, LOGITS.argmax(-1), RNG.integers(0, K, (STEPS, 8))).astype(np.int32)
WHERE = (RNG.random((STEPS, 8)) < 0.7) & (np.arange(STEPS) != 4)[:, None]
OPTIONS = {"initial": 0.1, "low": 0.02, "high": 0.25, "rate": 0.2, "decay": 0.7}
CONTROLLER = CalibrationController(**OPTIONS)
update = jax.jit(CONTROLLER.update)


def batches(logits=LOGITS):
    return zip(logits.astype(float), LABELS, WHERE, strict=True)


def run(controller, logits, labels=LABELS, where=WHERE, **options):
    """ε and the gap after each step, as a scan."""

    def step(state, batch):
        z, y, counts = batch
        state = controller.update(state, z, y, where=counts, **options)
        return state, (state.smoothing, state.gap)

    return jnp.stack(jax.lax.scan(step, controller.init(), (logits, labels, where))[1], axis=-1)


def test_it_follows_the_gap():
    expected = np.array(reference_adaptive.controller(batches(), **OPTIONS))
    np.testing.assert_allclose(jax.jit(functools.partial(run, CONTROLLER))(LOGITS), expected, rtol=1e-5, atol=1e-6)
    assert len(np.unique(expected[:, 0])) > 3, "a test of more than the ends of the range"


def test_vmap_over_its_parameters():
    """A controller is a pytree of its numbers."""
    rates = jnp.array([0.01, 0.2])
    swept = jax.vmap(lambda rate: run(CalibrationController(**OPTIONS | {"rate": rate}), LOGITS))(rates)
    for row, rate in zip(swept, rates, strict=True):
        expected = reference_adaptive.controller(batches(), **OPTIONS | {"rate": float(rate)})
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)
    assert jax.tree.leaves(CONTROLLER) == list(OPTIONS.values())


@pytest.mark.parametrize(("scale", "end"), [(9.0, 0.25), (0.01, 0.02)])
def test_it_ends_where_over_and_underconfidence_belong(scale, end):
    right = np.where(np.arange(8) < 4, LOGITS.argmax(-1), LOGITS.argmin(-1)).astype(np.int32)
    controller = CalibrationController(**OPTIONS | {"rate": 0.5})
    np.testing.assert_allclose(run(controller, scale * LOGITS, right, np.ones_like(WHERE))[-1, 0], end)


def test_what_does_not_count_leaves_no_trace():
    z, y = LOGITS[0].copy(), LABELS[0].copy()
    kept = np.arange(8) < 5
    expected = update(CONTROLLER.init(), z[:5], y[:5])
    z[6:], y[5:] = np.nan, [-100, 0, K]
    for found in (update(CONTROLLER.init(), z, y), update(CONTROLLER.init(), z, y, where=kept)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    state = CalibrationState(jnp.array(0.125), jnp.array(0.5))
    assert update(state, z, np.full(8, -1, np.int32)) == state


def test_classes_that_do_not_exist_are_never_predicted():
    exists = np.arange(K) < 3
    padded = np.where(exists, LOGITS[0], 1e4).astype(np.float32)
    y = LABELS[0] % 3
    found = jax.jit(functools.partial(CONTROLLER.update, axis=0))(
        CONTROLLER.init(), padded.T, y, class_where=np.broadcast_to(exists[:, None], (K, 8))
    )
    expected = update(CONTROLLER.init(), LOGITS[0, :, :3], y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_dtypes(dtype):
    with cases.precision(dtype):
        z = jnp.asarray(LOGITS, dtype)
        found = jax.jit(functools.partial(run, CONTROLLER))(z)
    expected = reference_adaptive.controller(batches(np.asarray(z)), **OPTIONS)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_predictions_are_constants():
    slope = jax.grad(lambda z: CONTROLLER.update(CONTROLLER.init(), z, LABELS[0]).smoothing)(LOGITS[0])
    np.testing.assert_array_equal(slope, np.zeros((8, K)))


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_devices_that_split_the_batch_agree(mode):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(mode,))

    def step(state, z, y, w, batch_axis_name=None):
        return CONTROLLER.update(state, z, y, where=w, batch_axis_name=batch_axis_name)

    specs = P(), P("data"), P("data"), P("data")
    state = CalibrationState(jnp.array(0.1), jnp.array(0.05))
    batch = LOGITS[1], LABELS[1], WHERE[1]
    expected = update(state, *batch[:2], where=batch[2])
    placed = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in batch]
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(functools.partial(step, batch_axis_name="data"), in_specs=specs, out_specs=P())
        for f in (step, mapped):
            given = jax.device_put(jax.tree.map(jnp.copy, state), NamedSharding(mesh, P()))
            found = jax.jit(f, donate_argnums=0)(given, *placed)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.parametrize(
    ("name", "bad", "got"),
    [
        ("high", {"low": 0.3, "high": 0.2}, r"0\.2"),
        ("initial", {"initial": 0.5}, r"0\.5"),
        ("initial", {"initial": -0.1}, r"-0\.1"),
        ("initial", {"initial": float("nan")}, "nan"),
        ("rate", {"rate": -1.0}, r"-1\.0"),
        ("rate", {"rate": jnp.ones(2)}, r"float32 \(2,\)"),
        ("decay", {"decay": 1.0}, r"1\.0"),
        ("decay", {"decay": "slow"}, "'slow'"),
    ],
)
def test_bad_controllers(name, bad, got):
    with pytest.raises((AssertionError, TypeError, ValueError), match=rf"(?s){name}: expected .*{got}"):
        CalibrationController(**bad)


def test_bad_input_of_update():
    with pytest.raises(AssertionError, match=r"labels: expected .*int32 \(3,\)"):
        CONTROLLER.update(CONTROLLER.init(), LOGITS[0], np.zeros(3, np.int32))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("initial", [0.1, np.float32(0.1), np.float64(0.1), np.float16(0.1)])
def test_a_scan_keeps_the_dtype_of_the_state(initial, x64):
    with jax.enable_x64(x64):
        controller = adaptive.CalibrationController(initial=initial)
        state, logits, labels = controller.init(), jnp.zeros((3, 2, 4)), jnp.zeros((3, 2), int)
        last, _ = jax.lax.scan(lambda s, batch: (controller.update(s, *batch), None), state, (logits, labels))
        assert jax.tree.map(lambda x: x.dtype, last) == jax.tree.map(lambda x: x.dtype, state)


@pytest.mark.parametrize(
    ("row", "first"),
    [
        ([1.0, 3.0, 3.0, 2.0], 1),
        ([0.0, 0.0, 0.0, 0.0], 0),
        ([-np.inf, -5.0, -np.inf, -np.inf], 1),
        ([1e6, 1e6 + 0.0625, -1e6, 1e6], 1),
        ([1e-20, 0.0, 1.0001e-20, -1e-20], 2),
        ([np.nan, 1.0, 0.0, 0.0], None),
        ([np.inf, 1.0, 0.0, 0.0], None),
        ([-np.inf] * 4, None),
    ],
)
def test_the_first_of_the_likeliest_classes_is_predicted(row, first):
    rows = np.tile(np.array(row, np.float32), (4, 1))
    correct = jax.jit(is_correct)(rows, jnp.arange(4))
    np.testing.assert_array_equal(correct, np.arange(4) == first)
