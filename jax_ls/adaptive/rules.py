"""Rules that give ε of each example from what the model predicts."""

import jax
import jax.numpy as jnp

from jax_ls import checks
from jax_ls.beliefs import Belief
from jax_ls.class_axis import AxisName, flat, multiply
from jax_ls.predictions import Array, Rival, log_prob, one_hot

__all__ = ["beta", "confidence", "entropy", "margin", "uncertainty"]


def confidence(
    logits: Array,
    labels: Array,
    smoothing: Array,
    *,
    gamma: Array = 1.0,
    where: Array | None = None,
    class_where: Array | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    """ε p_y^γ: the surer the model is of the label, the more it is smoothed. With ε = γ = 1, p_y itself.

    Args:
      logits: z, real numbers with K classes on `axis`; constants for differentiation.
      labels: y, integers (*batch,).
      smoothing: ε, () or (*batch,); any sign, may be traced.
      gamma: γ >= 0, () or (*batch,): 0 is plain smoothing, a large one spares all but the surest.
      where: boolean (*batch,), the examples that count; elsewhere 0.
      class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      ε of each example, (*batch,), in float32 or wider; NaN for a label that names no class.

    Raises:
      AssertionError, TypeError, ValueError: dtypes, shapes, `axis`, or a γ < 0, by name.

    Example:
      >>> from jax_ls import adaptive
      >>> logits, labels = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]])), jnp.array([0, 1])
      >>> adaptive.confidence(logits, labels, 0.1).round(4).tolist()
      [0.075, 0.05]

    References:
      Smooths the confident, as do Lee et al., Adaptive Label Smoothing with Self-Knowledge, 2022, by entropy.
    """
    checks.check_values("gamma", gamma, lambda x: x >= 0, "numbers >= 0")
    log_p = log_prob(logits, one_hot(labels), where, class_where, axis, class_axis_name)
    return _epsilon(smoothing, jnp.exp(multiply(_parameter("gamma", gamma, log_p), log_p)), where)


def uncertainty(
    logits: Array,
    labels: Array,
    smoothing: Array,
    *,
    where: Array | None = None,
    class_where: Array | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    """ε (1 − p_y): the less the model believes the label, the more it is smoothed.

    Args:
      logits, labels, smoothing, where, class_where, axis, class_axis_name: as in `confidence`. The logits of a teacher,
        and its predictions as `prior`, make the instance-based smoothing of Maher & Kull.

    Returns:
      ε of each example, (*batch,), in float32 or wider; NaN for a label that names no class.

    Raises:
      AssertionError, TypeError, ValueError: dtypes, shapes or `axis`, by name.

    Example:
      >>> from jax_ls import adaptive
      >>> logits, labels = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]])), jnp.array([0, 1])
      >>> adaptive.uncertainty(logits, labels, 0.1).round(4).tolist()
      [0.025, 0.05]

    References:
      Smooths the doubtful: Maher & Kull, Instance-based Label Smoothing, 2021; in spirit Reed et al., 2014.
    """
    log_p = log_prob(logits, one_hot(labels), where, class_where, axis, class_axis_name)
    return _epsilon(smoothing, -jnp.expm1(log_p), where)


def margin(
    logits: Array,
    labels: Array,
    smoothing: Array,
    *,
    where: Array | None = None,
    class_where: Array | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    """ε max(0, p_y − max_{k≠y} p_k): smoothed by how far the label leads, not at all where it does not lead.

    Smoothing a misclassified example pushes down a label that is too low already; this rule never does.

    Args:
      logits, labels, smoothing, where, class_where, axis, class_axis_name: as in `confidence`.

    Returns:
      ε of each example, (*batch,), in float32 or wider; NaN for a label that names no class.

    Raises:
      AssertionError, TypeError, ValueError: dtypes, shapes or `axis`, by name.

    Example:
      >>> from jax_ls import adaptive
      >>> logits, labels = jnp.log(jnp.array([[0.75, 0.25], [0.75, 0.25]])), jnp.array([0, 1])
      >>> adaptive.margin(logits, labels, 0.1).round(4).tolist()
      [0.05, 0.0]

    References:
      Smooths the confident. The argument for sparing the misclassified: Zhou et al., MaxSup, 2025.
    """
    target = one_hot(labels)
    log_p = log_prob(logits, target, where, class_where, axis, class_axis_name)
    log_rival = log_prob(logits, Rival(target.labels), where, class_where, axis, class_axis_name)
    return _epsilon(smoothing, jnp.maximum(jnp.exp(log_p) - jnp.exp(log_rival), 0), where)


def entropy(
    logits: Array,
    smoothing: Array,
    *,
    where: Array | None = None,
    class_where: Array | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    """ε (1 − H(p) / log K): the surer the model is, of whatever class, the more it is smoothed. It asks for no label.

    Args:
      logits, smoothing, where, class_where, axis, class_axis_name: as in `confidence`; K counts the classes that exist.

    Returns:
      ε of each example, (*batch,), in float32 or wider.

    Raises:
      AssertionError, TypeError, ValueError: dtypes, shapes or `axis`, by name.

    Example:
      >>> from jax_ls import adaptive
      >>> adaptive.entropy(jnp.array([[0.0, 0.0], [99.0, 0.0]]), 0.1).round(4).tolist()
      [0.0, 0.1]

    References:
      Smooths the confident: Lee et al., Adaptive Label Smoothing with Self-Knowledge, 2022.
    """
    options = where, class_where, axis, class_axis_name
    h = -log_prob(logits, Belief(), *options)
    size = _num_classes(jnp.asarray(logits), class_where, axis, class_axis_name).astype(h.dtype)
    # One class leaves nothing to doubt. Rounding does not take H beyond log K.
    return _epsilon(smoothing, jnp.maximum(1 - h / jnp.log(jnp.where(size > 1, size, jnp.e)), 0), where)


def beta(
    key: jax.Array,
    averaged: Array,
    smoothing: Array,
    *,
    concentration: Array = 3.0,
    where: Array | None = None,
) -> jax.Array:
    """ε (1 − b), b ~ Beta(a, 1) dealt out in the order of belief: the least believed label gets the smallest draw.

    With `spread="others"`: 1 − ε (1 − b) on the label, the rest shared by the other classes. Only the order of the
    beliefs matters, so that smoothing does not fade as the model grows sure. A draw below 1/K, of probability K^−a,
    makes the label the least likely class of its target.

    Args:
      key: of `jax.random`; a new one each step.
      averaged: p_y by a moving average of the model, (*batch,): `confidence(averaged_logits, labels, 1.0)`.
      smoothing: ε, () or (*batch,): the published α, the share of this loss beside plain cross-entropy.
      concentration: a > 0, (): the mean of b is a / (a + 1).
      where: boolean (*batch,), the examples that count and are ranked; elsewhere 0.

    Returns:
      ε of each example, (*batch,). Examples are ranked within the array: inside `shard_map`, on each device.

    Raises:
      AssertionError, TypeError, ValueError: dtypes, shapes, or a <= 0, by name.

    Example:
      >>> from jax_ls import adaptive
      >>> epsilon = adaptive.beta(jax.random.key(0), jnp.array([0.2, 0.9, 0.5]), 1.0)
      >>> jnp.argsort(epsilon).tolist()
      [1, 2, 0]

    References:
      Smooths the doubtful: Zhang & Sabuncu, Self-Distillation as Instance-Specific Label Smoothing, 2020 (a = 3,
      α = 0.6 in the published code).
    """
    p = jax.lax.stop_gradient(checks.as_weight("averaged", averaged))
    kept = jnp.ones(p.shape, bool) if where is None else checks.as_where("where", where, p.shape)
    a = checks.as_weight("concentration", concentration).astype(p.dtype)
    checks.assert_shape("concentration", a, [()], "a number")
    checks.check_values("concentration", concentration, lambda x: x > 0, "a number > 0")
    # P(b <= x) = x^a, inverted.
    draws = jax.random.uniform(key, (p.size,), p.dtype, minval=jnp.finfo(p.dtype).tiny) ** (1 / a)
    ranked = jnp.sort(jnp.where(flat(kept), draws, jnp.inf))
    order = jnp.argsort(flat(jnp.where(kept, p, jnp.inf)))
    b = jnp.zeros_like(draws).at[order].set(ranked).reshape(p.shape)
    return _epsilon(smoothing, jnp.where(jnp.isnan(p), jnp.nan, 1 - b), kept)


def _epsilon(smoothing: Array, share: jax.Array, where: Array | None) -> jax.Array:
    """ε · share of the examples that count; 0 for the others."""
    epsilon = _parameter("smoothing", smoothing, share) * share
    return epsilon if where is None else jnp.where(where, epsilon, 0)


def _parameter(name: str, x: Array, like: jax.Array) -> jax.Array:
    value = checks.as_weight(name, x)
    checks.assert_shape(name, value, [(), like.shape], f"() or {like.shape}, the shape of the batch")
    return value.astype(like.dtype)


def _num_classes(
    logits: jax.Array, class_where: Array | None, axis: int, class_axis_name: AxisName | None
) -> jax.Array:
    """How many classes exist: () or (*batch,)."""
    if class_where is None:
        count = jnp.asarray(logits.shape[axis], jnp.float32)
    else:
        exists = jnp.asarray(class_where)
        count = jnp.sum(exists, axis=axis if exists.ndim == logits.ndim else -1, dtype=jnp.float32)
    return count if class_axis_name is None else jax.lax.psum(count, class_axis_name)
