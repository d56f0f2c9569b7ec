"""Any loss of logits as a loss of hidden states and a kernel, by either plan, on one device or a mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_ls import checks, fences
from jax_ls.algebra import Target
from jax_ls.class_axis import AxisName, multiply, with_stand_ins
from jax_ls.linear import _class_blocks as classes
from jax_ls.linear import _token_chunks as chunks
from jax_ls.linear._arguments import (
    as_accumulate,
    as_arrays,
    as_layer,
    as_softcap,
    as_weights,
    at_least,
    check_product,
    per_batch,
    per_token,
)
from jax_ls.linear._block_logits import on_blocks
from jax_ls.linear._meshes import Layout
from jax_ls.linear.plan import block_sizes, chunk_count, symbolic_chunk_size
from jax_ls.reductions import Reduction, normalizer, sum_over_devices

__all__ = ["Options", "by_class_blocks", "by_token_chunks", "chunked_loss"]


def chunked_loss(
    loss: Callable[..., Any],
    *,
    has_aux: bool = False,
    reduction: Reduction = "mean",
    plan: Literal["tokens", "classes"] = "tokens",
    chunk_size: int | None = None,
    block_size: int | None = None,
    accumulate: DTypeLike | None = None,
    batch_axis_name: AxisName | None = None,
) -> Callable[..., Any]:
    """Returns a loss of hidden states and a kernel from a loss of logits, whose logits are never all held.

    With `plan="tokens"` the loss sees all classes of a chunk of tokens, as an array: any loss will do. With
    `plan="classes"` it is given, in place of logits, an object with the sums over classes that a sweep over blocks of
    classes can take, named as in `jax_ls.Logits`: `lse`, `log_total`, `log_prob(y)`, `pick(y)`, `dot(q)`, `mass(q)`,
    `mean()`.

    Args:
      loss: a function (logits (n, K), *arguments) -> losses (n,); with `has_aux`, -> (losses, auxiliary). In class
        blocks, (sums over classes, *arguments) -> losses (*batch,).
      has_aux: also return the auxiliary values, arrays with one entry a token; token chunks give them no derivative.
      reduction: as in `jax_ls.reduce`. In token chunks all but "none" take the gradients in the forward pass: three
        matrix products, reverse mode. "none" recomputes: four, any mode.
      plan, chunk_size, block_size, accumulate: as in `linear_cross_entropy`, but for "auto".
      batch_axis_name: mesh axes that tokens are split over, inside `jax.shard_map`, to reduce over.

    Returns:
      f(hidden (*batch, D), kernel (D, K), *arguments, bias=None, softcap=None, weights=None, denominator=None,
      transposed=False) -> loss, or (loss, auxiliary). Arguments are arrays (*batch, ...), targets, or trees of them.
      What `loss` closes over is shared by all tokens, and differentiated too. A token of weight 0 is absent, be it
      NaN: not even the derivative in its weight sees its loss. On an `Explicit` mesh that splits the tokens, each
      device takes its own. Without an outer `jit`, a loss that is defined anew for each call is compiled anew.

    Raises:
      AssertionError, TypeError: `loss` returns anything but one loss, and one auxiliary value, per token; or it asks
        class blocks for more than those sums.
      ValueError: token chunks where an explicit mesh splits the classes, of which `loss` would see a part.

    Example:
      >>> nll = lambda z, y: (smoothed_cross_entropy(z, y, 0.0), {"hits": z.argmax(-1) == y})
      >>> operands = jnp.eye(4, 8), 9 * jnp.eye(8, 16), jnp.arange(4)
      >>> loss, aux = chunked_loss(nll, has_aux=True)(*operands)
      >>> nll = lambda z, y: (-z.log_prob(y), {"lse": z.lse})
      >>> same, aux = chunked_loss(nll, has_aux=True, plan="classes")(*operands)
      >>> print(f"{loss:.4f} {same:.4f} {aux['lse'][0]:.4f}")
      0.0018 0.0018 9.0018
    """
    checks.check_option("plan", plan, ("tokens", "classes"))
    adds_up_in = as_accumulate(accumulate)
    for name, size in (("chunk_size", chunk_size), ("block_size", block_size)):
        if size is not None:
            checks.check_size(name, size)

    def chunked(
        hidden: ArrayLike,
        kernel: ArrayLike,
        *arguments: Any,
        bias: ArrayLike | None = None,
        softcap: float | None = None,
        weights: ArrayLike | None = None,
        denominator: ArrayLike | None = None,
        transposed: bool = False,
    ) -> Any:
        h, k = as_layer(hidden, kernel)
        layout = Layout.of(h, k, transposed, None, None, None, None, None)
        check_product(h, k, transposed, layout)
        if layout.mesh is not None and layout.classes and plan == "tokens":
            raise ValueError(
                f"kernel: expected all classes on every device, for the loss to see them, got {layout.kernel}: "
                "jax.sharding.reshard(kernel, jax.P()), or jax.shard_map and a loss that knows class_axis_name"
            )
        batch = h.shape[:-1]
        arguments = as_arrays(arguments)
        per_token(arguments, batch)
        operands = {
            "hidden": h,
            "kernel": k,
            "arguments": arguments,
            "bias": None if bias is None else checks.as_bias("bias", bias, k.shape[0 if transposed else 1]),
            "weights": as_weights(weights, h),
            "denominator": denominator,
        }
        normalizer(jnp.ones(()), reduction, denominator=denominator)
        axis = layout.batch_axis_name if layout.mesh is not None else batch_axis_name
        options = Options(
            plan, has_aux, reduction, chunk_size, block_size, adds_up_in, as_softcap(softcap), transposed, axis, layout
        )
        return _chunked(loss, options, operands)

    return chunked


@dataclass(frozen=True)
class Options:
    """The static options of a loss of an output layer."""

    plan: str
    has_aux: bool
    reduction: Reduction
    chunk_size: int | None
    block_size: int | None
    accumulate: Any
    softcap: float | None
    transposed: bool
    batch_axis_name: AxisName | None
    layout: Layout

    @property
    def class_axis(self) -> int:
        return 0 if self.transposed else 1


@functools.partial(jax.jit, static_argnums=(0, 1))
def _chunked(loss: Callable[..., Any], options: Options, operands: dict[str, Any]) -> Any:
    """Compiled once for each loss, options and shapes."""
    losses = options.layout.batch if options.reduction == "none" else PartitionSpec()
    out_specs = (losses, options.layout.batch) if options.has_aux else losses
    run = by_class_blocks if options.plan == "classes" else by_token_chunks
    return options.layout.local(functools.partial(run, loss, options), operands, out_specs)


def by_token_chunks(loss: Callable[..., Any], options: Options, operands: dict[str, Any]) -> Any:
    """Returns the loss of this device's tokens, reduced over all devices; with `has_aux`, the auxiliary values too.

    `operands` hold hidden, kernel, bias, arguments, weights and denominator.
    """
    h, k, bias, arguments = (operands[name] for name in ("hidden", "kernel", "bias", "arguments"))
    axis, gathering, batch = options.batch_axis_name, options.layout.gathering, h.shape[:-1]
    num_classes = k.shape[options.class_axis] * gathering.parts(options.class_axis)
    each = jnp.ones(batch, checks.wide(h.dtype))
    w = each if operands["weights"] is None else operands["weights"]
    count = normalizer(w, options.reduction, denominator=operands["denominator"], batch_axis_name=axis)
    own, common = chunks.partition(arguments, per_token(arguments, batch))
    # Marked so, gradients are summed over devices once, not in every chunk.
    over_tokens, over_classes = fences.varying_axes(h), fences.varying_axes(k)
    others = (bias, common)
    h = fences.varying(h, over_classes)
    k, others = fences.varying((k, others), over_tokens)
    counts_late = options.reduction == "none"

    def on_logits(logits: Array, own: Any, others: Any) -> Any:
        bias, common = others
        logits = logits if bias is None else logits + gathering.own_classes(bias)[None].astype(logits.dtype)
        if options.softcap is not None:
            logits = options.softcap * jnp.tanh(logits / options.softcap)
        if not batch:
            # Shapes would not tell what is a token's from what is shared: the loss sees the one token as it is.
            logits, own = jax.tree.map(lambda x: x[0], (logits, own))
        out = loss(logits, *gathering.met(chunks.combine(own, common)))
        losses, aux = _checked_output(out, options.has_aux, logits.shape[:-1])
        losses, aux = jax.tree.map(gathering.own_tokens, (losses, aux))
        return (losses, aux) if batch else jax.tree.map(lambda x: x[None], (losses, aux))

    count_of_tokens = math.prod(batch)
    parts = chunk_count(count_of_tokens, h.shape[-1], num_classes, options.chunk_size, gathering.visitors)
    size = None if isinstance(count_of_tokens, int) else symbolic_chunk_size(h.shape[-1], options.chunk_size)
    tokens = fences.varying(chunks.Tokens(h, w if counts_late else w / count, own), over_tokens)
    tokens = chunks.split(tokens, len(batch), parts, size)
    plan = chunks.Plan(
        on_logits, parts, options.transposed, gathering, at_least(options.accumulate, k.dtype), over_tokens
    )
    plan, shared = chunks.close(plan, tokens, chunks.Shared(k, others))
    if options.reduction == "none":
        value, aux = chunks.each(plan, tokens, shared)
        value = per_batch(value, batch)
    else:
        value, aux = cast(tuple[Array, Any], chunks.total(plan, tokens, shared))
        value = sum_over_devices(value, axis)
    return (value, jax.tree.map(lambda x: per_batch(x, batch), aux)) if options.has_aux else value


def by_class_blocks(loss: Callable[..., Any], options: Options, operands: dict[str, Any]) -> Any:
    """Returns what `by_token_chunks` returns. `operands` may hold class_where and class_weights too."""
    h, k, bias, weights = (operands[name] for name in ("hidden", "kernel", "bias", "weights"))
    arguments, batch, layout = operands["arguments"], h.shape[:-1], options.layout
    counted = None if weights is None else weights != 0
    if counted is not None:
        h = jnp.where(counted[..., None], h, 0)
        arguments = jax.tree.map(
            lambda x: x.counted(counted) if isinstance(x, Target) else with_stand_ins(x, counted),
            arguments,
            is_leaf=lambda x: isinstance(x, Target),
        )
    num_classes, parts = k.shape[options.class_axis], layout.gathering.parts(options.class_axis)
    size, tpu_size = block_sizes(h.shape[-1], num_classes, parts, options.block_size)
    blocks = classes.Blocks(
        size,
        num_classes,
        parts,
        options.transposed,
        options.softcap,
        layout.gathering,
        at_least(options.accumulate, h.dtype),
        tpu_size,
    )
    out = on_blocks(
        lambda z, arguments: loss(z, *arguments),
        blocks,
        classes.Layer(h.reshape(-1, h.shape[-1]), k, bias, operands.get("class_where")),
        {"arguments": arguments},
        batch=batch,
        rows=counted,
        class_weights=operands.get("class_weights"),
        class_axis_name=layout.class_axis_name,
        any_mode=options.reduction == "none",
    )
    losses, aux = _checked_output(out, options.has_aux, batch)
    losses = losses if counted is None else jnp.where(counted, losses, 0)
    axis = options.batch_axis_name
    w = jnp.ones_like(losses) if weights is None else weights
    count = normalizer(w, options.reduction, denominator=operands["denominator"], batch_axis_name=axis)
    value = multiply(w, losses)
    if options.reduction != "none":
        value = sum_over_devices(jnp.sum(value), axis) / count
    return (value, aux) if options.has_aux else value


def _checked_output(out: Any, has_aux: bool, batch: tuple[int, ...]) -> tuple[Array, Any]:
    """The losses and auxiliary values of a chunk, one of each per token."""
    each = f"{batch}, one per token of a chunk"
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"loss: expected (losses, auxiliary values) with has_aux, got {type(out).__name__}")
    losses, aux = out if has_aux else (out, None)
    if isinstance(losses, tuple | list | dict):
        raise TypeError(f"loss: expected losses {each}, got {type(losses).__name__}: has_aux=True?")
    losses = checks.as_array("loss", losses, f"losses {each}")
    checks.assert_shape("loss", losses, [batch], f"losses {each}")
    checks.assert_kind("loss", losses, float, f"real numbers {each}")

    def checked(path: Any, x: Any) -> Array:
        name = "loss, auxiliary" + jax.tree_util.keystr(path)
        x = checks.as_array(name, x, f"an array {batch} + (...), one entry per token of a chunk")
        shape = batch + x.shape[len(batch) :]
        checks.assert_shape(name, x, [shape], f"{batch} + (...), one entry per token of a chunk")
        return x

    return losses, jax.tree_util.tree_map_with_path(checked, aux)
