"""Running sums keep their digits: long batches, many batches, counts beyond 2³¹."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ls import calibration, online
from jax_ls.nnx import BrierScore, CalibrationError, NegativeLogLikelihood, OnlineSmoothing, Overconfidence
from jax_ls.running_sums import accumulate, as_running, sum_of, sums_by_row

RNG = np.random.default_rng(0)


def right(n, confidence=0.92):
    """n predictions of class 0 with one confidence, which are right."""
    z = jnp.log(jnp.array([confidence, 1 - confidence], jnp.float32))
    return jnp.broadcast_to(z, (n, 2)), jnp.zeros(n, jnp.int32)


# --- the helper


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 70_000])
def test_a_long_sum(n):
    x = np.float32(0.92) * np.ones((n, 3), np.float32) + RNG.uniform(-0.01, 0.01, (n, 3)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(sum_of)(x), x.sum(0, dtype=np.float64), rtol=3e-6, atol=0)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (100_000,)])
@pytest.mark.parametrize("num_rows", [1, 4, 300])
def test_sums_by_row(shape, num_rows):
    rows = RNG.integers(-2, num_rows + 2, shape).astype(np.int32)
    values = RNG.uniform(0.9, 1.0, (*shape, 2)).astype(np.float32)
    expected = np.zeros((num_rows, 2))
    for row in range(num_rows):
        expected[row] = values[rows == row].sum(0, dtype=np.float64)
    found = jax.jit(sums_by_row, static_argnums=2)(values, rows, num_rows)
    np.testing.assert_allclose(found, expected, rtol=3e-6)


def test_sums_by_row_move_no_more_than_the_sums_between_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P("data"))
    rows, values = np.arange(8192, dtype=np.int32) % 16, np.ones((8192, 16), np.float32)
    f = jax.jit(sums_by_row, static_argnums=2, in_shardings=(split, split))
    lines = [x for x in f.lower(values, rows, 16).compile().as_text().splitlines() if " all-reduce(" in x]
    assert lines
    assert all("= f32[16,16]" in line for line in lines)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_accumulate_is_exact_in_twice_the_precision(dtype):
    with jax.enable_x64(dtype == "float64"):
        number, step = np.dtype(dtype).type, jax.jit(accumulate)
        total, lost, exact = number(0), number(0), 0
        for n in [2**31 - 1, 1, 2**40 + 1, 3, -7, 2**23 + 1]:
            total, lost = step(total, lost, number(n), number(n - int(number(n))))
            exact += n
            assert int(total) + int(lost) == exact
            assert total == number(exact)


def test_infinities_and_nan_stay():
    zero = jnp.zeros(())
    total, lost = accumulate(*accumulate(zero, zero, jnp.float32(np.inf)), jnp.float32(1.0))
    assert (float(total), float(lost)) == (np.inf, 0.0)
    total, lost = accumulate(*accumulate(zero, zero, jnp.float32(np.nan)), jnp.float32(1.0))
    assert np.isnan(float(total))


@pytest.mark.parametrize("n", [0, 5, 2**24 + 1, 2**31 - 1])
def test_a_count_keeps_every_digit(n):
    total, lost = as_running(jnp.asarray(n, jnp.int32), jnp.float32)
    assert abs(int(total) + int(lost) - n) <= (n == 2**31 - 1)


# --- online


@pytest.mark.parametrize("decay", [None, 0.0])
def test_online_smoothing_adds_up_a_long_batch(decay):
    """A million correct predictions of one class in one batch, and labels of one class in nine of ten."""
    n = 2**20
    z = np.log(np.array([0.92, 0.05, 0.02, 0.01], np.float32))
    labels = np.where(np.arange(n) % 10 < 9, 0, np.arange(n) // 10 % 4).astype(np.int32)
    logits = np.stack([np.roll(z, y) for y in range(4)])[labels]
    state = online.update(online.init(4, decay=decay), logits, labels)
    state = online.next_epoch(state) if decay is None else state
    expected = np.stack([np.roll(np.exp(z), y) for y in range(4)])
    np.testing.assert_allclose(state.matrix, expected, rtol=3e-6)


def test_online_smoothing_keeps_what_is_too_small_for_its_sums():
    """From 2²⁴ correct predictions on, a float32 takes in none of them one by one."""
    logits, labels = right(1, 0.75)
    step = jax.jit(lambda s: online.update(s, logits, labels))
    state = step(online.init(2))
    state = replace(state, sums=state.sums * 2.0**24, counts=state.counts * 2.0**24)
    for _ in range(64):
        state = step(state)
    np.testing.assert_allclose(state.sums[0].sum(), 2**24 + 64, rtol=1e-7)
    np.testing.assert_allclose(state.counts[0], 2**24 + 64, rtol=0)


def test_online_smoothing_counts_beyond_two_to_the_31():
    n = 2**20
    logits, labels = right(n, 0.75)
    step = jax.jit(lambda s: online.update(s, logits, labels))
    state = online.init(2)
    for _ in range(2):
        state = step(state)
    state = step(jax.tree.map(lambda x: x * 2.0**10, state))
    assert float(state.counts[0]) == 2**31 + n
    np.testing.assert_allclose(online.next_epoch(state).matrix[0], [0.75, 0.25], rtol=3e-6)


def test_a_class_that_was_never_learned_gets_uniform_and_a_learned_row_is_kept():
    """As in the published code, where a class without a correct prediction trains on 1/K: no half loss."""
    state = online.update(online.init(4), jnp.array([[9.0, 0, 0, 0]]), jnp.array([0]))
    first = online.next_epoch(state)
    np.testing.assert_array_equal(first.matrix[1:], np.full((3, 4), 0.25))
    second = online.next_epoch(online.update(first, jnp.array([[0, 9.0, 0, 0]]), jnp.array([1])))
    np.testing.assert_array_equal(second.matrix[0], first.matrix[0])
    assert second.matrix[1].argmax() == 1
    np.testing.assert_array_equal(second.matrix[2:], np.full((2, 4), 0.25))


# --- calibration


def test_reliability_of_many_batches():
    """10⁵ batches in one scan."""
    logits, labels = right(7)

    steps = 100_000

    @jax.jit
    def run():
        one = calibration.reliability(logits, labels, num_bins=4)
        return jax.lax.scan(lambda total, _: (total + one, None), one, None, length=steps)[0]

    bins = run()
    n = 7 * (steps + 1)
    assert float(bins.count.sum()) == float(bins.correct.sum()) == n
    one = calibration.reliability(logits, labels, num_bins=4)
    np.testing.assert_allclose(bins.confidence[-1], one.confidence[-1], rtol=2e-7)
    np.testing.assert_allclose(bins.error(), one.error(), rtol=3e-6)
    np.testing.assert_allclose(bins.overconfidence, one.overconfidence, rtol=3e-6)


def test_sums_of_calibration_beyond_two_to_the_31():
    """Doubling 32 times is 2³² batches of a million: exact counts, the same figures."""
    logits, labels = right(1000)
    bins = one = calibration.reliability(logits, labels)
    mean = nll = calibration.Mean.of(jnp.full(1000, 0.3))
    for _ in range(32):
        bins, mean = bins + bins, mean + mean
    assert float(bins.count.sum()) == float(mean.count) == 1000 * 2**32
    np.testing.assert_allclose(bins.error(), one.error(), rtol=3e-6)
    np.testing.assert_allclose(mean.value, nll.value, rtol=2e-7)


def test_a_mean_of_many_batches():
    one = calibration.Mean.of(jnp.full(10, 0.1))
    scan = jax.jit(lambda: jax.lax.scan(lambda total, _: (total + one, None), one, None, length=100_000)[0])
    np.testing.assert_allclose(scan().value, one.value, rtol=2e-7)


@pytest.mark.parametrize("metric", [CalibrationError, Overconfidence, NegativeLogLikelihood, BrierScore])
def test_metrics_count_beyond_two_to_the_31(metric):
    logits, labels = right(2**20)
    score = metric()
    score.update(logits=logits, labels=labels)
    once = float(score.compute())
    for name, variable in vars(score).items():
        if hasattr(variable, "get_value") and name != "edges":
            variable[...] = variable[...] * 2.0**11
    score.update(logits=logits, labels=labels)
    np.testing.assert_allclose(score.compute(), once, rtol=1e-5)
    assert float(jnp.sum(score.count[...])) == 2**31 + 2**20


def test_nnx_online_smoothing_keeps_its_digits():
    soft, (logits, labels) = OnlineSmoothing(2), right(2**20)
    for _ in range(2):
        soft.update(logits, labels)
    soft.next_epoch()
    np.testing.assert_allclose(soft.matrix[0], [0.92, 0.08], rtol=3e-6)
