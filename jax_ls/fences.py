"""What keeps a compiler from undoing the arithmetic. A formula never names a fence: `ClassAxis` and `Logits` do.

Each fence acts where its symptom was seen, and is the identity elsewhere: XLA on TPU and GPU needs none of those that
XLA on CPU needs. `jax.lax.platform_dependent` chooses when the program is lowered. Each docstring names the symptom and
the benchmark row that shows it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

__all__ = [
    "after",
    "cut_out",
    "end_of_sum",
    "finite",
    "for_derivatives",
    "infinite",
    "kept_apart",
    "lowest",
    "unshared",
    "vary_alike",
    "varying",
    "varying_axes",
]

Tree = Any


def end_of_sum(sums: Array) -> Array:
    """Returns `sums`, which XLA on CPU then keeps apart from the arithmetic that follows.

    Symptom on CPU: a logarithm after a sum is folded into the loop of the sum, which then takes up to four times as
    long. A rounding to the precision that the number has already keeps it out. `benchmarks/cross_entropy.py`,
    65536×1000 float32, forward: 187 ms without, 47 ms with.
    """
    precision = jnp.finfo(sums.dtype)

    def rounded(x: Array) -> Array:
        return jax.lax.reduce_precision(x, precision.nexp, precision.nmant)

    return jax.lax.platform_dependent(sums, cpu=rounded, default=_same)


def kept_apart(sums: Array) -> Array:
    """Returns the sums of blocks, which XLA on no platform then merges with the sum of those sums.

    Symptom everywhere: one long sum again, whose last terms are rounded away. `tests/test_online.py`, 16.8 M examples.
    """
    return jax.lax.optimization_barrier(sums)


def cut_out(block: Array) -> Array:
    """Returns a block of a kernel as an array of its own.

    Symptom on TPU: each product cuts the block out of the kernel itself, at unaligned places.
    `benchmarks/linear_cross_entropy.py --compile-for v5p`, column cycles.
    """
    return jax.lax.optimization_barrier(block)


def after(done: Array, rows: Tree) -> Tree:
    """Returns numbers of the row that no sum can use before `done`, another sum, is known.

    Symptom on GPU: XLA takes both sums in one kernel and writes out the costly factors that they share.
    `benchmarks/accelerators.py`, "jensen", h100 passes.
    """
    return jax.lax.optimization_barrier((done, rows))[1]


def for_derivatives(logits: Array) -> Array:
    """Returns the logits from which the derivative of an elementwise loss is computed.

    Symptom on GPU: XLA computes the loss and its derivative in one kernel, and writes out up to ten costly factors that
    they share. `benchmarks/accelerators.py`, "asymmetric_loss", h100 passes.
    """
    return jax.lax.platform_dependent(
        logits, cuda=jax.lax.optimization_barrier, rocm=jax.lax.optimization_barrier, default=_same
    )


def unshared(*rows: Array) -> tuple[Array, ...]:
    """Returns numbers per row as copies that XLA on CPU shares with no other sum.

    Symptom on CPU: two sums that use z − max, or the same constant spread over all classes, have that array of the
    logits' size written out once for both. `benchmarks/methods.py`, "+ margin", column temporaries.
    """
    return jax.lax.platform_dependent(*vary_alike(*rows), cpu=_barrier, default=lambda *x: x)


def varying_axes(x: Array) -> frozenset[str]:
    """Returns the mesh axes over which `x` differs, inside `jax.shard_map`."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def varying(tree: Tree, names: frozenset[str]) -> Tree:
    """Returns arrays marked as differing over the mesh axes `names` too."""

    def mark(x: Array) -> Array:
        missing = tuple(sorted(names - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def vary_alike(*arrays: Array) -> tuple[Array, ...]:
    """Returns the arrays as what varies over the same axes of the surrounding `jax.shard_map`."""
    return varying(arrays, frozenset().union(*(varying_axes(x) for x in arrays)))


def _barrier(*rows: Array) -> tuple[Array, ...]:
    return jax.lax.optimization_barrier(rows)


def _same(x: Array) -> Array:
    return x


def lowest(dtype: DTypeLike) -> float:
    """Returns the number that stands for −inf within sums: so low that exp(lowest − z) is 0 for any finite z.

    A quarter of the lowest float, so that the difference of two such numbers is finite.
    """
    return float(jnp.finfo(dtype).min) / 4


@jax.custom_jvp
def finite(values: Array) -> Array:
    """Returns `values` with `lowest` in place of −inf, so that 0 · v is 0; its derivative is that of the identity.

    Symptom on CPU of a select in its place: XLA writes the operand of the sum out. `benchmarks/cross_entropy.py`,
    "jax_ls, prior (K,)", column temporaries.
    """
    return jnp.maximum(values, lowest(values.dtype))


@finite.defjvp
def _finite_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return finite(*primals), tangents[0]


def infinite(sums: Array) -> Array:
    """Turns a sum that a stand-in for −inf has entered back into ±inf; its derivative is that of the identity."""
    huge = jnp.abs(sums) > jnp.sqrt(jnp.finfo(sums.dtype).max)
    return sums + jax.lax.stop_gradient(jnp.where(huge, jnp.copysign(jnp.inf, sums), 0))
