"""ε of each example from the model's prediction for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.class_axis import AxisName, flat, multiply
from jax_ls.logits import Logits, on_logits

__all__ = ["beta", "confidence", "entropy", "focal_gamma", "margin", "uncertainty"]


def confidence(
    logits: ArrayLike,
    labels: ArrayLike,
    smoothing: ArrayLike,
    *,
    gamma: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns ε p_y^γ: the surer the model is of the label, the more the label is smoothed.

    With ε = γ = 1 it is p_y.

    Args:
      logits: z, real numbers with K classes on `axis`; constants for differentiation.
      labels: y, integers (*batch,).
      smoothing: ε, () or (*batch,); any sign, may be traced.
      gamma: γ >= 0, () or (*batch,): 0 is plain smoothing; a large γ smooths only where p_y is close to 1.
      where: boolean (*batch,), the examples that count; elsewhere 0.
      class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      ε of each example, (*batch,), in float32 or wider; NaN for a label that names no class.

    Raises:
      ValueError: a concrete γ < 0; a traced one gives NaN.

    Example:
      >>> from jax_ls import adaptive
      >>> logits, labels = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]])), jnp.array([0, 1])
      >>> adaptive.confidence(logits, labels, 0.1).round(4).tolist()
      [0.075, 0.05]

    References:
      Smooths confident predictions, as Lee et al., Adaptive Label Smoothing with Self-Knowledge, 2022, do by entropy.
    """
    checks.check_values("gamma", gamma, lambda x: x >= 0, "numbers >= 0")
    return on_logits(
        _confidence,
        logits,
        {"labels": checks.as_labels("labels", labels), "smoothing": smoothing, "gamma": gamma},
        where=where,
        class_where=class_where,
        axis=axis,
        class_axis_name=class_axis_name,
    )


def _confidence(z: Logits, labels: Array, smoothing: Array, gamma: Array) -> Array:
    log_p = jax.lax.stop_gradient(z.log_prob(labels))
    gamma = jnp.where(gamma >= 0, gamma, jnp.nan).astype(z.dtype)
    return smoothing.astype(z.dtype) * jnp.exp(multiply(gamma, log_p))


def uncertainty(
    logits: ArrayLike,
    labels: ArrayLike,
    smoothing: ArrayLike,
    *,
    where: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns ε (1 − p_y): the less probable the label is to the model, the more it is smoothed.

    Args:
      logits, labels, smoothing, where, class_where, axis, class_axis_name: as in `confidence`. With a teacher's
        logits here and its predictions as `prior` of the loss, it is Maher & Kull's instance-based smoothing.

    Returns:
      ε of each example, (*batch,), in float32 or wider; NaN for a label that names no class.

    Example:
      >>> from jax_ls import adaptive
      >>> logits, labels = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]])), jnp.array([0, 1])
      >>> adaptive.uncertainty(logits, labels, 0.1).round(4).tolist()
      [0.025, 0.05]

    References:
      Smooths doubtful predictions: Maher & Kull, Instance-based Label Smoothing, 2021; in spirit Reed et al., 2014.
    """
    return on_logits(
        _uncertainty,
        logits,
        {"labels": checks.as_labels("labels", labels), "smoothing": smoothing},
        where=where,
        class_where=class_where,
        axis=axis,
        class_axis_name=class_axis_name,
    )


def _uncertainty(z: Logits, labels: Array, smoothing: Array) -> Array:
    return -smoothing.astype(z.dtype) * jnp.expm1(jax.lax.stop_gradient(z.log_prob(labels)))


def margin(
    logits: ArrayLike,
    labels: ArrayLike,
    smoothing: ArrayLike,
    *,
    where: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns ε max(0, p_y − max_{k≠y} p_k): ε grows with the label's lead, and is 0 where another class leads.

    Smoothing a misclassified example pushes the label's logit down although it is too low already. This rule does not.

    Args:
      logits, labels, smoothing, where, class_where, axis, class_axis_name: as in `confidence`.

    Returns:
      ε of each example, (*batch,), in float32 or wider; NaN for a label that names no class.

    Example:
      >>> from jax_ls import adaptive
      >>> logits, labels = jnp.log(jnp.array([[0.75, 0.25], [0.75, 0.25]])), jnp.array([0, 1])
      >>> adaptive.margin(logits, labels, 0.1).round(4).tolist()
      [0.05, 0.0]

    References:
      Smooths confident predictions. Why misclassified examples are left out: Zhou et al., MaxSup, 2025.
    """
    return on_logits(
        _margin,
        logits,
        {"labels": checks.as_labels("labels", labels), "smoothing": smoothing},
        where=where,
        class_where=class_where,
        axis=axis,
        class_axis_name=class_axis_name,
    )


def _margin(z: Logits, labels: Array, smoothing: Array) -> Array:
    lead = jnp.exp(jax.lax.stop_gradient(z.log_prob(labels))) - jnp.exp(z.log_rival(labels))
    return smoothing.astype(z.dtype) * jnp.maximum(lead, 0)


def entropy(
    logits: ArrayLike,
    smoothing: ArrayLike,
    *,
    where: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns ε (1 − H(p) / log K): the lower the entropy, the more the example is smoothed. Needs no labels.

    Args:
      logits, smoothing, where, class_where, axis, class_axis_name: as in `confidence`; K counts the classes that exist.

    Returns:
      ε of each example, (*batch,), in float32 or wider.

    Example:
      >>> from jax_ls import adaptive
      >>> adaptive.entropy(jnp.array([[0.0, 0.0], [99.0, 0.0]]), 0.1).round(4).tolist()
      [0.0, 0.1]

    References:
      Smooths confident predictions: Lee et al., Adaptive Label Smoothing with Self-Knowledge, 2022.
    """
    return on_logits(
        _entropy,
        logits,
        {"smoothing": smoothing},
        where=where,
        class_where=class_where,
        axis=axis,
        class_axis_name=class_axis_name,
    )


def _entropy(z: Logits, smoothing: Array) -> Array:
    # For one class log K is 0, and so is H. `maximum` undoes rounding of H above log K.
    most = jnp.log(jnp.where(z.num_classes > 1, z.num_classes, jnp.e))
    return smoothing.astype(z.dtype) * jnp.maximum(1 - jax.lax.stop_gradient(z.entropy()) / most, 0)


def focal_gamma(
    logits: ArrayLike,
    labels: ArrayLike,
    threshold: ArrayLike = 0.2,
    *,
    below: ArrayLike = 5.0,
    above: ArrayLike = 3.0,
    where: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns γ for `focal_loss` by p_y: a large one for labels that the model does not believe yet, FLSD-53.

    γ = 5 where p_y < 0.2, else 3.

    Args:
      logits: z, real numbers with K classes on `axis`; constants for differentiation.
      labels: y, integers (*batch,).
      threshold: the p_y that divides them, () or (*batch,).
      below, above: γ on either side, () or (*batch,).
      where, class_where, axis, class_axis_name: as in `confidence`.

    Returns:
      γ of each example, (*batch,), in float32 or wider; NaN for a label that names no class.

    Example:
      >>> from jax_ls import adaptive
      >>> logits, labels = jnp.log(jnp.array([[0.9, 0.1], [0.9, 0.1]])), jnp.array([0, 1])
      >>> adaptive.focal_gamma(logits, labels).tolist()
      [3.0, 5.0]

    References:
      Mukhoti et al., Calibrating Deep Neural Networks using Focal Loss, 2020.
    """
    return on_logits(
        _focal_gamma,
        logits,
        {"labels": checks.as_labels("labels", labels), "threshold": threshold, "below": below, "above": above},
        where=where,
        class_where=class_where,
        axis=axis,
        class_axis_name=class_axis_name,
    )


def _focal_gamma(z: Logits, labels: Array, threshold: Array, below: Array, above: Array) -> Array:
    threshold, below, above = (x.astype(z.dtype) for x in (threshold, below, above))
    p = jnp.exp(jax.lax.stop_gradient(z.log_prob(labels)))
    return jnp.where(p < threshold, below, above) + 0 * p


def beta(
    key: Array,
    averaged: ArrayLike,
    smoothing: ArrayLike,
    *,
    concentration: ArrayLike = 3.0,
    where: ArrayLike | None = None,
) -> Array:
    """Returns ε (1 − b) with draws b ~ Beta(a, 1), sorted so that the least probable label gets the smallest draw.

    With `spread="others"` the label keeps 1 − ε (1 − b), and the other classes share the rest. Only the order of the
    p_y matters, so smoothing does not fade as the model becomes sure. A draw below 1/K, of probability K^−a, makes the
    label the least likely class of its target.

    Args:
      key: a key of `jax.random`; use a new one in each step.
      averaged: p_y by a moving average of the model, (*batch,): `confidence(averaged_logits, labels, 1.0)`.
      smoothing: ε, () or (*batch,): the published α, the share of this loss beside plain cross-entropy.
      concentration: a > 0, (): the mean of b is a / (a + 1).
      where: boolean (*batch,), the examples that count and are ranked; elsewhere 0.

    Returns:
      ε of each example, (*batch,). Examples are ranked within the array: inside `shard_map`, on each device.

    Raises:
      ValueError: a concrete a <= 0; a traced one gives NaN.

    Example:
      >>> from jax_ls import adaptive
      >>> epsilon = adaptive.beta(jax.random.key(0), jnp.array([0.2, 0.9, 0.5]), 1.0)
      >>> jnp.argsort(epsilon).tolist()
      [1, 2, 0]

    References:
      Smooths doubtful predictions: Zhang & Sabuncu, Self-Distillation as Instance-Specific Label Smoothing, 2020 (a =
      3, α = 0.6 in the published code).
    """
    p = jax.lax.stop_gradient(checks.as_weight("averaged", averaged))
    kept = jnp.ones(p.shape, bool) if where is None else checks.as_where("where", where, p.shape)
    a = checks.as_positive("concentration", concentration).astype(p.dtype)
    checks.assert_shape("concentration", a, [()], "a number")
    epsilon = checks.as_batch_numbers("smoothing", smoothing, p.shape).astype(p.dtype)
    # P(b <= x) = x^a, inverted.
    draws = jax.random.uniform(key, (p.size,), p.dtype, minval=jnp.finfo(p.dtype).tiny) ** (1 / a)
    ranked = jnp.sort(jnp.where(flat(kept), draws, jnp.inf))
    order = jnp.argsort(flat(jnp.where(kept, p, jnp.inf)))
    b = jnp.zeros_like(draws).at[order].set(ranked).reshape(p.shape)
    left = jnp.where(kept, jnp.where(jnp.isnan(p) | jnp.isnan(a), jnp.nan, 1 - b), 0)
    return jnp.where(kept, epsilon, 0) * left
