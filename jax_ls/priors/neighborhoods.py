"""u from the neighbouring labels in a sequence or an image: sparse targets, which never hold (*batch, K)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.class_axis import laid_as
from jax_ls.targets import Sparse

__all__ = ["neighbors", "spatial"]


def neighbors(
    labels: ArrayLike,
    *,
    offsets: Sequence[int] = (-2, -1, 1, 2),
    weights: ArrayLike | Sequence[float] = (2.0, 5.0, 5.0, 2.0),
    where: ArrayLike | None = None,
) -> Sparse:
    """Returns the weighted labels of each step's neighbours in a sequence: u_t = Σ_d w_d δ_{y_{t+d}} / Σ_d w_d.

    The sums run over neighbours that exist and count, so u sums to 1 at the ends of the sequence too. A step without
    neighbours gets its own label. `smooth(labels, ε, prior=neighbors(labels))` is the published target.

    Args:
      labels: integers (*batch, T).
      offsets: d, in steps: S integers.
      weights: w, numbers ≥ 0, (S,). May be traced; NaN if negative.
      where: boolean (*batch, T), the steps that count. Labels of other steps (padding) are never used.

    Returns:
      u, a `Sparse` target with S entries for each step.

    Raises:
      TypeError: offsets that are no integers.
      ValueError: concrete weights that are negative.

    Example:
      >>> from jax_ls import priors
      >>> labels = jnp.array([0, 1, 2])
      >>> u = priors.neighbors(labels, offsets=(-1, 1), weights=(1.0, 3.0))
      >>> print(u.probs(3))
      [[0.   1.   0.  ]
       [0.25 0.   0.75]
       [0.   1.   0.  ]]

    References:
      Chorowski and Jaitly, Towards Better Decoding and Language Model Integration in Sequence to Sequence Models, 2017.
    """
    y = checks.as_labels("labels", labels)
    checks.assert_min_rank("labels", y, 1, "integers (*batch, T)")
    if not isinstance(offsets, Sequence | np.ndarray) or not len(offsets):
        raise TypeError(f"offsets: expected a sequence of integers, got {offsets!r}")
    for offset in offsets:
        checks.check_integer("offsets", offset)
    w = checks.as_amount("weights", weights)
    checks.assert_shape("weights", w, [(len(offsets),)], f"({len(offsets)},), one number an offset")
    shifts = [(offset,) for offset in offsets]
    steps = np.arange(y.shape[-1])[:, None] + np.asarray(offsets, int)
    exists = jnp.broadcast_to((steps >= 0) & (steps < y.shape[-1]), (*y.shape, len(offsets)))
    if where is not None:
        where = laid_as(checks.as_where("where", where, y.shape), y, y.ndim)
        exists = laid_as(exists, y, y.ndim) & _at_offsets(where, shifts)
    return _vote(y, _at_offsets(y, shifts), w, exists)


def spatial(
    label_map: ArrayLike,
    *,
    kernel_size: int = 3,
    sigma: ArrayLike = 1.0,
    ndim: int = 2,
    where: ArrayLike | None = None,
) -> Sparse:
    """Returns the target of spatially varying smoothing: half a pixel's label, half its neighbours' labels.

    q = ½ δ_y + ½ Σ_j g_j δ_{y_j} / Σ_j g_j over neighbours j, g_j = exp(−|j|² / 2σ²). It is one-hot inside a region and
    soft at its border. Beyond the map the pixels at its edge are repeated. `cross_entropy(logits, spatial(label_map))`
    is the published loss. As a prior at ε < 1, the neighbours get ε/2.

    Args:
      label_map: integers (*batch, H, W), or (*batch, D, H, W) with ndim=3.
      kernel_size: an odd number n of pixels along each axis. The target has n^ndim entries for each pixel: 9, or 27.
      sigma: σ > 0 in pixels. May be traced; NaN if not positive.
      ndim: how many of the last axes are space.
      where: boolean in the shape of the map, the pixels that count. The others (void) are no one's neighbours. A pixel
        whose neighbours are all void gets a one-hot target.

    Returns:
      q, a `Sparse` target, which holds no array of the logits' size.

    Raises:
      ValueError: a kernel size that is even or below 3, or a concrete σ ≤ 0.

    Example:
      >>> from jax_ls import priors
      >>> q = priors.spatial(jnp.array([[0, 0, 0, 1, 1, 1]]))
      >>> q.probs(2)[0, :, 1].round(4).tolist()
      [0.0, 0.0, 0.1722, 0.8278, 1.0, 1.0]

    References:
      Islam and Glocker, Spatially Varying Label Smoothing: Capturing Uncertainty from Expert Annotations, 2021.
    """
    y = checks.as_labels("label_map", label_map)
    space = checks.check_size("ndim", ndim)
    checks.assert_min_rank("label_map", y, space, f"integers with {space} axes of space")
    size = checks.check_size("kernel_size", kernel_size)
    if size < 3 or size % 2 == 0:
        raise ValueError(f"kernel_size: expected an odd number, 3 or more, got {size}")
    sigma = checks.as_scalar("sigma", checks.as_positive("sigma", sigma))
    reach = range(-(size // 2), size // 2 + 1)
    offsets = [(0,) * space, *(d for d in itertools.product(reach, repeat=space) if any(d))]
    squares = np.sum(np.square(offsets[1:]), axis=-1)
    # Relative to the nearest neighbours, whose g is 1: else a small σ would make every g 0. Divided by σ twice, because
    # σ² may underflow.
    farther = jnp.exp(jnp.asarray(1 - squares, sigma.dtype) / sigma / (2 * sigma))
    g = jnp.where(jnp.isnan(sigma), jnp.nan, jnp.where(squares == 1, 1, farther))
    indices = _at_offsets(y, offsets)
    if where is None:
        weights = jnp.concatenate([jnp.ones(1, g.dtype), g / jnp.sum(g)])
        return Sparse(indices, jnp.broadcast_to(0.5 * weights, indices.shape))
    where = laid_as(checks.as_where("where", where, y.shape), y, y.ndim)
    votes = _vote(y, indices[..., 1:], g, _at_offsets(where, offsets[1:]))
    weights = jnp.concatenate([jnp.ones_like(votes.weights[..., :1]), votes.weights], axis=-1)
    return Sparse(jnp.concatenate([y[..., None], votes.indices], axis=-1), 0.5 * weights)


def _at_offsets(x: Array, offsets: Sequence[tuple[int, ...]]) -> Array:
    """Returns x at each offset along its last axes, (*shape, S). Entries at the edge are repeated beyond it."""
    space = len(offsets[0])
    # One gather, because XLA on CPU takes five times as long to stack S slices on the last axis.
    index = []
    for axis, moves in enumerate(zip(*offsets, strict=True)):
        size = x.shape[axis - space]
        line = jnp.arange(size, dtype=jnp.int32)[:, None] + jnp.asarray(moves, jnp.int32)[None]
        others = (1,) * axis, (1,) * (space - 1 - axis)
        index.append(jnp.clip(line, 0, size - 1).reshape(*others[0], size, *others[1], len(moves)))
    sharding = jax.typeof(x).sharding
    out = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, None)) if any(sharding.spec) else None
    return x.at[(..., *index)].get(mode="clip", out_sharding=out)


def _vote(labels: Array, neighbors: Array, weights: Array, counted: Array) -> Sparse:
    """Returns Σ_s w_s δ_{neighbor_s} / Σ_s w_s over the neighbours that count; the label itself if none counts."""
    w = jnp.broadcast_to(weights, counted.shape) * counted.astype(weights.dtype)
    total = jnp.sum(w, axis=-1, keepdims=True)
    alone = total == 0
    share = jnp.where(alone, 1 / weights.size, w / jnp.where(alone, 1, total))
    return Sparse(jnp.where(counted & ~alone, neighbors, labels[..., None]), share)
