"""Proper scores of predicted probabilities, least in expectation for the true ones, and a mean that adds up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import pytree
from jax_ls.calibration.reliability import as_examples, as_logits, ratio, total
from jax_ls.class_axis import AxisName, multiply
from jax_ls.losses import cross_entropy
from jax_ls.reductions import sum_over_devices
from jax_ls.running_sums import added, as_running
from jax_ls.targets import OneHot

__all__ = ["Mean", "brier_score", "negative_log_likelihood", "squared_error"]


# The sums of a `Mean`, and the field that holds the rounding error of each.
SUMS = {"sum": "lost_sum", "count": "lost_count"}


@pytree()
@dataclass(frozen=True, eq=False)
class Mean:
    """A mean held as a sum and a count, so that batches and devices add up.

    `a + b` is the mean of both sets together, `psum` the mean over all devices, and `value` the number.

    Args:
      sum: the sum of the losses that count.
      count: how many losses count: a whole number in the dtype of the sum.
      lost_sum, lost_count: the rounding errors of both, which `+` carries along; 0 if None.

    Example:
      >>> from jax_ls import calibration
      >>> batches = jnp.array([1.0, 2.0]), jnp.array([6.0])
      >>> (calibration.Mean.of(batches[0]) + calibration.Mean.of(batches[1])).value.tolist()
      3.0
    """

    sum: Array
    count: Array
    lost_sum: Any = None
    lost_count: Any = None

    def __post_init__(self) -> None:
        dtype = jnp.asarray(self.sum).dtype
        for name, lost in SUMS.items():
            rounded, rounding_error = as_running(jnp.asarray(getattr(self, name)), dtype)
            object.__setattr__(self, name, rounded)
            if getattr(self, lost) is None:
                object.__setattr__(self, lost, rounding_error)

    @classmethod
    def of(cls, losses: ArrayLike, where: ArrayLike | None = None) -> Mean:
        """Returns the mean of losses of any shape, over the entries that boolean `where` of that shape keeps."""
        x = checks.as_weight("losses", losses)
        kept = jnp.ones(x.shape, bool) if where is None else checks.as_where("where", where, x.shape)
        return cls(total(multiply(kept.astype(x.dtype), x)), jnp.sum(kept, dtype=jnp.int32))

    @property
    def value(self) -> Array:
        """The mean; NaN if nothing was counted."""
        return ratio(self.sum, self.count)

    def psum(self, batch_axis_name: AxisName | None) -> Mean:
        """Returns the mean over all devices, inside `jax.shard_map`."""
        return replace(self, **sum_over_devices(dict(vars(self)), batch_axis_name))

    def __add__(self, other: Mean) -> Mean:
        if not isinstance(other, Mean):
            return NotImplemented
        return replace(self, **added(self, other, SUMS))


def negative_log_likelihood(
    logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None, batch_axis_name: AxisName | None = None
) -> Array:
    """Returns the mean of −log p_y: the cross-entropy without smoothing.

    Args:
      logits, labels, where, batch_axis_name: as in `reliability`.

    Returns:
      A number in nats per example. Its exponential is the perplexity.

    Example:
      >>> from jax_ls import calibration
      >>> print(f"{calibration.negative_log_likelihood(jnp.zeros((2, 4)), jnp.array([0, 3])):.4f}")
      1.3863

    References:
      Good, Rational Decisions, 1952.
    """
    return _mean(negative_log_probability(logits, labels, where=where), where, batch_axis_name)


def negative_log_probability(logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    """Returns −log p_y of each example, (*batch,)."""
    return cross_entropy(as_logits(logits), OneHot(checks.as_labels("labels", labels)), where=where)


def squared_error(logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    """Returns Σ_k (p_k − δ_ky)² of each example, from 0 to 2. Its mean is the Brier score.

    Args:
      logits, labels, where: as in `reliability`.

    Returns:
      Errors (*batch,) in float32 or wider: 0 for an example that does not count, NaN for a label that names no class.

    Example:
      >>> from jax_ls import calibration
      >>> print(calibration.squared_error(jnp.log(jnp.array([[0.75, 0.25]])), jnp.array([0])).round(3))
      [0.125]

    References:
      Brier, Verification of Forecasts Expressed in Terms of Probability, 1950.
    """
    z, y, kept = as_examples(logits, labels, where)
    error = jnp.sum(jnp.square(jax.nn.softmax(z, axis=-1) - OneHot(y).probs(z.shape[-1]).astype(z.dtype)), axis=-1)
    return jnp.where(kept, error, 0)


def brier_score(
    logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None, batch_axis_name: AxisName | None = None
) -> Array:
    """Returns the Brier score, the mean of Σ_k (p_k − δ_ky)², from 0 to 2.

    Args:
      logits, labels, where, batch_axis_name: as in `reliability`.

    Returns:
      A number. For two classes it is twice the figure of the definition that sums over one class only.

    Example:
      >>> from jax_ls import calibration
      >>> calibration.brier_score(jnp.zeros((2, 4)), jnp.array([0, 3])).tolist()
      0.75

    References:
      Brier, Verification of Forecasts Expressed in Terms of Probability, 1950.
    """
    return _mean(squared_error(logits, labels, where=where), where, batch_axis_name)


def where_and_mask(where: ArrayLike | None, mask: ArrayLike | None, labels: ArrayLike) -> Array | None:
    """Returns which labels both `where` (booleans) and `mask` (booleans or numbers) keep; None if neither is given."""
    shape = np.shape(labels)
    kept = None if where is None else checks.as_where("where", where, shape)
    if mask is None:
        return kept
    unmasked = checks.as_weight("mask", mask) != 0
    checks.assert_shape("mask", unmasked, [shape], f"booleans {shape}")
    return unmasked if kept is None else unmasked & kept


def _mean(losses: Array, where: ArrayLike | None, batch_axis_name: AxisName | None) -> Array:
    mean = Mean.of(losses, where)
    return mean.psum(batch_axis_name).value
