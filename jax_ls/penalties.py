"""Penalties on the logits that act like smoothing: one number per example, to add to a loss with a weight.

    loss = cross_entropy(logits, labels) + 0.1 * penalties.max_suppression(logits)

Each is a formula over `Logits`, and takes the options of `cross_entropy`, except `ignore_index` and
`class_weights`, which need labels.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import Restricted, Target
from jax_ls.class_axis import AxisName
from jax_ls.logits import Batch, Logits, at_least, at_most, on_logits
from jax_ls.smoothing import Prior
from jax_ls.tangents import along
from jax_ls.targets import Uniform, as_target

__all__ = [
    "conditional",
    "confidence_penalty",
    "jensen",
    "margin",
    "max_suppression",
    "squared_logits",
    "z_loss",
]


@checks.named_options
def confidence_penalty(
    logits: ArrayLike,
    beta: ArrayLike,
    *,
    threshold: ArrayLike | None = None,
    where: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns −β H(p), which penalises low entropy; with a threshold Γ, β max(0, Γ − H(p)).

    Args:
      logits: z, real numbers with K classes on `axis`.
      beta: β, () or (*batch,).
      threshold: Γ, () or (*batch,): predictions of entropy above Γ cost nothing.
      where, class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Penalties (*batch,) in float32 or wider.

    Example:
      >>> from jax_ls import penalties
      >>> print(penalties.confidence_penalty(jnp.array([[0.0, 0.0], [0.0, 9.0]]), 1.0).round(4))
      [-0.6931 -0.0012]

    References:
      Pereyra et al., Regularizing Neural Networks by Penalizing Confident Output Distributions, 2017.
    """
    operands = {"beta": beta} | ({} if threshold is None else {"threshold": threshold})
    return on_logits(
        _confidence_penalty,
        logits,
        operands,
        where=where,
        class_where=class_where,
        axis=axis,
        class_axis_name=class_axis_name,
    )


def _confidence_penalty(z: Logits, beta: Array, threshold: Array | None = None) -> Array:
    beta = beta.astype(z.dtype)
    return -beta * z.entropy() if threshold is None else beta * jax.nn.relu(threshold.astype(z.dtype) - z.entropy())


@checks.named_options
def jensen(
    logits: ArrayLike,
    alpha: ArrayLike,
    *,
    prior: Prior | None = None,
    where: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns the skew Jensen divergence of p and a prior u: generalised entropy regularisation.

    [(1 − α) KL(u ‖ m) + α KL(p ‖ m)] / (α (1 − α)) with m = (1 − α) u + α p. At α = 1 it is KL(u ‖ p), which is label
    smoothing, and at α = 0 KL(p ‖ u), the confidence penalty.

    Args:
      logits: z, real numbers with K classes on `axis`.
      alpha: α, () or (*batch,), in [0, 1]; a traced α outside gives NaN. The derivative in α is exact for 0 < α < 1.
      prior: u, (K,) or (*batch, K) or a `Target`, classes last; uniform if None.
      where, class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Penalties (*batch,) in float32 or wider; 0 if p = u. At the ends, ∞ if a class has no mass in u (α = 0) or no
      chance in p (α = 1), and mass in the other.

    Raises:
      ValueError: a concrete α outside [0, 1].

    Example:
      >>> from jax_ls import penalties
      >>> print(f"{penalties.jensen(jnp.array([0.0, 2.0]), 0.5):.4f}")
      0.3582

    References:
      Meister et al., Generalized Entropy Regularization or: There's Nothing Special about Label Smoothing, 2020.
    """
    batch = Batch.of(logits, where, class_where, None, 0.0, axis, class_axis_name)
    alpha = checks.as_batch_numbers("alpha", checks.as_skew("alpha", alpha), batch.shape)
    if prior is not None and not isinstance(prior, Target):
        prior = checks.as_class_values("prior", prior, widened=False)
        checks.assert_class_values("prior", prior, batch.logits)
    u = Uniform() if prior is None else as_target(prior)
    if batch.class_where is not None and prior is not None:
        u = Restricted(u, batch.class_where)
    return batch.apply(_jensen, alpha=alpha, prior=u)


def _jensen(z: Logits, alpha: Array, prior: Target) -> Array:
    # J_α(u ‖ p) = J_{1−α}(p ‖ u). So let c = min(α, 1 − α), and (a, b) = (u, p) if α ≤ ½, else (p, u). Then
    # J = Σ_k b s / (1 − c) − (a + b c / (1 − c)) log(1 + c (eˢ − 1)) / c, s = log(b / a). Nothing cancels as c -> 0.
    alpha = alpha.astype(z.dtype)
    c = jnp.minimum(alpha, 1 - alpha)
    per_c = jnp.where(c == 0, 0, 1 / jnp.where(c == 0, 1, c))
    u_is_a = jnp.where(alpha <= 0.5, 1, 0).astype(z.dtype)
    u = z.probs(prior)

    def term(d: Array, log_total: Array, low: Array, *rows: Array) -> Array:
        return _skew_divergence(at_least(d - log_total, low), u, *rows)

    ends = jnp.where(c == 0, 1, 0).astype(z.dtype)
    tiny = float(jnp.finfo(z.dtype).tiny)
    apart = z.sum(term, z.log_total, -1e30, c, per_c, 1 / (1 - c), ends, u_is_a, 1 - u_is_a, 60.0, 0.0, tiny, 1e30)
    # What 1e30 stood for.
    return apart + jax.lax.stop_gradient(jnp.where(apart > 1e19, jnp.inf, 0).astype(z.dtype))


@jax.custom_jvp
def _skew_divergence(log_p: Array, u: Array, *rows: Array) -> Array:
    """The term of one class. Its derivative in log p is p log(p / m) / (1 − α), of the same logarithm.

    Left to JAX, each factor is derived by itself, and XLA on CPU and GPU writes some of them out.
    """
    return _with_slope(log_p, u, *rows)[0]


@functools.partial(_skew_divergence.defjvp, symbolic_zeros=True)
def _skew_divergence_jvp(primals: Any, tangents: Any) -> Any:
    (log_p, *others), (dlog_p, *changes) = primals, tangents
    value, slope = _with_slope(*primals)
    derivative = jnp.zeros_like(value) if isinstance(dlog_p, SymbolicZero) else slope * dlog_p
    if not all(isinstance(x, SymbolicZero) for x in changes):
        derivative += along(lambda *others: _with_slope(log_p, *others)[0], others, changes)
    return value, derivative


def _with_slope(
    log_p: Array,
    u: Array,
    c: Array,
    per_c: Array,
    scale: Array,
    ends: Array,
    u_is_a: Array,
    p_is_a: Array,
    high: Array,
    zero: Array,
    tiny: Array,
    huge: Array,
) -> tuple[Array, Array]:
    """The term of one class, and its derivative in log p."""
    p = jnp.exp(log_p)
    # log u, and −1e30 at 0. `tiny` is the least number that XLA does not flush to 0.
    beneath = jax.lax.stop_gradient(huge * jnp.maximum(1 - u / tiny, zero))
    s = (u_is_a - p_is_a) * (log_p - jnp.log(jnp.maximum(u, tiny)) + beneath)
    # A larger exponent than 60 changes neither value nor derivative, except at c = 0: there s counts in full, and
    # a (log m) / c is b − a.
    e = at_most(s, high)
    log_b = e + jax.lax.stop_gradient(ends * jnp.maximum(s - high, zero))
    # log(m / a) and log(b / m).
    log_m = jnp.log1p(c * jnp.expm1(e))
    log_b -= log_m
    a, b = u_is_a * u + p_is_a * p, p_is_a * u + u_is_a * p
    term = scale * b * log_b - a * (per_c * log_m) - ends * (b - a)
    return term, u_is_a * scale * p * log_b + p_is_a * (ends * (p - u) - p * (per_c * log_m))


@checks.named_options
def max_suppression(
    logits: ArrayLike,
    *,
    where: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns max_k z_k − mean_k z_k: the term of label smoothing, with the largest logit in place of the label's.

    Smoothing adds ε (z_y − mean z), which pushes the label's logit down even if another class has the largest. If
    classes tie for the maximum, the first of them gets the gradient.

    Args:
      logits: z, real numbers with K classes on `axis`.
      where, class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Penalties (*batch,) in float32 or wider.

    Example:
      >>> from jax_ls import penalties
      >>> print(penalties.max_suppression(jnp.array([[3.0, 0.0, 0.0]])))
      [2.]

    References:
      Zhou et al., MaxSup: Overcoming Representation Collapse in Label Smoothing, 2025.
    """
    return on_logits(
        _max_suppression,
        logits,
        where=where,
        class_where=class_where,
        axis=axis,
        class_axis_name=class_axis_name,
    )


def _max_suppression(z: Logits) -> Array:
    return z.pick(z.likeliest) - z.mean()


@checks.named_options
def margin(
    logits: ArrayLike,
    margin: ArrayLike = 10.0,
    *,
    where: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns the penalty of margin-based label smoothing, mean_k max(0, max z − z_k − m).

    Only logits further than m below the largest cost.

    Args:
      logits: z, real numbers with K classes on `axis`.
      margin: m, () or (*batch,).
      where, class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Penalties (*batch,) in float32 or wider; the paper weighs them with 0.1.

    Example:
      >>> from jax_ls import penalties
      >>> print(penalties.margin(jnp.array([[15.0, 0.0], [5.0, 0.0]]), 10.0))
      [2.5 0. ]

    References:
      Liu et al., The Devil is in the Margin: Margin-based Label Smoothing for Network Calibration, 2022.
    """
    return on_logits(
        _margin,
        logits,
        {"margin": margin},
        where=where,
        class_where=class_where,
        axis=axis,
        class_axis_name=class_axis_name,
    )


def _margin(z: Logits, margin: Array) -> Array:
    depth = z.sum(lambda d, m, zero: jnp.maximum(-d - m, zero), margin, 0.0)
    # `rise` is 0. Its factor gives the maximum its derivative: the number of classes further than m below it.
    rise = z.top - z.shift
    beneath = z.sum(_is_positive, jax.lax.stop_gradient(margin), 0.0, 1.0, 2e30)
    return (depth + jax.lax.stop_gradient(beneath) * rise) / z.num_classes


def _is_positive(d: Array, m: Array, zero: Array, one: Array, steep: Array) -> Array:
    """Returns [−d > m] by arithmetic: with a select, XLA on CPU writes the operand of the sum out."""
    return jnp.minimum(steep * jnp.maximum(-d - m, zero), one)


@checks.named_options
def conditional(
    logits: ArrayLike,
    margin: ArrayLike = 10.0,
    *,
    over: ArrayLike = 1.0,
    under: ArrayLike = 0.1,
    where: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns the penalty of adaptive and conditional label smoothing (ACLS).

    λ₁ max(0, max z − m)² + λ₂ mean_{k ≠ argmax} max(0, max z − z_k − m)². The maximum in the second term is a constant
    for differentiation. The first term pushes the largest logit below m, so a common offset of the logits changes it.
    The second pulls the others to within m of the largest.

    Args:
      logits: z, real numbers with K classes on `axis`.
      margin: m ≥ 0, () or (*batch,).
      over, under: λ₁ and λ₂, () or (*batch,).
      where, class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Penalties (*batch,) in float32 or wider; the paper weighs them with 0.1.

    Example:
      >>> from jax_ls import penalties
      >>> print(penalties.conditional(jnp.array([[12.0, 0.0], [5.0, 0.0]]), 10.0, under=0.5))
      [6. 0.]

    References:
      Park et al., ACLS: Adaptive and Conditional Label Smoothing for Network Calibration, 2023.
    """
    return on_logits(
        _conditional,
        logits,
        {"margin": margin, "over": over, "under": under},
        where=where,
        class_where=class_where,
        axis=axis,
        class_axis_name=class_axis_name,
    )


def _conditional(z: Logits, margin: Array, over: Array, under: Array) -> Array:
    margin, over, under = (x.astype(z.dtype) for x in (margin, over, under))
    depths = z.sum(lambda d, m, zero: jnp.square(jnp.maximum(-d - m, zero)), margin, 0.0)
    others = jnp.maximum(z.num_classes - 1, 1)
    return over * jnp.square(jax.nn.relu(z.top - margin)) + under * depths / others


@checks.named_options
def squared_logits(
    logits: ArrayLike,
    *,
    where: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns ½ ‖z‖² over the classes that exist.

    The LogitNorm loss (Wei et al. 2022), which divides z by its norm, is `jax_ls.logit_norm_loss`.

    Args:
      logits: z, real numbers with K classes on `axis`.
      where, class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Penalties (*batch,) in float32 or wider.

    Example:
      >>> from jax_ls import penalties
      >>> print(penalties.squared_logits(jnp.array([[3.0, 4.0]])))
      [12.5]

    References:
      Kornblith et al., Why Do Better Loss Functions Lead to Less Transferable Features?, 2021 (logit penalty).
    """
    return on_logits(
        _squared_logits,
        logits,
        where=where,
        class_where=class_where,
        axis=axis,
        class_axis_name=class_axis_name,
    )


def _squared_logits(z: Logits) -> Array:
    return z.sum(jnp.square, shifted=False) / 2


@checks.named_options
def z_loss(
    logits: ArrayLike,
    *,
    where: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns lse(z)², which keeps Σ exp(z) near 1. It is the `z_loss` of the losses as a separate term.

    Args:
      logits: z, real numbers with K classes on `axis`.
      where, class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Penalties (*batch,) in float32 or wider; PaLM weighs them with 1e-4.

    Example:
      >>> from jax_ls import penalties
      >>> print(f"{penalties.z_loss(jnp.zeros(4)):.4f}")
      1.9218

    References:
      Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, 2022.
    """
    return on_logits(
        _z_loss,
        logits,
        where=where,
        class_where=class_where,
        axis=axis,
        class_axis_name=class_axis_name,
    )


def _z_loss(z: Logits) -> Array:
    return jnp.square(z.lse)
