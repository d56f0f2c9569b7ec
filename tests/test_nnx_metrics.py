"""NNX metrics: batches that add up to one shot, compiled, masked, beside Flax's own, and over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jax_ls import calibration
from jax_ls.nnx import BrierScore, CalibrationError, NegativeLogLikelihood, Overconfidence

RNG = np.random.default_rng(0)
N, K = 40, 5
LOGITS = jnp.asarray(2 * RNG.normal(size=(N, K)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, K, N), jnp.int32)
WHERE = jnp.arange(N) % 3 != 1
SCORES = {
    "ece": (CalibrationError, calibration.expected_calibration_error),
    "rms": (
        functools.partial(CalibrationError, num_bins=4, norm=2),
        functools.partial(calibration.expected_calibration_error, num_bins=4, norm=2),
    ),
    "mce": (
        functools.partial(CalibrationError, norm=jnp.inf),
        functools.partial(calibration.expected_calibration_error, norm=jnp.inf),
    ),
    "overconfidence": (Overconfidence, calibration.overconfidence),
    "nll": (NegativeLogLikelihood, calibration.negative_log_likelihood),
    "brier": (BrierScore, calibration.brier_score),
}


def every():
    scores = {name: metric() for name, (metric, _) in SCORES.items()}
    return nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), **scores)


@functools.cache
def one_shot(masked):
    where = WHERE if masked else None
    return jax.jit(lambda z, y: {name: f(z, y, where=where) for name, (_, f) in SCORES.items()})(LOGITS, LABELS)


def assert_one_shot(metrics, masked):
    computed = metrics.compute()
    hits = np.asarray(jnp.argmax(LOGITS, axis=-1) == LABELS)
    np.testing.assert_allclose(computed.pop("accuracy"), hits[np.asarray(WHERE)].mean() if masked else hits.mean())
    for name, value in one_shot(masked).items():
        np.testing.assert_allclose(computed[name], value, rtol=1e-5, err_msg=name)


@nnx.jit
def step(metrics, logits, labels, mask):
    metrics.update(logits=logits, labels=labels, mask=mask, loss=jnp.float32(0))


@pytest.fixture
def promotion_as_flax_needs_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("promotion_as_flax_needs_it")
@pytest.mark.parametrize("masked", [False, True])
def test_batches_add_up_to_one_shot_and_reset_forgets(masked):
    metrics = every()
    for _ in range(2):
        for i in range(0, N, 10):
            kept = WHERE[i : i + 10] if masked else jnp.ones(10, bool)
            step(metrics, LOGITS[i : i + 10], LABELS[i : i + 10], kept)
        assert_one_shot(metrics, masked)
        metrics.reset()
        assert all(np.isnan(x) for x in metrics.compute().values())


def test_where_and_mask_are_one_and_both_must_hold():
    by_where, by_mask, by_both = BrierScore(), BrierScore(), BrierScore()
    by_where.update(logits=LOGITS, labels=LABELS, where=WHERE)
    by_mask.update(logits=LOGITS, labels=LABELS, mask=WHERE.astype(jnp.float32))
    other = jnp.arange(N) < 20
    by_both.update(logits=LOGITS, labels=LABELS, where=WHERE, mask=other)
    np.testing.assert_allclose(by_where.compute(), one_shot(True)["brier"], rtol=1e-6)
    np.testing.assert_allclose(by_mask.compute(), by_where.compute())
    expected = calibration.brier_score(LOGITS, LABELS, where=WHERE & other)
    np.testing.assert_allclose(by_both.compute(), expected, rtol=1e-6)


@pytest.mark.usefixtures("promotion_as_flax_needs_it")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_64_bits_change_nothing(dtype):
    with jax.enable_x64(True):
        metrics = every()
        logits = jnp.asarray(LOGITS, dtype)
        step(metrics, logits, LABELS, WHERE)
        assert_one_shot(metrics, True)
        metrics.ece.update(logits=logits, labels=LABELS, where=WHERE)
        np.testing.assert_allclose(metrics.ece.compute(), one_shot(True)["ece"], rtol=1e-5)


@pytest.mark.parametrize("metric", [CalibrationError, Overconfidence, NegativeLogLikelihood, BrierScore])
def test_running_sums_take_in_what_is_too_small_for_them(metric):
    """In float32 2²⁴ + 1/2 is 2²⁴."""
    score = metric()
    running = score.sum if hasattr(score, "sum") else score.confidence_sum
    running[...] = jnp.full_like(running[...], 2.0**24)
    # Confidence 1/2, loss log 2 and Brier score 1/2.
    add = nnx.jit(lambda score: score.update(logits=jnp.zeros((1, 2)), labels=jnp.zeros(1, jnp.int32)))
    for _ in range(64):
        add(score)
    expected = 64 * (np.log(2) if metric is NegativeLogLikelihood else 0.5)
    assert abs(float(jnp.max(running[...])) - 2**24 - expected) <= 2
    score.reset()
    add(score)
    np.testing.assert_allclose(jnp.max(running[...]), expected / 64, rtol=1e-6)


def test_an_infinite_loss_stays_infinite():
    score = NegativeLogLikelihood()
    for _ in range(3):
        score.update(logits=jnp.array([[0.0, -jnp.inf]]), labels=jnp.array([1]))
    assert float(score.compute()) == np.inf


def test_an_explicit_mesh_may_split_a_batch():
    mesh = jax.make_mesh((8,), ("data",))
    logits, labels = jax.device_put((LOGITS, LABELS), jax.NamedSharding(mesh, P("data")))
    score = CalibrationError()
    for _ in range(2):
        nnx.jit(lambda score, z, y: score.update(logits=z, labels=y))(score, logits, labels)
    np.testing.assert_allclose(score.compute(), one_shot(False)["ece"], rtol=1e-5)


def test_eight_devices_are_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def measure(logits, labels):
        metrics = nnx.MultiMetric(ece=CalibrationError(), nll=NegativeLogLikelihood())
        metrics.update(logits=logits, labels=labels, batch_axis_name="data")
        return metrics.compute()

    split = jax.jit(jax.shard_map(measure, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P()))(LOGITS, LABELS)
    for name, value in split.items():
        np.testing.assert_allclose(value, one_shot(False)[name], rtol=1e-5)


def test_the_state_is_metric_state_and_is_split_off():
    _, state = nnx.split(every(), nnx.metrics.MetricState)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 300


def test_bad_input_raises_by_name():
    with pytest.raises(ValueError, match="norm: expected 1"):
        CalibrationError(norm=3)
    with pytest.raises(ValueError, match="num_bins: expected a positive integer"):
        CalibrationError(num_bins=0)
    for metric, _ in SCORES.values():
        with pytest.raises(AssertionError, match="expected"):
            metric().update(logits=LOGITS, labels=LABELS[:3])
        with pytest.raises(AssertionError, match=r"mask: expected booleans \(40,\), got bool \(3,\)"):
            metric().update(logits=LOGITS, labels=LABELS, mask=WHERE[:3])
        with pytest.raises(AssertionError, match=r"where: expected booleans \(40,\), got float32"):
            metric().update(logits=LOGITS, labels=LABELS, mask=WHERE, where=WHERE.astype(jnp.float32))
        with pytest.raises(AssertionError, match="logits: expected at least one class"):
            metric().update(logits=LOGITS[:, :0], labels=LABELS)
