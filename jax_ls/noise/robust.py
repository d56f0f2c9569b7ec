"""Losses that wrong labels pull less: between cross-entropy and 1 − p_y, or against what the model learned early.

Their terms are not linear in the target, so they have no `class_weights`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import Target
from jax_ls.class_axis import AxisName
from jax_ls.logits import Logits
from jax_ls.noise.losses import open_labels
from jax_ls.targets import as_target

__all__ = ["early_learning", "generalized_cross_entropy", "symmetric_cross_entropy"]


@checks.named_options
def generalized_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    exponent: ArrayLike = 0.7,
    *,
    truncation: ArrayLike | None = None,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_where: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns (1 − p_y^r) / r: cross-entropy as r → 0, and 1 − p_y at r = 1, which wrong labels pull least.

    The gradient is that of cross-entropy times p_y^r. Truncated, labels of p_y ≤ k cost (1 − k^r) / r and have no
    gradient: begin without, for the model to believe anything.

    Args:
      logits: z, real numbers with K classes on `axis`.
      labels: y, integers (*batch,).
      exponent: r in (0, 1], () or (*batch,), the q of the paper.
      truncation: k in [0, 1), () or (*batch,); 0.5 in the paper. None: no truncation. An example whose traced r or k
        is out of range gets NaN.
      where, ignore_index, class_where, z_loss, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Losses (*batch,) in float32 or wider.

    Raises:
      ValueError: r outside (0, 1] or k outside [0, 1), where they are concrete.

    Example:
      >>> from jax_ls import noise
      >>> logits = jnp.array([[0.0, 0.0], [-9.0, 0.0]])
      >>> print(noise.generalized_cross_entropy(logits, jnp.array([0, 0]), 1.0).round(4))
      [0.5    0.9999]

    References:
      Zhang and Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels, 2018.
    """
    batch, y = open_labels(logits, labels, where, ignore_index, class_where, z_loss, axis, class_axis_name)
    r = checks.as_parameter("exponent", exponent, lambda x: (x > 0) & (x <= 1), "numbers in (0, 1]")
    operands = {"y": y, "r": checks.as_batch_numbers("exponent", r, batch.shape)}
    if truncation is not None:
        k = checks.as_parameter("truncation", truncation, lambda x: (x >= 0) & (x < 1), "numbers in [0, 1)")
        operands["k"] = checks.as_batch_numbers("truncation", k, batch.shape)
    return batch.apply(_generalized, **operands)


def _generalized(z: Logits, y: Array, r: Array, k: Array | None = None) -> Array:
    log_p, r = z.log_prob(y), r.astype(z.dtype)
    if k is not None:
        k = k.astype(z.dtype)
        log_k = jnp.log(jnp.where(k > 0, k, 1))
        # 0 · k hands on the NaN of a k out of range.
        log_p = jnp.where((k > 0) & (log_p <= log_k), log_k, log_p) + 0 * k
    return -jnp.expm1(r * log_p) / r


@checks.named_options
def symmetric_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    alpha: ArrayLike = 0.1,
    beta: ArrayLike = 1.0,
    *,
    log_zero: ArrayLike = -4.0,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_where: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns α CE + β A (1 − p_y): cross-entropy, and the reverse one, −Σ_k p_k log δ_y, with log 0 set to −A.

    Args:
      logits: z, real numbers with K classes on `axis`.
      labels: y, integers (*batch,).
      alpha: α ≥ 0, () or (*batch,); 0.1 for CIFAR-10 and 6 for CIFAR-100 in the paper.
      beta: β ≥ 0, () or (*batch,); 1 and 0.1. An example whose traced α or β is negative gets NaN.
      log_zero: −A, () or (*batch,), below 0.
      where, ignore_index, class_where, z_loss, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Losses (*batch,) in float32 or wider.

    Raises:
      ValueError: a concrete α or β < 0, or a concrete `log_zero` that is not below 0.

    Example:
      >>> from jax_ls import noise
      >>> print(noise.symmetric_cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), 1.0, 1.0).round(4))
      [4.3863]

    References:
      Wang et al., Symmetric Cross Entropy for Robust Learning with Noisy Labels, 2019.
    """
    batch, y = open_labels(logits, labels, where, ignore_index, class_where, z_loss, axis, class_axis_name)
    numbers = {
        "alpha": checks.as_amount("alpha", alpha),
        "beta": checks.as_amount("beta", beta),
        "log_zero": checks.as_parameter("log_zero", log_zero, lambda x: (x < 0) & (x > -jnp.inf), "numbers below 0"),
    }
    numbers = {name: checks.as_batch_numbers(name, x, batch.shape) for name, x in numbers.items()}
    return batch.apply(_symmetric, y=y, **numbers)


def _symmetric(z: Logits, y: Array, alpha: Array, beta: Array, log_zero: Array) -> Array:
    alpha, beta, log_zero = (x.astype(z.dtype) for x in (alpha, beta, log_zero))
    log_p = z.log_prob(y)
    return -alpha * log_p + beta * log_zero * jnp.expm1(log_p)


SURE = 1e-4
"""What is left of 1 − ⟨p, t⟩ where p and t are sure of the same class, so that its logarithm is finite."""


@checks.named_options
def early_learning(
    logits: ArrayLike,
    labels: ArrayLike,
    averages: Target | ArrayLike,
    weight: ArrayLike = 3.0,
    *,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_where: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns early-learning regularisation, CE + λ log(1 − (1 − 10⁻⁴) ⟨p, t⟩), t the average prediction so far.

    A model learns right labels first. The second term rewards p for staying with t, which it learned then, and so
    takes the gradient away from labels that t contradicts. t is a constant for differentiation.

    Args:
      logits: z, real numbers with K classes on `axis`.
      labels: y, integers (*batch,).
      averages: t, probabilities in the shape of the logits, or a `Target`: rows of what
        `jax_ls.online.average_predictions` keeps.
      weight: λ, () or (*batch,); 3 for CIFAR-10 and 7 for CIFAR-100 in the paper.
      where, ignore_index, class_where, z_loss, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Losses (*batch,) in float32 or wider, of any sign.

    Example:
      >>> from jax_ls import noise, online
      >>> averages, seen = jnp.zeros((100, 2)), jnp.array([7, 42])
      >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 2.0]]), jnp.array([0, 0])
      >>> averages = online.average_predictions(averages, seen, logits, decay=0.7)
      >>> print(noise.early_learning(logits, labels, averages[seen], weight=3.0).round(4))
      [-0.6845  1.3155]

    References:
      Liu et al., Early-Learning Regularization Prevents Memorization of Noisy Labels, 2020. The published code clips p
      to [10⁻⁴, 1 − 10⁻⁴]; here the term is 10⁻⁴ from 0 at least.
    """
    batch, y = open_labels(logits, labels, where, ignore_index, class_where, z_loss, axis, class_axis_name)
    if not isinstance(averages, Target):
        averages = batch.classes_last(checks.as_class_values("averages", averages, widened=False))
        checks.assert_shape("averages", averages, [batch.logits.shape], f"{batch.logits.shape}, the logits' shape")
    weight = checks.as_batch_numbers("weight", weight, batch.shape)
    return batch.apply(_early_learning, y=y, averages=as_target(averages), weight=weight)


def _early_learning(z: Logits, y: Array, averages: Target, weight: Array) -> Array:
    # log Σ_k p_k (1 − t_k): 1 − Σ_k p_k t_k would cancel.
    apart = z.log_sum(1 - (1 - SURE) * lax.stop_gradient(z.probs(averages))) - z.log_total
    return -z.log_prob(y) + weight.astype(z.dtype) * apart
