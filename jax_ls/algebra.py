"""The arithmetic of targets: what every target can do, and sums, weights and restrictions of them.

A new kind of target defines `contract` and `probs_on` in a few lines over `ClassAxis`; losses, sharding, masks and
the formulas below then hold for it too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp

from jax_ls import checks
from jax_ls.class_axis import ClassAxis, align, multiply

__all__ = ["Restricted", "Scaled", "Sum", "Target", "Weighted", "pytree"]

T = TypeVar("T")


def pytree(*static: str, **ranks: int) -> Callable[[type[T]], type[T]]:
    """Registers a dataclass, its fields as children; unflattening skips the constructor and its checks.

    `static` names fields that are no children; `ranks` the arrays, and how many axes each has for one example.
    """

    def register(cls: type[T]) -> type[T]:
        names = tuple(name for name in cls.__annotations__ if name not in static)

        def flatten(node: T) -> tuple[list[tuple[Any, Any]], Any]:
            children = [(jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in names]
            return children, tuple(getattr(node, name) for name in static)

        def unflatten(constants: Any, children: Any) -> T:
            node = object.__new__(cls)
            for name, value in zip((*static, *names), (*constants, *children), strict=True):
                object.__setattr__(node, name, value)
            return node

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        type.__setattr__(cls, "ranks", ranks)
        return cls

    return register


class Target:
    """What a distribution over classes has to tell a loss; any weighted sum of targets is a target.

    (1 - eps) * OneHot(y) + eps * Uniform()  is  q = (1 − ε) δ_y + ε u

    Weights are scalars or (*batch,), traced or not, of any sign. A subclass defines `contract` and `probs_on`,
    and `at` if it can be the prior of `spread="others"`.

    Example:
      >>> q = 0.5 * OneHot(jnp.array([0, 2])) + 0.5 * Uniform()
      >>> q.probs(2 + 2).tolist()
      [[0.625, 0.125, 0.125, 0.125], [0.125, 0.125, 0.625, 0.125]]
      >>> q.dot(jnp.array([[8.0, 0.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0]])).tolist()
      [5.0, 1.0]
    """

    ranks: ClassVar[Mapping[str, int]] = {}
    __array_ufunc__ = None  # a NumPy scalar on the left hands over to __rmul__

    def mass(self, *, axis: ClassAxis | None = None) -> jax.Array:
        """Σ_k q_k: (*batch,), or () where it is the same for all."""
        return self.contract(None, axis or ClassAxis())

    def dot(self, values: jax.typing.ArrayLike, *, axis: ClassAxis | None = None) -> jax.Array:
        """⟨q, values⟩ of values (*batch, K): (*batch,). A zero weight times −inf is 0."""
        values = jnp.asarray(values)
        checks.assert_min_rank("values", values, 1, "(*batch, K)")
        return self.contract(values, axis or ClassAxis(values.shape[-1]))

    def probs(self, num_classes: int) -> jax.Array:
        """q written out: (*batch, K), or (K,) where it is the same for all."""
        return self.probs_on(ClassAxis(checks.check_size("num_classes", num_classes)))

    def weighted(self, class_weights: jax.typing.ArrayLike) -> "Target":
        """q_k w_k for class weights w, (K,) or (*batch, K)."""
        return Weighted(self, checks.as_class_values("class_weights", class_weights))

    def per_example(self) -> list[bool]:
        """Of each leaf of the tree, in its order, whether it has one entry an example; the others are shared."""
        flags = []
        children, _ = jax.tree_util.tree_flatten_with_path(self, is_leaf=lambda x: x is not self)
        for (key,), field in children:
            name = str(getattr(key, "name", key))
            if isinstance(field, Target):
                flags += field.per_example()
            elif field is not None:
                # What a user's own target does not declare is shared, and left as it is.
                flags.append(name in self.ranks and jnp.ndim(field) > self.ranks[name])
        return flags

    def counted(self, where: jax.Array) -> "Target":
        """The same target with zeros for the examples that do not count, so that no NaN of theirs gets about."""
        leaves, tree = jax.tree.flatten(self)

        def zeroed(x: jax.Array) -> jax.Array:
            return jnp.where(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), x, 0)

        own = zip(leaves, self.per_example(), strict=True)
        return jax.tree.unflatten(tree, [zeroed(x) if is_own else x for x, is_own in own])

    def contract(self, values: jax.Array | None, axis: ClassAxis) -> jax.Array:
        """⟨q, values⟩ over the classes of `axis`; the mass where `values` is None."""
        raise TypeError(f"{type(self).__name__} does not define contract(values, axis)")

    def probs_on(self, axis: ClassAxis) -> jax.Array:
        """q at the classes of `axis` that this device holds: (*batch, K) or (K,)."""
        raise TypeError(f"{type(self).__name__} does not define probs_on(axis)")

    def at(self, labels: jax.Array, axis: ClassAxis) -> jax.Array:
        """q_y at labels (*batch,)."""
        raise TypeError(f"{type(self).__name__} does not define at(labels, axis)")

    def __add__(self, other: "Target") -> "Target":
        return Sum(self, other) if isinstance(other, Target) else NotImplemented

    def __mul__(self, weight: jax.typing.ArrayLike) -> "Target":
        return NotImplemented if isinstance(weight, Target) else Scaled(checks.as_weight("weight", weight), self)

    __rmul__ = __mul__


@pytree()
@dataclass(frozen=True, eq=False)
class Sum(Target):
    """left + right."""

    left: Target
    right: Target

    def contract(self, values: jax.Array | None, axis: ClassAxis) -> jax.Array:
        return _add(self.left.contract(values, axis), self.right.contract(values, axis))

    def probs_on(self, axis: ClassAxis) -> jax.Array:
        return _add(self.left.probs_on(axis), self.right.probs_on(axis))

    def at(self, labels: jax.Array, axis: ClassAxis) -> jax.Array:
        return _add(self.left.at(labels, axis), self.right.at(labels, axis))


@pytree(weight=0)
@dataclass(frozen=True, eq=False)
class Scaled(Target):
    """weight · target, for a weight () or (*batch,)."""

    weight: jax.Array
    target: Target

    def contract(self, values: jax.Array | None, axis: ClassAxis) -> jax.Array:
        if self.weight.ndim:
            checks.assert_batch("weight", self.weight, values)
        inner = self.target.contract(values, axis)
        weight = self.weight.astype(inner.dtype)
        # The mass keeps the NaN of a label that names no class, whatever its weight.
        return weight * inner if values is None else multiply(weight, inner)

    def probs_on(self, axis: ClassAxis) -> jax.Array:
        inner = self.target.probs_on(axis)
        ndim = max(inner.ndim, self.weight.ndim + 1)
        return align(self.weight[..., None], ndim).astype(inner.dtype) * align(inner, ndim)

    def at(self, labels: jax.Array, axis: ClassAxis) -> jax.Array:
        inner = self.target.at(labels, axis)
        return self.weight.astype(inner.dtype) * inner


@pytree(class_weights=1)
@dataclass(frozen=True, eq=False)
class Weighted(Target):
    """q_k w_k, for class weights w (K,) or (*batch, K)."""

    target: Target
    class_weights: jax.Array

    def contract(self, values: jax.Array | None, axis: ClassAxis) -> jax.Array:
        checks.assert_class_values("class_weights", self.class_weights, values)
        return self.target.contract(values, axis.weighted(self.class_weights))

    def probs_on(self, axis: ClassAxis) -> jax.Array:
        checks.assert_num_classes("class_weights", self.class_weights, axis.size)
        probs = self.target.probs_on(axis)
        ndim = max(probs.ndim, self.class_weights.ndim)
        return align(probs, ndim) * align(self.class_weights, ndim).astype(probs.dtype)

    def at(self, labels: jax.Array, axis: ClassAxis) -> jax.Array:
        inner = self.target.at(labels, axis)
        return inner * axis.take(self.class_weights, labels[..., None])[..., 0].astype(inner.dtype)


@pytree(where=1)
@dataclass(frozen=True, eq=False)
class Restricted(Target):
    """q given that the class is one that `where` (K,) or (*batch, K) keeps: q_k [k kept] / Σ_kept q."""

    target: Target
    where: jax.Array

    def contract(self, values: jax.Array | None, axis: ClassAxis) -> jax.Array:
        return self.target.contract(values, axis.restricted(self.where)) / self._kept(axis)

    def probs_on(self, axis: ClassAxis) -> jax.Array:
        probs = self.target.probs_on(axis)
        ndim = max(probs.ndim, self.where.ndim)
        kept = align(self._kept(axis)[..., None], ndim)
        return jnp.where(align(self.where, ndim), align(probs, ndim), 0) / kept

    def at(self, labels: jax.Array, axis: ClassAxis) -> jax.Array:
        kept = axis.take(self.where.astype(jnp.result_type(float)), labels[..., None])[..., 0]
        return kept * self.target.at(labels, axis) / self._kept(axis)

    def _kept(self, axis: ClassAxis) -> jax.Array:
        return self.target.contract(None, replace(axis, weights=None).restricted(self.where))


def _add(left: jax.Array, right: jax.Array) -> jax.Array:
    """left + right in the wider of their dtypes, aligned from the right."""
    ndim, dtype = max(left.ndim, right.ndim), max(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
    return align(left, ndim).astype(dtype) + align(right, ndim).astype(dtype)
