"""Batches whose inputs are mixed in pairs, with the labels of both: mixup and CutMix.

    images, target = mixing.cutmix(key, images, labels)
    losses = cross_entropy(model(images), smooth(target, 0.1))

Both return a `Mixed`, which unpacks like that.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.class_axis import everywhere, laid_as, look_up
from jax_ls.targets import Sparse

__all__ = ["Mixed", "cutmix", "mixup"]


class Mixed(NamedTuple):
    """A mixed batch: its inputs, and its labels as a target λ δ_y + (1 − λ) δ_y'.

    Example:
      >>> from jax_ls import mixing
      >>> inputs, target = mixing.mixup(jax.random.key(0), jnp.ones((4, 2)), jnp.arange(4))
      >>> inputs.shape, target.indices.shape
      ((4, 2), (4, 2))
    """

    inputs: Array
    target: Sparse


def mixup(
    key: Array, inputs: ArrayLike, labels: ArrayLike, alpha: ArrayLike = 0.2, *, where: ArrayLike | None = None
) -> Mixed:
    """Returns λ x + (1 − λ) x' and λ δ_y + (1 − λ) δ_y', x' another example and λ ~ Beta(α, α) for each.

    Args:
      key: of `jax.random`; a new one each step.
      inputs: x, real numbers (B, ...).
      labels: y, integers (B,).
      alpha: α > 0, a number, may be traced; small ones leave most examples nearly as they are.
      where: boolean (B,), the examples that count: others stay as they are, and nobody is mixed with them.

    Returns:
      A `Mixed`, inputs in their own dtype. `smooth(target, ε)` smooths its labels.

    Raises:
      ValueError: a concrete α ≤ 0.

    Example:
      >>> from jax_ls import mixing
      >>> inputs, target = mixing.mixup(jax.random.key(0), jnp.eye(3), jnp.arange(3), 1.0)
      >>> bool(jnp.allclose(inputs, target.probs(3)))
      True

    References:
      Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018.
    """
    x, y, partner, lam, _ = _pairs(key, "inputs", inputs, labels, alpha, where)
    share = lam.reshape(lam.shape + (1,) * (x.ndim - 1)).astype(x.dtype)
    # What does not count may be NaN, and is its own partner.
    mixed = x + (1 - share) * (look_up(x, partner) - x)
    return Mixed(jnp.where(share == 1, x, mixed), _target(y, partner, lam))


def cutmix(
    key: Array,
    images: ArrayLike,
    labels: ArrayLike,
    alpha: ArrayLike = 1.0,
    *,
    axes: tuple[int, int] = (1, 2),
    where: ArrayLike | None = None,
) -> Mixed:
    """Returns images with a box of another image in each, and λ δ_y + (1 − λ) δ_y', λ the share of pixels that is left.

    The box has sides √(1 − λ₀) of the image's, λ₀ ~ Beta(α, α), its centre anywhere; the image's edges cut it off.

    Args:
      key: of `jax.random`; a new one each step.
      images: x, numbers (B, ...).
      labels: y, integers (B,).
      alpha: α > 0, a number, may be traced.
      axes: the two axes of height and width; (1, 2) for (B, H, W, C) and (B, H, W), (2, 3) for (B, C, H, W).
      where: boolean (B,), the examples that count: others stay as they are, and nobody is mixed with them.

    Returns:
      A `Mixed`, images in their own dtype. `smooth(target, ε)` smooths its labels.

    Raises:
      ValueError: a concrete α ≤ 0, or an axis that is none.

    Example:
      >>> from jax_ls import mixing
      >>> images = jnp.broadcast_to(jnp.arange(3.0)[:, None, None], (3, 8, 8))
      >>> mixed, target = mixing.cutmix(jax.random.key(0), images, jnp.arange(3))
      >>> bool(jnp.allclose(mixed.mean((1, 2)), target.dot(jnp.broadcast_to(jnp.arange(3.0), (3, 3)))))
      True

    References:
      Yun et al., CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features, 2019.
    """
    x, y, partner, lam, key = _pairs(key, "images", images, labels, alpha, where)
    kept = 1 - lam
    side = jnp.sqrt(kept)
    inside, area = jnp.ones((1,) * x.ndim, bool), jnp.ones_like(lam)
    for name, axis, axis_key in zip(("axes[0]", "axes[1]"), axes, jax.random.split(key), strict=True):
        axis = checks.check_axis(name, axis, x.ndim)
        size = x.shape[axis]
        centre = jax.random.uniform(axis_key, lam.shape, lam.dtype) * size
        low, high = (jnp.clip(jnp.floor(centre + sign * side * size / 2 + 0.5), 0, size) for sign in (-1, 1))
        area *= (high - low) / size
        place = jnp.arange(size, dtype=lam.dtype).reshape((size,) + (1,) * (x.ndim - 1 - axis))
        place = place.reshape((1,) * axis + place.shape)
        low, high = (b.reshape(b.shape + (1,) * (x.ndim - 1)) for b in (low, high))
        inside = inside & (place >= low) & (place < high)
    return Mixed(jnp.where(inside, look_up(x, partner), x), _target(y, partner, 1 - area))


def _pairs(
    key: Array, name: str, inputs: ArrayLike, labels: ArrayLike, alpha: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array, Array, Array]:
    """Inputs, labels, the partner of each example, λ (1 where it does not count), and a key that is not used yet."""
    x = checks.as_array(name, inputs, "numbers (B, ...)")
    checks.assert_min_rank(name, x, 1, "numbers (B, ...)")
    y = checks.as_batch_labels("labels", labels, x.shape[:1])
    a = checks.as_scalar("alpha", checks.as_positive("alpha", alpha))
    kept = jnp.ones(y.shape, bool) if where is None else checks.as_where("where", where, y.shape)
    order_key, lam_key, next_key = jax.random.split(key, 3)
    # The examples that count, in the order of the batch and by lot; the others come last in both, and stay in place.
    whole = everywhere(kept)
    lots = jnp.where(whole, jax.random.uniform(order_key, y.shape), 2)
    partner = jnp.zeros(y.shape, int).at[jnp.argsort(~whole)].set(jnp.argsort(lots))
    lam = jax.random.beta(lam_key, a, a, y.shape, a.dtype)
    # On an explicit mesh, as the inputs lie.
    y, kept, partner, lam = (laid_as(row, x, 1) for row in (y, kept, partner, lam))
    return x, y, partner, jnp.where(kept, lam, 1), next_key


def _target(y: Array, partner: Array, lam: Array) -> Sparse:
    return Sparse(jnp.stack([y, look_up(y, partner)], axis=-1), jnp.stack([lam, 1 - lam], axis=-1))
