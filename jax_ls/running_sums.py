"""Sums over long batches, and over any number of batches, that keep their digits in float32.

Two things lose digits in silence: a long sum whose terms are added one after the other, and a running sum that has
grown so large that what a batch adds to it is rounded away. `sum_of` and `sums_by_row` add in blocks. `accumulate`
keeps what rounding took beside the sum, and counts in the same way: an int32 would overflow at 2³¹.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jax_ls import fences

__all__ = ["accumulate", "added", "as_running", "sum_of", "sums_by_row"]

# Terms that are added one after the other; the sums of the blocks are added in the same way.
BLOCK = 256


def accumulate(total: Array, lost: Array, more: Array, more_lost: Array | float = 0.0) -> tuple[Array, Array]:
    """Returns the sum of two numbers of twice the precision, (total + lost) + (more + more_lost), as such a number.

    The first part is the sum, correctly rounded; the second is what rounding took from it. Integers are exact up to
    2⁴⁸ in float32.
    """
    more = more.astype(total.dtype)
    first = total + more
    back = first - total
    # Knuth's error of a sum, whichever of the two is larger.
    error = (total - (first - back)) + (more - back) + (lost + more_lost)
    added = first + error
    left = error - (added - first)
    # Of infinities nothing is lost; NaN stays in the sum.
    finite = jnp.isfinite(added)
    return jnp.where(finite, added, first), jnp.where(finite, left, 0)


def as_running(x: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """Returns `x`, integers say, in `dtype`, and what rounding took from it."""
    total = x.astype(dtype)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return total, jnp.zeros_like(total)
    # The largest integers round to one that is not there.
    inside = total < -float(jnp.iinfo(x.dtype).min)
    return total, jnp.where(inside, x - jnp.where(inside, total, 0).astype(x.dtype), 0).astype(dtype)


def added(a: Any, b: Any, sums: Mapping[str, str]) -> dict[str, Array]:
    """Returns the fields of a + b. `sums` names the sums, and for each the field that holds what rounding took."""
    fields = {}
    for name, lost in sums.items():
        parts = (getattr(x, field) for x in (a, b) for field in (name, lost))
        fields[name], fields[lost] = accumulate(*parts)
    return fields


def sum_of(x: Array) -> Array:
    """Returns Σ x over the first axis, (n, ...) -> (...), in blocks of blocks."""
    while x.shape[0] > BLOCK:
        x = fences.kept_apart(jnp.sum(_in_blocks(x, BLOCK, 0), axis=1, dtype=x.dtype))
    return fences.kept_apart(jnp.sum(x, axis=0, dtype=x.dtype))


def sums_by_row(values: Array, rows: Array, num_rows: int) -> Array:
    """Returns Σ of the values (*batch, ...) of each row, (num_rows, ...). Rows outside [0, num_rows) are dropped.

    Takes no more memory than the values, or than `num_rows` rows of them.

    Args:
      values: (*batch, ...).
      rows: integers (*batch,).
      num_rows: how many rows the result has.
    """
    sharding = jax.typeof(values).sharding
    batch, rest = sharding.spec[: rows.ndim], sharding.spec[rows.ndim :]
    if not any(sharding.spec) and not any(jax.typeof(rows).sharding.spec):
        return _sums_by_row(values, rows, num_rows)
    # On an explicit mesh each device adds up its own examples.
    names = tuple(name for axis in batch if axis is not None for name in (axis if isinstance(axis, tuple) else (axis,)))

    def of_device(values: Array, rows: Array) -> Array:
        sums = _sums_by_row(values, rows, num_rows)
        return jax.lax.psum(sums, names) if names else sums

    rows = jax.sharding.reshard(rows, NamedSharding(sharding.mesh, PartitionSpec(*batch)))
    specs = {"in_specs": (sharding.spec, PartitionSpec(*batch)), "out_specs": PartitionSpec(None, *rest)}
    return jax.shard_map(of_device, mesh=sharding.mesh, **specs)(values, rows)


def _sums_by_row(values: Array, rows: Array, num_rows: int) -> Array:
    """The same on one device, and on meshes that the compiler looks after."""
    values, rows = values.reshape(rows.size, *values.shape[rows.ndim :]), rows.reshape(-1)
    # A negative row would count from the end.
    rows = jnp.where((rows >= 0) & (rows < num_rows), rows, num_rows)

    def of_block(values: Array, rows: Array) -> Array:
        return jnp.zeros((num_rows, *values.shape[1:]), values.dtype).at[rows].add(values, mode="drop")

    size = max(BLOCK, num_rows)
    # Block by block, and not by a number of the block beside the row: XLA then adds up what blocks have before it sends
    # anything from device to device.
    sums = jax.vmap(of_block)(_in_blocks(values, size, 0), _in_blocks(rows, size, num_rows))
    return sum_of(sums)


def _in_blocks(x: Array, size: int, fill: int) -> Array:
    """(n, ...) as (⌈n / size⌉, size, ...)."""
    padding = [(0, -len(x) % size), *[(0, 0)] * (x.ndim - 1)]
    return jnp.pad(x, padding, constant_values=fill).reshape(-1, size, *x.shape[1:])
