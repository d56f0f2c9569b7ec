"""The loss of each example -> one number: weights, empty means, micro-batches, devices."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_ls import calibration, linear_cross_entropy, mean, online, reduce, smoothed_cross_entropy
from jax_ls.adaptive import CalibrationController

NAN, INF = np.nan, np.inf
REDUCTIONS = ["none", "sum", "mean", "sum_by_nonzero_weights"]


def by_definition(losses, reduction, weights):
    """In float64, one example at a time; what weighs nothing is not looked at."""
    terms = [w * x if w != 0 else 0.0 for w, x in zip(weights.flat, losses.flat, strict=True)]
    if reduction == "none":
        return np.reshape(terms, losses.shape)
    return np.sum(terms) / divisor(reduction, weights)


def divisor(reduction, weights):
    counts = {"mean": weights.sum(), "sum_by_nonzero_weights": np.sum(weights.real != 0)}
    return counts.get(reduction, 1) or 1


@functools.partial(jax.jit, static_argnames="reduction")
def value_and_slopes(losses, weights, reduction):
    def total(losses, weights):
        reduced = reduce(losses, weights, reduction=reduction)
        return reduced.sum(), reduced

    (_, reduced), slopes = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(losses, weights)
    return reduced, slopes


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (0,)])
@pytest.mark.parametrize("kind", ["ones", "mask", "real", "negative", "zeros"])
def test_reductions_and_their_gradient(reduction, batch, kind):
    rng = np.random.default_rng(0)
    losses = rng.uniform(0.1, 5, batch).astype(np.float32)
    weights = {
        "ones": np.ones(batch),
        "mask": rng.integers(0, 2, batch),
        "real": rng.uniform(0.1, 2, batch) * rng.integers(0, 2, batch),
        "negative": rng.uniform(-2, -0.1, batch),
        "zeros": np.zeros(batch),
    }[kind].astype(np.float32)
    actual, slopes = value_and_slopes(losses, weights, reduction)
    x, w = losses.astype(float), weights.astype(float)
    cases.assert_close(actual, np.asarray(by_definition(x, reduction, w)), size=10)
    np.testing.assert_allclose(slopes[0], w / divisor(reduction, w), rtol=1e-5)
    if w.any():
        slope = reference.gradient(lambda w: np.sum(by_definition(x, reduction, w)), w)
        cases.assert_close(slopes[1], slope, size=10)


def test_no_weights_are_weights_of_one():
    losses = jnp.array([1.0, 2.0, 6.0])
    for reduction in REDUCTIONS:
        expected = by_definition(np.array([1.0, 2.0, 6.0]), reduction, np.ones(3))
        np.testing.assert_allclose(reduce(losses, reduction=reduction), expected)
    np.testing.assert_allclose(mean(losses), 3.0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_a_loss_of_no_weight_is_not_looked_at(reduction, poison):
    losses, weights = jnp.array([1.0, poison, 5.0, poison]), jnp.array([3.0, 0.0, 1.0, 0.0])
    actual, (slope, slope_in_weights) = value_and_slopes(losses, weights, reduction)
    np.testing.assert_allclose(actual, by_definition(np.asarray(losses), reduction, np.asarray(weights)))
    np.testing.assert_array_equal(slope[1::2], 0)
    assert np.isfinite(slope_in_weights).all()


def test_a_nan_that_counts_is_seen():
    for reduction in REDUCTIONS:
        assert np.isnan(reduce(jnp.array([1.0, NAN]), jnp.array([1.0, 1.0]), reduction=reduction)).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32", "bool"])
def test_losses_and_weights_of_other_dtypes_are_summed_in_float32(dtype):
    # 2049 ones do not fit into a sum in either half precision.
    ones = jnp.ones(2049, dtype)
    for weights in (ones, jnp.ones(2049)):
        total = reduce(ones, weights, reduction="sum")
        assert total.dtype == jnp.float32
        assert total == 2049


def test_weights_broadcast():
    losses = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(mean(losses, jnp.array([[1.0], [0.0]])), 1.0)
    np.testing.assert_allclose(mean(losses, 2.0), 2.5)
    np.testing.assert_allclose(reduce(losses, jnp.array([[0.0], [2.0]]), reduction="sum_by_nonzero_weights"), 8.0)


def test_an_empty_mean_is_zero_with_zero_gradients():
    for losses, weights in [(jnp.zeros(0), jnp.zeros(0)), (jnp.full(3, NAN), jnp.zeros(3))]:
        for reduction in ("sum", "mean", "sum_by_nonzero_weights"):
            value, slopes = value_and_slopes(losses, weights, reduction)
            assert value == 0
            np.testing.assert_array_equal(slopes[0], jnp.zeros_like(losses))


RNG = np.random.default_rng(1)
LOGITS, LABELS = RNG.normal(size=(12, 7)).astype(np.float32), RNG.integers(0, 7, 12)
# The three parts hold 4, 1 and 2 examples that count: the mean of their means is another number.
LABELS[[5, 6, 7, 9, 10]] = -100
COUNT = 7
PARTS = list(zip(LOGITS.reshape(3, 4, 7), LABELS.reshape(3, 4), strict=True))


@jax.jit
def part(logits, labels, denominator):
    def loss(z):
        losses = smoothed_cross_entropy(z, labels, 0.1, ignore_index=-100)
        return mean(losses, labels != -100, denominator=denominator)

    return jax.value_and_grad(loss)(logits)


def test_micro_batches_add_up_to_the_whole_batch():
    def by_definition(z):
        return reference.losses(z, LABELS, 0.1, ignore_index=-100) / COUNT

    z = LOGITS.astype(float)
    whole, parts = part(LOGITS, LABELS, None), [part(*x, COUNT) for x in PARTS]
    for value, slope in (whole, (sum(float(v) for v, _ in parts), np.concatenate([s for _, s in parts]))):
        np.testing.assert_allclose(value, by_definition(z).sum(), rtol=1e-6)
        np.testing.assert_allclose(slope, reference.gradient_by_class(by_definition, z), rtol=1e-5, atol=1e-7)
    mean_of_means = np.mean([part(*x, None)[0] for x in PARTS])
    assert abs(mean_of_means - by_definition(z).sum()) > 1e-2


def test_class_weighted_means_divide_by_the_weights_of_the_labels():
    """PyTorch's mean, here accumulated by a scan over micro-batches."""
    weights = np.linspace(0.5, 2, 7).astype(np.float32)
    denominator = weights[LABELS[LABELS >= 0]].sum()

    @jax.jit
    def accumulated(logits, labels):
        def step(total, batch):
            losses = smoothed_cross_entropy(*batch, 0.1, ignore_index=-100, class_weights=weights)
            return total + mean(losses, denominator=denominator), None

        return jax.lax.scan(step, 0.0, (logits, labels))[0]

    losses = reference.losses(LOGITS.astype(float), LABELS, 0.1, ignore_index=-100, class_weights=weights)
    actual = accumulated(LOGITS.reshape(3, 4, 7), LABELS.reshape(3, 4))
    np.testing.assert_allclose(actual, losses.sum() / denominator, rtol=1e-6)


@pytest.mark.parametrize("batch_axis_name", ["data", ("data", "model")])
@pytest.mark.parametrize("reduction", ["sum", "mean", "sum_by_nonzero_weights"])
def test_reductions_over_devices_are_those_of_the_whole_batch(batch_axis_name, reduction):
    """Devices hold different numbers of examples that count; some hold none."""
    shape, names = ((4,), ("data",)) if batch_axis_name == "data" else ((4, 2), batch_axis_name)
    mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))
    rng = np.random.default_rng(2)
    losses, weights = rng.uniform(1, 5, 16).astype(np.float32), rng.uniform(1, 2, 16).astype(np.float32)
    weights[:5] = 0
    losses[:5] = NAN

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(batch_axis_name), out_specs=(P(), P(batch_axis_name)))
    def everywhere(losses, weights):
        return jax.value_and_grad(lambda x: reduce(x, weights, reduction=reduction, batch_axis_name=batch_axis_name))(
            losses
        )

    value, slope = everywhere(losses, weights)
    np.testing.assert_allclose(value, by_definition(losses.astype(float), reduction, weights.astype(float)), rtol=1e-6)
    np.testing.assert_allclose(slope, weights / divisor(reduction, weights.astype(float)), rtol=1e-6)


def test_an_empty_mean_over_devices_is_zero():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.shard_map(
        functools.partial(mean, batch_axis_name="data"), mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P()
    )
    assert jax.jit(over)(jnp.full(8, NAN), jnp.zeros(8)) == 0


ZEROS, FIRST, CONTROLLER = jnp.zeros((4, 3)), jnp.zeros(4, int), CalibrationController()
OVER_DEVICES = {
    "mean": lambda axis: mean(jnp.ones(4), batch_axis_name=axis),
    "reduce": lambda axis: reduce(jnp.ones(4), reduction="sum", batch_axis_name=axis),
    "linear": lambda axis: linear_cross_entropy(jnp.ones((4, 2)), jnp.ones((2, 3)), FIRST, batch_axis_name=axis),
    "online": lambda axis: online.update(online.init(3), ZEROS, FIRST, batch_axis_name=axis),
    "controller": lambda axis: CONTROLLER.update(CONTROLLER.init(), ZEROS, FIRST, batch_axis_name=axis),
    "ece": lambda axis: calibration.expected_calibration_error(ZEROS, FIRST, batch_axis_name=axis),
    "ece, mass": lambda axis: calibration.reliability(ZEROS, FIRST, binning="mass", batch_axis_name=axis).count,
    "risk": lambda axis: calibration.area_under_risk_coverage(ZEROS, FIRST, batch_axis_name=axis),
    "nll": lambda axis: calibration.negative_log_likelihood(ZEROS, FIRST, batch_axis_name=axis),
    "temperature": lambda axis: calibration.fit_temperature(ZEROS, FIRST, batch_axis_name=axis),
}


@pytest.mark.parametrize("name", OVER_DEVICES)
@pytest.mark.parametrize(("axis", "wrong"), [("nope", "nope"), (("data", "nope"), "nope"), (3, 3)])
def test_a_mesh_axis_that_does_not_exist_raises_in_our_words(name, axis, wrong):
    expected = "batch_axis_name: expected a mesh axis of the surrounding jax.shard_map, "
    with pytest.raises(ValueError, match=f"{expected}and there is none around this call, got"):
        OVER_DEVICES[name](axis)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match=rf"{expected}one of 'data' \| 'model', got {wrong!r}"):
        jax.eval_shape(jax.shard_map(lambda: OVER_DEVICES[name](axis), mesh=mesh, in_specs=(), out_specs=P()))
