"""The sums over classes that a loss asks of its logits, taken in one pass over them, and single logits.

On TPU and GPU one variadic `jax.lax.reduce` takes the maximum, Σ exp and every linear sum: `_one_reduction`. On CPU
each sum is taken by itself, which is faster there: `_separate_sums`. `jax.lax.platform_dependent` chooses when the
program is lowered. Their derivatives are rules of `jax.custom_jvp`, so that forward mode and Hessians work.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding, PartitionSpec

from jax_ls import fences
from jax_ls.class_axis import AxisName, ClassAxis, align, class_axis_is_split

__all__ = ["Pass", "Sums", "laid_like", "pick", "remembered", "row_sums"]

REMEMBERED = "jax_ls.sum_over_classes"
"""Name of the sums over classes, for checkpoint policies: a few numbers per row, kept for the backward pass."""


Sums = dict[str, Array]
"""What one pass over the logits gives, (*batch,) each: the names are those of `Pass`."""


def remembered(x: Array) -> Array:
    """Returns a sum over classes under the name by which it is kept for the backward pass."""
    return checkpoint_name(x, REMEMBERED)


class Pass(NamedTuple):
    """What is static of a pass: which sums are asked for, and the mesh axis of the classes.

    "top" is max_k z_k. "ties" counts the classes that have it. "likeliest" is the first of them, as a real number.
    "total" is Σ_k eᵈ and "moment" Σ_k d eᵈ with d = z_k − max z. "linear i" is Σ_k w_k d for the i-th weights.
    """

    names: frozenset[str]
    class_axis_name: AxisName | None

    def __contains__(self, name: object) -> bool:
        return name in self.names


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def row_sums(wanted: Pass, z: Array, weights: tuple[Array | None, ...]) -> Sums:
    """Returns the sums over the classes of wide logits (*batch, K) that are wanted."""
    if not wanted.names and not weights:
        return {}
    implementations = {
        "cpu": _separate_sums,
        "cuda": functools.partial(_one_reduction, longest=CUDA_LONGEST_ROW),
        "rocm": functools.partial(_one_reduction, longest=CUDA_LONGEST_ROW),
        "default": _one_reduction,
    }
    chosen = {platform: functools.partial(f, wanted) for platform, f in implementations.items()}
    sums = jax.lax.platform_dependent(z, weights, **chosen)
    return sums if wanted.class_axis_name is None else _over_devices(wanted, z, weights, sums)


@functools.partial(row_sums.defjvp, symbolic_zeros=True)
def _row_sums_jvp(wanted: Pass, primals: Any, tangents: Any) -> Any:
    z, weights = primals
    dz, dweights = tangents
    sums = jax.tree.map(remembered, row_sums(wanted, z, weights))
    derivatives = {name: jnp.zeros_like(x) for name, x in sums.items()}
    if not sums:
        return sums, derivatives
    axis = ClassAxis(class_axis_name=wanted.class_axis_name)
    top = sums["top"][..., None]

    def summed(terms: Array) -> Array:
        return axis.psum(jnp.sum(terms, axis=-1))

    if not isinstance(dz, SymbolicZero):
        share = jnp.exp(z - top)
        if "ties" in wanted:
            derivatives["top"] = summed(jnp.where(z == top, dz, 0)) / sums["ties"]
        if "total" in wanted:
            derivatives["total"] = summed(share * dz)
        if "moment" in wanted:
            derivatives["moment"] = summed(share * (1 + fences.finite(z - top)) * dz)
        for i, w in enumerate(weights):
            derivatives[f"linear {i}"] = summed(dz if w is None else dz * align(w, z.ndim))
    for i, dw in enumerate(dweights):
        if dw is not None and not isinstance(dw, SymbolicZero):
            # Bounded, for what is multiplied by it and by 0 afterwards to stay finite.
            d = jnp.maximum(z - top, -jnp.sqrt(jnp.finfo(z.dtype).max))
            derivatives[f"linear {i}"] += summed(d * align(dw, z.ndim))
    return sums, derivatives


def _separate_sums(wanted: Pass, z: Array, weights: tuple[Array | None, ...]) -> Sums:
    """Returns each sum by itself, over z − max z: XLA on CPU takes four times as long for a variadic reduction."""

    def summed(terms: Array) -> Array:
        return fences.end_of_sum(jnp.sum(terms, axis=-1))

    def shifted(*constants: float) -> tuple[Array, ...]:
        """Returns z − max z and constants, as arrays that no other sum shares."""
        rows = fences.unshared(top, *(jnp.full_like(top, x) for x in constants))
        return z - rows[0][..., None], *(x[..., None] for x in rows[1:])

    top = jnp.max(z, axis=-1, initial=-jnp.inf)
    top = fences.end_of_sum(jnp.where(top == -jnp.inf, fences.lowest(z.dtype), top))
    sums = {"top": top}
    if "ties" in wanted:
        d, steep, one, zero = shifted(1e30, 1, 0)
        sums["ties"] = summed(jnp.maximum(one + steep * d, zero))
    if "total" in wanted:
        sums["total"] = summed(jnp.exp(z - top[..., None]))
    if "moment" in wanted:
        d, low = shifted(fences.lowest(z.dtype))
        # p · log p is 0 where log p is −inf.
        sums["moment"] = summed(jnp.exp(d) * jnp.maximum(d, low))
    if "likeliest" in wanted:
        sums["likeliest"] = _first_at(z, top)
    for i, w in enumerate(weights):
        d, *_ = shifted()
        sums[f"linear {i}"] = fences.infinite(summed(_weighted(d, w)))
    return sums


def laid_like(x: Array, z: Array) -> Array:
    """Returns class weights laid over an explicit mesh as the logits are. Otherwise XLA would gather the logits."""
    sharding = jax.typeof(z).sharding
    if not any(sharding.spec):
        return x
    spec = PartitionSpec(*sharding.spec[z.ndim - x.ndim :])
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def _weighted(values: Array, w: Array | None) -> Array:
    # Values first: with the shared factor first, XLA on CPU takes three times as long.
    return values if w is None else fences.finite(values) * align(w, values.ndim)


def _first_at(z: Array, top: Array) -> Array:
    """Returns the first class whose logit is `top`, as a real number; NaN where `top` is not finite.

    As a maximum of real numbers: XLA on CPU takes five times as long over an argmax.
    """
    # Numbers below 1, which the least difference of all, 2⁻¹²⁶, times the largest float exceeds.
    scale = 2.0**-31
    numbers = jnp.arange(z.shape[-1], dtype=jnp.int32).astype(z.dtype) * scale
    row_top, numbers = fences.unshared(top, numbers)
    below = (z - row_top[..., None]) * jnp.finfo(z.dtype).max
    return jnp.max(below - align(numbers, z.ndim), axis=-1, initial=-jnp.inf) / -scale


CUDA_LONGEST_ROW = 16384
"""Longest row that XLA on GPU reduces in one kernel. It splits longer ones in about √K parts, which it writes out."""


def _one_reduction(wanted: Pass, z: Array, weights: tuple[Array | None, ...], longest: int | None = None) -> Sums:
    """Returns all sums from one variadic reduction, which reads the logits once.

    It is an online softmax: the sums are rescaled whenever the maximum grows (Milakov and Gimelshein, Online normalizer
    calculation for softmax, 2018).
    """
    low = fences.lowest(z.dtype)
    ones, zeros = jnp.ones_like(z), jnp.zeros_like(z)
    operands: dict[str, Array] = {"top": fences.finite(z)}
    starts: dict[str, float] = {"top": low}
    if "ties" in wanted:
        operands["ties"], starts["ties"] = ones, 0
    if "total" in wanted or "moment" in wanted:
        operands["total"], starts["total"] = ones, 0
    if "moment" in wanted:
        operands["moment"], starts["moment"] = zeros, 0
    if "likeliest" in wanted:
        index = jnp.arange(z.shape[-1], dtype=jnp.int32)
        operands["likeliest"], starts["likeliest"] = jnp.broadcast_to(align(index, z.ndim), z.shape), z.shape[-1]
    for i, w in enumerate(weights):
        shown = ones if w is None else jnp.broadcast_to(align(w, z.ndim).astype(z.dtype), z.shape)
        operands[f"linear {i}"], starts[f"linear {i}"] = zeros, 0
        operands[f"mass {i}"], starts[f"mass {i}"] = shown, 0
    order = tuple(operands)

    def combine(left: Any, right: Any) -> Any:
        a, b = dict(zip(order, left, strict=True)), dict(zip(order, right, strict=True))
        step = a["top"] - b["top"]
        left_wins = step > 0
        out = {"top": jnp.maximum(a["top"], b["top"])}
        small = jnp.exp(-jnp.abs(step))

        def scaled(x: Array, y: Array) -> Array:
            return jnp.where(left_wins, x + y * small, x * small + y)

        if "ties" in a:
            of_winner = jnp.where(left_wins, a["ties"], b["ties"])
            out["ties"] = jnp.where(step == 0, a["ties"] + b["ties"], of_winner)
        if "total" in a:
            out["total"] = scaled(a["total"], b["total"])
        if "moment" in a:
            # Σ eᵈ d of the side whose maximum is exceeded by |step|: d falls by |step|.
            lost = jnp.where(left_wins, b["total"], a["total"]) * jnp.abs(step) * small
            out["moment"] = scaled(a["moment"], b["moment"]) - lost
        if "likeliest" in a:
            first = jnp.where(left_wins, a["likeliest"], b["likeliest"])
            out["likeliest"] = jnp.where(step == 0, jnp.minimum(a["likeliest"], b["likeliest"]), first)
        for i in range(len(weights)):
            out_of, mass = f"linear {i}", f"mass {i}"
            moved = jnp.where(left_wins, -b[mass], a[mass]) * step
            out[out_of], out[mass] = a[out_of] + b[out_of] + moved, a[mass] + b[mass]
        return tuple(out[name] for name in order)

    def reduced(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        starting = tuple(jnp.asarray(starts[name], x.dtype) for name, x in zip(order, arrays, strict=True))
        return tuple(jax.lax.reduce(arrays, starting, combine, (arrays[0].ndim - 1,)))

    arrays = tuple(operands.values())
    parts = _parts(z, longest)
    if parts > 1:
        arrays = reduced(tuple(x.reshape(*x.shape[:-1], parts, -1) for x in arrays))
    found = dict(zip(order, reduced(arrays), strict=True))
    sums = {name: x for name, x in found.items() if name == "top" or name in wanted}
    top = sums["top"]
    if "total" in wanted:
        sums["total"] = jnp.where(top <= low, 0, found["total"])
    if "likeliest" in wanted:
        is_known = jnp.isfinite(top) & (top > low)
        sums["likeliest"] = jnp.where(is_known, found["likeliest"].astype(z.dtype), jnp.nan)
    for i in range(len(weights)):
        sums[f"linear {i}"] = fences.infinite(found[f"linear {i}"])
    return sums


def _parts(z: Array, longest: int | None) -> int:
    """Returns into how many equal parts of at most `longest` classes a row is divided; 1 if no number divides it."""
    size = z.shape[-1]
    if longest is None or class_axis_is_split(z) or size <= longest:
        return 1
    fewest = -(-size // longest)
    return next((parts for parts in range(fewest, 8 * fewest) if size % parts == 0), 1)


def _over_devices(wanted: Pass, z: Array, weights: tuple[Array | None, ...], local: Sums) -> Sums:
    """Returns the sums over all devices that the classes are split over, from the sums of each device."""
    axis = ClassAxis(z.shape[-1], class_axis_name=wanted.class_axis_name)
    top = axis.pmax(local["top"])
    step = local["top"] - top
    scale = jnp.exp(step)
    sums = {"top": top}
    if "ties" in wanted:
        sums["ties"] = axis.psum(jnp.where(step == 0, local["ties"], 0))
    if "total" in wanted:
        sums["total"] = axis.psum(local["total"] * scale)
    if "moment" in wanted:
        sums["moment"] = axis.psum((local["moment"] + local["total"] * step) * scale)
    if "likeliest" in wanted:
        # NaN where the local maximum is not finite: then the class is another device's.
        number = local["likeliest"] + jnp.asarray(axis.start).astype(z.dtype)
        here = jnp.where((step == 0) & ~jnp.isnan(number), number, jnp.inf)
        first = -axis.pmax(-here)
        sums["likeliest"] = jnp.where(jnp.isinf(first), jnp.nan, first)
    for i, w in enumerate(weights):
        mass = z.shape[-1] if w is None else jnp.broadcast_to(jnp.sum(w, axis=-1).astype(z.dtype), top.shape)
        sums[f"linear {i}"] = axis.psum(local[f"linear {i}"] + mass * step)
    return sums


@jax.custom_jvp
def pick(z: Array, narrow: Array, index: Array) -> Array:
    """Returns z at classes (*batch, S), gathered from `narrow` before it is widened.

    A gather from wide logits makes XLA on TPU write them out.
    """
    return jnp.take_along_axis(narrow, index, axis=-1, mode="clip").astype(z.dtype)


MOST_COMPARED = 32
"""How many labels of an example are found by comparison in the gradient. More are scattered."""


@functools.partial(pick.defjvp, symbolic_zeros=True)
def _pick_jvp(primals: Any, tangents: Any) -> Any:
    z, narrow, index = primals
    dz = tangents[0]
    picked = pick(z, narrow, index)
    if isinstance(dz, SymbolicZero):
        return picked, jnp.zeros_like(picked)
    if index.shape[-1] > MOST_COMPARED:
        return picked, jnp.take_along_axis(dz, index, axis=-1, mode="clip")
    # A scatter, which a gather differentiates to, would write a wide array of the logits' size.
    classes = align(jnp.arange(z.shape[-1], dtype=index.dtype), z.ndim)
    hits = (jnp.sum(jnp.where(index[..., s, None] == classes, dz, 0), axis=-1) for s in range(index.shape[-1]))
    return picked, jnp.stack(list(hits), axis=-1)
