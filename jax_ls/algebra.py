"""The arithmetic of targets: the base class `Target`, and sums, weights and restrictions of targets.

A new kind of target defines `contract` and `probs_on`, in a few lines over `ClassAxis`. Losses, sharding, masks and the
arithmetic below then work for it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.class_axis import ClassAxis, align, laid_as, multiply, with_stand_ins

__all__ = ["Restricted", "Scaled", "Sum", "Target", "Weighted", "pytree"]

T = TypeVar("T")


def pytree(*static: str, **ranks: int) -> Callable[[type[T]], type[T]]:
    """Returns a decorator that registers a dataclass as a pytree. Unflattening skips the constructor and its checks.

    All fields are children, except those named in `static`. `ranks` gives for each array field its number of axes for
    one example.
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


class _Leaf(NamedTuple):
    """An array of a target: its field, its axes before those of one example, and whether classes are its last axis."""

    name: str
    batch: checks.Shape
    known: bool
    over_classes: bool


class Target:
    """A distribution q over classes. Any weighted sum of targets is a target.

    (1 - eps) * OneHot(y) + eps * Uniform()  is  q = (1 − ε) δ_y + ε u

    Weights are () or (*batch,), of any sign, and may be traced. A subclass defines `contract` and `probs_on`.

    Example:
      >>> q = 0.5 * OneHot(jnp.array([0, 2])) + 0.5 * Uniform()
      >>> q.probs(2 + 2).tolist()
      [[0.625, 0.125, 0.125, 0.125], [0.125, 0.125, 0.625, 0.125]]
      >>> q.dot(jnp.array([[8.0, 0.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0]])).tolist()
      [5.0, 1.0]
    """

    ranks: ClassVar[Mapping[str, int]] = {}
    by_class: ClassVar[bool] = True  # whether the last axis of its arrays for one example is that of the classes
    __array_ufunc__ = None  # makes a NumPy scalar on the left call __rmul__

    def mass(self, *, axis: ClassAxis | None = None) -> Array:
        """Returns Σ_k q_k: (*batch,), or () if all examples share q."""
        return self.contract(None, axis or ClassAxis())

    def dot(self, values: ArrayLike, *, axis: ClassAxis | None = None) -> Array:
        """Returns ⟨q, values⟩ for values (*batch, K): (*batch,) in float32 or wider. A zero weight times −inf is 0."""
        values = checks.as_weight("values", values)
        checks.assert_min_rank("values", values, 1, "(*batch, K)")
        return self.laid_as(values).contract(values, axis or ClassAxis(values.shape[-1]))

    def probs(self, num_classes: int) -> Array:
        """Returns q written out: (*batch, K), or (K,) if all examples share q."""
        return self.probs_on(ClassAxis(checks.check_size("num_classes", num_classes)))

    def weighted(self, class_weights: ArrayLike) -> Target:
        """Returns the target q_k w_k for class weights w, (K,) or (*batch, K)."""
        return Weighted(self, checks.as_class_values("class_weights", class_weights))

    def per_example(self) -> list[bool]:
        """Returns for each leaf of the tree whether it has an entry for each example; other leaves are shared.

        `jax.vmap` and `jax.shard_map` ask for that. It is simplest to make the target inside, from the labels; to pass
        one in, give an axis to each leaf, or P("data") and P():

        Example:
          >>> q = smooth(jnp.array([1, 0]), 0.5)
          >>> axes = jax.tree.unflatten(jax.tree.structure(q), [0 if each else None for each in q.per_example()])
          >>> jax.vmap(lambda q: q.probs(2), in_axes=(axes,))(q).tolist()
          [[0.25, 0.75], [0.75, 0.25]]
        """
        return [bool(leaf.batch) for leaf in self._leaves()]

    def over_classes(self) -> list[bool]:
        """Returns for each leaf of the tree whether its last axis is that of the classes."""
        return [leaf.over_classes for leaf in self._leaves()]

    def batch_shape(self) -> checks.Shape | None:
        """Returns (*batch,), as the leaves with an entry for each example have it; None if all leaves are shared."""
        return max((leaf.batch for leaf in self._leaves() if leaf.batch), key=len, default=None)

    def counted(self, where: Array) -> Target:
        """Returns the target with stand-ins for the examples that do not count, so that no NaN of theirs spreads."""

        def masked(x: Array, leaf: _Leaf) -> Array:
            if not leaf.batch:
                return x
            if leaf.batch != where.shape:
                expected = f"batch axes {where.shape}, as the values have"
                raise ValueError(f"{leaf.name}: expected {expected}, got {checks.describe(x)}")
            return with_stand_ins(x, where)

        return self._map(masked)

    def laid_as(self, values: Array) -> Target:
        """Returns the target with its arrays as an explicit mesh lays values (*batch, K) over its devices."""
        return self._map(lambda x, leaf: laid_as(x, values, len(leaf.batch), leaf.over_classes) if leaf.known else x)

    def _map(self, f: Callable[[Array, _Leaf], Array]) -> Target:
        leaves, tree = jax.tree.flatten(self)
        return jax.tree.unflatten(tree, [f(x, leaf) for x, leaf in zip(leaves, self._leaves(), strict=True)])

    def _leaves(self) -> list[_Leaf]:
        """Returns what is known of each leaf of the tree."""
        found = []
        children, _ = jax.tree_util.tree_flatten_with_path(self, is_leaf=lambda x: x is not self)
        for (key,), field in children:
            name = str(getattr(key, "name", key))
            if isinstance(field, Target):
                found += field._leaves()
            elif field is not None:
                # An array that a user's own target does not declare in `ranks` counts as shared.
                shape = jnp.shape(field)
                rank = self.ranks.get(name, len(shape))
                batch = shape[: max(len(shape) - rank, 0)]
                found.append(_Leaf(name, batch, name in self.ranks, self.by_class and rank > 0))
        return found

    def contract(self, values: Array | None, axis: ClassAxis) -> Array:
        """Returns ⟨q, values⟩ over the classes of `axis`; the mass Σ_k q_k if `values` is None."""
        raise TypeError(f"{type(self).__name__} does not define contract(values, axis)")

    def probs_on(self, axis: ClassAxis) -> Array:
        """Returns q at the classes of `axis` that this device holds: (*batch, K) or (K,)."""
        raise TypeError(f"{type(self).__name__} does not define probs_on(axis)")

    def __add__(self, other: Target) -> Target:
        return Sum(self, other) if isinstance(other, Target) else NotImplemented

    def __radd__(self, other: object) -> Target:
        # Python's `sum` begins with 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: Target) -> Target:
        return self + -other if isinstance(other, Target) else NotImplemented

    def __neg__(self) -> Target:
        return -1.0 * self

    def __mul__(self, weight: ArrayLike) -> Target:
        return NotImplemented if isinstance(weight, Target) else Scaled(checks.as_weight("weight", weight), self)

    __rmul__ = __mul__

    def __truediv__(self, divisor: ArrayLike) -> Target:
        if isinstance(divisor, Target):
            return NotImplemented
        return Scaled(1 / checks.as_weight("divisor", divisor), self)


@pytree()
@dataclass(frozen=True, eq=False)
class Sum(Target):
    """The target left + right."""

    left: Target
    right: Target

    def contract(self, values: Array | None, axis: ClassAxis) -> Array:
        return _add(self.left.contract(values, axis), self.right.contract(values, axis))

    def probs_on(self, axis: ClassAxis) -> Array:
        return _add(self.left.probs_on(axis), self.right.probs_on(axis))


@pytree(weight=0)
@dataclass(frozen=True, eq=False)
class Scaled(Target):
    """The target weight · q, for a weight () or (*batch,)."""

    weight: Array
    target: Target

    def contract(self, values: Array | None, axis: ClassAxis) -> Array:
        if self.weight.ndim:
            checks.assert_batch("weight", self.weight, values)
        inner = self.target.contract(values, axis)
        weight = self.weight.astype(inner.dtype)
        # The mass keeps the NaN of a label that names no class, whatever its weight.
        return weight * inner if values is None else multiply(weight, inner)

    def probs_on(self, axis: ClassAxis) -> Array:
        inner = self.target.probs_on(axis)
        ndim = max(inner.ndim, self.weight.ndim + 1)
        return align(self.weight[..., None], ndim).astype(inner.dtype) * align(inner, ndim)


@pytree(class_weights=1)
@dataclass(frozen=True, eq=False)
class Weighted(Target):
    """The target q_k w_k, for class weights w (K,) or (*batch, K)."""

    target: Target
    class_weights: Array

    def contract(self, values: Array | None, axis: ClassAxis) -> Array:
        checks.assert_class_values("class_weights", self.class_weights, values)
        return self.target.contract(values, axis.weighted(self.class_weights))

    def probs_on(self, axis: ClassAxis) -> Array:
        checks.assert_num_classes("class_weights", self.class_weights, axis.size)
        probs = self.target.probs_on(axis)
        ndim = max(probs.ndim, self.class_weights.ndim)
        return align(probs, ndim) * align(self.class_weights, ndim).astype(probs.dtype)


@pytree(class_where=1)
@dataclass(frozen=True, eq=False)
class Restricted(Target):
    """q restricted to the classes that `class_where` (K,) or (*batch, K) keeps, and renormalised: q_k / Σ_kept q."""

    target: Target
    class_where: Array

    def contract(self, values: Array | None, axis: ClassAxis) -> Array:
        checks.assert_class_values("class_where", self.class_where, values)
        return self.target.contract(values, self._kept(axis)) / self._mass(axis)

    def probs_on(self, axis: ClassAxis) -> Array:
        checks.assert_num_classes("class_where", self.class_where, axis.size)
        probs = self.target.probs_on(replace(axis, where=None))
        exists = axis.kept(self.class_where)
        ndim = max(probs.ndim, exists.ndim)
        return jnp.where(align(exists, ndim), align(probs, ndim), 0) / align(self._mass(axis.apart())[..., None], ndim)

    def _kept(self, axis: ClassAxis) -> ClassAxis:
        """Returns an axis on which classes that are not kept have weight 0, so that their mass does not count."""
        exists = axis.kept(self.class_where)
        return replace(axis, where=None, size=exists.shape[-1]).weighted(exists.astype(jnp.float32))

    def _mass(self, axis: ClassAxis) -> Array:
        return self.target.contract(None, self._kept(replace(axis, weights=None)))


def _add(left: Array, right: Array) -> Array:
    """Returns left + right in the wider of their dtypes, aligned from the right."""
    ndim, dtype = max(left.ndim, right.ndim), max(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
    return align(left, ndim).astype(dtype) + align(right, ndim).astype(dtype)
