"""The class axis as a target is shown it: how long it is, which of it exists, and what of it this device holds.

Every sum over classes and every look-up by label in this library happens here, so that sharding, masks and
weights are written once. Users meet it only when they write a `Target` of their own.
"""

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from jax_ls import checks

AxisName = str | tuple[str, ...]

SAVED = "jax_ls.sum_over_classes"
"""Name of the sums over classes, for checkpoint policies: a few numbers a row, worth keeping for the backward pass."""


def saved(x: jax.Array) -> jax.Array:
    """A sum over classes, kept for the backward pass of the losses, and fenced.

    XLA on CPU folds what follows a sum, a logarithm say, into the sum and then takes up to four times as long. A
    rounding to the precision it has keeps it out.
    """
    precision = jnp.finfo(x.dtype)
    return checkpoint_name(jax.lax.reduce_precision(x, precision.nexp, precision.nmant), SAVED)


def align(x: jax.Array, ndim: int) -> jax.Array:
    """`x` with leading axes of length 1 up to `ndim`: (K,) against (*batch, K) under strict rank promotion."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape) if x.ndim < ndim else x


def multiply(weight: jax.Array, value: jax.Array) -> jax.Array:
    """weight · value, where a zero weight times ±inf or NaN is 0, and its derivative in `weight` is kept."""
    return weight * jnp.where((weight == 0) & ~jnp.isfinite(value), 0, value)


@jax.custom_jvp
def _finite(values: jax.Array) -> jax.Array:
    """−inf as the lowest finite number, so that 0 · v is 0. The same function to differentiation.

    `multiply` over K-wide arrays would do, but XLA on CPU writes the operand of a sum out where it holds a select.
    """
    return jnp.maximum(values, jnp.finfo(values.dtype).min)


@_finite.defjvp
def _finite_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _finite(*primals), tangents[0]


def _infinite(sums: jax.Array) -> jax.Array:
    """Sums that a lowest finite number entered, as the infinity it stood for."""
    huge = jnp.abs(sums) > jnp.sqrt(jnp.finfo(sums.dtype).max)
    return sums + jax.lax.stop_gradient(jnp.where(huge, jnp.copysign(jnp.inf, sums), 0))


@dataclass(frozen=True)
class ClassAxis:
    """The last axis of the values that a target meets. All arrays align with those values from the right.

    Args:
      size: number of classes on this device; None while it is not known.
      where: boolean (K,) or (*batch, K), the classes that exist.
      rows: boolean (*batch,), the examples that count; in others no label is amiss.
      weights: (K,) or (*batch, K), the weight of each class.
      offset: (*batch,), subtracted from the values before they are summed.
      class_axis_name: mesh axis that the classes are split over, inside `jax.shard_map`.
    """

    size: int | None = None
    where: jax.Array | None = None
    rows: jax.Array | None = None
    weights: jax.Array | None = None
    offset: jax.Array | None = None
    class_axis_name: AxisName | None = None

    def restricted(self, where: jax.Array) -> Self:
        """The same axis with only the classes that `where` keeps too."""
        if self.where is not None:
            ndim = max(where.ndim, self.where.ndim)
            where = align(where, ndim) & align(self.where, ndim)
        return replace(self, where=where, size=self.size or where.shape[-1])

    def weighted(self, weights: jax.Array) -> Self:
        """The same axis with each class weighted by `weights` too."""
        if self.weights is not None:
            ndim = max(weights.ndim, self.weights.ndim)
            weights = align(weights, ndim) * align(self.weights, ndim)
        return replace(self, weights=weights, size=self.size or weights.shape[-1])

    def shifted(self, offset: jax.Array) -> Self:
        """The same axis for values less `offset`, (*batch,)."""
        return replace(self, offset=offset)

    @property
    def num_devices(self) -> int:
        """How many devices the classes are split over."""
        return 1 if self.class_axis_name is None else jax.lax.axis_size(self.class_axis_name)

    @property
    def start(self) -> jax.Array | int:
        """The first class that this device holds."""
        if self.class_axis_name is None or self.size is None:
            return 0
        return self.size * jax.lax.axis_index(self.class_axis_name)

    def psum(self, x: jax.Array) -> jax.Array:
        return x if self.class_axis_name is None else jax.lax.psum(x, self.class_axis_name)

    def max(self, values: jax.Array) -> jax.Array:
        """max_k v_k over all devices, as a constant for differentiation."""
        top = jax.lax.stop_gradient(jnp.max(values, axis=-1, initial=-jnp.inf))
        return top if self.class_axis_name is None else jax.lax.pmax(top, self.class_axis_name)

    def first(self, values: jax.Array, top: jax.Array) -> jax.Array:
        """The first class whose value is max_k v_k = `top`, (*batch,), as a real number; NaN where `top` is not finite.

        As a maximum of real numbers: XLA on CPU takes five times as long over an argmax. The barrier keeps it from
        writing v − top out for others to share.
        """
        # Numbers below 1, which the least difference of all, 2⁻¹²⁶, times the largest float exceeds.
        scale = 2.0**-31
        numbers = (jnp.arange(values.shape[-1], dtype=jnp.int32) + self.start).astype(values.dtype) * scale
        at, numbers = jax.lax.optimization_barrier((top, numbers))
        below = (values - at[..., None]) * jnp.finfo(values.dtype).max
        return self.max(below - align(numbers, values.ndim)) / -scale

    def uniform(self) -> jax.Array:
        """1/K over the classes that exist: (K,), or (*batch, K) where they differ by example."""
        if self.where is not None:
            kept = self.where.astype(jnp.result_type(float))
            return kept / self.psum(jnp.sum(kept, axis=-1, keepdims=True))
        size = checks.check_size("num_classes", self.size)
        return jnp.full((size,), 1 / (size * self.num_devices))

    def mean(self, values: jax.Array | None) -> jax.Array:
        """Mean over the classes that exist of w_k (v_k − offset), of w_k where there are no values."""
        if self.where is not None or self.weights is not None:
            return self.dot(self.uniform(), values)
        if values is None:
            return jnp.ones(())
        return saved(self.psum(jnp.sum(self._shift(values), axis=-1))) / (values.shape[-1] * self.num_devices)

    def dot(self, q: jax.Array, values: jax.Array | None) -> jax.Array:
        """Σ_k q_k w_k (v_k − offset) over the classes that exist; Σ_k q_k w_k where there are no values."""
        shown = [x for x in (q, self.where, self.weights, values) if x is not None]
        ndim = max(x.ndim for x in shown)
        dtype = q.dtype if values is None else values.dtype
        q = align(q, ndim).astype(dtype)
        if self.weights is not None:
            q = q * align(self.weights, ndim).astype(dtype)
        if self.where is not None:
            q = jnp.where(align(self.where, ndim), q, 0)
        if values is None:
            return saved(self.psum(jnp.sum(q, axis=-1)))
        # Values first: with the shared factor first, XLA on CPU takes three times as long.
        return saved(_infinite(self.psum(jnp.sum(_finite(self._shift(values)) * q, axis=-1))))

    def pick(self, values: jax.Array | None, labels: jax.Array) -> jax.Array:
        """w_y (v_y − offset) at global labels (*batch, S); w_y where there are no values; NaN where no class is y."""
        picked = jnp.ones(labels.shape) if values is None else self.take(values, labels)
        if values is not None and self.offset is not None:
            picked = picked - self.offset[..., None]
        if self.weights is not None:
            picked = picked * self.take(self.weights, labels).astype(picked.dtype)
        return jnp.where(self.contains(labels), picked, jnp.nan)

    def contains(self, labels: jax.Array) -> jax.Array:
        """Whether labels (*batch, S) name classes that exist; True in rows that do not count."""
        known = labels >= 0
        if self.size is not None:
            known &= labels < self.size * self.num_devices
        if self.where is not None:
            known &= self.take(self.where.astype(jnp.float32), labels) > 0
        if self.rows is not None:
            known |= ~self.rows[..., None]
        return known

    def take(self, values: jax.Array, labels: jax.Array) -> jax.Array:
        """v_y at global labels (*batch, S), whichever device holds it; 0 where no device does."""
        index = labels - self.start
        held = (index >= 0) & (index < values.shape[-1])
        if _class_axis_is_sharded(values):
            # A gather along a sharded axis is refused on an explicit mesh.
            classes = align(jnp.arange(values.shape[-1], dtype=index.dtype), index.ndim + 1)
            hit = index[..., None] == classes
            return jnp.sum(jnp.where(hit, align(values[..., None, :], hit.ndim), 0), axis=-1)
        if values.ndim == 1:
            taken = look_up(values, index)
        else:
            index = jnp.clip(index, 0, values.shape[-1] - 1)
            taken = jnp.take_along_axis(align(values, index.ndim), index, axis=-1, mode="clip")
        return self.psum(jnp.where(held, taken, 0))

    def columns(self, labels: jax.Array) -> jax.Array:
        """Whether class k of this device is y: boolean (*batch, S, K)."""
        classes = jnp.arange(self.size, dtype=labels.dtype) + self.start
        return labels[..., None] == align(classes, labels.ndim + 1)

    def _shift(self, values: jax.Array) -> jax.Array:
        return values if self.offset is None else values - self.offset[..., None]


def look_up(table: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a table (n, ...) at `index`, clipped into range."""
    table, sharding = jnp.asarray(table), jax.typeof(index).sharding
    # On an explicit mesh JAX asks how the rows are to lie: as their indices do.
    spec = (*sharding.spec, *jax.typeof(table).sharding.spec[1:])
    out = NamedSharding(sharding.mesh, PartitionSpec(*spec)) if any(spec) else None
    return table.at[jnp.clip(index, 0, table.shape[0] - 1)].get(mode="clip", out_sharding=out)


def is_split(x: jax.Array) -> bool:
    """Whether an explicit mesh splits `x` over its devices."""
    return any(jax.typeof(x).sharding.spec)


def everywhere(x: jax.Array) -> jax.Array:
    """What an explicit mesh splits, whole on every device: JAX sorts, flattens and scatters nothing else."""
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec())) if is_split(x) else x


def flat(x: jax.Array) -> jax.Array:
    """(*batch,) as (N,), whole on every device of an explicit mesh."""
    return everywhere(x).reshape(-1)


def gathered(x: jax.Array, batch_axis_name: AxisName | None) -> jax.Array:
    """(*batch,) as (N,), of all devices."""
    x = flat(x)
    if batch_axis_name is None:
        return x
    # As a sum: only of sums does `jax.shard_map` know that they are the same on all devices, and `jax.vmap` what to do.
    slots = jnp.zeros((jax.lax.axis_size(batch_axis_name), x.size), x.dtype)
    return jax.lax.psum(slots.at[jax.lax.axis_index(batch_axis_name)].set(x), batch_axis_name).reshape(-1)


def with_whole_rows(values: jax.Array) -> jax.Array:
    """All classes of an example on one device of an explicit mesh, for columns to be taken."""
    if not _class_axis_is_sharded(values):
        return values
    sharding = jax.typeof(values).sharding
    return jax.sharding.reshard(values, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-1], None)))


def _class_axis_is_sharded(values: jax.Array) -> bool:
    return jax.typeof(values).sharding.spec[-1] is not None
