"""The class axis: how long it is, which of its classes exist, and which of them this device holds.

Every sum over classes of arrays other than the logits, and every look-up by label, is written here once, so that masks,
class weights and meshes are too. `jax_ls.logits` does the same for the logits. Users meet `ClassAxis` only when they
write a `Target` of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jax_ls import checks, fences

__all__ = ["AxisName", "ClassAxis", "align", "class_axis_is_split", "everywhere", "flat", "gathered", "is_split"]
__all__ += [
    "laid_as",
    "look_up",
    "multiply",
    "stand_in",
    "times_its_log",
    "whole_rows_of",
    "with_stand_ins",
    "with_whole_rows",
]

AxisName = str | tuple[str, ...]


def align(x: Array, ndim: int) -> Array:
    """Returns `x` with leading axes of length 1 up to `ndim`: (K,) against (*batch, K) under strict rank promotion."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape) if x.ndim < ndim else x


def multiply(weight: Array, value: Array) -> Array:
    """Returns weight · value, where a zero weight times ±inf or NaN is 0; the derivative in `weight` is kept."""
    return weight * jnp.where((weight == 0) & ~jnp.isfinite(value), 0, value)


@jax.custom_jvp
def times_its_log(q: Array) -> Array:
    """Returns q log q, with 0 log 0 = 0; its derivative in a q of 0 is −1e30, which stands for −∞."""
    return q * _log_or(q, 0)


@times_its_log.defjvp
def _times_its_log_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    (q,), (dq,) = primals, tangents
    return times_its_log(q), dq * (_log_or(q, -1e30) + 1)


def _log_or(q: Array, at_zero: float) -> Array:
    return jnp.where(q == 0, at_zero, jnp.log(jnp.where(q == 0, 1, q)))


def stand_in(dtype: DTypeLike) -> Array:
    """Returns the number that examples which do not count get in place of their own: 0.5, class 0, or True.

    0.5 lies inside the domain of every formula of a rate, a weight or a probability, so that gradients stay finite.
    """
    dtype = jnp.dtype(dtype)
    return jnp.asarray(0.5 if jnp.issubdtype(dtype, jnp.floating) else dtype == jnp.bool_, dtype)


def with_stand_ins(x: Array, where: Array) -> Array:
    """Returns `x` (*batch, ...) with stand-ins for the examples that `where`, (*batch,), leaves out."""
    return jnp.where(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), x, stand_in(x.dtype))


@dataclass(frozen=True)
class ClassAxis:
    """The last axis of the values that a target meets. All arrays align with those values from the right.

    Args:
      size: number of classes on this device; None while it is not known.
      where: boolean (K,) or (*batch, K), the classes that exist.
      rows: boolean (*batch,), the examples that count; in others no label is wrong.
      weights: (K,) or (*batch, K), the weight of each class.
      class_axis_name: mesh axis that the classes are split over, inside `jax.shard_map`.
      sharding: how an explicit mesh lays an array (K,) over its devices; None for whole on each.
    """

    size: int | None = None
    where: Array | None = None
    rows: Array | None = None
    weights: Array | None = None
    class_axis_name: AxisName | None = None
    sharding: NamedSharding | None = None

    def restricted(self, where: Array) -> Self:
        """Returns the same axis with only the classes that `where` keeps too."""
        where = self.kept(where)
        return replace(self, where=where, size=self.size or where.shape[-1])

    def kept(self, where: Array) -> Array:
        """Returns which classes exist and are kept by `where`: (K,) or (*batch, K)."""
        if self.where is None:
            return where
        ndim = max(where.ndim, self.where.ndim)
        return align(where, ndim) & align(self.where, ndim)

    def weighted(self, weights: Array) -> Self:
        """Returns the same axis with each class weighted by `weights` too."""
        if self.weights is not None:
            weights, old = checks.same_dtype(weights, self.weights)
            ndim = max(weights.ndim, old.ndim)
            weights = align(weights, ndim) * align(old, ndim)
        return replace(self, weights=weights, size=self.size or weights.shape[-1])

    @property
    def num_devices(self) -> int:
        """How many devices the classes are split over."""
        return 1 if self.class_axis_name is None else jax.lax.axis_size(self.class_axis_name)

    @property
    def start(self) -> Array | int:
        """The first class that this device holds."""
        if self.class_axis_name is None or self.size is None:
            return 0
        return self.size * jax.lax.axis_index(self.class_axis_name)

    def psum(self, x: Array) -> Array:
        """Returns the sum of `x` over the devices that the classes are split over."""
        return x if self.class_axis_name is None else jax.lax.psum(x, self.class_axis_name)

    def pmax(self, x: Array) -> Array:
        """Returns the maximum of `x` over the devices that the classes are split over; it has no derivative."""
        x = jax.lax.stop_gradient(x)
        return x if self.class_axis_name is None else jax.lax.pmax(x, self.class_axis_name)

    def laid(self, x: Array) -> Array:
        """Returns an array (K,) as an explicit mesh lays the classes over its devices."""
        return x if self.sharding is None else jax.sharding.reshard(x, self.sharding)

    def classes(self, dtype: DTypeLike) -> Array:
        """Returns the numbers of this device's classes, from 0: (K,)."""
        return self.laid(jnp.arange(checks.check_size("num_classes", self.size)).astype(dtype))

    def exists(self, dtype: DTypeLike) -> Array:
        """Returns 1 for the classes that exist and 0 for the others: (K,) or (*batch, K)."""
        if self.where is not None:
            return self.where.astype(dtype)
        return self.laid(jnp.ones(checks.check_size("num_classes", self.size), dtype))

    def away(self, labels: Array, dtype: DTypeLike) -> Array:
        """Returns 0 for the label and 1 for all other classes of this device, (*batch, K).

        In real numbers: XLA on CPU writes the operand of a sum or maximum out where it holds a select or integers.
        """
        place = (labels - self.start).astype(dtype)
        classes, place, one = fences.unshared(self.classes(dtype), place, jnp.ones_like(place))
        return jnp.minimum(jnp.abs(align(classes, labels.ndim + 1) - place[..., None]), one[..., None])

    def count(self) -> Array:
        """Returns how many classes exist over all devices: (), or (*batch,) where it differs by example."""
        if self.where is not None:
            return self.psum(jnp.sum(self.where, axis=-1, dtype=jnp.result_type(float)))
        size = checks.check_size("num_classes", self.size)
        return jnp.asarray(size * self.num_devices, jnp.result_type(float))

    def row_count(self) -> Array:
        """Returns `count()` for a formula: like `mass`, it may come out of a pass over the logits."""
        return self.count() if self.where is None else self.mass(self.where)

    def mass(self, q: Array) -> Array:
        """Returns Σ_k q_k over all devices, for real numbers or booleans (*batch, K) or (K,).

        A loss takes it in its pass over the logits. So no weights in such a pass can be made of it: see `apart`.
        """
        dtype = jnp.result_type(float) if q.dtype == jnp.bool_ else checks.wide(q.dtype)
        return fences.end_of_sum(self.psum(jnp.sum(q, axis=-1, dtype=dtype)))

    def apart(self) -> ClassAxis:
        """Returns the same axis, none of whose sums comes out of a pass over the logits."""
        return ClassAxis(self.size, self.where, self.rows, self.weights, self.class_axis_name, self.sharding)

    def uniform(self) -> Array:
        """Returns 1/K over the classes that exist: (K,), or (*batch, K) where they differ by example.

        NaN where no class exists.
        """
        if self.where is None:
            size = checks.check_size("num_classes", self.size)
            return self.laid(jnp.full((size,), 1 / (size * self.num_devices)))
        return self.where.astype(jnp.result_type(float)) / self.count()[..., None]

    def mean(self, values: Array | None) -> Array:
        """Returns the mean over the classes that exist of w_k v_k; of w_k if `values` is None."""
        if self.weights is None and self.where is None:
            return jnp.ones(()) if values is None else self.sum(values, None) / (values.shape[-1] * self.num_devices)
        count = self.row_count()
        if self.weights is not None:
            total = self.dot(self.exists(jnp.result_type(float)), values)
        else:
            total = count if values is None else self.sum(values, self.exists(values.dtype))
        return total / count.astype(total.dtype)

    def dot(self, q: Array, values: Array | None) -> Array:
        """Returns Σ_k q_k w_k v_k over the classes that exist; Σ_k q_k w_k if `values` is None."""
        shown = [x for x in (q, self.where, self.weights) if x is not None]
        ndim = max(x.ndim for x in shown)
        dtype = checks.wide(q.dtype) if values is None else values.dtype
        q = align(q, ndim).astype(dtype)
        if self.weights is not None:
            q = q * align(self.weights, ndim).astype(dtype)
        if self.where is not None:
            q = jnp.where(align(self.where, ndim), q, 0)
        return self.mass(q) if values is None else self.sum(values, q)

    def sum(self, values: Array, q: Array | None) -> Array:
        """Returns Σ_k q_k v_k of values (*batch, K), or Σ_k v_k if `q` is None. 0 · −inf is 0."""
        if q is None:
            return fences.end_of_sum(self.psum(jnp.sum(values, axis=-1)))
        ndim = max(values.ndim, q.ndim)
        return fences.end_of_sum(self.psum(jnp.sum(multiply(align(q, ndim), align(values, ndim)), axis=-1)))

    def pick(self, values: Array | None, labels: Array) -> Array:
        """Returns w_y v_y at global labels (*batch, S); w_y if `values` is None; NaN where no class is y."""
        picked = jnp.ones(labels.shape) if values is None else self.take(values, labels)
        if self.weights is not None:
            picked = multiply(self.take(self.weights, labels).astype(picked.dtype), picked)
        return jnp.where(self.contains(labels), picked, jnp.nan)

    def contains(self, labels: Array) -> Array:
        """Returns whether labels (*batch, S) name classes that exist; True in rows that do not count."""
        known = labels >= 0
        if self.size is not None:
            known &= labels < self.size * self.num_devices
        if self.where is not None:
            known &= self.take(self.where, labels) > 0
        if self.rows is not None:
            known |= ~self.rows[..., None]
        return known

    def take(self, values: Array, labels: Array) -> Array:
        """Returns v_y at global labels (*batch, S), whichever device holds it; 0 where no device does.

        A mask gives 1 and 0. It is gathered from as it is: XLA on TPU would write it out as numbers.
        """
        index = labels - self.start
        held = (index >= 0) & (index < values.shape[-1])
        if class_axis_is_split(values):
            # A gather along a split axis is refused on an explicit mesh.
            classes = align(jnp.arange(values.shape[-1], dtype=index.dtype), index.ndim + 1)
            hit = index[..., None] == classes
            values = values.astype(jnp.float32) if values.dtype == jnp.bool_ else values
            return jnp.sum(jnp.where(hit, align(values[..., None, :], hit.ndim), 0), axis=-1)
        if values.ndim == 1:
            taken = look_up(values, index)
        else:
            index = jnp.clip(index, 0, values.shape[-1] - 1)
            taken = jnp.take_along_axis(align(values, index.ndim), index, axis=-1, mode="clip")
        if taken.dtype == jnp.bool_:
            taken = taken.astype(jnp.float32)
        return self.psum(jnp.where(held, taken, 0))

    def columns(self, labels: Array) -> Array:
        """Returns whether class k of this device is y: boolean (*batch, S, K)."""
        classes = self.classes(labels.dtype) + self.start
        return labels[..., None] == align(classes, labels.ndim + 1)


def look_up(table: Array, index: Array) -> Array:
    """Returns the rows of a table (n, ...) at `index`, which is clipped into range."""
    table, sharding = whole_rows_of(jnp.asarray(table)), jax.typeof(index).sharding
    # On an explicit mesh JAX asks how to lay the rows over the devices: as their indices are.
    spec = (*sharding.spec, *jax.typeof(table).sharding.spec[1:])
    out = NamedSharding(sharding.mesh, PartitionSpec(*spec)) if any(spec) else None
    return table.at[jnp.clip(index, 0, table.shape[0] - 1)].get(mode="clip", out_sharding=out)


def whole_rows_of(table: Array) -> Array:
    """Returns a table (n, ...) with all of its n rows on every device of an explicit mesh, for a look-up."""
    sharding = jax.typeof(table).sharding
    if not table.ndim or sharding.spec[0] is None:
        return table
    return jax.sharding.reshard(table, NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:])))


def laid_as(x: Array, values: Array, batch: int, over_classes: bool = False) -> Array:
    """Returns `x` as an explicit mesh lays values (*batch, K) over its devices; `x` itself on other meshes.

    Args:
      x: an array whose first `batch` axes are those of the examples, and its last that of the classes `over_classes`.
      values: real numbers (*batch, K).
      batch: how many axes of examples `x` has: none, or as many as the values.
      over_classes: whether the last axis of `x` is that of the classes.
    """
    sharding = jax.typeof(values).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    spec = [*sharding.spec[:batch], *[None] * (x.ndim - batch)]
    if over_classes:
        spec[-1] = sharding.spec[-1]
    wanted = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return x if tuple(jax.typeof(x).sharding.spec) == tuple(spec) else jax.sharding.reshard(x, wanted)


def is_split(x: Array) -> bool:
    """Returns whether an explicit mesh splits `x` over its devices."""
    return any(jax.typeof(x).sharding.spec)


def everywhere(x: Array) -> Array:
    """Returns `x` whole on every device of an explicit mesh: JAX does not sort, flatten or scatter a split array."""
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec())) if is_split(x) else x


def flat(x: Array) -> Array:
    """Returns (*batch,) as (N,), whole on every device of an explicit mesh."""
    return everywhere(x).reshape(-1)


def gathered(x: Array, batch_axis_name: AxisName | None) -> Array:
    """Returns (*batch,) of all devices as (N,)."""
    x = flat(x)
    if batch_axis_name is None:
        return x
    # A sum, because `jax.shard_map` knows that sums are the same on all devices, and `jax.vmap` has a rule for them.
    slots = jnp.zeros((jax.lax.axis_size(batch_axis_name), x.size), x.dtype)
    return jax.lax.psum(slots.at[jax.lax.axis_index(batch_axis_name)].set(x), batch_axis_name).reshape(-1)


def with_whole_rows(values: Array) -> Array:
    """Returns `values` with all classes of an example on one device of an explicit mesh."""
    if not class_axis_is_split(values):
        return values
    sharding = jax.typeof(values).sharding
    return jax.sharding.reshard(values, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-1], None)))


def class_axis_is_split(values: Array) -> bool:
    """Returns whether an explicit mesh splits the classes of `values` over its devices."""
    return jax.typeof(values).sharding.spec[-1] is not None
