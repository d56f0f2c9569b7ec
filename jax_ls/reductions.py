"""The loss of each example -> one number, over devices and accumulation steps too."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.class_axis import AxisName, multiply

__all__ = ["Reduction", "mean", "normalizer", "reduce", "sum_over_devices"]

Reduction = Literal["none", "sum", "mean", "sum_by_nonzero_weights"]


def mean(
    losses: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    denominator: ArrayLike | None = None,
    batch_axis_name: AxisName | None = None,
) -> Array:
    """Weighted mean, Σ w · loss / Σ w; 0 where no weight is left.

    Weights divide as they multiply: an example of weight 0 counts nowhere, be it NaN (for its gradient to be 0 too,
    tell the loss by `where`). To accumulate over k micro-batches, give each the `denominator` of the whole batch, Σ w
    over all of them: the k results, and their gradients, then add up to those of the whole batch.

    Args:
      losses: any shape.
      weights: broadcastable to the losses: a mask, or the weight of each example; 1 if None.
      denominator: what to divide by instead of Σ w: () and positive.
      batch_axis_name: mesh axes to sum over, inside `jax.shard_map`: the mean is then that of all devices.

    Returns:
      A number.

    Raises:
      AssertionError: weights that do not broadcast to the losses.

    Example:
      >>> mean(jnp.array([1.0, 5.0, jnp.nan]), jnp.array([3, 1, 0])).tolist()
      2.0
      >>> batch = jnp.array([1.0, 2.0, 6.0])
      >>> (mean(batch[:1], denominator=3) + mean(batch[1:], denominator=3)).tolist()
      3.0
    """
    return reduce(losses, weights, reduction="mean", denominator=denominator, batch_axis_name=batch_axis_name)


def reduce(
    losses: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    reduction: Reduction,
    denominator: ArrayLike | None = None,
    batch_axis_name: AxisName | None = None,
) -> Array:
    """Losses as one number, or weighted one by one.

    "none": w · loss. "sum": Σ w · loss. "mean": Σ w · loss / Σ w. "sum_by_nonzero_weights": Σ w · loss over the
    number of weights that are not 0, the default of `tf.losses`. A mean over nothing is 0.

    Args:
      losses, weights, denominator, batch_axis_name: as in `mean`; a denominator goes with "mean" alone.
      reduction: one of the four words.

    Returns:
      A number; with "none", an array in the shape of the losses.

    Raises:
      AssertionError: weights that do not broadcast to the losses.
      ValueError: an unknown `reduction`, or a denominator where none divides.

    Example:
      >>> reduce(jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 2.0, 0.0]), reduction="sum_by_nonzero_weights").tolist()
      3.0
    """
    loss = checks.as_weight("losses", losses)
    w = jnp.ones_like(loss) if weights is None else checks.as_broadcast("weights", weights, loss)
    count = normalizer(w, reduction, denominator=denominator, batch_axis_name=batch_axis_name)
    weighted = multiply(w, loss)
    return weighted if reduction == "none" else _sum(weighted, batch_axis_name) / count


def normalizer(
    weights: Array,
    reduction: Reduction,
    *,
    denominator: ArrayLike | None = None,
    batch_axis_name: AxisName | None = None,
) -> Array:
    """What Σ w · loss is divided by: 1 where nothing is to be, or where the divisor would be 0."""
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
    """Sums each array of a tree over the mesh axes that the examples are split over; None: as it is."""
    if batch_axis_name is None:
        return x
    checks.check_mesh_axes("batch_axis_name", batch_axis_name)
    return jax.lax.psum(x, batch_axis_name)


def _sum(x: Array, batch_axis_name: AxisName | None) -> Array:
    return sum_over_devices(jnp.sum(x), batch_axis_name)
