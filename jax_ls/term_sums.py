"""Sums over the classes of any elementwise function of the logits: one more pass over them.

Their derivatives are rules of `with_jvp`: what a backward pass would have to sum, the forward pass sums already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jax_ls import fences
from jax_ls.class_axis import align
from jax_ls.row_sums import remembered
from jax_ls.tangents import along, with_jvp

__all__ = ["term_sums"]

Arrays = tuple[Array, ...]
Term = Callable[..., Any]


def term_sums(term: Term, z: Array, top: Array | None, rows: Sequence[Array], exists: Array | None) -> Any:
    """Returns Σ_k term(z_k − top, *rows) over the classes of this device that exist.

    `term` is elementwise, gets numbers (*batch,) of the row as (*batch, 1), and may close over arrays. It may return
    a tree of arrays: then the result is that tree of sums.
    """
    # Traced once: what it is given later must differ over the same mesh axes.
    z, *rows = fences.vary_alike(z, *rows)
    shown = [x[..., None] for x in rows]
    tree = jax.tree.structure(jax.eval_shape(term, z, *shown))
    term, closed_over = jax.closure_convert(term, z, *shown)
    exists = exists if exists is None else align(exists, z.ndim)
    sums = _term_sums(term, tree.num_leaves, z, top, exists, tuple(rows), tuple(closed_over))
    return jax.tree.unflatten(tree, sums)


@functools.partial(with_jvp, static=2)
def _term_sums(
    term: Term, count: int, z: Array, top: Array | None, exists: Array | None, rows: Arrays, closed_over: Arrays
) -> Arrays:
    return _sums_of_terms(term, [(part, None) for part in range(count)], z, top, exists, rows, closed_over)


@_term_sums.defjvp
def _term_sums_jvp(term: Term, count: int, primals: Any, tangents: Any) -> Any:
    z, top, exists, rows, closed_over = primals
    dz, _, _, drows, dclosed = tangents
    moving = [i for i, dx in enumerate(drows) if not isinstance(dx, SymbolicZero)]
    # Σ_k ∂term/∂row comes out of the pass that takes the sums. A backward pass that took it would read the logits once
    # more.
    wanted = [(part, of) for of in (None, *moving) for part in range(count)]
    found = dict(zip(wanted, map(remembered, _sums_of_terms(term, wanted, *primals)), strict=True))
    sums = tuple(found[part, None] for part in range(count))
    derivatives = [
        sum((found[part, i] * drows[i] for i in moving), jnp.zeros_like(total)) for part, total in enumerate(sums)
    ]

    def terms(z: Array, closed_over: Arrays) -> Arrays:
        return tuple(_terms(term, part, None, z, top, exists, rows, closed_over) for part in range(count))

    if not all(isinstance(x, SymbolicZero) for x in (dz, *dclosed)):
        dterms = along(terms, (z, closed_over), (dz, dclosed))
        derivatives = [x + jnp.sum(dx, axis=-1) for x, dx in zip(derivatives, dterms, strict=True)]
    return sums, tuple(derivatives)


def _terms(
    term: Term,
    part: int,
    slope_of: int | None,
    z: Array,
    top: Array | None,
    exists: Array | None,
    rows: Arrays,
    closed_over: Arrays,
    one: Array | None = None,
) -> Array:
    """Returns a part of the terms, (*batch, K), 0 where no class exists; or its derivative in one of the rows.

    `one` is 1 for each row. Made of a constant, it would be written out for all classes by XLA on CPU.
    """
    d = z if top is None else z - top[..., None]
    # A class that does not exist gets what the likeliest has: in the domain of every term, whose slopes stay finite.
    d = d if exists is None else jnp.where(exists, d, 0)
    shown = [x[..., None] for x in rows]

    def of_row(x: Array | None) -> Array:
        given = shown if slope_of is None else [*shown[:slope_of], x, *shown[slope_of + 1 :]]
        return jax.tree.leaves(term(d, *given, *closed_over))[part]

    if slope_of is None:
        terms = of_row(None)
    else:
        step = jnp.ones_like(shown[slope_of]) if one is None else one[..., None]
        terms = jax.jvp(of_row, (shown[slope_of],), (step,))[1]
    terms = fences.vary_alike(jnp.broadcast_to(terms, z.shape), z)[0]
    return terms if exists is None else jnp.where(exists, terms, 0)


def _sums_of_terms(
    term: Term,
    wanted: Sequence[tuple[int, int | None]],
    z: Array,
    top: Array | None,
    exists: Array | None,
    rows: Arrays,
    closed_over: Arrays,
) -> Arrays:
    """Returns the sums of parts of the terms, or of their derivatives in a row."""

    def in_turn(z: Array, top: Array | None, exists: Array | None, rows: Arrays, closed_over: Arrays) -> Arrays:
        sums: list[Array] = []
        for part, slope_of in wanted:
            # Numbers of the row are no other sum's: what two sums spread over all classes, XLA writes out for both.
            # Inside `jax.shard_map` those that differ over fewer mesh axes stay as they were traced.
            axes = fences.varying_axes(z)
            of_rows = {
                i: x for i, x in enumerate(closed_over) if x.shape[-1:] == (1,) and fences.varying_axes(x) == axes
            }
            if sums:
                one = jnp.ones_like(sums[-1])
                own_top, own, of_rows, one = fences.after(sums[-1], (top, rows, of_rows, one))
            else:
                (own_top, own), one = jax.tree.map(lambda x: fences.unshared(x)[0], (top, rows)), None
            also = tuple(of_rows.get(i, x) for i, x in enumerate(closed_over))
            terms = _terms(term, part, slope_of, z, own_top, exists, own, also, one)
            sums.append(fences.end_of_sum(jnp.sum(terms, axis=-1)))
        return tuple(sums)

    def together(*operands: Any) -> Arrays:
        arrays = tuple(_terms(term, part, slope_of, *operands) for part, slope_of in wanted)
        zeros = tuple(jnp.zeros((), x.dtype) for x in arrays)
        return tuple(jax.lax.reduce(arrays, zeros, _add, (z.ndim - 1,)))

    return jax.lax.platform_dependent(
        z, top, exists, rows, closed_over, cpu=in_turn, cuda=in_turn, rocm=in_turn, default=together
    )


def _add(left: Arrays, right: Arrays) -> Arrays:
    return tuple(x + y for x, y in zip(left, right, strict=True))
