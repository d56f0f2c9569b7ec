"""Calls that people already have, by the names and argument names of PyTorch, TensorFlow, Keras and others.

Each returns the number of the original, in value and gradient, and is a few lines over the core. An example that does
not count has a gradient of exactly 0, and a mean over no examples is 0: where an original differs, the docstring says
so. `docs/coming-from.md` has the line of the core beside each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import Target
from jax_ls.losses import sigmoid_cross_entropy, smoothed_cross_entropy
from jax_ls.reductions import reduce
from jax_ls.smoothing import entropy_of_smoothed, smooth, smooth_labels
from jax_ls.targets import OneHot, as_target

__all__ = [
    "LabelSmoothing",
    "LabelSmoothingCrossEntropy",
    "fairseq_label_smoothed_nll_loss",
    "flax_compute_weighted_cross_entropy",
    "keras_binary_crossentropy",
    "keras_categorical_crossentropy",
    "keras_sparse_categorical_crossentropy",
    "maxtext_cross_entropy_with_logits",
    "t5x_compute_weighted_cross_entropy",
    "tf_softmax_cross_entropy",
    "timm_binary_cross_entropy",
    "timm_label_smoothing_cross_entropy",
    "torch_cross_entropy",
]


# PyTorch


def torch_cross_entropy(
    input: ArrayLike,  # noqa: A002
    target: ArrayLike,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Array:
    """Returns PyTorch's `torch.nn.functional.cross_entropy`.

    A mean over no examples is 0, PyTorch's is NaN. A label that names no class gives NaN, PyTorch raises.

    Args:
      input: logits (K,), or (N, K, ...) with the classes on axis 1.
      target: integers () or (N, ...), or probabilities in the shape of the logits.
      weight: (K,), the weight of each class.
      ignore_index: a label whose examples do not count; for integers.
      reduction: "mean", over Σ w_y for integers and over the examples for probabilities; "sum" or "none".
      label_smoothing: ε.

    Returns:
      A number; with "none", losses in the shape of the labels.

    Example:
      >>> from jax_ls import compat
      >>> z, y = jnp.array([[2.0, -1.0, 0.5, 1.0], [0.0, 3.0, -2.0, 1.5]]), jnp.array([0, -100])
      >>> print(compat.torch_cross_entropy(z, y, label_smoothing=0.1).round(4))
      0.6327
    """
    checks.check_option("reduction", reduction, ("none", "mean", "sum"))
    z, y = checks.as_logits("input", input), checks.as_array("target", target)
    dense = jnp.issubdtype(y.dtype, jnp.floating)
    return smoothed_cross_entropy(
        z,
        y,
        float(label_smoothing),
        ignore_index=None if dense else ignore_index,
        class_weights=None if weight is None else jnp.asarray(weight),
        axis=0 if z.ndim == 1 else 1,
        reduction=reduction,  # pyright: ignore[reportArgumentType]
    )


@dataclass(frozen=True)
class LabelSmoothingCrossEntropy:
    """The PyTorch module that many projects copied before PyTorch could smooth. Call it with (output, target).

    In the original, ignored examples still pull the gradient, and count in half of the mean. Here they do not count.

    Args:
      eps: ε.
      reduction: "mean", "sum" or "none".
      ignore_index: a label whose examples do not count.

    Example:
      >>> from jax_ls import compat
      >>> print(compat.LabelSmoothingCrossEntropy(eps=0.1)(jnp.zeros((2, 4)), jnp.array([0, 3])).round(4))
      1.3863
    """

    eps: float = 0.1
    reduction: str = "mean"
    ignore_index: int = -100

    def __call__(self, output: ArrayLike, target: ArrayLike) -> Array:
        checks.check_option("reduction", self.reduction, ("none", "mean", "sum"))
        given: Any = {"ignore_index": self.ignore_index, "reduction": self.reduction}
        return smoothed_cross_entropy(output, target, float(self.eps), **given)


@dataclass(frozen=True)
class LabelSmoothing:
    """The Annotated Transformer's module: Σ KL(q ‖ p). Call it with (x, target), log-probabilities and labels.

    The label keeps 1 − ε. The classes but the label and the padding share ε. Rows whose label is padding do not count.

    Args:
      size: K.
      padding_idx: the class of padding.
      smoothing: ε.

    Example:
      >>> from jax_ls import compat
      >>> criterion = compat.LabelSmoothing(size=5, padding_idx=0, smoothing=0.4)
      >>> log_p = jnp.log(jnp.array([[0.1, 0.1, 0.6, 0.1, 0.1], [0.1, 0.1, 0.6, 0.1, 0.1]]))
      >>> print(criterion(log_p, jnp.array([2, 0])).round(4))
      0.1151
    """

    size: int
    padding_idx: int
    smoothing: float = 0.0

    def __call__(self, x: ArrayLike, target: ArrayLike) -> Array:
        y = checks.as_labels("target", target)
        is_word, kept = jnp.arange(self.size) != self.padding_idx, y != self.padding_idx
        y = jnp.where(kept, y, (self.padding_idx + 1) % self.size)
        q = smooth(y, float(self.smoothing), spread="others", class_where=is_word)
        number = jnp.asarray(self.smoothing, jnp.result_type(float))
        entropy = entropy_of_smoothed(number, jnp.asarray(self.size - 1, number.dtype), "others")
        losses = _against(q, x, kept)
        return jnp.sum(jnp.where(kept, losses - entropy.astype(losses.dtype), 0))


# TensorFlow and Keras

TF_REDUCTIONS = {
    "none": "none",
    "weighted_sum": "sum",
    "weighted_mean": "mean",
    "weighted_sum_over_batch_size": "sum",
    "weighted_sum_by_nonzero_weights": "sum_by_nonzero_weights",
}


def tf_softmax_cross_entropy(
    onehot_labels: ArrayLike,
    logits: ArrayLike,
    weights: ArrayLike = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "weighted_sum_by_nonzero_weights",
) -> Array:
    """Returns TensorFlow's `tf.compat.v1.losses.softmax_cross_entropy`.

    Args:
      onehot_labels: (*batch, K), integers or real numbers.
      logits: z, (*batch, K).
      weights: broadcastable to (*batch,).
      label_smoothing: ε.
      reduction: a value of `tf.losses.Reduction`: "none", "weighted_sum", "weighted_mean",
        "weighted_sum_over_batch_size" or "weighted_sum_by_nonzero_weights".

    Returns:
      A number; with "none", (*batch,).

    Example:
      >>> from jax_ls import compat
      >>> print(compat.tf_softmax_cross_entropy(jnp.eye(4)[:2], jnp.zeros((2, 4)), jnp.array([3.0, 0.0])).round(4))
      4.1589
    """
    checks.check_option("reduction", reduction, TF_REDUCTIONS)
    losses = smoothed_cross_entropy(logits, _real(onehot_labels, logits), float(label_smoothing))
    given: Any = {"reduction": TF_REDUCTIONS[reduction]}
    if reduction == "weighted_sum_over_batch_size":
        given = {"reduction": "mean", "denominator": losses.size}
    return reduce(losses, jnp.asarray(weights), **given)


KERAS_EPSILON = 1e-7
"""Keras clips probabilities to [1e-7, 1 − 1e-7]."""


def keras_categorical_crossentropy(
    y_true: ArrayLike, y_pred: ArrayLike, from_logits: bool = False, label_smoothing: float = 0.0, axis: int = -1
) -> Array:
    """Returns Keras's `keras.losses.categorical_crossentropy`, a loss for each example.

    Args:
      y_true: one-hot labels or probabilities, in the shape of `y_pred`.
      y_pred: probabilities, which are divided by their sum and clipped as Keras does; logits if `from_logits`.
      from_logits: whether `y_pred` are logits.
      label_smoothing: ε.
      axis: the class axis.

    Returns:
      Losses (*batch,). The class `CategoricalCrossentropy` returns their mean.

    Example:
      >>> from jax_ls import compat
      >>> p = jnp.array([[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]])
      >>> print(compat.keras_categorical_crossentropy(jnp.array([[0, 1, 0], [0, 0, 1]]), p).round(4))
      [0.0513 2.3026]
    """
    q = _real(y_true, y_pred)
    if from_logits:
        return smoothed_cross_entropy(y_pred, q, float(label_smoothing), axis=axis)
    q = smooth(jnp.moveaxis(q, axis, -1), float(label_smoothing))
    return _against(q, _keras_log(y_pred, axis))


def keras_sparse_categorical_crossentropy(
    y_true: ArrayLike, y_pred: ArrayLike, from_logits: bool = False, ignore_class: int | None = None, axis: int = -1
) -> Array:
    """Returns Keras's `keras.losses.sparse_categorical_crossentropy`, a loss for each example.

    Args:
      y_true: labels (*batch,) or (*batch, 1), integers or real numbers.
      y_pred: probabilities, which are divided by their sum and clipped as Keras does; logits if `from_logits`.
      from_logits: whether `y_pred` are logits.
      ignore_class: a label whose examples have the loss 0.
      axis: the class axis.

    Returns:
      Losses (*batch,). The class `SparseCategoricalCrossentropy` returns their mean.

    Example:
      >>> from jax_ls import compat
      >>> p = jnp.array([[0.05, 0.95, 0.0], [0.1, 0.8, 0.1]])
      >>> print(compat.keras_sparse_categorical_crossentropy(jnp.array([1.0, 2.0]), p).round(4))
      [0.0513 2.3026]
    """
    y, z = checks.as_array("y_true", y_true), checks.as_array("y_pred", y_pred)
    y = y[..., 0] if y.ndim == z.ndim and y.shape[-1] == 1 else y
    y = y.astype(jnp.int32)
    if from_logits:
        return smoothed_cross_entropy(z, y, 0.0, ignore_index=ignore_class, axis=axis)
    kept, hard = _without(y, ignore_class)
    return _against(hard, _keras_log(z, axis), kept)


def keras_binary_crossentropy(
    y_true: ArrayLike, y_pred: ArrayLike, from_logits: bool = False, label_smoothing: float = 0.0, axis: int = -1
) -> Array:
    """Returns Keras's `keras.losses.binary_crossentropy`, the mean over an axis.

    Args:
      y_true: 0 and 1, or probabilities, in the shape of `y_pred`.
      y_pred: probabilities, which are clipped as Keras does; logits if `from_logits`.
      from_logits: whether `y_pred` are logits.
      label_smoothing: ε.
      axis: the axis that the mean is taken over.

    Returns:
      Losses in the shape of the other axes. The class `BinaryCrossentropy` returns their mean.

    Example:
      >>> from jax_ls import compat
      >>> p = jnp.array([[0.6, 0.4], [0.4, 0.6]])
      >>> print(compat.keras_binary_crossentropy(jnp.array([[0, 1], [0, 0]]), p).round(4))
      [0.9163 0.7136]
    """
    q = _real(y_true, y_pred)
    if from_logits:
        return jnp.mean(sigmoid_cross_entropy(y_pred, q, float(label_smoothing)), axis=axis)
    p = jnp.clip(_wide(y_pred), KERAS_EPSILON, 1 - KERAS_EPSILON)
    q = q.astype(p.dtype) * (1 - label_smoothing) + 0.5 * label_smoothing
    return -jnp.mean(q * jnp.log(p) + (1 - q) * jnp.log1p(-p), axis=axis)


# timm and fairseq


def timm_label_smoothing_cross_entropy(x: ArrayLike, target: ArrayLike, smoothing: float = 0.1) -> Array:
    """Returns timm's `LabelSmoothingCrossEntropy(smoothing)(x, target)`; for soft targets `SoftTargetCrossEntropy()`.

    Args:
      x: logits (N, K).
      target: integers (N,), or probabilities (N, K), which timm's `SoftTargetCrossEntropy` takes with `smoothing=0`.
      smoothing: ε.

    Returns:
      The mean, a number.

    Example:
      >>> from jax_ls import compat
      >>> print(compat.timm_label_smoothing_cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3])).round(4))
      1.3863
    """
    return smoothed_cross_entropy(x, target, float(smoothing), reduction="mean")


def timm_binary_cross_entropy(
    x: ArrayLike,
    target: ArrayLike,
    smoothing: float = 0.1,
    target_threshold: float | None = None,
    weight: ArrayLike | None = None,
    reduction: str = "mean",
    sum_classes: bool = False,
    pos_weight: ArrayLike | None = None,
) -> Array:
    """Returns timm's `BinaryCrossEntropy(smoothing, ...)(x, target)`.

    Args:
      x: logits (N, K).
      target: integers (N,), which are smoothed as for softmax, or numbers (N, K), which are taken as they are.
      smoothing: ε, for integers.
      target_threshold: targets above it become 1 and the others 0; None leaves them.
      weight: multiplies each loss, broadcastable to (N, K).
      reduction: "mean", "sum" or "none".
      sum_classes: the mean over examples of the sum over classes; `reduction` then does not count.
      pos_weight: multiplies −q log σ(z), broadcastable to (N, K).

    Returns:
      A number; with "none", (N, K).

    Example:
      >>> from jax_ls import compat
      >>> print(compat.timm_binary_cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]), sum_classes=True).round(4))
      2.7726
    """
    checks.check_option("reduction", reduction, ("none", "mean", "sum"))
    z, q = checks.as_array("x", x), checks.as_array("target", target)
    q = smooth_labels(q, float(smoothing), num_classes=z.shape[-1]) if q.shape != z.shape else _real(q, z)
    q = q if target_threshold is None else (q > target_threshold).astype(q.dtype)
    losses = sigmoid_cross_entropy(z, q, pos_weight=pos_weight)
    losses = losses if weight is None else losses * checks.as_broadcast("weight", weight, losses)
    if sum_classes:
        return jnp.mean(jnp.sum(losses, axis=-1))
    return reduce(losses, reduction=reduction)  # pyright: ignore[reportArgumentType]


def fairseq_label_smoothed_nll_loss(
    lprobs: ArrayLike, target: ArrayLike, epsilon: float, ignore_index: int | None = None, reduce: bool = True
) -> tuple[Array, Array]:
    """Returns fairseq's `label_smoothed_nll_loss`: the smoothed loss and the one without smoothing.

    The label keeps 1 − ε and each other class gets ε/(K−1).

    Args:
      lprobs: log-probabilities (N, K).
      target: integers (N,) or (N, 1).
      epsilon: ε.
      ignore_index: a label whose rows are 0.
      reduce: whether to sum over the rows.

    Returns:
      (loss, nll_loss): two numbers, or (N,) each. fairseq leaves an axis of length 1 at their end.

    Example:
      >>> from jax_ls import compat
      >>> lprobs = jnp.log(jnp.array([[0.7, 0.1, 0.1, 0.1]]))
      >>> loss, nll = compat.fairseq_label_smoothed_nll_loss(lprobs, jnp.array([0]), 0.3)
      >>> print(loss.round(4), nll.round(4))
      0.9404 0.3567
    """
    x, y = checks.as_logits("lprobs", lprobs), checks.as_array("target", target)
    y = y[..., 0] if y.ndim == x.ndim else y
    kept, hard = _without(y, ignore_index)
    smoothed = smooth(hard, float(epsilon), spread="others")
    losses = [_against(q, x, kept) for q in (smoothed, hard)]
    loss, nll = (jnp.sum(x) if reduce else x for x in losses)
    return loss, nll


# T5X, Flax's examples and MaxText


def t5x_compute_weighted_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: ArrayLike | None = None,
) -> tuple[Array, Array, Array]:
    """Returns T5X's `compute_weighted_cross_entropy`: sums of the loss, of its z-loss, and of the weights.

    The label keeps 1 − ε. The entropy of the target is subtracted, so that a perfect model reads 0.

    Args:
      logits: z, (*batch, K).
      targets: integers (*batch,).
      weights: (*batch,); 1 if None.
      label_smoothing: ε.
      z_loss: the weight of lse(z)².
      loss_normalizing_factor: a number that the first two results are divided by; 1 if None.

    Returns:
      (loss, z_loss, weight_sum), three numbers. The z-loss is part of the loss.

    Example:
      >>> from jax_ls import compat
      >>> sums = compat.t5x_compute_weighted_cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]), z_loss=0.1)
      >>> print([f"{x:.4f}" for x in sums])
      ['3.1570', '0.3844', '2.0000']
    """
    parts = smoothed_cross_entropy(
        logits, targets, float(label_smoothing), spread="others", relative=True, z_loss=z_loss, return_parts=True
    )
    factor = jnp.asarray(1.0 if loss_normalizing_factor is None else loss_normalizing_factor, parts.loss.dtype)
    loss, penalty = (reduce(x, weights, reduction="sum") / factor for x in (parts.loss, parts.z_loss))
    return loss, penalty, _sum_of(weights, parts.loss)


def flax_compute_weighted_cross_entropy(
    logits: ArrayLike, targets: ArrayLike, weights: ArrayLike | None = None, label_smoothing: float = 0.0
) -> tuple[Array, Array]:
    """Returns `compute_weighted_cross_entropy` of Flax's examples wmt, lm1b, gemma and nlp_seq.

    The label keeps 1 − ε. The entropy of the target is subtracted, so that a perfect model reads 0.

    Args:
      logits: z, (*batch, K).
      targets: integers (*batch,).
      weights: (*batch,); 1 if None.
      label_smoothing: ε.

    Returns:
      (loss, normalizing_factor), Σ w · loss and Σ w: divide the first by the second.

    Example:
      >>> from jax_ls import compat
      >>> loss, count = compat.flax_compute_weighted_cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]))
      >>> print((loss / count).round(4))
      1.3863
    """
    loss, _, count = t5x_compute_weighted_cross_entropy(logits, targets, weights, label_smoothing)
    return loss, count


def maxtext_cross_entropy_with_logits(
    logits: ArrayLike, targets: ArrayLike, z_loss: float = 0.0
) -> tuple[Array, Array]:
    """Returns `cross_entropy_with_logits` of MaxText and T5X: the loss of each token, and the z-loss in it.

    Args:
      logits: z, (*batch, K).
      targets: one-hot or smoothed labels (*batch, K), as theirs, or integers (*batch,), which are not written out.
      z_loss: the weight of lse(z)².

    Returns:
      (loss, z_loss), (*batch,) each.

    Example:
      >>> from jax_ls import compat
      >>> loss, penalty = compat.maxtext_cross_entropy_with_logits(jnp.zeros((1, 4)), jnp.array([2]), z_loss=0.1)
      >>> print(loss.round(4), penalty.round(4))
      [1.5785] [0.1922]
    """
    y = checks.as_array("targets", targets)
    y = y if y.ndim < jnp.ndim(logits) else _real(y, logits)
    parts = smoothed_cross_entropy(logits, y, 0.0, z_loss=z_loss, return_parts=True)
    return parts.loss, parts.z_loss


def _wide(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    return x.astype(checks.wide(x.dtype))


def _real(x: ArrayLike, like: ArrayLike) -> Array:
    """Returns one-hot integers as real numbers, in the dtype of predictions; real numbers as they are."""
    array = jnp.asarray(x)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(_wide(like).dtype)


def _against(q: Target, log_p: ArrayLike, kept: Array | None = None) -> Array:
    """Returns −⟨q, log p⟩ of log-probabilities (*batch, K), which are not normalised again; 0 for rows not kept."""
    x = _wide(log_p)
    if kept is None:
        return -as_target(q).dot(x)
    return jnp.where(kept, -as_target(q).dot(jnp.where(kept[..., None], x, 0)), 0)


def _without(labels: Array, index: int | None) -> tuple[Array, Target]:
    """Returns which labels are not `index`, and the labels as a target, with class 0 in place of the others."""
    kept = jnp.ones(labels.shape, bool) if index is None else labels != index
    return kept, OneHot(jnp.where(kept, labels, 0))


def _keras_log(y_pred: ArrayLike, axis: int) -> Array:
    """Returns log p with the classes last, as Keras takes it."""
    p = jnp.moveaxis(_wide(y_pred), axis, -1)
    p = p / jnp.sum(p, axis=-1, keepdims=True)
    return jnp.log(jnp.clip(p, KERAS_EPSILON, 1 - KERAS_EPSILON))


def _sum_of(weights: ArrayLike | None, losses: Array) -> Array:
    """Returns Σ w, or how many losses there are."""
    ones = jnp.ones_like(losses)
    return jnp.sum(ones if weights is None else checks.as_broadcast("weights", weights, ones))
