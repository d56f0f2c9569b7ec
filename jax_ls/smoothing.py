"""labels -> q: how much mass leaves the label, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import Restricted, Target, pytree
from jax_ls.class_axis import ClassAxis, align, times_its_log
from jax_ls.targets import Dense, OneHot, Uniform, as_target

__all__ = ["Prior", "Spread", "entropy_of_smoothed", "smooth", "smooth_binary_labels", "smooth_labels"]

Spread = Literal["all", "others"]
Prior = Target | ArrayLike


@checks.named_options
def smooth(
    labels: Target | ArrayLike,
    smoothing: ArrayLike,
    *,
    prior: Prior | None = None,
    spread: Spread = "all",
    class_where: ArrayLike | None = None,
) -> Target:
    """Returns the smoothed target, a structure of the labels' size.

    With spread="all", q = (1 − ε) δ_y + ε u. With spread="others" the label keeps exactly 1 − ε, which is "all" at
    ε / (1 − u_y): a uniform u gives ε/(K−1) to each of the other classes.

    Args:
      labels: integers (*batch,), probabilities (*batch, K), or any `Target`.
      smoothing: ε, () or (*batch,); any sign, may be traced.
      prior: u, (K,) or (*batch, K) or a `Target`; uniform if None.
      spread: "all" (Szegedy, PyTorch, Keras, optax) or "others" (fairseq, T5X).
      class_where: boolean (K,) or (*batch, K), the classes that exist; the others get no mass, K counts those kept.

    Returns:
      A `Target`.

    Raises:
      ValueError: an unknown `spread`, a concrete ε above 1, or a bare (K, K) prior for a batch of K examples.

    Example:
      >>> smooth(jnp.array([1]), 0.5).probs(4).tolist()
      [[0.125, 0.625, 0.125, 0.125]]

    References:
      Szegedy et al., Rethinking the Inception Architecture, 2016.
    """
    checks.check_option("spread", spread, ("all", "others"))
    hard = as_target(labels)
    epsilon = checks.as_weight("smoothing", smoothing)
    checks.check_values("smoothing", smoothing, lambda x: x <= 1, "numbers <= 1, for the label to keep its mass")
    batch = _batch(hard)
    if epsilon.ndim and batch is not None:
        checks.assert_shape("smoothing", epsilon, [(), batch], "{shapes}, the shape of the batch")
    soft = _prior(prior, class_where, batch)
    if spread == "others":
        return _Others(hard, epsilon, soft)
    return (1 - epsilon) * hard + epsilon * soft


@checks.named_options
def smooth_labels(
    labels: ArrayLike,
    smoothing: ArrayLike,
    *,
    num_classes: int | None = None,
    prior: Prior | None = None,
    spread: Spread = "all",
    class_where: ArrayLike | None = None,
    axis: int = -1,
) -> Array:
    """Returns smoothed labels as an array, for a loss that takes arrays. The losses of jax_ls do not need it.

    Args:
      labels: integers (*batch,), or probabilities with their classes on `axis`.
      smoothing: ε, () or (*batch,).
      num_classes: K; needed for integer labels, and for one example's probabilities (K,).
      prior, spread, class_where: as in `smooth`, with classes last.
      axis: the class axis of the result, and of dense labels.

    Returns:
      q with K classes on `axis`; the dtype of dense labels, else the default float.
      A label outside [0, K), or of a class that `class_where` leaves out, makes its own row NaN.

    Raises:
      TypeError: integer labels without `num_classes`.
      ValueError: as in `smooth`.

    Example:
      >>> smooth_labels(jnp.array([1]), 0.5, num_classes=4).tolist()
      [[0.125, 0.625, 0.125, 0.125]]

    References:
      Szegedy et al., Rethinking the Inception Architecture, 2016.
    """
    labels = checks.as_array("labels", labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        checks.assert_min_rank("labels", labels, 1, "integers (*batch,), or probabilities with their classes on axis")
    hard_ndim = labels.ndim + 1 if jnp.issubdtype(labels.dtype, jnp.integer) else labels.ndim
    axis = checks.check_axis("axis", axis, hard_ndim)
    if hard_ndim == labels.ndim:
        labels = jnp.moveaxis(labels, axis, -1)
        if num_classes is None:
            # Real numbers (N,) are likelier N labels of the wrong dtype than one example's probabilities.
            expected = "integers (*batch,), or probabilities (*batch, K), or (K,) with num_classes"
            checks.assert_min_rank("labels", labels, 2, expected)
        checks.assert_num_classes("labels", labels, num_classes)
        num_classes, dtype = labels.shape[-1], labels.dtype
    else:
        dtype = jnp.result_type(float)
    size = checks.check_size("num_classes", num_classes)
    batch = labels.shape[: hard_ndim - 1]
    written_out = jax.ShapeDtypeStruct((*batch, size), dtype)
    if prior is not None and not isinstance(prior, Target):
        prior = checks.as_class_values("prior", prior)
        checks.assert_class_values("prior", prior, written_out)
    target = smooth(labels, smoothing, prior=prior, spread=spread, class_where=class_where)
    where = None if class_where is None else checks.as_class_where("class_where", class_where)
    if where is not None:
        checks.assert_class_values("class_where", where, written_out)
    probs = target.probs_on(ClassAxis(size, where=where))
    return jnp.moveaxis(probs, -1, axis).astype(dtype)


@checks.named_options
def smooth_binary_labels(labels: ArrayLike, smoothing: ArrayLike, *, prior: ArrayLike = 0.5) -> Array:
    """Returns smoothed binary or multi-label targets, element by element: (1 − ε) y + ε · prior.

    Args:
      labels: y, any shape; 0 and 1, or probabilities; integers, booleans or real numbers.
      smoothing: ε, broadcastable to the labels.
      prior: the number that a label moves towards, broadcastable to the labels: 0.5 (Keras), 1/K (timm's BCE), 0
        (one-sided for GANs: real labels become 1 − ε, fake ones stay 0), or the base rate of each label.

    Returns:
      An array of the labels' shape; their dtype if real, else float32.

    Example:
      >>> smooth_binary_labels(jnp.array([1, 0]), 0.5).tolist()
      [0.75, 0.25]

    References:
      Salimans et al., Improved Techniques for Training GANs, 2016 (one-sided smoothing).
    """
    given = checks.as_array("labels", labels)
    y = checks.as_weight("labels", given)
    epsilon = checks.as_broadcast("smoothing", smoothing, y)
    base_rate = checks.as_broadcast("prior", prior, y)
    smoothed = (1 - epsilon) * y + epsilon * base_rate
    return smoothed.astype(given.dtype) if jnp.issubdtype(given.dtype, jnp.floating) else smoothed


def entropy_of_smoothed(smoothing: Array, num_classes: Array, spread: Spread) -> Array:
    """Returns H(q) of a label that is smoothed uniformly over K classes; NaN where q has negative entries.

    Args:
      smoothing: ε, () or (*batch,).
      num_classes: K, () or (*batch,), a real number.
      spread: as in `smooth`.
    """
    if spread == "others":
        others = num_classes - 1
        share = jnp.where(others == 0, 0, smoothing / jnp.where(others == 0, 1, others))
        label = jnp.where(others == 0, 1, 1 - smoothing)
    else:
        others, share = num_classes - 1, smoothing / num_classes
        label = 1 - smoothing + share
    return -times_its_log(label) - others * times_its_log(share)


@pytree(epsilon=0)
@dataclass(frozen=True, eq=False)
class _Others(Target):
    """(1 − ε) on the label and ε u_k / Σ_{j≠y} u_j on the others, whose sum is taken without u_y: 1 − u_y would cancel.

    Where all of u is on the label, the others share ε equally. Where there are no others, the label keeps everything.
    """

    hard: Target
    epsilon: Array
    prior: Target

    def contract(self, values: Array | None, axis: ClassAxis) -> Array:
        if values is None and axis.weights is None:
            # Spreading changes no mass.
            return self.hard.contract(None, axis)
        if isinstance(self.prior, Uniform):
            return self._with_uniform(self.prior, axis).contract(values, axis)
        if not isinstance(self.hard, OneHot):
            return axis.dot(self.probs_on(replace(axis, weights=None)), values)
        parts = self._of_labels(self.hard.labels, axis)
        if values is None:
            label = axis.take(parts.exists, self.hard.labels[..., None])[..., 0]
            rest = axis.psum(jnp.sum(parts.exists, axis=-1)) - label
            off = parts.by_prior * _without_label(self.hard.labels, parts.u, axis) + parts.equally * rest
        else:
            # The shares contain masks and class weights. Multiplied later, XLA on CPU would write the product out.
            off = replace(axis, where=None, weights=None).dot(parts.others(axis, self.hard.labels), values)
        hard = (1 - parts.epsilon) * self.hard
        return hard.contract(values, axis).astype(off.dtype) + parts.epsilon.astype(off.dtype) * off

    def probs_on(self, axis: ClassAxis) -> Array:
        axis = replace(axis.apart(), weights=None)
        if isinstance(self.prior, Uniform):
            return self._with_uniform(self.prior, axis).probs_on(axis)
        if not isinstance(self.hard, OneHot):
            return self._of_dense(axis)
        labels = self.hard.labels
        parts = self._of_labels(labels, axis)
        epsilon = jnp.broadcast_to(parts.epsilon, labels.shape)[..., None]
        return (1 - epsilon) * self.hard.probs_on(axis).astype(epsilon.dtype) + epsilon * parts.others(axis, labels)

    def _with_uniform(self, prior: Uniform, axis: ClassAxis) -> Target:
        """Returns the mixture with the uniform distribution. Its 1 − u_y is 1 − 1/K, which does not cancel."""
        count = (axis if prior.class_where is None else axis.restricted(prior.class_where)).row_count()
        alone = count <= 1
        raised = jnp.where(alone, 0, self.epsilon / jnp.where(alone, 1, 1 - 1 / count).astype(self.epsilon.dtype))
        raised, mass = checks.same_dtype(raised, self.hard.contract(None, replace(axis, weights=None)))
        return (1 - raised) * self.hard + (raised * mass) * prior

    def _of_labels(self, labels: Array, axis: ClassAxis) -> _Shares:
        """Returns how the classes other than the label share ε, times the class weights."""
        bare = replace(axis.apart(), weights=None)
        u = self.prior.probs_on(bare)
        rest = _without_label(labels, u, bare)
        count = axis.count().astype(u.dtype)
        sure = rest == 0
        exists = axis.exists(u.dtype)
        if axis.weights is not None:
            weights = axis.weights.astype(u.dtype)
            u, exists = (align(x, weights.ndim) * align(weights, x.ndim) for x in (u, exists))
        return _Shares(
            jnp.where(count > 1, self.epsilon.astype(u.dtype), 0),
            jnp.where(sure, 0, 1 / jnp.where(sure, 1, rest)),
            jnp.where(sure, 1 / jnp.maximum(count - 1, 1), 0),
            u,
            exists,
        )

    def _of_dense(self, axis: ClassAxis) -> Array:
        """Returns the target for dense labels h, the sum over labels j with weight h_j.

        Label j gives u_k / Σ_{i≠j} u_i to class k ≠ j, or 1 / (K − 1) if that sum is 0.
        """
        hard, u = checks.same_dtype(self.hard.probs_on(axis), self.prior.probs_on(axis))
        ndim = max(hard.ndim, u.ndim, self.epsilon.ndim + 1)
        hard, u, exists = align(hard, ndim), align(u, ndim), align(axis.exists(u.dtype), ndim)
        epsilon = align(self.epsilon[..., None], ndim).astype(u.dtype)
        count = axis.count().astype(u.dtype)
        count = align(count[..., None], ndim) if count.ndim else count
        rest = _sum_without(u, u, axis)
        sure = rest == 0
        by_prior, equally = jnp.where(sure, 0, hard / jnp.where(sure, 1, rest)), jnp.where(sure, hard, 0)
        by_prior, equally = (_sum_without(x, x, axis) for x in (by_prior, equally))
        spread = u * by_prior + exists * equally / jnp.maximum(count - 1, 1)
        return jnp.where(count > 1, (1 - epsilon) * hard + epsilon * spread, hard)


class _Shares(NamedTuple):
    """ε, and the share of it that a class k other than the label gets: by_prior · u_k + equally · [k exists]."""

    epsilon: Array
    by_prior: Array
    equally: Array
    u: Array
    exists: Array

    def others(self, axis: ClassAxis, labels: Array) -> Array:
        """Returns the shares, (*batch, K); 0 on the label."""
        ndim = labels.ndim + 1
        by_prior, equally = self.by_prior[..., None], self.equally[..., None]
        shares = align(self.u, ndim) * by_prior + align(self.exists, ndim) * equally
        return shares * axis.away(labels, self.u.dtype)


def _without_label(labels: Array, x: Array, axis: ClassAxis) -> Array:
    """Returns Σ_{k≠y} x_k, (*batch,), for x (K,) or (*batch, K)."""
    if x.ndim == 1:
        return _sum_without(axis.take(x, labels[..., None]), x, axis)[..., 0]
    return axis.psum(jnp.sum(x * axis.away(labels, x.dtype), axis=-1))


def _sum_without(entry: Array, x: Array, axis: ClassAxis) -> Array:
    """Returns Σ_k x_k less each `entry`, which is one of x.

    The sum less an entry cancels where the entry is most of Σ|x|. Only the largest can be: its sum is taken without it.
    """

    def summed(terms: Array) -> Array:
        return align(axis.psum(jnp.sum(terms, axis=-1, keepdims=True)), entry.ndim)

    size = jnp.abs(x)
    top = size == axis.pmax(jnp.max(size, axis=-1, keepdims=True))
    total, without_top = summed(x), summed(jnp.where(top, 0, x))
    return jnp.where(jnp.abs(entry) > summed(size) / 2, without_top, total - entry)


def _prior(prior: Prior | None, class_where: ArrayLike | None, batch: tuple[int, ...] | None) -> Target:
    where = None if class_where is None else checks.as_class_where("class_where", class_where)
    if where is not None:
        _check_rows("class_where", where, batch)
    if prior is None:
        return Uniform(where)
    if not isinstance(prior, Target):
        prior = checks.as_class_values("prior", prior, widened=False)
        _check_rows("prior", prior, batch)
        if prior.ndim == 2 and prior.shape[0] == prior.shape[1] and batch == prior.shape[:1]:
            raise ValueError(
                f"prior: expected (K,) or a Target, got {checks.describe(prior)} for a batch of K examples: "
                "one row per label is Rows(prior, labels), one row per example is Dense(prior)"
            )
    target = as_target(prior)
    return target if where is None else Restricted(target, where)


def _check_rows(name: str, x: Array, batch: tuple[int, ...] | None) -> None:
    """Raises unless `x` is (K,) or (*batch, K)."""
    if batch is not None and x.ndim > 1:
        checks.assert_shape(name, x, [(*batch, x.shape[-1])], "(K,) or {shapes}, one row an example")


def _batch(hard: Target) -> tuple[int, ...] | None:
    """Returns the batch axes of the labels; None if they are not known."""
    if isinstance(hard, OneHot):
        return hard.labels.shape
    return hard.probabilities.shape[:-1] if isinstance(hard, Dense) else hard.batch_shape()
