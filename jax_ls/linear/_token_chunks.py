"""Σ w · loss of tokens whose logits are a matrix product, a chunk of tokens at a time.

The logits of a chunk live and die within it. Its gradients are taken beside its loss, in the forward pass: three
matrix products in all, where recomputing would take four. A chunk is every C-th token, not C neighbours: where tokens
are sharded over devices, each then works on its own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun  # pyright: ignore[reportPrivateImportUsage] - so in jax 0.12

from jax_ls import checks
from jax_ls.class_axis import multiply

Tree = Any


class Plan(NamedTuple):
    """What is static: `loss(logits, arguments, others)` -> (losses, auxiliary), each one a token."""

    loss: Callable[..., tuple[jax.Array, Tree]]
    chunks: int
    transposed: bool


class Tokens(NamedTuple):
    """What there is one of for each token. All arrays are (n, C, ...): chunk c is [:, c]."""

    hidden: Any
    weights: Any
    arguments: Tree


class Shared(NamedTuple):
    """What all tokens share: the kernel, and whatever else the loss reads."""

    kernel: Any
    others: Tree


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def total(plan: Plan, tokens: Tokens, shared: Shared) -> tuple[jax.Array, Tree]:
    """Σ w · loss, and the auxiliary values of each token, which have no derivative."""

    def step(index: jax.Array | int) -> tuple[Tree, Tree]:
        chunk = take(tokens, index)
        losses, aux = plan.loss(logits_of(plan, chunk, shared), chunk.arguments, shared.others)
        return jnp.sum(multiply(chunk.weights, losses)), aux

    return _sweep(step, plan.chunks)


def each(plan: Plan, tokens: Tokens, shared: Shared) -> tuple[jax.Array, Tree]:
    """w · loss of each token, and the auxiliary values; recomputed for the backward pass, in any mode."""
    kernel = shared.kernel.astype(checks.wide(shared.kernel.dtype))  # so that its cotangents add up in float32

    @jax.checkpoint
    def step(chunk: Tokens, kernel: jax.Array, others: Tree) -> tuple[jax.Array, Tree]:
        narrow = Shared(kernel.astype(shared.kernel.dtype), others)
        losses, aux = plan.loss(logits_of(plan, chunk, narrow), chunk.arguments, others)
        return multiply(chunk.weights, losses), aux

    chunks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    rows = jax.lax.map(lambda chunk: step(chunk, kernel, shared.others), chunks)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), rows)


def logits_of(plan: Plan, chunk: Tokens, shared: Shared) -> jax.Array:
    """(n, K), in float32 or wider."""
    return _product(_counted(chunk, chunk.hidden), shared.kernel, 1, 1 if plan.transposed else 0)


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=checks.wide(a.dtype))


def _counted(chunk: Tokens, x: jax.Array) -> jax.Array:
    """0 for the tokens of weight 0, whatever stands there."""
    return jnp.where((chunk.weights != 0).reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def take(tokens: Tokens, index: jax.Array | int) -> Tokens:
    """Chunk `index`."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False), tokens)


def _sweep(step: Callable[..., tuple[Tree, Tree]], chunks: int) -> tuple[Tree, Tree]:
    """Sums of what the steps return first; what they return second, each token's in its own place."""
    sums, rows = jax.eval_shape(step, 0)
    start = jax.tree.map(_zeros, sums), jax.tree.map(functools.partial(_zeros, chunks=chunks), rows)

    def body(carry: tuple[Tree, Tree], index: jax.Array) -> tuple[tuple[Tree, Tree], None]:
        sums, rows = step(index)
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=1)
        return (jax.tree.map(jnp.add, carry[0], sums), jax.tree.map(put, carry[1], rows)), None

    (sums, rows), _ = jax.lax.scan(body, start, jnp.arange(chunks))
    return sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


def _zeros(x: jax.ShapeDtypeStruct, chunks: int | None = None) -> jax.Array:
    shape = x.shape if chunks is None else (x.shape[0], chunks, *x.shape[1:])
    varying = tuple(x.manual_axis_type.varying) if x.manual_axis_type else ()
    zeros = jnp.zeros(shape, x.dtype)
    return jax.lax.pcast(zeros, varying, to="varying") if varying else zeros


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which `x` differs, inside `jax.shard_map`."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def varying(tree: Tree, names: frozenset[str]) -> Tree:
    """Arrays marked as differing over the mesh axes `names` too."""

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(names - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def split(tokens: Tokens, batch_rank: int, chunks: int) -> Tokens:
    """Arrays (*batch, ...) as (n, C, ...), with zeros at the end, of weight 0, where they are not divisible."""

    def one(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, *x.shape[batch_rank:])
        ragged = -x.shape[0] % chunks
        x = jnp.pad(x, [(0, ragged)] + [(0, 0)] * (x.ndim - 1)) if ragged else x
        return x.reshape(x.shape[0] // chunks, chunks, *x.shape[1:])

    return jax.tree.map(one, tokens)


def close(plan: Plan, tokens: Tokens, shared: Shared) -> tuple[Plan, Shared]:
    """What the loss closes over, made an argument: a custom derivative sees nothing else."""
    first = take(tokens, 0)
    example = logits_of(plan, first, shared), first.arguments, shared.others
    closed, shape = jax.make_jaxpr(plan.loss, return_shape=True)(*example)
    tree = jax.tree.structure(shape)

    def opened(logits: jax.Array, arguments: Tree, others: Tree) -> tuple[jax.Array, Tree]:
        loss = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, others[1]))
        return jax.tree.unflatten(tree, loss(*jax.tree.leaves((logits, arguments, others[0]))))

    return plan._replace(loss=opened), shared._replace(others=(shared.others, closed.consts))


def _total_fwd(plan: Plan, tokens: Any, shared: Any) -> tuple[tuple[jax.Array, Tree], Tree]:
    want_tokens, want_shared = jax.tree.map(lambda x: x.perturbed, (tokens, shared))
    tokens, shared = jax.tree.map(lambda x: x.value, (tokens, shared))
    _refuse_shared_closures(varying_axes(tokens.hidden), partition(shared.others, want_shared.others)[0])

    def step(index: jax.Array | int) -> tuple[Tree, Tree]:
        chunk = take(tokens, index)
        arguments, fixed_arguments = partition(chunk.arguments, want_tokens.arguments)
        others, fixed_others = partition(shared.others, want_shared.others)

        def loss(logits: jax.Array, arguments: Tree, others: Tree) -> tuple[jax.Array, Tree]:
            return plan.loss(logits, combine(arguments, fixed_arguments), combine(others, fixed_others))

        losses, pull, aux = jax.vjp(loss, logits_of(plan, chunk, shared), arguments, others, has_aux=True)
        d_logits, d_arguments, d_others = pull(chunk.weights.astype(losses.dtype))
        d_logits = _counted(chunk, d_logits).astype(chunk.hidden.dtype)
        d_hidden = d_kernel = None
        if want_tokens.hidden:
            d_hidden = _product(d_logits, shared.kernel, 1, 0 if plan.transposed else 1).astype(d_logits.dtype)
        if want_shared.kernel:
            hidden = _counted(chunk, chunk.hidden)
            left, right = (d_logits, hidden) if plan.transposed else (hidden, d_logits)
            d_kernel = _product(left, right, 0, 0)
        d_weights = _counted(chunk, losses) if want_tokens.weights else None
        d_arguments = jax.tree.map(functools.partial(_counted, chunk), d_arguments)
        sums = jnp.sum(multiply(chunk.weights, losses)), d_kernel, d_others
        return sums, (aux, Tokens(d_hidden, d_weights, d_arguments))

    (value, d_kernel, d_others), (aux, d_tokens) = _sweep(step, plan.chunks)
    d_tokens = jax.tree.map(lambda x: x.reshape(-1, plan.chunks, *x.shape[1:]), d_tokens)
    # Arrays of no size carry the dtypes that the cotangents must have.
    return (value, aux), (d_tokens, Shared(d_kernel, d_others), shared.kernel[:0, :0])


def _refuse_shared_closures(over_tokens: frozenset[str], others: Tree) -> None:
    """Their gradient would be summed over devices in every chunk, and then weighed by one device's cotangent."""
    for x in jax.tree.leaves(others):
        if missing := over_tokens - varying_axes(x):
            names = tuple(sorted(missing))
            raise TypeError(
                f"loss: expected the arrays it closes over, if differentiated, to be marked as differing over the "
                f'tokens\' mesh axes, x = jax.lax.pcast(x, {names}, to="varying"), got {checks.describe(x)} without'
            )


def _total_bwd(plan: Plan, residuals: Tree, cotangents: tuple[Any, Tree]) -> tuple[Tokens, Shared]:
    del plan
    d_tokens, d_shared, kernel = residuals
    ct, ct_aux = cotangents
    if not all(isinstance(x, SymbolicZero) for x in jax.tree.leaves(ct_aux, is_leaf=_is_symbolic_zero)):
        raise TypeError('aux: the auxiliary values of a chunked loss have no derivative; reduction="none" has one')
    scale = jnp.zeros(()) if isinstance(ct, SymbolicZero) else ct
    d_tokens, d_shared = jax.tree.map(lambda x: (x.astype(scale.dtype) * scale).astype(x.dtype), (d_tokens, d_shared))
    d_kernel = None if d_shared.kernel is None else d_shared.kernel.astype(kernel.dtype)
    return d_tokens, Shared(d_kernel, d_shared.others)


def _is_symbolic_zero(x: object) -> bool:
    return isinstance(x, SymbolicZero)


def partition(tree: Tree, wanted: Tree) -> tuple[Tree, Tree]:
    """Two trees of the same structure: what is wanted, and the rest; None where the other has it."""
    kept = jax.tree.map(lambda x, w: x if w else None, tree, wanted)
    return kept, jax.tree.map(lambda x, w: None if w else x, tree, wanted)


def combine(left: Tree, right: Tree) -> Tree:
    """What `partition` took apart."""
    return jax.tree.map(lambda x, y: y if x is None else x, left, right, is_leaf=lambda x: x is None)


total.defvjp(_total_fwd, _total_bwd, symbolic_zeros=True)
