"""Confidence against accuracy in bins, held as sums, so that batches and devices add up."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import pytree
from jax_ls.class_axis import AxisName, ClassAxis, flat, gathered, with_whole_rows
from jax_ls.logits import Logits, on_logits
from jax_ls.reductions import sum_over_devices
from jax_ls.running_sums import added, as_running, sum_of, sums_by_row

__all__ = ["Binning", "Reliability", "classwise_reliability", "reliability"]

Binning = Literal["width", "mass"]

# The sums of a `Reliability`, and the field that holds the rounding error of each.
SUMS = {"count": "lost_count", "correct": "lost_correct", "confidence_sum": "lost_confidence"}


@pytree()
@dataclass(frozen=True, eq=False)
class Reliability:
    """Predictions in bins by their confidence: bin b holds confidences in (edges[b], edges[b + 1]].

    The outermost bins also hold confidences beyond their edges. If a and b have the same edges, `a + b` is the
    reliability of both sets together. `psum` adds up the devices. A prediction of NaN, or a label that names no class,
    makes the confidence of its bin NaN, and so every error. Sums stay exact to rounding over any number of batches, and
    counts do not overflow.

    Args:
      edges: (*classes, B + 1), ascending.
      count: (*classes, B), how many predictions each bin holds: whole numbers in the dtype of the confidence.
      correct: (*classes, B), how many of those are right.
      confidence_sum: (*classes, B), the sum of their confidence.
      lost_count, lost_correct, lost_confidence: (*classes, B), the rounding errors of the three sums, which `+` carries
        along; zeros if None.

    Example:
      >>> from jax_ls import calibration
      >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6]]))
      >>> bins = calibration.reliability(logits, jnp.array([0, 1, 1, 1]), num_bins=4)
      >>> print(bins.count, bins.correct)
      [0. 0. 2. 2.] [0. 0. 1. 2.]
      >>> print(f"{bins.error():.2f} {(bins + bins).error():.2f}")
      0.15 0.15
    """

    edges: Array
    count: Array
    correct: Array
    confidence_sum: Array
    lost_count: Any = None
    lost_correct: Any = None
    lost_confidence: Any = None

    def __post_init__(self) -> None:
        dtype = jnp.asarray(self.confidence_sum).dtype
        for name, lost in SUMS.items():
            rounded, rounding_error = as_running(jnp.asarray(getattr(self, name)), dtype)
            object.__setattr__(self, name, rounded)
            if getattr(self, lost) is None:
                object.__setattr__(self, lost, rounding_error)

    @property
    def confidence(self) -> Array:
        """Mean confidence of each bin; NaN for an empty bin."""
        return ratio(self.confidence_sum, self.count)

    @property
    def accuracy(self) -> Array:
        """Share of right predictions in each bin; NaN for an empty bin."""
        return ratio(self.correct, self.count)

    @property
    def share(self) -> Array:
        """Share of all predictions that each bin holds; NaN if there are no predictions."""
        return ratio(self.count, jnp.sum(self.count, axis=-1, keepdims=True))

    @property
    def overconfidence(self) -> Array:
        """Mean confidence minus accuracy, which no choice of bins changes; NaN if there are no predictions."""
        return ratio(jnp.sum(self._excess, axis=-1), jnp.sum(self.count, axis=-1))

    @property
    def _excess(self) -> Array:
        """Σ (confidence − correct) of each bin."""
        return self.confidence_sum - self.correct + (self.lost_confidence - self.lost_correct)

    def error(self, norm: float = 1) -> Array:
        """Returns (Σ_b share_b |accuracy_b − confidence_b|^norm)^(1/norm), or the largest gap for `inf`.

        NaN if there are no predictions.
        """
        if norm not in (1, 2, np.inf):
            raise ValueError(f"norm: expected 1 | 2 | inf, got {norm!r}")
        total = jnp.sum(self.count, axis=-1)
        gap = jnp.abs(self._excess) / jnp.maximum(self.count, 1).astype(self._excess.dtype)
        if norm == np.inf:
            return jnp.where(total > 0, jnp.max(gap, axis=-1), jnp.nan)
        if norm == 1:
            return ratio(jnp.sum(jnp.abs(self._excess), axis=-1), total)
        square = ratio(jnp.sum(jnp.abs(self._excess) * gap, axis=-1), total)
        # The slope of a root at 0 is infinite.
        return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))

    def psum(self, batch_axis_name: AxisName | None) -> Reliability:
        """Returns the reliability of the predictions of all devices, inside `jax.shard_map`."""
        sums = {name: getattr(self, name) for pair in SUMS.items() for name in pair}
        return replace(self, **sum_over_devices(sums, batch_axis_name))

    def __add__(self, other: Reliability) -> Reliability:
        if not isinstance(other, Reliability):
            return NotImplemented
        checks.assert_shape("edges", other.edges, [self.edges.shape], f"{self.edges.shape}, as on the left of +")
        same = jnp.all(self.edges == other.edges)
        if not isinstance(same, Tracer) and not same:
            raise ValueError("edges: expected the same edges on both sides of +; give those of the first to the second")
        sums = added(self, other, SUMS)
        return replace(self, **sums | {"confidence_sum": jnp.where(same, sums["confidence_sum"], jnp.nan)})


def reliability(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    num_bins: int = 15,
    binning: Binning = "width",
    edges: ArrayLike | None = None,
    where: ArrayLike | None = None,
    batch_axis_name: AxisName | None = None,
) -> Reliability:
    """Returns how often predictions of each confidence are right, in bins (lo, hi].

    The prediction is ŷ = argmax_k z_k, and its confidence is p_ŷ.

    Args:
      logits: z, real numbers (*batch, K).
      labels: y, integers (*batch,).
      num_bins: B.
      binning: "width" has edges b/B. "mass" has edges at the b/B quantiles of this batch, so that bins are equally
        full, except that equal confidences share a bin.
      edges: ascending numbers (B + 1,) in place of `num_bins` and `binning`. With the edges of an earlier batch,
        equal-mass bins add up too. Traced edges that do not ascend make the errors NaN.
      where: boolean (*batch,), the examples that count.
      batch_axis_name: mesh axes that the examples are split over, inside `jax.shard_map`; the result is that of all.

    Returns:
      A `Reliability`. If classes tie for the largest logit, the first of them is the prediction, as in `jnp.argmax`.

    Raises:
      ValueError: an unknown `binning`, or concrete edges that do not ascend.

    Example:
      >>> from jax_ls import calibration
      >>> bins = calibration.reliability(jnp.log(jnp.array([[0.8, 0.2]])), jnp.array([1]), num_bins=2)
      >>> print(bins.count, bins.accuracy, f"{bins.confidence[1]:.2f}")
      [0. 1.] [nan  0.] 0.80

    References:
      Guo et al., On Calibration of Modern Neural Networks, 2017; equal mass: Nixon et al., 2019.
    """
    z, y, kept = as_examples(logits, labels, where)
    confidence, correct = confidence_and_hit(z, y)
    bins = _binned(confidence, correct, kept, num_bins, binning, _as_edges(edges, z, 1), batch_axis_name)
    return bins.psum(batch_axis_name)


def classwise_reliability(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    num_bins: int = 15,
    binning: Binning = "width",
    edges: ArrayLike | None = None,
    where: ArrayLike | None = None,
    batch_axis_name: AxisName | None = None,
) -> Reliability:
    """Returns how often class k is the label when the model gives it the probability p_k, for every k.

    Args:
      logits, labels, num_bins, binning, where, batch_axis_name: as in `reliability`.
      edges: (B + 1,) for all classes, or (K, B + 1).

    Returns:
      A `Reliability` with a row of bins for each class: its arrays are (K, B).

    Example:
      >>> from jax_ls import calibration
      >>> bins = calibration.classwise_reliability(jnp.zeros((4, 2)), jnp.array([0, 0, 0, 1]), num_bins=2)
      >>> bins.accuracy.tolist(), bins.error().tolist()
      ([[0.75, nan], [0.25, nan]], [0.25, 0.25])

    References:
      Nixon et al., Measuring Calibration in Deep Learning, 2019; Kull et al., Beyond Temperature Scaling, 2019.
    """
    z, y, kept = as_examples(logits, labels, where)
    p, known = with_whole_rows(jax.nn.softmax(z, axis=-1)), ClassAxis(z.shape[-1]).contains(y)
    given = _as_edges(edges, z, 2)
    checks.check_option("binning", binning, ("width", "mass"))
    size = checks.check_size("num_bins", num_bins)
    return _classwise(p, known, y, kept, given, size, binning, batch_axis_name).psum(batch_axis_name)


# Under `jit`, so that the loop over classes is compiled once and not at each call.
@functools.partial(jax.jit, static_argnames=("num_bins", "binning", "batch_axis_name"))
def _classwise(
    p: Array,
    known: Array,
    y: Array,
    kept: Array,
    given: Array | None,
    num_bins: int,
    binning: Binning,
    batch_axis_name: AxisName | None,
) -> Reliability:
    """Returns the bins of each class over the predictions of this device."""

    def of_class(k: Array) -> Reliability:
        hit = jnp.where(known, (y == k).astype(p.dtype), jnp.nan)
        edges = given[k] if given is not None and given.ndim == 2 else given
        return _binned(jnp.take(p, k, axis=-1), hit, kept, num_bins, binning, edges, batch_axis_name)

    # One class at a time: the bins of all classes at once would take several times the memory of the logits.
    return jax.lax.map(of_class, jnp.arange(p.shape[-1], dtype=y.dtype))


def as_examples(logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None) -> tuple[Array, Array, Array]:
    """Returns logits in float32 or wider, labels, and which examples count. The other examples become zeros."""
    z = as_logits(logits)
    z = z.astype(checks.wide(z.dtype))
    y = checks.as_labels("labels", labels)
    checks.assert_batch("labels", y, z)
    if where is None:
        return z, y, jnp.ones(y.shape, bool)
    kept = checks.as_where("where", where, y.shape)
    return jnp.where(kept[..., None], z, 0), jnp.where(kept, y, 0), kept


def as_logits(logits: ArrayLike) -> Array:
    """Returns logits (*batch, K) in their own dtype; K is at least 1."""
    z = checks.as_logits("logits", logits)
    checks.assert_shape("logits", z, [(*z.shape[:-1], max(z.shape[-1], 1))], "at least one class")
    checks.check_no_probabilities("logits", z)
    return z


def confidence_and_hit(z: Array, y: Array) -> tuple[Array, Array]:
    """Returns max_k p_k, and 1 if that class is the label, else 0; NaN for a label that names no class."""
    return on_logits(_confidence_and_hit, z, {"labels": y})


def _confidence_and_hit(z: Logits, labels: Array) -> tuple[Array, Array]:
    hit = z.is_likeliest(labels).astype(z.dtype)
    return z.top_prob, jnp.where(z.contains(labels), hit, jnp.nan)


def total(x: Array) -> Array:
    """Returns Σ x, added in blocks so that a long float32 sum keeps its digits."""
    return sum_of(flat(x))


def ratio(sums: Array, count: Array) -> Array:
    """Returns sums / count; NaN where the count is 0."""
    dtype = sums.dtype if jnp.issubdtype(sums.dtype, jnp.floating) else jnp.result_type(float)
    return jnp.where(count > 0, sums.astype(dtype) / jnp.maximum(count, 1).astype(dtype), jnp.nan)


def _binned(
    confidence: Array,
    correct: Array,
    kept: Array,
    num_bins: int,
    binning: Binning,
    edges: Array | None,
    batch_axis_name: AxisName | None,
) -> Reliability:
    """Returns the bins of the predictions (*batch,) of this device. Quantiles are taken over all devices."""
    checks.check_option("binning", binning, ("width", "mass"))
    size = checks.check_size("num_bins", num_bins)
    confidence, correct, kept = (flat(x) for x in (confidence, correct, kept))
    if edges is not None:
        size = edges.size - 1
        confidence = jnp.where(jnp.all(edges[1:] >= edges[:-1]), confidence, jnp.nan)
    elif binning == "mass":
        edges = _quantiles(confidence, kept, size, batch_axis_name)
    else:
        # Division in float64 makes each edge the float32 nearest to b/B, as a confidence of 1/K is the nearest to 1/K.
        edges = jnp.asarray(np.arange(size + 1) / size, confidence.dtype)
    inner = jax.lax.stop_gradient(edges[1:-1])
    index = jnp.sum(confidence[:, None] > inner[None], axis=-1, dtype=jnp.int32)
    known = jnp.where(jnp.isnan(correct), jnp.nan, confidence)
    parts = [kept.astype(jnp.int32), (kept & (correct > 0)).astype(jnp.int32), jnp.where(kept, known, 0)]
    return Reliability(edges, *(sums_by_row(x, index, size) for x in parts))


def _as_edges(edges: ArrayLike | None, z: Array, ndim: int) -> Array | None:
    """Returns edges (B + 1,), or also (K, B + 1) if `ndim` is 2. Concrete edges must ascend."""
    if edges is None:
        return None
    given = checks.as_weight("edges", edges).astype(z.dtype)
    size, num_classes = max((2, *given.shape[-1:])), z.shape[-1]
    expected = "ascending numbers (B + 1,)" + f" or ({num_classes}, B + 1)" * (ndim - 1)
    checks.assert_shape("edges", given, [(num_classes, size), (size,)][2 - ndim :], expected)
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves(edges)):
        checks.check_values("edges", edges, lambda x: x[..., 1:] >= x[..., :-1], expected)
    return given


def _quantiles(confidence: Array, kept: Array, num_bins: int, batch_axis_name: AxisName | None) -> Array:
    """Returns the edges 0, the ⌈n b / B⌉-th smallest of the n confidences that count for 0 < b < B, and 1."""
    count = sum_over_devices(jnp.sum(kept, dtype=jnp.int32), batch_axis_name)
    values = gathered(jnp.where(kept, jax.lax.stop_gradient(confidence), jnp.inf), batch_axis_name)
    b = jnp.arange(1, num_bins, dtype=jnp.int32)
    rank = count // num_bins * b + (count % num_bins * b + num_bins - 1) // num_bins
    inner = jnp.sort(values)[jnp.maximum(rank, 1) - 1] if values.size else jnp.ones(b.shape, values.dtype)
    ends = jnp.arange(2, dtype=values.dtype)
    return jnp.concatenate([ends[:1], jnp.minimum(inner, 1), ends[1:]])
