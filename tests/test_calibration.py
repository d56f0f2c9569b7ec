"""Errors of calibration, scores and temperature against their definitions, over batches, devices and models."""

import contextlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_calibration as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jax_ls import calibration

N, K = 96, 7
ERRORS = ["expected_calibration_error", "classwise_calibration_error"]
SCORES = ["overconfidence", "negative_log_likelihood", "brier_score", "area_under_risk_coverage"]
EVERY = [*ERRORS, *SCORES, "fit_temperature"]


def draw(n=N, k=K, scale=2.0, seed=0):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(n, k))).astype(np.float32)
    labels = np.where(rng.random(n) < 0.6, logits.argmax(-1), rng.integers(0, k, n))
    return jnp.asarray(logits), jnp.asarray(labels, jnp.int32)


LOGITS, LABELS = draw()
STATIC = dict.fromkeys(ERRORS, ("num_bins", "binning", "norm"))
JITTED = {name: jax.jit(getattr(calibration, name), static_argnames=STATIC.get(name)) for name in EVERY}


def close(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("binning", ["width", "mass"])
@pytest.mark.parametrize("num_bins", [1, 15])
@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_their_definitions(name, num_bins, binning):
    options = [{"num_bins": num_bins, "binning": binning, "norm": norm} for norm in (1, 2, np.inf)]
    logits, labels = LOGITS[:37], LABELS[:37]
    expected = [getattr(reference, name)(np.asarray(logits), np.asarray(labels), **each) for each in options]
    close(
        jax.jit(lambda z, y: [getattr(calibration, name)(z, y, **each) for each in options])(logits, labels), expected
    )


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_scores_are_their_definitions(name, scale):
    # Saturated confidences tie in float32, and in float64 do not.
    logits, labels = draw(scale=min(scale, 3.0) if name == "area_under_risk_coverage" else scale)
    expected = getattr(reference, name)(np.asarray(logits), np.asarray(labels))
    close(JITTED[name](logits, labels), expected)
    close(JITTED[name](logits.reshape(8, 12, K), labels.reshape(8, 12)), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("name", EVERY)
def test_other_dtypes(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        logits = jnp.asarray(np.asarray(LOGITS), dtype)
        actual = jax.jit(getattr(calibration, name))(logits, LABELS)
        assert actual.dtype == ("float64" if dtype == "float64" else "float32")
    close(actual, JITTED[name](jnp.asarray(np.asarray(logits, np.float32)), LABELS))


@pytest.mark.parametrize("name", EVERY)
def test_a_common_offset_changes_nothing(name):
    # Multiples of 1/8, which 10⁶ takes in without rounding.
    logits = jnp.round(LOGITS * 8) / 8
    close(JITTED[name](logits + 1e6, LABELS), JITTED[name](logits, LABELS))


@pytest.mark.parametrize("name", EVERY)
def test_masked_examples_are_as_if_not_there(name):
    kept = np.arange(N) % 3 != 1
    rotten = jnp.where(jnp.asarray(kept)[:, None], LOGITS, jnp.nan)
    labels = jnp.where(jnp.asarray(kept), LABELS, -100)
    masked = JITTED[name](rotten, labels, where=jnp.asarray(kept))
    close(masked, JITTED[name](LOGITS[kept], LABELS[kept]))


@pytest.mark.parametrize("name", EVERY)
def test_nothing_to_measure_is_nan_and_a_temperature_of_1(name):
    expected = 1.0 if name == "fit_temperature" else np.nan
    np.testing.assert_equal(float(JITTED[name](LOGITS, LABELS, where=jnp.zeros(N, bool))), expected)
    np.testing.assert_equal(float(JITTED[name](LOGITS[:0], LABELS[:0])), expected)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_broken_and_counts_is_seen(name):
    assert np.isnan(JITTED[name](LOGITS.at[3, 2].set(jnp.nan), LABELS))
    assert np.isnan(JITTED[name](LOGITS, LABELS.at[3].set(K)))
    assert np.isnan(JITTED[name](LOGITS, LABELS.at[3].set(-1)))


@pytest.mark.parametrize("name", EVERY)
def test_many_models_at_once(name):
    models = jnp.stack([LOGITS, 2 * LOGITS, LOGITS[::-1]])
    together = jax.jit(jax.vmap(getattr(calibration, name), in_axes=(0, None)))(models, LABELS)
    close(together, [JITTED[name](z, LABELS) for z in models])


ON_DEVICES = [*((name, {}) for name in EVERY), *((name, {"binning": "mass"}) for name in ERRORS)]


@pytest.mark.parametrize(("name", "options"), ON_DEVICES)
def test_eight_devices_are_one(name, options):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    where = jnp.arange(N) % 5 != 2

    def measure(z, y, w):
        return getattr(calibration, name)(z, y, where=w, batch_axis_name="data", **options)

    split = jax.jit(jax.shard_map(measure, mesh=mesh, in_specs=(P("data"),) * 3, out_specs=P()))
    close(split(LOGITS, LABELS, where), JITTED[name](LOGITS, LABELS, where=where, **options))
    sharded = jax.device_put((LOGITS, LABELS, where), jax.NamedSharding(mesh, P("data")))
    close(JITTED[name](sharded[0], sharded[1], where=sharded[2], **options), split(LOGITS, LABELS, where))


@pytest.mark.parametrize(("name", "options"), ON_DEVICES)
def test_an_explicit_mesh_may_split_examples_and_classes(name, options):
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    arrays = jnp.pad(LOGITS, ((0, 0), (0, 1)), constant_values=-jnp.inf), LABELS, jnp.arange(N) % 5 != 2
    expected = JITTED[name](*arrays[:2], where=arrays[2], **options)
    for shape, layout in (((N,), ("data", "model")), ((8, 12), (None, "data", None))):
        batch = P(*layout[: len(shape)])
        z, y, where = (
            jax.device_put(x.reshape(*shape, *x.shape[1:]), jax.NamedSharding(mesh, spec))
            for x, spec in zip(arrays, (P(*layout), batch, batch), strict=True)
        )
        with jax.set_mesh(mesh) if len(shape) == 1 else contextlib.nullcontext():
            close(JITTED[name](z, y, where=where, **options), expected)


@pytest.mark.parametrize("measure", [calibration.overconfidence, calibration.area_under_risk_coverage])
def test_an_explicit_mesh_needs_no_jit(measure):
    mesh = jax.make_mesh((8,), ("data",))
    close(measure(*jax.device_put((LOGITS, LABELS), jax.NamedSharding(mesh, P("data")))), measure(LOGITS, LABELS))


def test_a_vmapped_axis_may_hold_the_examples():
    parts = LOGITS.reshape(8, -1, K), LABELS.reshape(8, -1)
    split = jax.vmap(lambda z, y: calibration.area_under_risk_coverage(z, y, batch_axis_name="i"), axis_name="i")(
        *parts
    )
    close(split, JITTED["area_under_risk_coverage"](LOGITS, LABELS))


def test_means_add_up_over_batches_and_devices():
    losses = jax.jit(calibration.squared_error)(LOGITS, LABELS)
    halves = calibration.Mean.of(losses[:20]) + calibration.Mean.of(losses[20:])
    close(halves.value, JITTED["brier_score"](LOGITS, LABELS))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mean = jax.shard_map(
        lambda x: calibration.Mean.of(x).psum("data").value, mesh=mesh, in_specs=P("data"), out_specs=P()
    )
    close(mean(losses), halves.value)


def test_long_sums_keep_their_digits():
    """A running sum in float32 of 10⁶ confidences of .9199 is off by 10⁻²."""
    n = 2**20
    logits = jnp.broadcast_to(jnp.array([np.log(0.9199), np.log(0.0801)], jnp.float32), (n, 2))
    labels = (jnp.arange(n) % 100 >= 92).astype(jnp.int32)
    right = float(np.mean(np.arange(n) % 100 < 92))
    close(JITTED["expected_calibration_error"](logits, labels), abs(right - 0.9199), 1e-3)
    close(JITTED["brier_score"](logits, labels), right * 2 * 0.0801**2 + (1 - right) * 2 * 0.9199**2, 1e-5)
    close(JITTED["fit_temperature"](logits, labels), np.log(0.9199 / 0.0801) / np.log(right / (1 - right)), 1e-4)


def test_aurc_of_ties_is_the_mean_over_orders():
    logits, labels = jnp.zeros((4, 2)), jnp.array([0, 1, 1, 0])
    close(JITTED["area_under_risk_coverage"](logits, labels), 0.5)
    thrice = jnp.tile(LOGITS[:32], (3, 1))
    expected = reference.area_under_risk_coverage(np.asarray(thrice), np.asarray(LABELS))
    close(JITTED["area_under_risk_coverage"](thrice, LABELS), expected)


def test_classes_of_minus_infinity_are_as_if_not_there():
    wide = jnp.concatenate([LOGITS, jnp.full((N, 2), -jnp.inf)], axis=-1)
    for name in ("expected_calibration_error", "brier_score", "fit_temperature", "area_under_risk_coverage"):
        close(JITTED[name](wide, LABELS), JITTED[name](LOGITS, LABELS))


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.3, 3.0), st.floats(0.2, 5.0))
def test_laws(seed, scale, factor):
    logits, labels = draw(24, 4, scale, seed)
    order = np.random.default_rng(seed).permutation(24)
    for name in EVERY:
        close(JITTED[name](logits[order], labels[order]), JITTED[name](logits, labels), 1e-3)
    for name in ERRORS:
        assert 0 <= JITTED[name](logits, labels) <= 1
    signed = JITTED["overconfidence"](logits, labels)
    assert abs(signed) <= JITTED["expected_calibration_error"](logits, labels) + 1e-6
    t = JITTED["fit_temperature"](logits, labels)
    if 0.3 < t < 3.0:
        close(JITTED["fit_temperature"](np.float32(factor) * logits, labels), np.float32(factor) * t, 1e-3)
    before, after = (JITTED["negative_log_likelihood"](z, labels) for z in (logits, logits / t))
    assert after <= before + 1e-6


# What others compute.


@pytest.mark.skipif(importlib.util.find_spec("torchmetrics") is None, reason="torchmetrics is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("norm", "word"), [(1, "l1"), (2, "l2"), (np.inf, "max")])
@pytest.mark.parametrize("num_bins", [10, 15])
def test_torchmetrics_agrees(norm, word, num_bins):
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    p, y = torch.tensor(reference.probabilities(np.asarray(LOGITS)).astype(np.float32)), torch.tensor(np.array(LABELS))
    theirs = multiclass_calibration_error(p, y.long(), num_classes=K, n_bins=num_bins, norm=word)
    close(JITTED["expected_calibration_error"](LOGITS, LABELS, num_bins=num_bins, norm=norm), float(theirs))


@pytest.mark.parametrize(("norm", "theirs"), [(1, 0.19093919), (2, 0.23846909), (np.inf, 0.70055348)])
def test_the_figures_of_torchmetrics(norm, theirs):
    """Of version 1.9.0 on the same 96 examples, 15 bins."""
    close(JITTED["expected_calibration_error"](LOGITS, LABELS, norm=norm), theirs)


# Bad input.


@pytest.mark.parametrize("name", EVERY)
def test_shapes_that_disagree_raise_by_name(name):
    measure = getattr(calibration, name)
    with pytest.raises(AssertionError, match=r"labels: expected batch axes \(96,\)"):
        measure(LOGITS, LABELS[:-1])
    with pytest.raises(AssertionError, match="labels: expected integers"):
        measure(LOGITS, LABELS.astype(jnp.float32))
    with pytest.raises(AssertionError, match="logits: expected real numbers"):
        measure(LOGITS.astype(jnp.int32), LABELS)
    with pytest.raises(AssertionError, match="logits: expected at least one class, got float32 \\(96, 0\\)"):
        measure(LOGITS[:, :0], LABELS)
    with pytest.raises(AssertionError, match=r"where: expected booleans \(96,\)"):
        measure(LOGITS, LABELS, where=jnp.ones(3, bool))


@pytest.mark.parametrize("name", ERRORS)
def test_options_that_do_not_exist_raise_by_name(name):
    measure = getattr(calibration, name)
    with pytest.raises(ValueError, match="num_bins: expected a positive integer"):
        measure(LOGITS, LABELS, num_bins=0)
    with pytest.raises(ValueError, match='binning: expected "width"'):
        measure(LOGITS, LABELS, binning="size")
    with pytest.raises(ValueError, match=r"norm: expected 1 \| 2 \| inf, got 3"):
        measure(LOGITS, LABELS, norm=3)
