"""The temperature of the best likelihood: against golden section, over models and devices, and where there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_calibration as reference
from jax.sharding import PartitionSpec as P
from test_calibration import LABELS, LOGITS, K, close, draw

from jax_ls import calibration

fit = jax.jit(calibration.fit_temperature)


@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
def test_the_temperature_is_that_of_the_best_likelihood(scale):
    logits, labels = draw(scale=scale)
    close(fit(logits, labels), reference.temperature(np.asarray(logits), np.asarray(labels)), 2e-4)


def test_a_known_temperature_is_recovered():
    """Labels drawn from softmax(z); logits shown as T z. Within four standard errors of T."""
    z = jax.random.normal(jax.random.key(0), (40_000, 5)) * 2
    labels = jax.random.categorical(jax.random.key(1), z)
    known = jnp.array([0.2, 0.5, 1.0, 3.0, 9.0])
    fitted = jax.jit(jax.vmap(lambda t: calibration.fit_temperature(t * z, labels)))(known)
    np.testing.assert_allclose(fitted, known, rtol=0.03)
    np.testing.assert_allclose(fitted / known, fitted[2], rtol=1e-4)


def test_a_separable_set_stops_at_the_lower_bound_and_its_opposite_at_the_upper():
    logits = 3.0 * jax.nn.one_hot(LABELS, K) + LOGITS / 10
    assert float(fit(logits, LABELS)) == np.float32(0.05)
    assert float(fit(-logits, LABELS)) == 20.0
    assert float(calibration.fit_temperature(logits, LABELS, bounds=(0.3, 2.0))) == np.float32(0.3)
    assert float(calibration.fit_temperature(-logits, LABELS, bounds=(0.3, 2.0))) == 2.0
    assert float(fit(jnp.zeros((4, 3)), jnp.array([0, 1, 2, 2]))) == 1.0


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        *(([gap, 0.0, -1.0], 0.05) for gap in (1e-6, 87.0, 88.0, 1e3, 1e6)),
        ([5.0, 5.0, 0.0], 0.05),
        ([5.0, 5.0, 5.0], 1.0),
        ([5.0, -jnp.inf, -jnp.inf], 1.0),
        ([5.0, -jnp.inf, 4.0], 0.05),
    ],
)
def test_all_labels_at_the_top_are_separable_unless_there_is_nothing_below(row, expected):
    assert float(fit(jnp.array([row, [0.0] * 3]), jnp.array([0, 1]))) == np.float32(expected)


def test_where_no_temperature_gives_a_likelihood_there_is_none():
    impossible = LOGITS.at[3, LABELS[3]].set(-jnp.inf)
    assert np.isnan(fit(impossible, LABELS))
    kept = jnp.arange(len(LABELS)) != 3
    close(fit(impossible, LABELS, where=kept), fit(LOGITS, LABELS, where=kept))


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e6])
def test_extreme_logits_give_a_temperature_within_bounds(scale):
    t = float(fit(scale * LOGITS, LABELS))
    assert t == {1e-3: np.float32(0.05), 1e3: 20.0, 1e6: 20.0}[scale]


def test_each_device_may_fit_its_own_temperature():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def fit(z, y):
        return calibration.fit_temperature(z, y)[None]

    split = jax.jit(jax.shard_map(fit, mesh=mesh, in_specs=(P("data"),) * 2, out_specs=P("data")))(LOGITS, LABELS)
    close(split, jax.vmap(calibration.fit_temperature)(LOGITS.reshape(8, -1, K), LABELS.reshape(8, -1)))


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (jnp.nan, 1.0)])
def test_bounds_of_no_temperature_raise(bounds):
    with pytest.raises(ValueError, match="bounds: expected two numbers, 0 < low <= high"):
        calibration.fit_temperature(LOGITS, LABELS, bounds=bounds)
    with pytest.raises(ValueError, match="bounds: expected two numbers, 0 < low <= high"):
        jax.jit(lambda z, y: calibration.fit_temperature(z, y, bounds=bounds))(LOGITS, LABELS)
    assert np.isnan(jax.jit(lambda *bounds: calibration.fit_temperature(LOGITS, LABELS, bounds=bounds))(*bounds))


@pytest.mark.parametrize("bounds", [(0.05,), (1, 2, 3), 1.0, None, ("low", "high"), (jnp.ones(2), 20.0)])
def test_bounds_that_are_not_two_numbers_raise_by_name(bounds):
    with pytest.raises((TypeError, AssertionError), match="bounds: expected"):
        calibration.fit_temperature(LOGITS, LABELS, bounds=bounds)
