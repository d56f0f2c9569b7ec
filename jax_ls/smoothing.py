"""labels -> q: how much mass leaves the label, and where it goes."""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp

from jax_ls import checks
from jax_ls.algebra import Restricted, Target, pytree
from jax_ls.class_axis import ClassAxis, align
from jax_ls.targets import Dense, OneHot, Uniform, as_target

__all__ = ["Prior", "Spread", "smooth", "smooth_binary_labels", "smooth_labels"]

Spread = Literal["all", "others"]
Prior = Target | jax.typing.ArrayLike


def smooth(
    labels: Target | jax.typing.ArrayLike,
    smoothing: jax.typing.ArrayLike,
    *,
    prior: Prior | None = None,
    spread: Spread = "all",
    class_where: jax.typing.ArrayLike | None = None,
) -> Target:
    """Smoothed targets, as a structure of the size of the labels.

    q = (1 − ε) δ_y + ε u with spread="all"; the label keeps exactly 1 − ε with spread="others", which is "all" at
    ε / (1 − u_y), so that a uniform u gives ε/(K−1) to each of the others.

    Args:
      labels: integers (*batch,), probabilities (*batch, K), or any `Target`.
      smoothing: ε, () or (*batch,); any sign, may be traced.
      prior: u, (K,) or (*batch, K) or a `Target`; uniform if None.
      spread: "all" (Szegedy, PyTorch, Keras, optax) or "others" (fairseq, T5X).
      class_where: boolean (K,) or (*batch, K), the classes that exist; the others get no mass, K counts those kept.

    Returns:
      A `Target`.

    Raises:
      AssertionError: wrong dtypes, ranks or shapes.
      TypeError: `smoothing` is no real number.
      ValueError: an unknown `spread`.

    Example:
      >>> smooth(jnp.array([1]), 0.5).probs(4).tolist()
      [[0.125, 0.625, 0.125, 0.125]]

    References:
      Szegedy et al., Rethinking the Inception Architecture, 2016.
    """
    checks.check_option("spread", spread, ("all", "others"))
    hard = as_target(labels)
    epsilon = checks.as_weight("smoothing", smoothing)
    _check_epsilon(hard, epsilon)
    soft = _prior(prior, class_where)
    if spread == "others":
        return _Others(hard, epsilon, soft)
    return (1 - epsilon) * hard + epsilon * soft


def smooth_labels(
    labels: jax.typing.ArrayLike,
    smoothing: jax.typing.ArrayLike,
    *,
    num_classes: int | None = None,
    prior: Prior | None = None,
    spread: Spread = "all",
    class_where: jax.typing.ArrayLike | None = None,
    axis: int = -1,
) -> jax.Array:
    """Smoothed labels written out, for a loss that takes arrays. The losses of jax_ls do without: see `smooth`.

    Args:
      labels: integers (*batch,), or probabilities with their classes on `axis`.
      smoothing: ε, () or (*batch,).
      num_classes: K; needed for integer labels, and for one example's probabilities (K,).
      prior, spread, class_where: as in `smooth`, with classes last.
      axis: where the classes are in the result, and in dense labels.

    Returns:
      q with K classes on `axis`; the dtype of dense labels, else the default float.
      A label outside [0, K), or of a class that `class_where` leaves out, makes its own row NaN.

    Raises:
      AssertionError: wrong dtypes, ranks, shapes or K.
      TypeError, ValueError: `num_classes` missing or < 1, `axis` or `spread` unknown.

    Example:
      >>> smooth_labels(jnp.array([1]), 0.5, num_classes=4).tolist()
      [[0.125, 0.625, 0.125, 0.125]]

    References:
      Szegedy et al., Rethinking the Inception Architecture, 2016.
    """
    labels = jnp.asarray(labels)
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


def smooth_binary_labels(
    labels: jax.typing.ArrayLike, smoothing: jax.typing.ArrayLike, *, prior: jax.typing.ArrayLike = 0.5
) -> jax.Array:
    """Smoothed binary or multi-label targets, element by element: (1 − ε) y + ε · prior.

    Args:
      labels: y, any shape; 0 and 1, or probabilities; integers, booleans or real numbers.
      smoothing: ε, broadcastable to the labels.
      prior: what a label is drawn to, broadcastable to the labels: 0.5 (Keras), 1/K (timm's BCE), 0 (GAN
        one-sided: real labels become 1 − ε and fake ones stay 0), or the base rate of each label.

    Returns:
      An array of the labels' shape; their dtype if real, else float32.

    Raises:
      AssertionError: shapes that do not broadcast to the labels.
      TypeError: arguments that are no real numbers.

    Example:
      >>> smooth_binary_labels(jnp.array([1, 0]), 0.5).tolist()
      [0.75, 0.25]

    References:
      Salimans et al., Improved Techniques for Training GANs, 2016 (one-sided smoothing).
    """
    given = jnp.asarray(labels)
    y = checks.as_weight("labels", given)
    epsilon = checks.as_broadcast("smoothing", smoothing, y)
    base_rate = checks.as_broadcast("prior", prior, y)
    smoothed = (1 - epsilon) * y + epsilon * base_rate
    return smoothed.astype(given.dtype) if jnp.issubdtype(given.dtype, jnp.floating) else smoothed


@pytree(epsilon=0)
@dataclass(frozen=True, eq=False)
class _Others(Target):
    """(1 − ε) on the label and ε u_k / (1 − u_y) on the others; all on the label where there are no others.

    Held back until K, or this device's share of u, is known: u_y is what it needs.
    """

    hard: Target
    epsilon: jax.Array
    prior: Target

    def contract(self, values: jax.Array | None, axis: ClassAxis) -> jax.Array:
        return self._mixture(axis).contract(values, axis)

    def probs_on(self, axis: ClassAxis) -> jax.Array:
        return self._mixture(axis).probs_on(axis)

    def at(self, labels: jax.Array, axis: ClassAxis) -> jax.Array:
        return self._mixture(axis).at(labels, axis)

    def _mixture(self, axis: ClassAxis) -> Target:
        if axis.size is None and axis.weights is None:
            # Only the mass is asked for, which no spreading changes.
            return (1 - self.epsilon) * self.hard + self.epsilon * self.prior
        if isinstance(self.hard, OneHot):
            raised = _raised(self.epsilon, self.prior.at(self.hard.labels, axis))
            return (1 - raised) * self.hard + raised * self.prior
        u = self.prior.probs_on(axis)
        ndim = max(u.ndim, self.epsilon.ndim + 1)
        raised = _raised(align(self.epsilon[..., None], ndim), align(u, ndim))
        bare = replace(axis, weights=None)
        return self.hard.weighted(1 - raised) + self.hard.weighted(raised).contract(None, bare) * self.prior


def _raised(epsilon: jax.Array, u_y: jax.Array) -> jax.Array:
    """ε / (1 − u_y); 0 where u_y = 1."""
    alone = u_y >= 1
    return jnp.where(alone, 0, epsilon.astype(u_y.dtype) / jnp.where(alone, 1, 1 - u_y))


def _prior(prior: Prior | None, class_where: jax.typing.ArrayLike | None) -> Target:
    where = None if class_where is None else checks.as_class_where("class_where", class_where)
    if prior is None:
        return Uniform(where)
    if not isinstance(prior, Target):
        prior = checks.as_class_values("prior", prior)
    target = as_target(prior)
    return target if where is None else Restricted(target, where)


def _check_epsilon(hard: Target, epsilon: jax.Array) -> None:
    if epsilon.ndim and isinstance(hard, OneHot | Dense):
        batch = hard.labels.shape if isinstance(hard, OneHot) else hard.probabilities.shape[:-1]
        checks.assert_shape("smoothing", epsilon, [(), batch], f"() or {batch}, the shape of the batch")
