"""(logits, q) -> the loss of each example: formulas over `jax_ls.logits.Logits`, and a wrapper for losses of arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import Target
from jax_ls.class_axis import AxisName, align, multiply
from jax_ls.logits import Batch, Logits
from jax_ls.reductions import Reduction, reduce_counted
from jax_ls.smoothing import Prior, Spread, entropy_of_smoothed, smooth, smooth_binary_labels, smooth_labels
from jax_ls.targets import OneHot, as_target

__all__ = [
    "LossParts",
    "SmoothedLoss",
    "as_loss_target",
    "cross_entropy",
    "kl_divergence",
    "sigmoid_cross_entropy",
    "smoothed_cross_entropy",
    "smoothed_target",
    "with_label_smoothing",
]


def _kl_divergence(z: Logits, target: Target) -> Array:
    return z.cross_entropy(target) + z.negentropy(target)


@checks.named_options
def cross_entropy(
    logits: ArrayLike,
    target: Target | ArrayLike,
    *,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_where: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns the cross-entropy of any target, without writing the target out: M · lse(z) − ⟨q, z⟩ with M = Σ_k q_k.

    Args:
      logits: z, real numbers with K classes on `axis`; sums over K accumulate in float32 or wider.
      target: q, a `Target`, probabilities in the shape of the logits, or integers (*batch,).
      where: boolean (*batch,), the examples that count; elsewhere loss and gradient are exactly 0.
      ignore_index: a label whose examples do not count, for integer labels.
      class_where: boolean (K,) or the logits' shape, the classes that exist; no others touch the loss.
      class_weights: (K,), multiplies q_k; a mean over Σ w_y is `mean(losses, denominator=w[y].sum())`.
      z_loss: (), or (*batch,), the weight of lse(z)², which keeps the logits near 0.
      axis: the class axis of the logits, and of arrays in their shape.
      class_axis_name: inside `jax.shard_map`, the mesh axis that K is split over; labels stay global, arrays over
        classes come as the local slice.

    Returns:
      Losses (*batch,) in float32 or wider; NaN for a label that names no class.

    Raises:
      TypeError: `ignore_index` with a target that is no integers.

    Example:
      >>> q = 0.9 * OneHot(jnp.array([2])) + 0.1 * OneHot(jnp.array([0]))
      >>> print(cross_entropy(jnp.zeros((1, 4)), q).round(4))
      [1.3863]

    References:
      Szegedy et al., Rethinking the Inception Architecture, 2016; z-loss: Chowdhery et al., PaLM, 2022.
    """
    batch = Batch.of(logits, where, class_where, class_weights, z_loss, axis, class_axis_name)
    q = as_loss_target(batch, target)
    return batch.ignoring(q, ignore_index).apply(Logits.cross_entropy, q=q)


@checks.named_options
def kl_divergence(
    logits: ArrayLike,
    target: Target | ArrayLike,
    *,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_where: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns the cross-entropy less the entropy of the target, CE(z, q) − H(q): 0 for a perfect model.

    The gradient in the logits is that of `cross_entropy`. T5X and the Annotated Transformer report this number.

    Args:
      logits, target, where, ignore_index, class_where, class_weights, z_loss, axis, class_axis_name: as in
        `cross_entropy`.

    Returns:
      Losses (*batch,) in float32 or wider; NaN where q has negative entries, which have no entropy. The slope in ε at
      ε = 0 is −∞: −1e30 stands for it. Begin a learned ε above 0.

    Example:
      >>> q = smooth(jnp.array([1]), 0.1)
      >>> abs(kl_divergence(jnp.log(q.probs(3)), q)).max() < 1e-6
      Array(True, dtype=bool)

    References:
      Raffel et al., T5, 2020; Rush, The Annotated Transformer, 2018.
    """
    batch = Batch.of(logits, where, class_where, class_weights, z_loss, axis, class_axis_name)
    q = as_loss_target(batch, target)
    return batch.ignoring(q, ignore_index).apply(_kl_divergence, target=q)


class LossParts(NamedTuple):
    """A loss and what it is made of, from one pass over the logits: what `return_parts=True` returns.

    Each is one number per example, or reduced as the loss is.

    Args:
      loss: all of it.
      unsmoothed: the cross-entropy of the labels as they were given, without smoothing and z-loss.
      z_loss: the part of `loss` that the option `z_loss` adds.
      lse: log Σ_k exp z_k.

    Example:
      >>> parts = smoothed_cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), z_loss=0.5, return_parts=True)
      >>> print(parts.lse.round(4), parts.z_loss.round(4), (parts.loss - parts.z_loss).round(4))
      [1.3863] [0.9609] [1.3863]
    """

    loss: Array
    unsmoothed: Array
    z_loss: Array
    lse: Array


@checks.named_options
def smoothed_cross_entropy(
    logits: ArrayLike,
    labels: Target | ArrayLike,
    smoothing: ArrayLike = 0.1,
    *,
    prior: Prior | None = None,
    spread: Spread = "all",
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_where: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    relative: bool = False,
    reduction: Reduction = "none",
    return_parts: bool = False,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
) -> Any:
    """Returns the cross-entropy with label smoothing: `cross_entropy(logits, smooth(labels, smoothing))`.

    lse(z) − (1 − ε) z_y − ε ⟨u, z⟩, for a uniform u without any array of K numbers but the logits.

    Args:
      logits: z, real numbers with K classes on `axis`.
      labels: integers (*batch,), probabilities in the shape of the logits, or a `Target`.
      smoothing: ε, () or (*batch,); a real number of at most 1, negative allowed; may be traced.
      prior, spread: where ε goes, as in `smooth`; a prior comes with its classes last.
      where, ignore_index, class_where, class_weights, z_loss, axis, class_axis_name: as in `cross_entropy`.
      relative: less H(q), as in `kl_divergence`: 0 for a perfect model, with the same gradient.
      reduction: "none", or as in `reduce` over the examples that count. With `class_weights` and integer labels a mean
        divides by Σ w_y, as PyTorch does; otherwise by the number of those examples. An empty mean is 0.
      return_parts: whether to return `LossParts`, with lse and z-loss.
      batch_axis_name: mesh axes that the examples are split over, inside `jax.shard_map`, to reduce over.

    Returns:
      Losses (*batch,) in float32 or wider, a number if reduced, or `LossParts` of them. NaN for a label that names no
      class.

    Raises:
      TypeError: `ignore_index` with dense labels, or an integer other than 0 as ε.
      ValueError: an unknown `spread`, or a concrete ε above 1.

    Example:
      >>> logits, labels = jnp.array([[2.0, -1.0, 0.5, 1.0], [0.0, 3.0, -2.0, 1.5]]), jnp.array([0, 3])
      >>> [f"{loss:.4f}" for loss in smoothed_cross_entropy(logits, labels, 0.1)]
      ['0.6327', '1.8341']

    References:
      Szegedy et al., Rethinking the Inception Architecture, 2016; Müller et al., When Does Label Smoothing
      Help?, 2019.
    """
    checks.check_smoothing(smoothing)
    batch = Batch.of(logits, where, class_where, class_weights, z_loss, axis, class_axis_name)
    batch, hard, target = smoothed_target(batch, labels, smoothing, prior, spread, ignore_index)
    if not relative and not return_parts and reduction == "none":
        return batch.apply(Logits.cross_entropy, q=target)
    operands: dict[str, Any] = {"q": target, "hard": hard}
    closed = prior is None and isinstance(hard, OneHot) and class_weights is None
    if relative and closed:
        operands["epsilon"] = checks.as_weight("smoothing", smoothing)
    if batch.z_loss is not None:
        operands["z_weight"], batch = batch.z_loss, replace(batch, z_loss=None)
    by_class = isinstance(hard, OneHot) and class_weights is not None
    formula = SmoothedLoss((spread if closed else "summed") if relative else None, return_parts, by_class)
    found, counts = batch.apply(formula, **operands)
    return reduce_counted(found, counts, reduction, batch_axis_name)


@dataclass(frozen=True)
class SmoothedLoss:
    """The formula of a smoothed loss and its parts, and of what each example adds to the divisor of a mean. Static.

    Args:
      entropy: None, or how H(q) is found where it is not given: from ε for a `spread`, or "summed" over the classes.
      parts: whether to return `LossParts`.
      by_class: whether an example counts as much as the class of its label weighs; otherwise each counts 1.
    """

    entropy: str | None
    parts: bool
    by_class: bool = False

    def __call__(
        self,
        z: Any,
        q: Target,
        hard: Target | None = None,
        epsilon: Array | None = None,
        entropy: Array | None = None,
        z_weight: Array | None = None,
    ) -> tuple[Any, Array]:
        """Returns (the loss or its parts, counts), (*batch,) each, for `Logits` or what stands for them."""
        loss = z.cross_entropy(q)
        if epsilon is not None:
            spread = "others" if self.entropy == "others" else "all"
            entropy = entropy_of_smoothed(epsilon.astype(z.dtype), z.num_classes, spread)
        if entropy is not None:
            loss = loss - entropy.astype(loss.dtype)
        elif self.entropy == "summed":
            loss = loss + z.negentropy(q)
        penalty = jnp.zeros_like(loss) if z_weight is None else z_weight.astype(loss.dtype) * jnp.square(z.lse)
        loss = loss if z_weight is None else loss + penalty
        counts = jnp.broadcast_to(z.mass(hard), loss.shape) if self.by_class else jnp.ones_like(loss)
        return (LossParts(loss, z.cross_entropy(hard or q), penalty, z.lse) if self.parts else loss), counts


def smoothed_target(
    batch: Batch,
    labels: Target | ArrayLike,
    smoothing: ArrayLike,
    prior: Prior | None,
    spread: Spread,
    ignore_index: int | None,
) -> tuple[Batch, Target, Target]:
    """Returns the batch without the examples to ignore, the labels as a target, and that target smoothed."""
    hard = as_loss_target(batch, labels, "labels")
    # A uniform prior takes its classes from the loss.
    kept = None if prior is None else batch.class_where
    if prior is not None and not isinstance(prior, Target):
        prior = checks.as_class_values("prior", prior, widened=False)
        checks.assert_class_values("prior", prior, batch.logits)
    target = smooth(hard, smoothing, prior=prior, spread=spread, class_where=kept)
    return batch.ignoring(hard, ignore_index), hard, target


def as_loss_target(batch: Batch, x: Target | ArrayLike, name: str = "target") -> Target:
    """Returns a target from a target, integers (*batch,), or probabilities in the shape of the given logits."""
    if isinstance(x, Target):
        return x
    array = checks.as_array(name, x)
    array = batch.classes_last(array) if array.ndim == batch.logits.ndim else array
    checks.assert_target(name, array, batch.logits)
    return as_target(array)


@checks.named_options
def sigmoid_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    smoothing: ArrayLike = 0.0,
    *,
    prior: ArrayLike = 0.5,
    pos_weight: ArrayLike | None = None,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_weights: ArrayLike | None = None,
) -> Array:
    """Returns the smoothed binary cross-entropy of each element, −q log σ(z) − (1 − q) log σ(−z).

    q = (1 − ε) y + ε · prior

    Args:
      logits: z, real numbers of any shape.
      labels: y, in the shape of the logits; 0 and 1, or probabilities.
      smoothing: ε, broadcastable to the labels.
      prior: the number that a label moves towards, broadcastable to the labels; see `smooth_binary_labels`.
      pos_weight: multiplies the first term, −q log σ(z); broadcastable to the labels. PyTorch and timm have it too.
      where: booleans in the shape of the logits, the elements that count; elsewhere loss and gradient are 0.
      ignore_index: a label whose elements do not count, for integer labels: −1 for "not annotated", say.
      class_weights: (K,), multiplies the losses of each class, on the last axis of the logits.

    Returns:
      Losses in the shape of the logits, in float32 or wider.

    Raises:
      AssertionError: `ignore_index` with labels that are no integers.

    Example:
      >>> losses = sigmoid_cross_entropy(jnp.array([10.0, -10.0, -10.0]), jnp.array([1, 0, 1]), 0.1)
      >>> print(f"{losses.mean():.3f}")
      3.500

    References:
      Szegedy et al., Rethinking the Inception Architecture, 2016.
    """
    z = checks.as_array("logits", logits)
    checks.assert_kind("logits", z, float, "real numbers")
    z = z.astype(checks.wide(z.dtype))
    y = checks.as_array("labels", labels)
    checks.assert_shape("labels", y, [z.shape], "{shapes}, the shape of the logits")
    where = checks.as_kept(y, where, ignore_index)
    if where is not None:
        smoothing, prior = checks.as_broadcast("smoothing", smoothing, z), checks.as_broadcast("prior", prior, z)
        z, y, smoothing, prior = (jnp.where(where, x, jnp.zeros((), x.dtype)) for x in (z, y, smoothing, prior))
    weight = None if pos_weight is None else checks.as_broadcast("pos_weight", pos_weight, z)
    q = smooth_binary_labels(checks.as_weight("labels", y).astype(z.dtype), smoothing, prior=prior)
    positive = q if weight is None else q * (weight if where is None else jnp.where(where, weight, 0))
    # −log σ(±z) = max(∓z, 0) + log(1 + e^−|z|): one logarithm for both. Two make XLA on GPU write float32 arrays out.
    tail = jnp.log1p(jnp.exp(-jnp.abs(z)))
    losses = multiply(positive, jnp.maximum(-z, 0)) + multiply(1 - q, jnp.maximum(z, 0)) + (positive + 1 - q) * tail
    if class_weights is not None:
        weights = checks.as_class_values("class_weights", class_weights)
        checks.assert_shape("class_weights", weights, [z.shape[-1:]], "{shapes}, one weight a class")
        losses = losses * align(weights, z.ndim).astype(z.dtype)
    return losses if where is None else jnp.where(where, losses, 0)


def with_label_smoothing(
    loss: Callable[..., Array],
    smoothing: float | Array | optax.Schedule,
    *,
    binary: bool = False,
    **smooth_options: Any,
) -> Callable[..., Array]:
    """Returns an optax-style `loss(logits, dense_labels, ...)` with label smoothing, for integer or dense labels.

    The wrapper writes the smoothed labels out, because `loss` needs them. `smoothed_cross_entropy` does not.

    Args:
      loss: a function of logits and dense labels, such as `optax.softmax_cross_entropy`.
      smoothing: ε, () or (*batch,), or an optax schedule of it.
      binary: labels are independent zeros and ones in the shape of the logits, smoothed towards `prior` = 0.5.
      **smooth_options: options of `smooth_labels`; if binary, the `prior` of `smooth_binary_labels`.

    Returns:
      `smoothed(logits, labels, *args, step=None, **kwargs)`; `step` is for a schedule, and `axis` is the class
      axis of logits and labels. `axis` and all other arguments go to `loss`.

    Raises:
      TypeError: a schedule without `step`, or an unknown option of smoothing.

    Example:
      >>> loss = with_label_smoothing(optax.softmax_cross_entropy, optax.linear_schedule(0.1, 0.0, 100))
      >>> print(loss(jnp.zeros((1, 4)), jnp.array([2]), step=50).round(4))
      [1.3863]

    References:
      Szegedy et al., Rethinking the Inception Architecture, 2016.
    """

    @functools.wraps(loss)
    def smoothed(logits: ArrayLike, labels: ArrayLike, *args: Any, step: Any = None, **kwargs: Any) -> Array:
        logits = jnp.asarray(logits)
        epsilon: Any = smoothing
        if callable(smoothing):
            if step is None:
                raise TypeError("step: expected the training step that the smoothing schedule is read at, got None")
            epsilon = smoothing(step)
        if binary:
            dense = smooth_binary_labels(jnp.asarray(labels).astype(logits.dtype), epsilon, **smooth_options)
        else:
            axis = kwargs.get("axis", -1)
            place = checks.check_axis("axis", axis, logits.ndim)
            size = logits.shape[place]
            labels = checks.as_array("labels", labels)
            classes_last = jnp.moveaxis(labels, place, -1) if labels.ndim == logits.ndim else labels
            checks.assert_target("labels", classes_last, jax.eval_shape(lambda: jnp.moveaxis(logits, place, -1)))
            dense = smooth_labels(labels, epsilon, num_classes=size, axis=axis, **smooth_options)
        return loss(logits, dense.astype(logits.dtype), *args, **kwargs)

    return smoothed
