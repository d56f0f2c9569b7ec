"""Calibration errors, and the area under the risk-coverage curve."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ls.calibration.reliability import (
    Binning,
    as_examples,
    classwise_reliability,
    confidence_and_hit,
    ratio,
    reliability,
    total,
)
from jax_ls.class_axis import AxisName, gathered
from jax_ls.reductions import sum_over_devices

__all__ = ["area_under_risk_coverage", "classwise_calibration_error", "expected_calibration_error", "overconfidence"]


def expected_calibration_error(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    num_bins: int = 15,
    binning: Binning = "width",
    norm: float = 1,
    where: ArrayLike | None = None,
    batch_axis_name: AxisName | None = None,
) -> Array:
    """Returns the expected calibration error (ECE), the mean gap between confidence and accuracy over bins.

    ECE = (Σ_b |B_b|/N |acc(B_b) − conf(B_b)|^norm)^(1/norm)

    Args:
      logits, labels, num_bins, binning, where, batch_axis_name: as in `reliability`. A smoothed model has nearly the
        same confidence for all examples, and they may all lie in one bin of equal width. So look at equal mass too.
      norm: 1; 2, the root of the mean square; or `jnp.inf`, the largest gap of any bin (MCE).

    Returns:
      A number in [0, 1]. It equals torchmetrics' figure unless a confidence lies on an edge: torchmetrics has bins
      [lo, hi), and one more bin for confidences of exactly 1.

    Raises:
      ValueError: an unknown `binning` or `norm`.

    Example:
      >>> from jax_ls import calibration
      >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6]]))
      >>> print(f"{calibration.expected_calibration_error(logits, jnp.array([0, 1, 1, 1])):.2f}")
      0.35

    References:
      Guo et al., On Calibration of Modern Neural Networks, 2017; Nixon et al., 2019, for equal mass.
    """
    bins = reliability(logits, labels, num_bins=num_bins, binning=binning, where=where, batch_axis_name=batch_axis_name)
    return bins.error(norm)


def classwise_calibration_error(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    num_bins: int = 15,
    binning: Binning = "width",
    norm: float = 1,
    where: ArrayLike | None = None,
    batch_axis_name: AxisName | None = None,
) -> Array:
    """Returns the mean over classes k of the calibration error of p_k.

    It judges all entries of p; `expected_calibration_error` judges only the largest.

    Args:
      logits, labels, num_bins, binning, norm, where, batch_axis_name: as in `expected_calibration_error`.

    Returns:
      A number in [0, 1]. It falls as 1/K, because most p_k are near 0. `classwise_reliability(...).error()` has the
      error of each class.

    Example:
      >>> from jax_ls import calibration
      >>> calibration.classwise_calibration_error(jnp.zeros((4, 2)), jnp.array([0, 0, 0, 1])).tolist()
      0.25

    References:
      Nixon et al., Measuring Calibration in Deep Learning, 2019; Kull et al., Beyond Temperature Scaling, 2019.
    """
    bins = classwise_reliability(
        logits, labels, num_bins=num_bins, binning=binning, where=where, batch_axis_name=batch_axis_name
    )
    return jnp.mean(bins.error(norm))


def overconfidence(
    logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None, batch_axis_name: AxisName | None = None
) -> Array:
    """Returns mean confidence minus accuracy: a calibration error with its sign.

    Args:
      logits, labels, where, batch_axis_name: as in `reliability`.

    Returns:
      A number in [−1, 1]. Above 0 the model is overconfident. Below 0 it is underconfident, as smoothed models often
      are. Its magnitude is the calibration error of a single bin. With norm 1, more bins never give less.

    Example:
      >>> from jax_ls import calibration
      >>> print(f"{calibration.overconfidence(jnp.log(jnp.array([[0.75, 0.25]])), jnp.array([0])):.2f}")
      -0.25

    References:
      Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    return reliability(logits, labels, num_bins=1, where=where, batch_axis_name=batch_axis_name).overconfidence


def area_under_risk_coverage(
    logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None, batch_axis_name: AxisName | None = None
) -> Array:
    """Returns the area under the risk-coverage curve (AURC).

    It is the mean over n = 1 … N of the error rate among the n most confident predictions.

    Args:
      logits, labels, where, batch_axis_name: as in `reliability`. Confidence is max p. Examples of the same confidence
        have no order; the result is the mean over all their orders.

    Returns:
      A number in [0, 1]: 0 if every prediction is right, about the error rate if confidence says nothing about errors.

    Example:
      >>> from jax_ls import calibration
      >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.8, 0.2]]))
      >>> calibration.area_under_risk_coverage(logits, jnp.array([0, 1])).tolist()  # right, wrong: (0/1 + 1/2) / 2
      0.25

    References:
      Geifman, Uziel & El-Yaniv, Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers, 2019.
    """
    z, y, kept = as_examples(logits, labels, where)
    confidence, correct = confidence_and_hit(z, y)
    counted = kept, kept & jnp.isnan(confidence + correct)
    count, unknown = (sum_over_devices(jnp.sum(x, dtype=jnp.int32), batch_axis_name) for x in counted)
    doubt, wrong = jnp.where(kept, -confidence, jnp.inf), (correct < 1).astype(jnp.int32)
    doubt, wrong = jax.lax.sort((gathered(doubt, batch_axis_name), gathered(wrong, batch_axis_name)), num_keys=1)
    n = jnp.arange(1, doubt.size + 1, dtype=jnp.int32)
    n, start, size, wrong_before, wrong_in_run = (x.astype(doubt.dtype) for x in (n, *_runs_of_ties(doubt, wrong)))
    wrong_among_n = wrong_before + (n - start) / size * wrong_in_run
    area = ratio(total(jnp.where(n <= count.astype(n.dtype), wrong_among_n / n, 0)), count)
    return jnp.where(unknown > 0, jnp.nan, area)


def _runs_of_ties(values: Array, marked: Array) -> tuple[Array, ...]:
    """Returns four numbers for each of the sorted values, about the run of equal values that it belongs to.

    They are the run's start, its length, the count of marked values before it, and the count of marked values in it.
    """
    index = jnp.arange(values.size, dtype=jnp.int32)
    differs = values[1:] != values[:-1]
    true = jnp.ones((min(values.size, 1),), bool)
    start = jax.lax.cummax(jnp.where(jnp.concatenate([true, differs]), index, 0))
    end = jax.lax.cummin(jnp.where(jnp.concatenate([differs, true]), index + 1, values.size), reverse=True)
    before = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(marked)])
    return start, end - start, before[start], before[end] - before[start]
