"""The plan for many classes: sums over classes of logits that are a matrix product, a block of classes at a time.

One sweep over the blocks takes lse, linear sums Σ w_k z_k and single logits by the online rule: when a block holds a
larger logit, the sums so far are rescaled.

The backward pass is a second sweep. It recomputes a block's logits, turns them into their slopes, adds to the gradient
of `hidden` and finishes the block's part of the kernel's gradient: four matrix products in all, and nothing of the size
of tokens × classes, or of the kernel in float32.

The last block may reach over the classes that are left. It then begins earlier, without the classes that other blocks
hold, and comes first, so that those write their gradients over the zeros that it leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jax_ls import checks, fences
from jax_ls.class_axis import align
from jax_ls.fences import varying, varying_axes
from jax_ls.linear._gathering import Gathering
from jax_ls.linear._products import narrowed, product, stored_dtype, unit_of
from jax_ls.row_sums import Pass, row_sums

__all__ = ["Blocks", "Layer", "Sums", "sweep", "sweep_in_any_mode"]

Tree = Any


class Layer(NamedTuple):
    """An output layer: hidden (N, D), kernel (D, K) or (K, D), bias (K,), and which classes exist, (K,)."""

    hidden: Any
    kernel: Any
    bias: Any
    exists: Any


@dataclass(frozen=True)
class Blocks:
    """How the classes are cut. Static.

    Args:
      size: classes of a block, from each part of the kernel where it is split over the tokens' devices.
      classes: classes of a part; `parts` × `classes` are all that this device works on.
      parts: in how many parts the tokens' devices hold the classes.
      transposed: whether the kernel is (K, D).
      softcap: c, for c · tanh(z / c) in place of z.
      gathering: how the kernel is made whole.
      accumulate: dtype that the gradient of `hidden` adds up in.
      tpu_size: classes of a block on TPU.
      piece: tokens whose gradient adds up in one array; None for all.
    """

    size: int
    classes: int
    parts: int
    transposed: bool
    softcap: float | None
    gathering: Gathering
    accumulate: Any
    tpu_size: int
    piece: int | None = None

    def run(self, sweep: Callable[..., Any], *operands: Any) -> Any:
        """Returns sweep(blocks, *operands), with the blocks that suit the platform that it is lowered for.

        On TPU blocks are larger, and the gradient of `hidden` adds up in pieces of 1024 tokens: XLA then keeps a piece
        in fast memory: a tenth fewer cycles for the second sweep, as it estimates. On GPU the pieces would be copied.
        """
        on_tpu = replace(self, size=self.tpu_size, piece=1024)
        return jax.lax.platform_dependent(
            operands,
            tpu=lambda x: sweep(on_tpu, *x),
            default=lambda x: sweep(self, *x),
        )

    @property
    def count(self) -> int:
        return -(-self.classes // self.size)

    @property
    def ragged(self) -> bool:
        return self.classes % self.size != 0

    @property
    def class_axis(self) -> int:
        return 0 if self.transposed else 1

    def order(self) -> Array:
        """Returns the blocks, the last one first."""
        return jnp.roll(jnp.arange(self.count, dtype=jnp.int32), 1)

    def start(self, block: Array) -> Array:
        """Returns the first class of a block within each part."""
        return jnp.minimum(block * self.size, self.classes - self.size) if self.ragged else block * self.size

    def fresh(self, block: Array) -> Array | None:
        """Returns which classes (B,) of a block are not another's; None for all."""
        if not self.ragged:
            return None
        return jnp.tile(self.start(block) + jnp.arange(self.size, dtype=jnp.int32) >= block * self.size, self.parts)

    def places(self, block: Array, labels: Array) -> tuple[Array, Array]:
        """Returns for labels (N, S), counted on this device, their places in a block, and whether they are in it."""
        part, within = labels // self.classes, labels % self.classes
        place = within - self.start(block)
        held = (within >= block * self.size) & (place >= 0) & (place < self.size)
        held &= (labels >= 0) & (labels < self.parts * self.classes)
        return jnp.where(held, part * self.size + place, 0), held

    def kernel(self, block: Array, kernel: Array) -> Array:
        """Returns the kernel of a block, (D, B) or (B, D)."""
        part = jax.lax.dynamic_slice_in_dim(kernel, self.start(block), self.size, self.class_axis)
        return fences.cut_out(self.gathering.whole(part))

    def cut(self, block: Array, x: Array) -> Array:
        """Returns columns of x (K,) or (N, K): (B,) or (N, B)."""
        x = x.reshape(*x.shape[:-1], self.parts, self.classes)
        x = jax.lax.dynamic_slice_in_dim(x, self.start(block), self.size, x.ndim - 1)
        return x.reshape(*x.shape[:-2], self.parts * self.size)

    def put(self, block: Array, whole: Array, x: Array) -> Array:
        """Returns `whole` (K,) or (N, K) with the columns of a block in their place."""
        shape = whole.shape
        whole = whole.reshape(*shape[:-1], self.parts, self.classes)
        x = x.reshape(*shape[:-1], self.parts, self.size).astype(whole.dtype)
        return jax.lax.dynamic_update_slice_in_dim(whole, x, self.start(block), whole.ndim - 1).reshape(shape)


class Sums(NamedTuple):
    """Sums over classes of each token (N,): the maximum; Σ exp(z − max); Σ w (z − max) for each w; logits (N, S)."""

    top: Any
    total: Any
    linear: Any
    picked: Any


class _Part(NamedTuple):
    """One block: its kernel, bias (B,), which classes count, weights of the linear sums, places of labels."""

    kernel: Any
    bias: Any
    kept: Any
    weights: Any
    places: Any


def _part(blocks: Blocks, block: Array, layer: Layer, weights: Sequence[Any], labels: Sequence[Array]) -> _Part:
    fresh, exists = blocks.fresh(block), layer.exists
    kept = None if exists is None else blocks.cut(block, exists)
    if fresh is not None:
        kept = fresh if kept is None else kept & fresh
    return _Part(
        blocks.kernel(block, layer.kernel),
        None if layer.bias is None else blocks.cut(block, layer.bias),
        kept,
        [_present(None if w is None else blocks.cut(block, w), fresh, kept) for w in weights],
        [blocks.places(block, y) for y in labels],
    )


def _present(w: Array | None, fresh: Array | None, kept: Array | None) -> Array | None:
    """The weights of a block, with 0 for classes that another block holds or that do not exist.

    Their derivative is 0 too. Else it would be what stands for −inf, which overflows times a cotangent above 1.
    """
    if w is None:
        return None if fresh is None else fresh.astype(jnp.float32)
    return w if kept is None else jnp.where(align(kept, w.ndim), w, 0)


def _logits(blocks: Blocks, hidden: Array, part: _Part) -> tuple[Array, Array | None]:
    """The logits (N, B) of a block, −inf where no class is, and the slope of the softcap."""
    z = product(hidden, part.kernel, 1, blocks.class_axis ^ 1)
    z = z if part.bias is None else z + part.bias.astype(z.dtype)[None]
    slope = None
    if blocks.softcap is not None:
        bent = jnp.tanh(z / blocks.softcap)
        z, slope = blocks.softcap * bent, 1 - jnp.square(bent)
    return (z if part.kept is None else jnp.where(part.kept[None], z, -jnp.inf)), slope


def _sums(z: Array, part: _Part) -> tuple[Sums, list[Array]]:
    """The sums of one block, and the mass Σ w of each linear sum."""
    weights = tuple(None if w is None else w.astype(z.dtype) for w in part.weights)
    names = {"top", "total"} | {f"linear {i}" for i in range(len(weights))}
    sums = row_sums(Pass(frozenset(names), None), z, weights)
    picked = []
    for places, held in part.places:
        taken = jnp.take_along_axis(z, places, axis=1, mode="clip")
        picked.append(jnp.where(held, taken, 0))
    linear = tuple(sums[f"linear {i}"] for i in range(len(weights)))
    return Sums(jax.lax.stop_gradient(sums["top"]), sums["total"], linear, picked), [_mass(w, z) for w in weights]


def _mass(w: Array | None, z: Array) -> Array:
    mass = jnp.asarray(z.shape[1], z.dtype) if w is None else jnp.sum(w, axis=-1)
    return jnp.broadcast_to(mass, z.shape[:1])


def _joined(a: Sums, mass_a: Sequence[Array], b: Sums, mass_b: Sequence[Array]) -> tuple[Sums, list[Array]]:
    """The sums over two sets of classes, from those of each."""
    top = jax.lax.stop_gradient(jnp.maximum(a.top, b.top))
    total = a.total * jnp.exp(a.top - top) + b.total * jnp.exp(b.top - top)
    sums = zip(a.linear, mass_a, b.linear, mass_b, strict=True)
    linear = tuple(x + m * (a.top - top) + y + n * (b.top - top) for x, m, y, n in sums)
    picked = [x + y for x, y in zip(a.picked, b.picked, strict=True)]
    return Sums(top, total, linear, picked), [m + n for m, n in zip(mass_a, mass_b, strict=True)]


def _nothing(hidden: Array, weights: Sequence[Any], labels: Sequence[Array]) -> tuple[Sums, list[Array]]:
    """The sums over no class."""
    dtype, shape = checks.wide(hidden.dtype), hidden.shape[:1]
    zeros = [jnp.zeros(shape, dtype) for _ in weights]
    picked = [jnp.zeros(y.shape, dtype) for y in labels]
    return Sums(jnp.full(shape, fences.lowest(dtype), dtype), jnp.zeros(shape, dtype), tuple(zeros), picked), zeros


# The sweeps.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sweep(blocks: Blocks, layer: Layer, weights: list[Any], labels: list[Array]) -> tuple[Sums, list[Array]]:
    """Returns the sums over all classes of this device; reverse mode, with the gradients finished block by block."""
    return blocks.run(_take_sums, layer, weights, labels)


def _take_sums(blocks: Blocks, layer: Layer, weights: list[Any], labels: list[Array]) -> tuple[Sums, list[Array]]:
    def step(carry: Tree, block: Array) -> tuple[Tree, None]:
        part = _part(blocks, block, layer, weights, labels)
        sums, masses = _sums(_logits(blocks, layer.hidden, part)[0], part)
        before, masses_before = carry
        return _joined(before, masses_before, sums, masses), None

    start = varying(_nothing(layer.hidden, weights, labels), varying_axes(layer.hidden))
    return jax.lax.scan(step, start, blocks.order())[0]


def sweep_in_any_mode(
    blocks: Blocks, layer: Layer, weights: list[Any], labels: list[Array]
) -> tuple[Sums, list[Array]]:
    """Returns what `sweep` returns, by rules that every mode of differentiation follows; holds the kernel once more."""
    axis, pad = blocks.class_axis, blocks.count * blocks.size - blocks.classes
    wide = layer.hidden.astype(checks.wide(layer.hidden.dtype))  # so that its cotangents add up in float32

    def cut(x: Array, axis: int, parts: int) -> Array:
        """Class axis first, as (count, ..., parts · size)."""
        x = jnp.moveaxis(x, axis, -1)
        x = x.reshape(*x.shape[:-1], parts, blocks.classes)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)]) if pad else x
        x = x.reshape(*x.shape[:-1], blocks.count, blocks.size)
        x = jnp.moveaxis(x, -2, 0)
        x = x.reshape(*x.shape[:-2], parts * blocks.size)
        return jnp.moveaxis(x, -1, axis + 1)

    ids = jnp.arange(blocks.count * blocks.size).reshape(blocks.count, blocks.size)
    fresh = jnp.tile(ids < blocks.classes, (1, blocks.parts)) if pad else None
    kept = None if layer.exists is None else cut(layer.exists, 0, blocks.parts)
    if fresh is not None:
        kept = fresh if kept is None else kept & fresh
    xs = {
        "kernel": cut(layer.kernel, axis, 1),
        "bias": None if layer.bias is None else cut(layer.bias, 0, blocks.parts),
        "kept": kept,
        "fresh": fresh,
        "weights": [None if w is None else cut(w, w.ndim - 1, blocks.parts) for w in weights],
        "block": jnp.arange(blocks.count, dtype=jnp.int32),
    }

    @jax.checkpoint
    def sums_of(wide: Array, x: Tree) -> tuple[Sums, list[Array]]:
        within = [_padded_places(blocks, x["block"], y) for y in labels]
        given = [_present(w, x["fresh"], x["kept"]) for w in x["weights"]]
        part = _Part(blocks.gathering.whole(x["kernel"]), x["bias"], x["kept"], given, within)
        return _sums(_logits(blocks, wide.astype(layer.hidden.dtype), part)[0], part)

    def step(carry: Tree, x: Tree) -> tuple[Tree, None]:
        return _joined(*carry, *sums_of(wide, x)), None

    start = varying(_nothing(layer.hidden, weights, labels), varying_axes(layer.hidden))
    return jax.lax.scan(step, start, xs)[0]


def _padded_places(blocks: Blocks, block: Array, labels: Array) -> tuple[Array, Array]:
    """As `Blocks.places`, where the last block is padded."""
    part, within = labels // blocks.classes, labels % blocks.classes
    place = within - block * blocks.size
    held = (place >= 0) & (place < blocks.size) & (labels >= 0) & (labels < blocks.parts * blocks.classes)
    return jnp.where(held, part * blocks.size + place, 0), held


def _sweep_fwd(blocks: Blocks, layer: Any, weights: Any, labels: Any) -> tuple[Any, Tree]:
    wanted = jax.tree.map(lambda x: jnp.zeros(()) if x.perturbed else None, (layer, weights))
    layer, weights, labels = jax.tree.map(lambda x: x.value, (layer, weights, labels))
    sums, masses = cast(tuple[Sums, list[Array]], sweep(blocks, layer, weights, labels))
    return (sums, masses), (layer, weights, labels, sums.top, wanted)


def _sweep_bwd(blocks: Blocks, residuals: Tree, cotangents: Tree) -> tuple[Layer, list[Any], list[None]]:
    # What is no derivative is None where it comes in: a tree of arrays is what a choice of platform takes.
    cotangents = jax.tree.map(lambda x: None if _is_zero(x) else x, cotangents, is_leaf=_is_zero)
    layer, weights, labels, top, wanted = residuals
    found, found_weights = blocks.run(_take_slopes, layer, weights, labels, top, wanted, cotangents)
    return found, found_weights, [None for _ in labels]


def _take_slopes(
    blocks: Blocks,
    layer: Layer,
    weights: list[Any],
    labels: list[Array],
    top: Array,
    wanted_all: Tree,
    cotangents: Tree,
) -> tuple[Layer, list[Any]]:
    """The gradients of the layer and of the weights, a block of classes at a time."""
    wanted, wanted_weights = wanted_all
    (_, d_total, d_linear, d_picked), d_mass = cotangents
    hidden, axis = layer.hidden, blocks.class_axis
    wide, dtype = checks.wide(hidden.dtype), stored_dtype(hidden.dtype)
    unit = unit_of(_largest(d_total, d_linear, d_picked, weights, hidden), dtype)
    everywhere = varying_axes(hidden)

    def step(carry: Tree, block: Array) -> tuple[Tree, None]:
        part = _part(blocks, block, layer, weights, labels)
        z, bend = _logits(blocks, hidden, part)
        away = z - top[:, None]
        slopes = jnp.zeros((), wide) if d_total is None else jnp.exp(away) * d_total[:, None]
        for ct, w in zip(d_linear, part.weights, strict=True):
            if ct is not None:
                slopes = slopes + (ct[:, None] if w is None else ct[:, None] * align(w, 2).astype(wide))
        for ct, (places, held) in zip(d_picked, part.places, strict=True):
            if ct is not None:
                slopes = slopes + _placed(ct, places, held, z.shape[1])
        slopes = jnp.broadcast_to(slopes, z.shape)
        slopes = slopes if bend is None else slopes * bend
        slopes = slopes if part.kept is None else jnp.where(part.kept[None], slopes, 0)
        found = dict(carry)
        if wanted.bias is not None:
            found["bias"] = blocks.put(block, carry["bias"], jnp.sum(slopes, axis=0))
        for i, (ct, w) in enumerate(zip(d_linear, part.weights, strict=True)):
            if wanted_weights[i] is not None and ct is not None:
                d_w = ct[:, None] * (fences.finite(z) - top[:, None])
                if d_mass[i] is not None:
                    d_w = d_w + d_mass[i][:, None]
                d_w = d_w if part.kept is None else jnp.where(part.kept[None], d_w, 0)
                d_w = d_w if w.ndim == 2 else jnp.sum(d_w, axis=0)
                found["weights"] = [*found["weights"]]
                found["weights"][i] = blocks.put(block, carry["weights"][i], d_w)
        slopes = narrowed(slopes, unit, dtype)
        if wanted.kernel is not None:
            left, right = (slopes, hidden) if blocks.transposed else (hidden, slopes)
            d_part = product(left, right, 0, 0)
            d_part = blocks.gathering.shard(d_part if unit is None else d_part * unit, layer.kernel.dtype)
            found["kernel"] = jax.lax.dynamic_update_slice_in_dim(carry["kernel"], d_part, blocks.start(block), axis)
        if wanted.hidden is not None:
            rows = [slopes[first : first + len(old)] for first, old in zip(firsts, carry["hidden"], strict=True)]
            found["hidden"] = [
                old + product(new, part.kernel, 1, axis).astype(old.dtype)
                for old, new in zip(carry["hidden"], rows, strict=True)
            ]
        return found, None

    pairs = zip(wanted_weights, weights, strict=True)
    d_weights = [None if wanted is None else jnp.zeros(w.shape, w.dtype) for wanted, w in pairs]
    piece = blocks.piece or max(len(hidden), 1)
    firsts = range(0, len(hidden), piece)
    zeros = [jnp.zeros(hidden[first : first + piece].shape, blocks.accumulate) for first in firsts]
    start = {
        "hidden": None if wanted.hidden is None else zeros,
        "kernel": None if wanted.kernel is None else jax.lax.empty(layer.kernel.shape, layer.kernel.dtype),
        "bias": None if wanted.bias is None else jnp.zeros(layer.bias.shape, layer.bias.dtype),
        "weights": d_weights,
    }
    found, _ = jax.lax.scan(step, varying(start, everywhere), blocks.order())
    d_hidden = None
    if wanted.hidden is not None:
        pieces = [x if unit is None else x * unit.astype(x.dtype) for x in found["hidden"]]
        d_hidden = jnp.concatenate([hidden[:0], *(x.astype(hidden.dtype) for x in pieces)])
    return Layer(d_hidden, found["kernel"], found["bias"], None), found["weights"]


sweep.defvjp(_sweep_fwd, _sweep_bwd, symbolic_zeros=True)


def _is_zero(x: object) -> bool:
    return isinstance(x, SymbolicZero)


def _placed(ct: Array, places: Array, held: Array, size: int) -> Array:
    """Σ_s ct_s at the place of each label: (N, S) as (N, B), by comparison, for a scatter would write a copy."""
    classes = jnp.arange(size, dtype=places.dtype)[None]
    ct = jnp.where(held, ct, 0)
    total = jnp.zeros((), ct.dtype)
    for s in range(ct.shape[1]):
        total = total + jnp.where(places[:, s, None] == classes, ct[:, s, None], 0)
    return jnp.broadcast_to(total, (len(ct), size))


def _largest(d_total: Any, d_linear: Any, d_picked: Any, weights: Any, hidden: Array) -> Array:
    """A number that no slope exceeds."""
    bound = jnp.zeros(hidden.shape[:1], checks.wide(hidden.dtype))
    bound = bound if d_total is None else bound + jnp.abs(d_total)
    for ct, w in zip(d_linear, weights, strict=True):
        if ct is not None:
            most = 1 if w is None else jnp.max(jnp.abs(w), axis=-1)
            bound = bound + jnp.abs(ct) * most
    for ct in d_picked:
        if ct is not None:
            bound = bound + jnp.sum(jnp.abs(ct), axis=-1)
    return jnp.max(jnp.where(jnp.isfinite(bound), bound, 0), initial=0)
