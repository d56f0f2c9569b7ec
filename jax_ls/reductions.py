"""The loss of each example -> one number, also over devices and micro-batches."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.class_axis import AxisName, multiply

__all__ = ["Reduction", "mean", "normalizer", "reduce", "reduce_counted", "sum_over_devices"]

Reduction = Literal["none", "sum", "mean", "sum_by_nonzero_weights"]


@checks.named_options
def mean(
    losses: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    denominator: ArrayLike | None = None,
    batch_axis_name: AxisName | None = None,
) -> Array:
    """Returns the weighted mean Σ w · loss / Σ w; 0 if all weights are 0.

    An example of weight 0 does not count, even if its loss is NaN. Give `where` to the loss too: only then is the
    gradient of that example 0 as well. To accumulate over k micro-batches, give each call the `denominator` of the
    whole batch, Σ w over all micro-batches. The k results and gradients then add up to those of the whole batch.

    Args:
      losses: any shape.
      weights: a mask or the weight of each example, broadcastable to the losses; 1 if None.
      denominator: a positive number () to divide by in place of Σ w.
      batch_axis_name: mesh axes that the examples are split over, inside `jax.shard_map`; the mean is that of all.

    Returns:
      A number.

    Example:
      >>> mean(jnp.array([1.0, 5.0, jnp.nan]), jnp.array([3, 1, 0])).tolist()
      2.0
      >>> batch = jnp.array([1.0, 2.0, 6.0])
      >>> (mean(batch[:1], denominator=3) + mean(batch[1:], denominator=3)).tolist()
      3.0
    """
    return reduce(losses, weights, reduction="mean", denominator=denominator, batch_axis_name=batch_axis_name)


@checks.named_options
def reduce(
    losses: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    reduction: Reduction,
    denominator: ArrayLike | None = None,
    batch_axis_name: AxisName | None = None,
) -> Array:
    """Returns the losses as one number, or each loss times its weight.

    "none": w · loss. "sum": Σ w · loss. "mean": Σ w · loss / Σ w. "sum_by_nonzero_weights": Σ w · loss divided by the
    number of weights that are not 0, the default of `tf.losses`. If the divisor is 0, the result is 0.

    Args:
      losses, weights, denominator, batch_axis_name: as in `mean`; only "mean" takes a denominator.
      reduction: one of the four words.

    Returns:
      A number; with "none", an array in the shape of the losses.

    Raises:
      ValueError: an unknown `reduction`, or a denominator with another reduction than "mean".

    Example:
      >>> reduce(jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 2.0, 0.0]), reduction="sum_by_nonzero_weights").tolist()
      3.0
    """
    loss = checks.as_weight("losses", losses)
    w = jnp.ones_like(loss) if weights is None else checks.as_broadcast("weights", weights, loss)
    count = normalizer(w, reduction, denominator=denominator, batch_axis_name=batch_axis_name)
    weighted = multiply(w, loss)
    return weighted if reduction == "none" else _sum(weighted, batch_axis_name) / count


def reduce_counted(losses: Any, counts: Array, reduction: Reduction, batch_axis_name: AxisName | None = None) -> Any:
    """Returns a tree of losses (*batch,) as `reduce` does, where a mean divides by Σ counts: 0 if that is 0.

    A count is what an example adds to the divisor: 1, the weight of its class, or 0 for one that is left out.
    """
    count = normalizer(counts, reduction, batch_axis_name=batch_axis_name)
    if reduction == "none":
        return losses
    total = _sum(counts, batch_axis_name) if reduction == "mean" else count

    def reduced(x: Array) -> Array:
        summed = _sum(x, batch_axis_name) / count
        return jnp.where(total == 0, jnp.zeros((), summed.dtype), summed)

    return jax.tree.map(reduced, losses)


def normalizer(
    weights: Array,
    reduction: Reduction,
    *,
    denominator: ArrayLike | None = None,
    batch_axis_name: AxisName | None = None,
) -> Array:
    """Returns what Σ w · loss is divided by; 1 for a sum, and 1 in place of 0."""
    checks.check_option("reduction", reduction, ("none", "sum", "mean", "sum_by_nonzero_weights"))
    one = jnp.ones((), weights.dtype)
    if denominator is not None:
        if reduction != "mean":
            raise ValueError(f'denominator: expected None with reduction "{reduction}", got {denominator!r}')
        count = checks.as_broadcast("denominator", denominator, one)
    elif reduction == "mean":
        count = _sum(weights, batch_axis_name)
    elif reduction == "sum_by_nonzero_weights":
        count = _sum((weights != 0).astype(weights.dtype), batch_axis_name)
    else:
        return one
    return jnp.where(count == 0, 1, count)


def sum_over_devices(x: Any, batch_axis_name: AxisName | None) -> Any:
    """Returns a tree with each array summed over the mesh axes; the tree itself if they are None."""
    if batch_axis_name is None:
        return x
    checks.check_mesh_axes("batch_axis_name", batch_axis_name)
    return jax.lax.psum(x, batch_axis_name)


def _sum(x: Array, batch_axis_name: AxisName | None) -> Array:
    return sum_over_devices(jnp.sum(x), batch_axis_name)
