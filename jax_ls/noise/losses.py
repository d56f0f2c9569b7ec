"""Losses that correct for wrong labels: formulas over `jax_ls.logits.Logits`.

Their terms are not linear in the target, so they have no `class_weights`.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import Target
from jax_ls.class_axis import AxisName, everywhere
from jax_ls.logits import Batch, Logits
from jax_ls.noise.labels import as_matrix, as_rate, assert_one_given
from jax_ls.smoothing import smooth
from jax_ls.targets import OneHot, Rows

__all__ = ["backward_correction", "bootstrap", "forward_correction", "label_relaxation", "open_labels"]


@checks.named_options
def forward_correction(
    logits: ArrayLike,
    labels: ArrayLike,
    resample_rate: ArrayLike | None = None,
    *,
    matrix: ArrayLike | None = None,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_where: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns the cross-entropy of the predicted noisy label, −log Σ_k T_ky p_k. It is bounded.

    Symmetric noise needs no matrix: −log((1 − α) p_y + α/K), which is cross-entropy at α = 0. Labels flipped with
    probability e have α = e K/(K−1).

    Args:
      logits: z, real numbers with K classes on `axis`.
      labels: the noisy y, integers (*batch,).
      resample_rate: α, the share of labels drawn anew from all K classes; () or (*batch,), in [0, 1). An example
        whose traced α is outside gets NaN.
      matrix: T, (K, K), in place of α: T_ij = P(seen as j | i). It is whole even where classes are split over devices.
        A traced one is not checked.
      where, ignore_index, class_where, z_loss, axis, class_axis_name: as in `cross_entropy`; K counts the classes
        that exist.

    Returns:
      Losses (*batch,) in float32 or wider. At α = 0 the derivative in α is held at that of p_y = e⁻⁶⁰/K.

    Raises:
      ValueError: concrete rates outside [0, 1), or a concrete matrix whose rows are no distributions.
      TypeError: `resample_rate` and `matrix` are both given, or neither is.

    Example:
      >>> from jax_ls import noise
      >>> losses = noise.forward_correction(jnp.array([[9.0, 0.0], [-9.0, 0.0]]), jnp.array([0, 0]), 0.2)
      >>> print(losses.round(4))
      [0.1055 2.3016]

    References:
      Patrini et al., Making Deep Neural Networks Robust to Label Noise, 2017; Lukasik et al., Does Label Smoothing
      Mitigate Label Noise?, 2020 (symmetric).
    """
    batch, y = open_labels(logits, labels, where, ignore_index, class_where, z_loss, axis, class_axis_name)
    assert_one_given("resample_rate", resample_rate, matrix)
    if matrix is None:
        return batch.apply(_forward, y=y, alpha=as_rate("resample_rate", resample_rate, y.shape))
    table = as_matrix("matrix", matrix, batch.logits.shape[-1] * batch.num_devices)
    return batch.apply(_forward_by_matrix, y=y, seen=Rows(batch.local(table.T), y))


def _forward(z: Logits, y: Array, alpha: Array) -> Array:
    # −log((1 − α) p + α/K) = nll − log(1 + α (eᵈ − 1)) with eᵈ = 1 / (K p), which overflows for a small p.
    nll, log_k, alpha = -z.log_prob(y), jnp.log(z.num_classes), alpha.astype(z.dtype)
    d = nll - log_k
    far = (d > 60) & (alpha > 0)
    log_alpha = jnp.log(jnp.where(far, alpha, 1))
    bounded = -jnp.logaddexp(jnp.log1p(-alpha) - nll, log_alpha - log_k)
    return jnp.where(far, bounded, nll - jnp.log1p(alpha * jnp.expm1(jnp.minimum(d, 60))))


def _forward_by_matrix(z: Logits, y: Array, seen: Target) -> Array:
    # 0 · z_y makes the loss NaN for a label that names no class.
    return z.log_total - z.log_sum(z.probs(seen)) + 0 * z.pick(y)


@checks.named_options
def backward_correction(
    logits: ArrayLike,
    labels: ArrayLike,
    resample_rate: ArrayLike | None = None,
    *,
    matrix: ArrayLike | None = None,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_where: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns the loss whose mean over the noise is the cross-entropy of the clean label: q is row y of T⁻¹.

    For symmetric noise it is smoothing with a negative ε: q = smooth(y, −α / (1 − α)). The loss is unbounded below:
    train with plain cross-entropy first, or take `forward_correction`.

    Args:
      logits, labels, resample_rate, matrix, where, ignore_index, class_where, z_loss, axis, class_axis_name: as in
        `forward_correction`. T is inverted in every call; `cross_entropy(logits, Rows(inverse, labels))` takes the
        inverse.

    Returns:
      Losses (*batch,) in float32 or wider, of any sign; not finite if T has no inverse.

    Raises:
      TypeError, ValueError: as in `forward_correction`.

    Example:
      >>> from jax_ls import noise
      >>> print(noise.backward_correction(jnp.array([[1.0, 0.0]]), jnp.array([0]), 0.2).round(4))
      [0.1883]

    References:
      Patrini et al., Making Deep Neural Networks Robust to Label Noise, 2017; Lukasik et al., Does Label Smoothing
      Mitigate Label Noise?, 2020.
    """
    batch, y = open_labels(logits, labels, where, ignore_index, class_where, z_loss, axis, class_axis_name)
    assert_one_given("resample_rate", resample_rate, matrix)
    if matrix is None:
        rate = as_rate("resample_rate", resample_rate, y.shape)
        target: Target = smooth(y, -rate / (1 - rate))
    else:
        table = as_matrix("matrix", matrix, batch.logits.shape[-1] * batch.num_devices)
        target = Rows(batch.local(jnp.linalg.inv(everywhere(table))), y)
    return batch.apply(Logits.cross_entropy, q=target)


@checks.named_options
def label_relaxation(
    logits: ArrayLike,
    labels: ArrayLike,
    relaxation: ArrayLike = 0.1,
    *,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_where: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns the KL divergence to the nearest target that gives y at least 1 − α.

    If p_y ≥ 1 − α, loss and gradient are 0. Else it is (1 − α) log((1 − α) / p_y) + α log(α / (1 − p_y)): the other
    classes of the target share α in proportion to p.

    Args:
      logits: z, real numbers with K classes on `axis`.
      labels: y, integers (*batch,).
      relaxation: α, () or (*batch,), in [0, 1), NaN for an example whose traced α is not; 0 is cross-entropy, and
        has no derivative in α.
      where, ignore_index, class_where, z_loss, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Losses (*batch,) in float32 or wider.

    Raises:
      ValueError: a concrete α outside [0, 1).

    Example:
      >>> from jax_ls import noise
      >>> print(noise.label_relaxation(jnp.array([[3.0, 0.0], [0.0, 0.0]]), jnp.array([0, 0]), 0.1).round(4))
      [0.     0.3681]

    References:
      Lienen and Hüllermeier, From Label Smoothing to Label Relaxation, 2021.
    """
    batch, y = open_labels(logits, labels, where, ignore_index, class_where, z_loss, axis, class_axis_name)
    return batch.apply(_label_relaxation, y=y, alpha=as_rate("relaxation", relaxation, y.shape))


def _label_relaxation(z: Logits, y: Array, alpha: Array) -> Array:
    # The slope in nll is (1 − α − p) / (1 − p), in [0, 1] outside the relaxed set: no digit of nll is lost, so
    # log(1 − p) may come from it.
    nll, alpha = -z.log_prob(y), alpha.astype(z.dtype)
    kept = jnp.log1p(-alpha)
    relaxed = nll <= -kept
    nll = jnp.where(relaxed, 1, nll)
    log_alpha = jnp.log(jnp.where(alpha > 0, alpha, 1))
    apart = (1 - alpha) * (kept + nll) + alpha * (log_alpha - jnp.log(-jnp.expm1(-nll)))
    return jnp.where(relaxed, 0, apart)


@checks.named_options
def bootstrap(
    logits: ArrayLike,
    labels: ArrayLike,
    beta: ArrayLike,
    *,
    kind: Literal["soft", "hard"] = "soft",
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_where: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns the cross-entropy of a mixture of the label and the model's prediction, β and 1 − β.

    "soft": q = β δ_y + (1 − β) p. The loss is β CE + (1 − β) H(p), with a gradient through both terms. "hard": p is
    replaced by δ of the likeliest class, a constant for differentiation.

    Args:
      logits: z, real numbers with K classes on `axis`.
      labels: y, integers (*batch,).
      beta: β, () or (*batch,), how far the label is trusted; the paper takes 0.95 soft and 0.8 hard.
      kind: "soft" or "hard".
      where, ignore_index, class_where, z_loss, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Losses (*batch,) in float32 or wider.

    Raises:
      ValueError: an unknown `kind`.

    Example:
      >>> from jax_ls import noise
      >>> print(noise.bootstrap(jnp.array([[0.0, 5.0]]), jnp.array([0]), 0.8, kind="hard").round(4))
      [4.0067]

    References:
      Reed et al., Training Deep Neural Networks on Noisy Labels with Bootstrapping, 2014.
    """
    batch, y = open_labels(logits, labels, where, ignore_index, class_where, z_loss, axis, class_axis_name)
    checks.check_option("kind", kind, ("soft", "hard"))
    beta = checks.as_batch_numbers("beta", beta, batch.shape)
    return batch.apply(_soft_bootstrap if kind == "soft" else _hard_bootstrap, y=y, beta=beta)


def _soft_bootstrap(z: Logits, y: Array, beta: Array) -> Array:
    beta = beta.astype(z.dtype)
    return -beta * z.log_prob(y) + (1 - beta) * z.entropy()


def _hard_bootstrap(z: Logits, y: Array, beta: Array) -> Array:
    beta = beta.astype(z.dtype)
    return -beta * z.log_prob(y) - (1 - beta) * z.log_prob(z.likeliest)


@checks.named_options
def open_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    where: ArrayLike | None,
    ignore_index: int | None,
    class_where: ArrayLike | None,
    z_loss: ArrayLike,
    axis: int,
    class_axis_name: AxisName | None,
) -> tuple[Batch, Array]:
    """Returns the batch of logits, and its integer labels."""
    batch = Batch.of(logits, where, class_where, None, z_loss, axis, class_axis_name)
    y = checks.as_batch_labels("labels", labels, batch.shape)
    return batch.ignoring(OneHot(y), ignore_index), y
