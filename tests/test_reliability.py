"""Bins of confidence against accuracy: what lies in them, how batches of them add up, and edges that are none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_calibration as reference
from jax.sharding import PartitionSpec as P
from test_calibration import JITTED, LABELS, LOGITS, N, close

from jax_ls import calibration
from jax_ls.logits import is_correct

MEASURES = ["reliability", "classwise_reliability"]
BINS = {name: jax.jit(getattr(calibration, name), static_argnames=("num_bins", "binning")) for name in MEASURES}
reliability = BINS["reliability"]


@pytest.mark.parametrize("of", ["reliability", "classwise_reliability"])
@pytest.mark.parametrize("binning", ["width", "mass"])
def test_batches_add_up(of, binning):
    measure = BINS[of]
    edges = measure(LOGITS, LABELS, binning=binning).edges
    parts = [measure(LOGITS[i : i + 24], LABELS[i : i + 24], edges=edges) for i in range(0, N, 24)]
    total, whole = functools.reduce(lambda a, b: a + b, parts), measure(LOGITS, LABELS, binning=binning)
    assert total.count.tolist() == whole.count.tolist()
    for norm in (1, 2, np.inf):
        close(total.error(norm), whole.error(norm))
    assert np.max(total.count) < N


def test_bins_in_full():
    bins = reliability(LOGITS, LABELS, num_bins=5)
    p = reference.probabilities(np.asarray(LOGITS))
    table = reference.bins_of(p.max(-1), p.argmax(-1) == np.asarray(LABELS), reference.equal_width(5))
    count, confidence, right = (np.array(column, float) for column in zip(*table, strict=True))
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(bins.count, count)
        close(bins.confidence, confidence / count)
        close(bins.accuracy, right / count)
    close(bins.share, count / N)
    assert np.isnan(bins.confidence[0])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 10, 15, 29])
def test_a_confidence_on_an_edge_belongs_below_it(size):
    """1/K of equal logits is exactly an edge of K bins, and of 2K; 1 is the last edge."""
    one, many = jnp.zeros((1, size)), jnp.full((1, 3), -200.0).at[0, 0].set(0.0)
    zero = jnp.zeros((1,), jnp.int32)
    assert reliability(one, zero, num_bins=size).count.tolist() == [1] + [0] * (size - 1)
    assert int(jnp.argmax(reliability(one, zero, num_bins=2 * size).count)) == 1
    assert int(reliability(many, zero, num_bins=size).count[-1]) == 1


def test_of_predictions_that_tie_the_first_counts():
    logits = jnp.array([[0.0, 5.0, 5.0], [1.0, 1.0, 1.0], [-jnp.inf, 2.0, 2.0]])
    for labels, right in (([1, 0, 1], 3), ([2, 1, 2], 0), ([0, 2, 0], 0)):
        assert int(reliability(logits, jnp.array(labels)).correct.sum()) == right
    close(JITTED["overconfidence"](logits[1:2], jnp.array([0])), 1 / 3 - 1)


def test_equal_mass_bins_are_equally_full_but_for_ties():
    assert reliability(LOGITS, LABELS, num_bins=8, binning="mass").count.tolist() == [12] * 8
    tied = reliability(jnp.zeros((10, 4)), jnp.zeros(10, jnp.int32), num_bins=5, binning="mass")
    assert sorted(tied.count.tolist()) == [0, 0, 0, 0, 10]
    close(tied.error(), 0.75)


@pytest.mark.parametrize("of", MEASURES)
def test_the_bins_of_all_devices_are_the_same_on_each(of):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def measure(z, y):
        return getattr(calibration, of)(z, y, num_bins=4, binning="mass", batch_axis_name="data")

    split = jax.jit(jax.shard_map(measure, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P()))(LOGITS, LABELS)
    jax.tree.map(close, split, BINS[of](LOGITS, LABELS, num_bins=4, binning="mass"))


@pytest.mark.parametrize("gap", [2e-38, 1e-37, 5e-36, 1e-30])
@pytest.mark.parametrize("size", [2, 1000])
def test_the_least_difference_tells_which_class_is_predicted(size, gap):
    logits = jnp.zeros((2, size)).at[:, -1].set(gap)
    labels = jnp.array([0, size - 1])
    assert is_correct(logits, labels).tolist() == [False, True]
    assert [int(reliability(logits[i:], labels[i:]).correct.sum()) for i in (0, 1)] == [1, 1]
    assert int(reliability(logits[:1], labels[:1]).correct.sum()) == 0


def test_the_outermost_bins_hold_what_lies_outside():
    logits, labels = jnp.log(jnp.array([[0.6, 0.4], [0.75, 0.25], [0.95, 0.05]])), jnp.zeros(3, jnp.int32)
    assert reliability(logits, labels, edges=jnp.array([0.7, 0.8, 0.9])).count.tolist() == [2, 1]


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("edges", [[0.0, 0.8, 0.4, 1.0], [0.0, np.nan, 1.0], [1, 0]])
def test_edges_that_do_not_ascend_raise_or_where_they_are_traced_are_seen(name, edges):
    measure = getattr(calibration, name)
    with pytest.raises(ValueError, match="edges: expected ascending numbers"):
        measure(LOGITS, LABELS, edges=edges)
    with pytest.raises(ValueError, match="edges: expected ascending numbers"):
        jax.jit(lambda z, y: measure(z, y, edges=edges))(LOGITS, LABELS)
    assert np.all(np.isnan(BINS[name](LOGITS, LABELS, edges=jnp.array(edges, jnp.float32)).error()))


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("edges", [0.5, [0.5], [], [[[0.0, 1.0]]]])
def test_edges_of_another_shape_raise_by_name(name, edges):
    expected = r"\(B \+ 1,\)" + (r" or \(7, B \+ 1\)" if name == "classwise_reliability" else "")
    with pytest.raises(AssertionError, match=f"edges: expected ascending numbers {expected}, got float32"):
        getattr(calibration, name)(LOGITS, LABELS, edges=edges)


def test_edges_may_be_integers_and_equal():
    assert calibration.reliability(LOGITS, LABELS, edges=[0, 1]).count.tolist() == [N]
    assert calibration.reliability(LOGITS, LABELS, edges=[0, 0, 1]).count.tolist() == [0, N]
    with pytest.raises(TypeError, match="edges: expected a number or an array of numbers, got 'x'"):
        calibration.reliability(LOGITS, LABELS, edges="x")


def test_bins_of_other_edges_do_not_add_up():
    one, other = (calibration.reliability(LOGITS[i:], LABELS[i:], binning="mass") for i in (0, 5))
    with pytest.raises(ValueError, match="edges: expected the same edges"):
        one + other
    with pytest.raises(AssertionError, match=r"edges: expected \(16,\)"):
        one + calibration.reliability(LOGITS, LABELS, num_bins=3)
    assert np.isnan(jax.jit(lambda a, b: (a + b).error())(one, other))
    with pytest.raises(AssertionError, match=r"edges: expected ascending numbers \(B \+ 1,\) or \(7, B \+ 1\)"):
        calibration.classwise_reliability(LOGITS, LABELS, edges=jnp.ones((3, 4)))
