"""(hidden, kernel, q) -> loss, without ever holding the logits. How: see `jax_ls.linear._token_chunks`."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_ls import checks
from jax_ls.algebra import Target
from jax_ls.class_axis import AxisName
from jax_ls.linear import _token_chunks as chunks
from jax_ls.losses import cross_entropy
from jax_ls.reductions import Reduction, normalizer, sum_over_devices
from jax_ls.smoothing import Prior, Spread, smooth
from jax_ls.targets import as_target

__all__ = ["chunked_loss", "linear_cross_entropy"]

Array = jax.typing.ArrayLike


def chunked_loss(
    loss: Callable[..., Any],
    *,
    has_aux: bool = False,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    batch_axis_name: AxisName | None = None,
) -> Callable[..., Any]:
    """Any loss of logits as a loss of what the logits are made from, a chunk of tokens at a time.

    Args:
      loss: a function (logits (n, K), *arguments) -> losses (n,); with `has_aux`, -> (losses, auxiliary).
      has_aux: also return the auxiliary values, arrays with one entry a token; they have no derivative.
      reduction: as in `jax_ls.reduce`. All but "none" take the gradients in the forward pass: three matrix products,
        reverse mode. "none" recomputes: four, any mode.
      chunk_size: tokens whose logits are held at a time; chosen from the shapes if None.
      batch_axis_name: mesh axes that tokens are split over, inside `jax.shard_map`, to reduce over.

    Returns:
      f(hidden (*batch, D), kernel (D, K), *arguments, bias=None, softcap=None, weights=None, denominator=None,
      transposed=False) -> loss, or (loss, auxiliary). Arguments are arrays (*batch, ...), targets, or trees of them.
      What `loss` closes over is shared by all tokens, and differentiated too. A token of weight 0 is absent, be it
      NaN: not even the derivative in its weight sees its loss.

    Raises:
      AssertionError, TypeError, ValueError: by name, when f is called.

    Example:
      >>> hits = lambda z, y: (smoothed_cross_entropy(z, y), {"hits": z.argmax(-1) == y})
      >>> f = chunked_loss(hits, has_aux=True)
      >>> value, aux = f(jnp.eye(4, 8), 9 * jnp.eye(8, 16), jnp.arange(4))
      >>> int(aux["hits"].sum())
      4
    """

    def chunked(
        hidden: Array,
        kernel: Array,
        *arguments: Any,
        bias: Array | None = None,
        softcap: float | None = None,
        weights: Array | None = None,
        denominator: Array | None = None,
        transposed: bool = False,
    ) -> Any:
        h, k = _checked(hidden, kernel, transposed)
        if softcap is not None:
            checks.check_values("softcap", softcap, lambda c: (c > 0) & (c < math.inf), "a finite number > 0")
        batch, classes = h.shape[:-1], k.shape[0 if transposed else 1]
        each = jnp.ones(batch, checks.wide(h.dtype))
        w = each if weights is None else checks.as_broadcast("weights", weights, each)
        count = normalizer(w, reduction, denominator=denominator, batch_axis_name=batch_axis_name)
        # A loss scale reaches float16 gradients after the forward pass, so they are not divided before.
        early = count if h.dtype != jnp.float16 else jnp.ones_like(count)
        own, common = chunks.partition(arguments, _per_token(arguments, batch))
        others = (None if bias is None else checks.as_bias("bias", bias, classes), common)
        # Marked so, gradients are summed over devices once, not in every chunk.
        over_tokens, over_classes = chunks.varying_axes(h), chunks.varying_axes(k)
        h, (k, others) = chunks.varying(h, over_classes), chunks.varying((k, others), over_tokens)

        def on_logits(logits: jax.Array, own: Any, others: Any) -> Any:
            bias, common = others
            logits = logits if bias is None else logits + bias[None]
            logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
            if not batch:
                # Shapes would not tell what is a token's from what is shared: the loss sees the one token as it is.
                logits, own = jax.tree.map(lambda x: x[0], (logits, own))
            out = loss(logits, *chunks.combine(own, common))
            losses, aux = out if has_aux else (out, None)
            return (losses, aux) if batch else jax.tree.map(lambda x: x[None], (losses, aux))

        parts = _chunk_count(math.prod(batch), h.shape[-1], classes, chunk_size)
        tokens = chunks.varying(chunks.Tokens(h, w / early, own), over_tokens)
        tokens = chunks.split(tokens, len(batch), parts)
        plan, shared = chunks.close(chunks.Plan(on_logits, parts, transposed), tokens, chunks.Shared(k, others))
        if reduction == "none":
            value, aux = chunks.each(plan, tokens, shared)
            value = _per_batch(value, batch)
        else:
            # Under jit, for JAX has no rule that knows what is differentiated inside a shard_map run op by op.
            total = jax.jit(functools.partial(chunks.total, plan))
            value, aux = cast(tuple[jax.Array, Any], total(tokens, shared))
            value = sum_over_devices(value, batch_axis_name) * (early / count)
        return (value, jax.tree.map(lambda x: _per_batch(x, batch), aux)) if has_aux else value

    return chunked


def linear_cross_entropy(
    hidden: Array,
    kernel: Array,
    target: Target | Array,
    *,
    smoothing: Array = 0.0,
    prior: Prior | None = None,
    spread: Spread = "all",
    bias: Array | None = None,
    weights: Array | None = None,
    class_where: Array | None = None,
    class_weights: Array | None = None,
    z_loss: Array = 0.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    reduction: Reduction = "mean",
    denominator: Array | None = None,
    transposed: bool = False,
    class_axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
) -> jax.Array:
    """`cross_entropy` of an output layer, z = hidden · kernel + bias, without ever holding the logits of all tokens.

    Args:
      hidden: (*batch, D), any float dtype; products accumulate in float32, the kernel's gradient too.
      kernel: (D, K), or (K, D) if `transposed`, as tied embeddings lie.
      target: a `Target`, or integers (*batch,); smoothed by `smoothing`, `prior`, `spread` as in `smooth`.
      bias: (K,).
      weights: (*batch,); a mean divides by their sum, over all devices; a token of weight 0 is absent.
      class_where, class_weights, z_loss: as in `cross_entropy`: (K,), (K,) and a number.
      softcap: c, for c · tanh(z / c) in place of z.
      reduction, chunk_size, batch_axis_name: as in `chunked_loss`; denominator: as in `mean`.
      class_axis_name: inside `jax.shard_map`, the mesh axis that K is split over; labels stay global. On an `Explicit`
        mesh both axes are read off the arrays. On an `Auto` mesh with tokens split, use `shard_map`: XLA would sum
        the kernel's gradient over devices in every chunk.

    Returns:
      A number; with "none", (*batch,). A label that names no class makes it NaN, all of it if reduced.

    Raises:
      AssertionError, TypeError, ValueError: dtypes, shapes, options or a chunk size that do not fit, by name.

    Example:
      >>> hidden, embeddings = jnp.ones((2, 5, 4)), jnp.zeros((1000, 4))
      >>> labels = jnp.zeros((2, 5), jnp.int32)
      >>> print(f"{linear_cross_entropy(hidden, embeddings, labels, smoothing=0.1, transposed=True):.4f}")
      6.9078

    References:
      Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024; Hsu et al., Liger Kernel, 2024.
    """
    h, k = _checked(hidden, kernel, transposed)
    logits = jax.ShapeDtypeStruct((*h.shape[:-1], k.shape[0 if transposed else 1]), h.dtype)
    each = jax.ShapeDtypeStruct(h.shape[:-1], checks.wide(h.dtype))
    if not isinstance(target, Target):
        checks.assert_target("target", jnp.asarray(target), logits)
    plain = isinstance(smoothing, int | float) and smoothing == 0 and prior is None
    if not plain:
        # A uniform prior takes its classes from the loss.
        kept = None if prior is None else class_where
        target = smooth(target, smoothing, prior=prior, spread=spread, class_where=kept)
    operands = {
        "hidden": h,
        "kernel": k,
        "target": as_target(target),
        "weights": None if weights is None else checks.as_broadcast("weights", weights, each),
        "bias": None if bias is None else jnp.asarray(bias),
        "shared": _shared(logits.shape[-1:], class_where, class_weights, z_loss),
        "denominator": denominator,
    }

    def run(operands: dict[str, Any], class_axis_name: AxisName | None, batch_axis_name: AxisName | None) -> jax.Array:
        shared = chunks.varying(operands["shared"], chunks.varying_axes(operands["hidden"]))

        def loss(logits: jax.Array, target: Target, counted: jax.Array | None) -> jax.Array:
            return cross_entropy(logits, target, where=counted, class_axis_name=class_axis_name, **shared)

        chunked = chunked_loss(loss, reduction=reduction, chunk_size=chunk_size, batch_axis_name=batch_axis_name)
        w = operands["weights"]
        options = {"bias": operands["bias"], "softcap": softcap, "denominator": operands["denominator"]}
        counted = None if w is None else w != 0
        return chunked(
            operands["hidden"],
            operands["kernel"],
            operands["target"],
            counted,
            weights=w,
            transposed=transposed,
            **options,
        )

    layout = _Layout.of(h, k, transposed)
    if layout is None:
        return run(operands, class_axis_name, batch_axis_name)
    leaves, tree = jax.tree.flatten(operands)
    return jax.shard_map(
        lambda *leaves: run(jax.tree.unflatten(tree, leaves), layout.classes, layout.tokens or None),
        in_specs=tuple(jax.typeof(leaf).sharding.spec for leaf in leaves),
        out_specs=layout.batch if reduction == "none" else PartitionSpec(),
    )(*leaves)


@dataclass(frozen=True)
class _Layout:
    """How an explicit mesh splits tokens and classes. Each device then works on its own, as in a user's shard_map."""

    batch: PartitionSpec
    tokens: tuple[str, ...]
    classes: AxisName | None

    @classmethod
    def of(cls, hidden: jax.Array, kernel: jax.Array, transposed: bool) -> "_Layout | None":
        *batch, features = jax.typeof(hidden).sharding.spec
        spec = jax.typeof(kernel).sharding.spec
        classes = spec[0 if transposed else 1]
        if not any(batch) and classes is None:
            return None
        if features is not None or spec[1 if transposed else 0] is not None:
            raise ValueError(f"hidden, kernel: expected D whole on every device, got {features} and {spec}")
        tokens = tuple(name for part in batch if part for name in ((part,) if isinstance(part, str) else part))
        return cls(PartitionSpec(*batch), tokens, classes)


def _checked(hidden: Array, kernel: Array, transposed: bool) -> tuple[jax.Array, jax.Array]:
    h, k = jnp.asarray(hidden), jnp.asarray(kernel)
    checks.assert_kind("hidden", h, float, "real numbers (*batch, D)")
    checks.assert_min_rank("hidden", h, 1, "real numbers (*batch, D)")
    checks.assert_kind("kernel", k, float, "real numbers (D, K), or (K, D) if transposed")
    checks.assert_rank("kernel", k, 2, "a matrix (D, K), or (K, D) if transposed")
    shape = (k.shape[0], h.shape[-1]) if transposed else (h.shape[-1], k.shape[1])
    checks.assert_shape("kernel", k, [shape], f"{shape}, for hidden {checks.describe(h)}")
    return h, k


def _shared(
    shape: tuple[int, ...], class_where: Array | None, class_weights: Array | None, z_loss: Array
) -> dict[str, jax.Array]:
    """The options of `cross_entropy` that are given, as arrays that all tokens share."""
    given: dict[str, jax.Array] = {}
    if class_where is not None:
        given["class_where"] = checks.as_class_where("class_where", class_where)
    if class_weights is not None:
        given["class_weights"] = checks.as_class_values("class_weights", class_weights)
    for name, x in given.items():
        checks.assert_shape(name, x, [shape], f"{shape}, one value a class")
    if not (isinstance(z_loss, int | float) and z_loss == 0):
        given["z_loss"] = checks.as_weight("z_loss", z_loss)
        checks.assert_shape("z_loss", given["z_loss"], [()], "a number")
    return given


def _chunk_count(tokens: int, features: int, classes: int, chunk_size: int | None) -> int:
    """By default a chunk's logits take the room of `hidden`, or half of that of the kernel's gradient if that is more.

    Smaller chunks would save little memory and spend their time on adding to that gradient.
    """
    if chunk_size is None:
        chunk_size = max(tokens * features // classes, features // 2, 1)
    fewest = max(1, -(-tokens // checks.check_size("chunk_size", chunk_size)))
    # A divisor nearby leaves no ragged chunk to pad.
    return next((count for count in range(fewest, 2 * fewest) if tokens % count == 0), fewest)


def _per_token(arguments: Any, batch: tuple[int, ...]) -> Any:
    """Of each array, whether it has an entry a token: targets hold some that all tokens share."""

    def flags(node: Any) -> Any:
        leaves, tree = jax.tree.flatten(node)
        own = node.per_example() if isinstance(node, Target) else [True] * len(leaves)
        for leaf, is_own in zip(leaves, own, strict=True):
            if is_own:
                shape = batch + leaf.shape[len(batch) :]
                checks.assert_shape("target or argument", leaf, [shape], f"batch axes {batch}, as hidden has")
        return jax.tree.unflatten(tree, own)

    return jax.tree.map(flags, arguments, is_leaf=lambda x: isinstance(x, Target))


def _per_batch(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    return x[: math.prod(batch)].reshape(*batch, *x.shape[1:])
