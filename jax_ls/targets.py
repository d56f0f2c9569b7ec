"""q: the kinds of target distributions. Weighted sums of them are targets too, see `jax_ls.algebra`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import Target, pytree
from jax_ls.class_axis import ClassAxis, align, look_up, multiply

__all__ = ["Dense", "OneHot", "Rows", "Sparse", "Target", "Uniform", "as_target"]


@pytree(labels=0)
@dataclass(frozen=True, eq=False)
class OneHot(Target):
    """The target with all mass on the label: q = δ_y.

    A label outside [0, K) gives NaN, in the loss and in its gradient.

    Args:
      labels: integers (*batch,).

    Example:
      >>> OneHot(jnp.array([1, 0])).probs(3).tolist()
      [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """

    labels: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", checks.as_labels("labels", self.labels))

    def contract(self, values: Array | None, axis: ClassAxis) -> Array:
        checks.assert_batch("labels", self.labels, values)
        return axis.pick(values, self.labels[..., None])[..., 0]

    def probs_on(self, axis: ClassAxis) -> Array:
        labels = self.labels[..., None]
        hit = axis.columns(labels)[..., 0, :]
        return jnp.where(axis.contains(labels), hit.astype(jnp.result_type(float)), jnp.nan)


@pytree(class_where=1)
@dataclass(frozen=True, eq=False)
class Uniform(Target):
    """The target with the same mass on every class: u = 1/K, or uniform over the classes that `class_where` keeps.

    Args:
      class_where: boolean (K,) or (*batch, K), the classes that share the mass; None for all classes of the loss.

    Example:
      >>> Uniform(jnp.array([True, True, False, False])).probs(4).tolist()
      [0.5, 0.5, 0.0, 0.0]
    """

    class_where: Array | None = None

    def __post_init__(self) -> None:
        if self.class_where is not None:
            object.__setattr__(self, "class_where", checks.as_class_where("class_where", self.class_where))

    def contract(self, values: Array | None, axis: ClassAxis) -> Array:
        return self._kept(axis).mean(values)

    def probs_on(self, axis: ClassAxis) -> Array:
        return self._kept(axis).uniform()

    def _kept(self, axis: ClassAxis) -> ClassAxis:
        if self.class_where is None:
            return axis
        checks.assert_num_classes("class_where", self.class_where, axis.size)
        return axis.restricted(self.class_where)


@pytree(probabilities=1)
@dataclass(frozen=True, eq=False)
class Dense(Target):
    """A target that is written out. All examples share one of shape (K,).

    Args:
      probabilities: real numbers (K,) or (*batch, K). They need not sum to 1; losses take their mass into account.

    Example:
      >>> Dense(jnp.array([0.25, 0.75])).dot(jnp.array([[4.0, 0.0], [0.0, 4.0]])).tolist()
      [1.0, 3.0]
    """

    probabilities: Array

    def __post_init__(self) -> None:
        expected = "real numbers (K,) or (*batch, K)"
        probabilities = checks.as_array("probabilities", self.probabilities, expected)
        checks.assert_kind("probabilities", probabilities, float, expected)
        checks.assert_min_rank("probabilities", probabilities, 1, expected)
        # In their own dtype: widened here, XLA would keep a float32 copy for the backward pass.
        object.__setattr__(self, "probabilities", probabilities)

    def contract(self, values: Array | None, axis: ClassAxis) -> Array:
        checks.assert_class_values("probabilities", self.probabilities, values)
        return axis.dot(self.probabilities, values)

    def probs_on(self, axis: ClassAxis) -> Array:
        checks.assert_num_classes("probabilities", self.probabilities, axis.size)
        if axis.where is None:
            return self._wide()
        ndim = max(self.probabilities.ndim, axis.where.ndim)
        return jnp.where(align(axis.where, ndim), align(self._wide(), ndim), 0)

    def _wide(self) -> Array:
        return self.probabilities.astype(checks.wide(self.probabilities.dtype))


@pytree(table=2, labels=0)
@dataclass(frozen=True, eq=False)
class Rows(Target):
    """The target in row y of a table, for a q that depends only on the label.

    Class similarity, hierarchies, ordinal classes and online smoothing give such tables.

    Args:
      table: real numbers (K, K); row y is the target of label y.
      labels: integers (*batch,).

    Example:
      >>> Rows(jnp.array([[0.75, 0.25], [0.5, 0.5]]), jnp.array([1, 0])).probs(2).tolist()
      [[0.5, 0.5], [0.75, 0.25]]
    """

    table: Array
    labels: Array

    def __post_init__(self) -> None:
        table = checks.as_class_values("table", self.table)
        checks.assert_rank("table", table, 2, "a matrix (K, K)")
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "labels", checks.as_labels("labels", self.labels))

    def contract(self, values: Array | None, axis: ClassAxis) -> Array:
        checks.assert_batch("labels", self.labels, values)
        return axis.dot(self.probs_on(axis), values)

    def probs_on(self, axis: ClassAxis) -> Array:
        checks.assert_num_classes("table", self.table, axis.size)
        known = ClassAxis(self.table.shape[0], rows=axis.rows).contains(self.labels[..., None])
        dense = Dense(look_up(self.table, self.labels)).probs_on(axis)
        return jnp.where(known, dense, jnp.nan)


@pytree("num_classes", indices=1, weights=1)
@dataclass(frozen=True, eq=False)
class Sparse(Target):
    """A target on a few classes for each example: q = Σ_s w_s δ_{i_s}.

    Mixup, two-hot values and neighbouring labels give such targets. An index outside [0, K) with a weight other than 0
    gives NaN.

    Args:
      indices: integers (*batch, S).
      weights: real numbers (*batch, S).
      num_classes: K, static, if it is known; a loss over another number of classes then raises.

    Example:
      >>> Sparse(jnp.array([[0, 2]]), jnp.array([[0.75, 0.25]])).probs(3).tolist()
      [[0.75, 0.0, 0.25]]
    """

    by_class = False

    indices: Array
    weights: Array
    num_classes: int | None = None

    def __post_init__(self) -> None:
        indices = checks.as_labels("indices", self.indices)
        weights = checks.as_class_values("weights", self.weights)
        checks.assert_shape("weights", weights, [indices.shape], "{shapes}, the shape of indices")
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "weights", weights)

    def contract(self, values: Array | None, axis: ClassAxis) -> Array:
        self._check(axis)
        checks.assert_batch("indices", self.indices[..., 0], values)
        picked = axis.pick(values, self.indices)
        terms = multiply(self.weights.astype(picked.dtype), picked)
        if not 0 < terms.shape[-1] <= 32:
            return jnp.sum(terms, axis=-1)
        # Added one by one: XLA on CPU takes up to thirty times as long for a sum over a short last axis.
        return functools.reduce(jnp.add, (terms[..., s] for s in range(terms.shape[-1])))

    def probs_on(self, axis: ClassAxis) -> Array:
        self._check(axis)
        known = axis.contains(self.indices) & ~jnp.isnan(self.weights) | (self.weights == 0)
        probs = jnp.sum(jnp.where(axis.columns(self.indices), self.weights[..., None], 0), axis=-2)
        return jnp.where(jnp.all(known, axis=-1, keepdims=True), probs, jnp.nan)

    def _check(self, axis: ClassAxis) -> None:
        if self.num_classes is not None and axis.size is not None:
            checks.assert_total("target", self.num_classes, axis.size * axis.num_devices)


def as_target(x: Target | ArrayLike, name: str = "target") -> Target:
    """Returns a target as it is, integers as `OneHot`, and real numbers as `Dense`."""
    if isinstance(x, Target):
        return x
    array = checks.as_array(name, x)
    return OneHot(array) if jnp.issubdtype(array.dtype, jnp.integer) else Dense(array)
