"""The plan for many tokens: Σ w · loss of tokens whose logits are a matrix product, a chunk of tokens at a time.

The logits of a chunk live and die within it. Its gradients are taken beside its loss, in the forward pass: three
matrix products in all, where recomputing would take four. A chunk is every C-th token, not C neighbours: where tokens
are split over devices, each then works on its own.

A kernel that is split over the tokens' devices (FSDP) is gathered once, before the loop, and its gradient is summed
over the devices once, after the loop. Or the tokens of a chunk are gathered, and the kernel stays where it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun  # pyright: ignore[reportPrivateImportUsage] - so in jax 0.12

from jax_ls import checks, fences
from jax_ls.class_axis import multiply
from jax_ls.linear._gathering import Gathering
from jax_ls.linear._products import narrowed, product, stored_dtype, unit_of

Tree = Any


class Plan(NamedTuple):
    """The static part. `loss(logits, arguments, others)` returns (losses, auxiliary values), one of each per token."""

    loss: Callable[..., tuple[Array, Tree]]
    chunks: int
    transposed: bool
    gathering: Gathering = Gathering()
    accumulate: Any = jnp.float32
    token_axes: frozenset[str] = frozenset()


class Tokens(NamedTuple):
    """Arrays with one entry per token, all of them (n, C, ...): chunk c is [:, c]."""

    hidden: Any
    weights: Any
    arguments: Tree


class Shared(NamedTuple):
    """Arrays that all tokens share: the kernel, and whatever else the loss reads."""

    kernel: Any
    others: Tree


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def total(plan: Plan, tokens: Tokens, shared: Shared) -> tuple[jax.Array, Tree]:
    """Returns Σ w · loss, and the auxiliary values of each token, which have no derivative."""
    shared = shared._replace(kernel=plan.gathering.whole(shared.kernel))

    def step(index: jax.Array | int) -> tuple[Tree, Tree]:
        chunk = take(tokens, index)
        logits = logits_of(plan, hidden_of(plan, chunk), shared.kernel)
        losses, aux = plan.loss(logits, chunk.arguments, shared.others)
        return jnp.sum(multiply(chunk.weights, losses)), aux

    return _sweep(step, plan.chunks)


def each(plan: Plan, tokens: Tokens, shared: Shared) -> tuple[jax.Array, Tree]:
    """Returns w · loss of each token, and the auxiliary values; recomputed for the backward pass, in any mode."""
    shared = shared._replace(kernel=plan.gathering.whole(shared.kernel))
    kernel = shared.kernel.astype(checks.wide(shared.kernel.dtype))  # so that its cotangents add up in float32

    @jax.checkpoint
    def step(chunk: Tokens, kernel: jax.Array, others: Tree) -> tuple[jax.Array, Tree]:
        logits = logits_of(plan, hidden_of(plan, chunk), kernel.astype(shared.kernel.dtype))
        losses, aux = plan.loss(logits, chunk.arguments, others)
        return multiply(chunk.weights, losses), aux

    chunks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    rows = jax.lax.map(lambda chunk: step(chunk, kernel, shared.others), chunks)
    return jax.tree.map(lambda x: _in_order(jnp.moveaxis(x, 0, 1)), rows)


def hidden_of(plan: Plan, chunk: Tokens) -> jax.Array:
    """Returns the hidden states of all tokens that this device sees, 0 for those of weight 0."""
    return plan.gathering.all_tokens(_counted(chunk, chunk.hidden))


def logits_of(plan: Plan, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the logits (n, K) of hidden states (n, D), in float32 or wider."""
    return product(hidden, kernel, 1, 1 if plan.transposed else 0)


def _counted(chunk: Tokens, x: jax.Array) -> jax.Array:
    """Returns `x` with 0 for the tokens of weight 0, whatever stands there."""
    return _only(chunk.weights != 0, x)


def _only(counts: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x (n, ...) with 0 for the tokens that do not count."""
    return jnp.where(counts.reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def take(tokens: Tokens, index: jax.Array | int) -> Tokens:
    """Returns chunk `index`."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False), tokens)


def _sweep(step: Callable[..., tuple[Tree, Tree]], chunks: int) -> tuple[Tree, Tree]:
    """Scans `step` over the chunks. Adds up the first tree that it returns and puts the second back in token order."""
    sums, rows = jax.eval_shape(step, 0)
    start = jax.tree.map(_zeros, sums), jax.tree.map(functools.partial(_zeros, chunks=chunks), rows)

    def body(carry: tuple[Tree, Tree], index: jax.Array) -> tuple[tuple[Tree, Tree], None]:
        sums, rows = step(index)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=1)
        return (jax.tree.map(jnp.add, carry[0], sums), jax.tree.map(put, carry[1], rows)), None

    (sums, rows), _ = jax.lax.scan(body, start, jnp.arange(chunks))
    return sums, jax.tree.map(_in_order, rows)


def _in_order(x: jax.Array) -> jax.Array:
    """Returns (n, C, ...) as (n · C, ...)."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _zeros(x: jax.ShapeDtypeStruct, chunks: int | None = None) -> jax.Array:
    shape = x.shape if chunks is None else (x.shape[0], chunks, *x.shape[1:])
    varying = tuple(x.manual_axis_type.varying) if x.manual_axis_type else ()
    zeros = jnp.zeros(shape, x.dtype)
    return jax.lax.pcast(zeros, varying, to="varying") if varying else zeros


def split(tokens: Tokens, batch_rank: int, chunks: int, size: int | None = None) -> Tokens:
    """Returns arrays (*batch, ...) as (n, C, ...); the last token, at weight 0, fills the last chunk.

    A token of zeros would not do: where there is no class 0, the slope of its loss would be NaN. `size` is n where
    the number of tokens is symbolic.
    """

    def one(x: jax.Array) -> jax.Array:
        x = x.reshape(math.prod(x.shape[:batch_rank]), *x.shape[batch_rank:])
        ragged = -x.shape[0] % chunks if size is None else chunks * size - x.shape[0]
        if size is not None or ragged:
            x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (ragged, *x.shape[1:]))])
        return x.reshape(x.shape[0] // chunks if size is None else size, chunks, *x.shape[1:])

    filled = jax.tree.map(one, tokens)
    count = math.prod(tokens.weights.shape)
    place = jnp.arange(filled.weights.size, dtype=jnp.int32).reshape(filled.weights.shape)
    return filled._replace(weights=jnp.where(place < count, filled.weights, 0))


def close(plan: Plan, tokens: Tokens, shared: Shared) -> tuple[Plan, Shared]:
    """Returns the plan with the arrays that the loss closes over as arguments: a custom derivative sees no others."""
    first = take(tokens, 0)
    whole = jax.eval_shape(plan.gathering.whole, shared.kernel)
    logits = jax.eval_shape(lambda chunk, kernel: logits_of(plan, hidden_of(plan, chunk), kernel), first, whole)
    example = logits, first.arguments, shared.others
    closed, shape = jax.make_jaxpr(plan.loss, return_shape=True)(*example)
    tree = jax.tree.structure(shape)

    def opened(logits: jax.Array, arguments: Tree, others: Tree) -> tuple[jax.Array, Tree]:
        loss = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, others[1]))
        return jax.tree.unflatten(tree, loss(*jax.tree.leaves((logits, arguments, others[0]))))

    return plan._replace(loss=opened), shared._replace(others=(shared.others, closed.consts))


def _total_fwd(plan: Plan, tokens: Any, shared: Any) -> tuple[tuple[jax.Array, Tree], Tree]:
    want_tokens, want_shared = jax.tree.map(lambda x: x.perturbed, (tokens, shared))
    tokens, shared = jax.tree.map(lambda x: x.value, (tokens, shared))
    _refuse_shared_closures(plan.token_axes, partition(shared.others, want_shared.others)[0])
    kernel = plan.gathering.whole(shared.kernel)
    dtype = stored_dtype(tokens.hidden.dtype)

    def step(index: jax.Array | int) -> tuple[Tree, Tree]:
        chunk = take(tokens, index)
        arguments, fixed_arguments = partition(chunk.arguments, want_tokens.arguments)
        others, fixed_others = partition(shared.others, want_shared.others)

        def loss(logits: jax.Array, arguments: Tree, others: Tree) -> tuple[jax.Array, Tree]:
            return plan.loss(logits, combine(arguments, fixed_arguments), combine(others, fixed_others))

        hidden = hidden_of(plan, chunk)
        losses, pull, aux = jax.vjp(loss, logits_of(plan, hidden, kernel), arguments, others, has_aux=True)
        d_logits, d_arguments, d_others = pull(chunk.weights.astype(losses.dtype))
        d_logits = _only(plan.gathering.all_tokens(chunk.weights != 0), d_logits)
        unit = unit_of(jnp.max(jnp.abs(d_logits), initial=0), dtype)
        d_logits = narrowed(d_logits, unit, dtype)
        d_hidden = d_kernel = None
        if want_tokens.hidden:
            d_hidden = _times(product(d_logits, kernel, 1, 0 if plan.transposed else 1), unit)
            d_hidden = plan.gathering.summed_for_own_tokens(d_hidden, dtype)
            units = unit_of(jnp.max(jnp.abs(d_hidden), axis=-1, keepdims=True, initial=0), dtype)
            d_hidden = narrowed(d_hidden, units, dtype), units
        if want_shared.kernel:
            left, right = (d_logits, hidden) if plan.transposed else (hidden, d_logits)
            d_kernel = _times(product(left, right, 0, 0), unit).astype(plan.accumulate)
        d_weights = _counted(chunk, losses) if want_tokens.weights else None
        d_arguments = jax.tree.map(functools.partial(_counted, chunk), d_arguments)
        sums = jnp.sum(multiply(chunk.weights, losses)), d_kernel, d_others
        return sums, (aux, Tokens(d_hidden, d_weights, d_arguments))

    (value, d_kernel, d_others), (aux, d_tokens) = _sweep(step, plan.chunks)
    d_tokens = jax.tree.map(lambda x: x.reshape(-1, plan.chunks, *x.shape[1:]), d_tokens)
    # Arrays of no size carry the dtypes that the cotangents must have.
    return (value, aux), (d_tokens, Shared(d_kernel, d_others), tokens.hidden[:0, :0], shared.kernel[:0, :0])


def _times(x: Array, unit: Array | None) -> Array:
    return x if unit is None else x * unit


def _refuse_shared_closures(token_axes: frozenset[str], others: Tree) -> None:
    """Their gradient would be summed over devices in every chunk, and then weighed by one device's cotangent."""
    for x in jax.tree.leaves(others):
        if missing := token_axes - fences.varying_axes(x):
            names = tuple(sorted(missing))
            raise TypeError(
                f"loss: expected the arrays it closes over, if differentiated, to be marked as differing over the "
                f'tokens\' mesh axes, x = jax.lax.pcast(x, {names}, to="varying"), got {checks.describe(x)} without'
            )


def _total_bwd(plan: Plan, residuals: Tree, cotangents: tuple[Any, Tree]) -> tuple[Tokens, Shared]:
    d_tokens, d_shared, hidden, kernel = residuals
    ct, ct_aux = cotangents
    if not all(isinstance(x, SymbolicZero) for x in jax.tree.leaves(ct_aux, is_leaf=_is_symbolic_zero)):
        raise TypeError('aux: the auxiliary values of a chunked loss have no derivative; reduction="none" has one')
    scale = jnp.zeros(()) if isinstance(ct, SymbolicZero) else ct

    def scaled(x: Array) -> Array:
        return x.astype(checks.wide(x.dtype)) * scale.astype(checks.wide(x.dtype))

    d_hidden = d_kernel = None
    if d_tokens.hidden is not None:
        d_hidden, units = d_tokens.hidden
        d_hidden = _times(scaled(d_hidden), units).astype(hidden.dtype)
    if d_shared.kernel is not None:
        d_kernel = plan.gathering.shard(scaled(d_shared.kernel), kernel.dtype)
    d_tokens, d_shared = jax.tree.map(
        lambda x: scaled(x).astype(x.dtype), (d_tokens._replace(hidden=None), d_shared._replace(kernel=None))
    )
    return d_tokens._replace(hidden=d_hidden), d_shared._replace(kernel=d_kernel)


def _is_symbolic_zero(x: object) -> bool:
    return isinstance(x, SymbolicZero)


def partition(tree: Tree, wanted: Tree) -> tuple[Tree, Tree]:
    """Returns two trees of the same structure: the wanted leaves, and the others; None where the other tree has one."""
    kept = jax.tree.map(lambda x, w: x if w else None, tree, wanted)
    return kept, jax.tree.map(lambda x, w: None if w else x, tree, wanted)


def combine(left: Tree, right: Tree) -> Tree:
    """Returns the tree that `partition` took apart."""
    return jax.tree.map(lambda x, y: y if x is None else x, left, right, is_leaf=lambda x: x is None)


total.defvjp(_total_fwd, _total_bwd, symbolic_zeros=True)
