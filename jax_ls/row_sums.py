"""The sums over classes that a loss asks of its logits, taken in one pass over them, and single logits.

On TPU and GPU one variadic `jax.lax.reduce` takes the maximum, Σ exp and every linear sum: `_one_reduction`. On CPU
each sum is taken by itself, which is faster there: `_separate_sums`. `jax.lax.platform_dependent` chooses when the
program is lowered. Their derivatives are rules of `with_jvp`, so that forward mode and Hessians work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding, PartitionSpec

from jax_ls import fences
from jax_ls.class_axis import AxisName, ClassAxis, align, class_axis_is_split
from jax_ls.tangents import with_jvp

__all__ = ["Pass", "Sums", "pick", "remembered", "row_sums"]

REMEMBERED = "jax_ls.sum_over_classes"
"""Name of the sums over classes, for checkpoint policies: a few numbers per row, kept for the backward pass."""


Sums = dict[str, Array]
"""What one pass over the logits gives, (*batch,) each: the names are those of `Pass`."""


def remembered(x: Array) -> Array:
    """Returns a sum over classes under the name by which it is kept for the backward pass."""
    return checkpoint_name(x, REMEMBERED)


class Pass(NamedTuple):
    """What is static of a pass: which sums are asked for, the mesh axis of the classes, and how the logits lie.

    "top" is max_k z_k. "ties" counts the classes that have it. "likeliest" is the first of them, as a real number.
    "total" is Σ_k eᵈ and "moment" Σ_k d eᵈ with d = z_k − max z. "linear i" is Σ_k w_k d for the i-th weights, and
    "mass i" is Σ_k w_k. "beneath i" is the largest d of a class with w_k > 0, 0 if there is none, and "seen i" is
    Σ_k w_k exp(d − beneath), for weights of no negative entry. `in_columns` says that the classes were not last:
    neighbours in memory are other examples.
    """

    names: frozenset[str]
    class_axis_name: AxisName | None
    in_columns: bool = False

    def __contains__(self, name: object) -> bool:
        return name in self.names


@functools.partial(with_jvp, static=1)
def row_sums(wanted: Pass, z: Array, weights: tuple[Array | None, ...]) -> Sums:
    """Returns the sums over the classes of wide logits (*batch, K) that are wanted; "top" always.

    Weights are (K,) or (*batch, K), of real numbers or booleans; None for ones.
    """
    if not wanted.names:
        return {}
    here = wanted
    if wanted.class_axis_name is not None:
        # The maximum of all devices is not that of one: Σ_k w_k (z_k − max z) moves by the mass.
        masses = {f"mass {i}" for i, w in enumerate(weights) if w is not None and f"linear {i}" in wanted}
        here = wanted._replace(names=wanted.names | masses)
    on_gpu = functools.partial(_one_reduction, reduce=_by_columns if wanted.in_columns else _by_rows)
    implementations = {"cpu": _separate_sums, "cuda": on_gpu, "rocm": on_gpu, "default": _one_reduction}
    chosen = {platform: functools.partial(f, here) for platform, f in implementations.items()}
    sums = jax.lax.platform_dependent(z, weights, **chosen)
    return sums if wanted.class_axis_name is None else _over_devices(wanted, z, weights, sums)


@row_sums.defjvp
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

    def seen(i: int) -> Array:
        # Only where w is 0 can the exponent be large: that derivative in w stays finite.
        return jnp.exp(jnp.minimum(z - top - sums[f"beneath {i}"][..., None], 60))

    if not isinstance(dz, SymbolicZero):
        share = jnp.exp(z - top)
        if "ties" in wanted:
            derivatives["top"] = summed(jnp.where(z == top, dz, 0)) / sums["ties"]
        if "total" in wanted:
            derivatives["total"] = summed(share * dz)
        if "moment" in wanted:
            derivatives["moment"] = summed(share * (1 + fences.finite(z - top)) * dz)
        for i, w in enumerate(weights):
            if f"linear {i}" in wanted:
                derivatives[f"linear {i}"] = summed(_times(w, dz))
            if w is not None and f"seen {i}" in wanted:
                derivatives[f"seen {i}"] = summed(_times(w, seen(i) * dz))
    for i, dw in enumerate(dweights):
        if dw is None or isinstance(dw, SymbolicZero):
            continue
        if f"linear {i}" in wanted:
            # Bounded, for what is multiplied by it and by 0 afterwards to stay finite.
            d = jnp.maximum(z - top, -jnp.sqrt(jnp.finfo(z.dtype).max))
            derivatives[f"linear {i}"] += summed(d * _shown(dw, z))
        if f"mass {i}" in wanted:
            derivatives[f"mass {i}"] = summed(_spread(dw, z))
        if f"seen {i}" in wanted:
            derivatives[f"seen {i}"] += summed(_times(dw, seen(i)))
    return sums, derivatives


def _shown(w: Array, z: Array) -> Array:
    """Returns weights in the dtype of the logits, aligned with them."""
    return align(w, z.ndim).astype(z.dtype)


def _spread(w: Array, z: Array) -> Array:
    """Returns weights in the shape of the logits, for sums over them to differ over the same mesh axes."""
    return fences.vary_alike(jnp.broadcast_to(_shown(w, z), z.shape), z)[0]


def _times(w: Array | None, values: Array) -> Array:
    """Returns w · values, or values where a mask w is True and 0 elsewhere."""
    if w is None:
        return values
    return jnp.where(align(w, values.ndim), values, 0) if w.dtype == jnp.bool_ else values * _shown(w, values)


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
        if f"linear {i}" in wanted:
            d, *_ = shifted()
            sums[f"linear {i}"] = fences.infinite(summed(_weighted(d, w)))
        if w is not None and f"mass {i}" in wanted:
            sums[f"mass {i}"] = summed(_spread(w, z))
        if w is not None and f"seen {i}" in wanted:
            beneath = jnp.max(jnp.where(_shown(w, z) > 0, z, -jnp.inf), axis=-1, initial=-jnp.inf) - top
            beneath = fences.end_of_sum(jnp.where(jnp.isfinite(beneath), beneath, 0))
            # In this order the difference is 0 for the class that is beneath the maximum by as much.
            row_top, row_beneath = (x[..., None] for x in fences.unshared(top, beneath))
            sums[f"beneath {i}"] = beneath
            sums[f"seen {i}"] = summed(_shown(w, z) * jnp.exp(jnp.minimum((z - row_top) - row_beneath, 60)))
    return sums


def _weighted(values: Array, w: Array | None) -> Array:
    # Values first: with the shared factor first, XLA on CPU takes three times as long.
    return values if w is None else fences.finite(values) * _shown(w, values)


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


Arrays = tuple[Array, ...]
Combine = Callable[[Arrays, Arrays], Arrays]
Reduce = Callable[[Arrays, tuple[int, ...]], Arrays]


def _over_last(reduce: Reduce, combine: Combine, arrays: Arrays) -> Arrays:
    """Returns arrays (*batch, K) reduced over K, in one go."""
    return reduce(arrays, (arrays[0].ndim - 1,))


def _one_reduction(
    wanted: Pass,
    z: Array,
    weights: tuple[Array | None, ...],
    reduce: Callable[[Reduce, Combine, Arrays], Arrays] = _over_last,
) -> Sums:
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
        own = _times(w, ones)
        if f"linear {i}" in wanted or f"mass {i}" in wanted:
            operands[f"mass {i}"], starts[f"mass {i}"] = own, 0
        if f"linear {i}" in wanted:
            operands[f"linear {i}"], starts[f"linear {i}"] = zeros, 0
        if w is not None and f"seen {i}" in wanted:
            operands[f"highest {i}"], starts[f"highest {i}"] = jnp.where(_shown(w, z) > 0, operands["top"], low), low
            operands[f"seen {i}"], starts[f"seen {i}"] = own, 0
    order = tuple(operands)

    def combine(left: Arrays, right: Arrays) -> Arrays:
        a, b = dict(zip(order, left, strict=True)), dict(zip(order, right, strict=True))
        step = a["top"] - b["top"]
        left_wins = step > 0
        out = {"top": jnp.maximum(a["top"], b["top"])}
        # The side with the smaller maximum falls by as much.
        fall = -jnp.abs(step)
        small = jnp.exp(fall)

        def winner(name: str) -> Array:
            return jnp.where(left_wins, a[name], b[name])

        def loser(name: str) -> Array:
            return jnp.where(left_wins, b[name], a[name])

        if "ties" in a:
            out["ties"] = jnp.where(step == 0, a["ties"] + b["ties"], winner("ties"))
        if "total" in a:
            out["total"] = winner("total") + loser("total") * small
        if "moment" in a:
            # fall · small first, which is finite: many classes that do not exist, times their fall, are not.
            out["moment"] = winner("moment") + loser("moment") * small + loser("total") * (fall * small)
        if "likeliest" in a:
            first = jnp.minimum(a["likeliest"], b["likeliest"])
            out["likeliest"] = jnp.where(step == 0, first, winner("likeliest"))
        for i in range(len(weights)):
            linear, mass = f"linear {i}", f"mass {i}"
            if mass in a:
                out[mass] = a[mass] + b[mass]
            if f"seen {i}" in a:
                highest, of_highest = f"highest {i}", f"seen {i}"
                rise = a[highest] - b[highest]
                less = jnp.exp(-jnp.abs(rise))
                out[highest] = jnp.maximum(a[highest], b[highest])
                out[of_highest] = jnp.where(
                    rise > 0, a[of_highest] + b[of_highest] * less, a[of_highest] * less + b[of_highest]
                )
            if linear in a:
                out[linear] = a[linear] + b[linear] + loser(mass) * fall
        return tuple(out[name] for name in order)

    def reduced(arrays: Arrays, axes: tuple[int, ...]) -> Arrays:
        starting = tuple(jnp.asarray(starts[name], x.dtype) for name, x in zip(order, arrays, strict=True))
        return tuple(jax.lax.reduce(arrays, starting, combine, axes))

    # On an explicit mesh JAX does not reshape an axis that is split.
    reduce = _over_last if class_axis_is_split(z) else reduce
    found = dict(zip(order, reduce(reduced, combine, tuple(operands.values())), strict=True))
    sums = {name: x for name, x in found.items() if name == "top" or name in wanted}
    top = sums["top"]
    if "total" in wanted:
        sums["total"] = jnp.where(top <= low, 0, found["total"])
    if "likeliest" in wanted:
        is_known = jnp.isfinite(top) & (top > low)
        sums["likeliest"] = jnp.where(is_known, found["likeliest"].astype(z.dtype), jnp.nan)
    for i in range(len(weights)):
        if f"linear {i}" in wanted:
            sums[f"linear {i}"] = fences.infinite(found[f"linear {i}"])
        if f"seen {i}" in wanted:
            highest = found[f"highest {i}"]
            sums[f"beneath {i}"] = jnp.where(highest > low, highest - top, 0)
            # NaN weights stay NaN.
            sums[f"seen {i}"] = jnp.where((highest <= low) & (found[f"seen {i}"] > 0), 0, found[f"seen {i}"])
    return sums


LONGEST_ROW = 16384
"""Longest row that XLA on GPU reduces in one kernel. It splits longer ones in about √K parts, which it writes out."""


def _by_rows(reduce: Reduce, combine: Combine, arrays: Arrays) -> Arrays:
    """Returns arrays reduced over the classes, which are neighbours in memory: in equal parts and a rest."""
    last, size = arrays[0].ndim - 1, arrays[0].shape[-1]
    fewest = -(-size // LONGEST_ROW)
    if fewest == 1:
        return reduce(arrays, (last,))
    parts = next((n for n in range(fewest, 8 * fewest) if size % n == 0), fewest)
    whole, rest = _cut(arrays, size - size % parts)
    whole = reduce(tuple(x.reshape(*x.shape[:-1], parts, -1) for x in whole), (last + 1,))
    whole = reduce(whole, (last,))
    return combine(whole, reduce(rest, (last,))) if rest else whole


SHORTEST_COLUMN = 32
"""Fewest classes for which XLA on GPU takes its kernel for columns, which reads operands that were written out."""


def _by_columns(reduce: Reduce, combine: Combine, arrays: Arrays) -> Arrays:
    """Returns arrays reduced over the classes, whose neighbours in memory are other examples.

    Over two axes with the parts between them: XLA then writes a loop, into which it fuses the operands.
    """
    last, size = arrays[0].ndim - 1, arrays[0].shape[-1]
    if size < SHORTEST_COLUMN:
        return reduce(arrays, (last,))
    # As many as the memory for their sums allows: few examples do not fill a GPU.
    parts = 16 if size >= 8192 else 2
    left_over = size % (2 * parts)
    # A single class is no reduction, and XLA would transpose the logits for it.
    whole, rest = _cut(arrays, size - (left_over if left_over != 1 else left_over + 2 * parts))
    whole = reduce(tuple(x.reshape(*x.shape[:-1], -1, parts, 2) for x in whole), (last, last + 2))
    pieces = [tuple(x[..., i] for x in whole) for i in range(parts)]
    return functools.reduce(combine, [*pieces, reduce(rest, (last,))] if rest else pieces)


def _cut(arrays: Arrays, size: int) -> tuple[Arrays, Arrays]:
    """Returns the first `size` classes, and the others; () if there are none."""
    if size == arrays[0].shape[-1]:
        return arrays, ()
    return tuple(x[..., :size] for x in arrays), tuple(x[..., size:] for x in arrays)


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
        if f"linear {i}" in wanted:
            mass = z.shape[-1] if w is None else local[f"mass {i}"]
            sums[f"linear {i}"] = axis.psum(local[f"linear {i}"] + mass * step)
        if f"mass {i}" in wanted:
            sums[f"mass {i}"] = axis.psum(local[f"mass {i}"])
        if f"seen {i}" in wanted:
            highest = jnp.where(local[f"seen {i}"] > 0, local["top"] + local[f"beneath {i}"], fences.lowest(z.dtype))
            over_all = axis.pmax(highest)
            sums[f"beneath {i}"] = jnp.where(over_all > fences.lowest(z.dtype), over_all - top, 0)
            sums[f"seen {i}"] = axis.psum(local[f"seen {i}"] * jnp.exp(highest - over_all))
    return sums


@with_jvp
def pick(z: Array, narrow: Array, index: Array) -> Array:
    """Returns z at classes (*batch, S), gathered from `narrow` before it is widened.

    A gather from wide logits makes XLA on TPU write them out.
    """
    if class_axis_is_split(narrow):
        return _pick_on_mesh(narrow, index).astype(z.dtype)
    return jnp.take_along_axis(narrow, index, axis=-1, mode="clip").astype(z.dtype)


def _pick_on_mesh(narrow: Array, index: Array) -> Array:
    """Returns logits that each device gathers from its own classes.

    JAX refuses a gather along an axis that an explicit mesh splits.
    """
    sharding = jax.typeof(narrow).sharding
    *rows, classes = sharding.spec
    place = PartitionSpec(*rows, None)

    def gather(narrow: Array, index: Array) -> Array:
        index = index - narrow.shape[-1] * jax.lax.axis_index(classes)
        held = (index >= 0) & (index < narrow.shape[-1])
        taken = jnp.take_along_axis(narrow, index, axis=-1, mode="clip")
        return jax.lax.psum(jnp.where(held, taken, 0), classes)

    index = jax.sharding.reshard(index, NamedSharding(sharding.mesh, place))
    return jax.shard_map(gather, mesh=sharding.mesh, in_specs=(sharding.spec, place), out_specs=place)(narrow, index)


MOST_COMPARED = 32
"""How many labels of an example are found by comparison in the gradient. More are scattered."""


@pick.defjvp
def _pick_jvp(primals: Any, tangents: Any) -> Any:
    z, narrow, index = primals
    dz = tangents[0]
    picked = pick(z, narrow, index)
    if isinstance(dz, SymbolicZero):
        return picked, jnp.zeros_like(picked)
    if index.shape[-1] > MOST_COMPARED and not class_axis_is_split(z):
        return picked, jnp.take_along_axis(dz, index, axis=-1, mode="clip")
    # A scatter, which a gather differentiates to, would write a wide array of the logits' size.
    classes = align(jnp.arange(z.shape[-1], dtype=index.dtype), z.ndim)
    hits = (jnp.sum(jnp.where(index[..., s, None] == classes, dz, 0), axis=-1) for s in range(index.shape[-1]))
    return picked, jnp.stack(list(hits), axis=-1)
