"""Sums over long batches, and over any number of batches, that keep their digits in float32.

Two sums lose digits in silence: a long sum whose terms are added one after the other, and a running sum so large that
the sum of a batch is rounded away. `sum_of` and `sums_by_row` add in blocks. `accumulate` keeps the rounding error
beside the sum. Counts use it too, because an int32 overflows at 2³¹.
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

    The first part is the rounded sum, and the second its rounding error. Integers are exact up to 2⁴⁸ in float32.
    """
    more = more.astype(total.dtype)
    rounded = total + more
    added_part = rounded - total
    # Knuth's formula for the rounding error of a sum, whichever operand is larger.
    error = (total - (rounded - added_part)) + (more - added_part) + (lost + more_lost)
    corrected = rounded + error
    rest = error - (corrected - rounded)
    # An infinite sum has no rounding error. NaN stays in the sum.
    finite = jnp.isfinite(corrected)
    return jnp.where(finite, corrected, rounded), jnp.where(finite, rest, 0)


def as_running(x: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """Returns `x`, for example integers, in `dtype`, and its rounding error."""
    total = x.astype(dtype)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return total, jnp.zeros_like(total)
    # The largest integers round to a number that the integer dtype does not have.
    inside = total < -float(jnp.iinfo(x.dtype).min)
    return total, jnp.where(inside, x - jnp.where(inside, total, 0).astype(x.dtype), 0).astype(dtype)


def added(a: Any, b: Any, sums: Mapping[str, str]) -> dict[str, Array]:
    """Returns the fields of a + b. `sums` names the sums, and for each the field that holds its rounding error."""
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
    """Returns `sums_by_row` on one device, or on an `Auto` mesh."""
    values, rows = values.reshape(rows.size, *values.shape[rows.ndim :]), rows.reshape(-1)
    # A negative row would count from the end.
    rows = jnp.where((rows >= 0) & (rows < num_rows), rows, num_rows)

    def of_block(values: Array, rows: Array) -> Array:
        return jnp.zeros((num_rows, *values.shape[1:]), values.dtype).at[rows].add(values, mode="drop")

    size = max(BLOCK, num_rows)
    # `vmap` over blocks, not a scatter with the block's number as an index: XLA then adds up the blocks of a device
    # before devices exchange anything.
    sums = jax.vmap(of_block)(_in_blocks(values, size, 0), _in_blocks(rows, size, num_rows))
    return sum_of(sums)


def _in_blocks(x: Array, size: int, fill: int) -> Array:
    """Returns (n, ...) as (⌈n / size⌉, size, ...), padded with `fill`."""
    padding = [(0, -len(x) % size), *[(0, 0)] * (x.ndim - 1)]
    return jnp.pad(x, padding, constant_values=fill).reshape(-1, size, *x.shape[1:])
