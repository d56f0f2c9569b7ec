"""(hidden, kernel, q) -> loss, without ever holding the logits of all tokens."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_ls import checks, fences
from jax_ls.algebra import Target
from jax_ls.class_axis import AxisName, multiply
from jax_ls.linear import _class_blocks as classes
from jax_ls.linear import _token_chunks as chunks
from jax_ls.linear._meshes import Layout
from jax_ls.linear.plan import Plan, block_sizes, chosen, chunk_count
from jax_ls.losses import cross_entropy
from jax_ls.reductions import Reduction, normalizer, sum_over_devices
from jax_ls.smoothing import Prior, Spread, smooth
from jax_ls.targets import Dense, Rows, as_target

__all__ = ["chunked_loss", "linear_cross_entropy"]


def chunked_loss(
    loss: Callable[..., Any],
    *,
    has_aux: bool = False,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    accumulate: DTypeLike | None = None,
    batch_axis_name: AxisName | None = None,
) -> Callable[..., Any]:
    """Returns a loss of hidden states and a kernel from a loss of logits, taken a chunk of tokens at a time.

    The loss sees all classes of a chunk at once, so this is the plan "tokens" of `linear_cross_entropy`.

    Args:
      loss: a function (logits (n, K), *arguments) -> losses (n,); with `has_aux`, -> (losses, auxiliary).
      has_aux: also return the auxiliary values, arrays with one entry a token; they have no derivative.
      reduction: as in `jax_ls.reduce`. All but "none" take the gradients in the forward pass: three matrix products,
        reverse mode. "none" recomputes: four, any mode.
      chunk_size: tokens whose logits are held at a time; chosen from the shapes if None.
      accumulate: dtype in which the kernel's gradient adds up over chunks; float32 if None.
      batch_axis_name: mesh axes that tokens are split over, inside `jax.shard_map`, to reduce over.

    Returns:
      f(hidden (*batch, D), kernel (D, K), *arguments, bias=None, softcap=None, weights=None, denominator=None,
      transposed=False) -> loss, or (loss, auxiliary). Arguments are arrays (*batch, ...), targets, or trees of them.
      What `loss` closes over is shared by all tokens, and differentiated too. A token of weight 0 is absent, be it
      NaN: not even the derivative in its weight sees its loss. On an `Explicit` mesh that splits the tokens, each
      device takes its own. Without an outer `jit`, a loss that is defined anew for each call is compiled anew.

    Raises:
      AssertionError, TypeError: `loss` returns anything but one loss, and one auxiliary value, per token.
      ValueError: an explicit mesh splits the classes, of which `loss` would see a part.

    Example:
      >>> hits = lambda z, y: (smoothed_cross_entropy(z, y), {"hits": z.argmax(-1) == y})
      >>> f = chunked_loss(hits, has_aux=True)
      >>> value, aux = f(jnp.eye(4, 8), 9 * jnp.eye(8, 16), jnp.arange(4))
      >>> int(aux["hits"].sum())
      4
    """
    adds_up_in = _checked_accumulate(accumulate)

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
        h, k = _checked(hidden, kernel)
        layout = Layout.of(h, k, transposed, None, None, None, None, None)
        _check_product(h, k, transposed, layout)
        if layout.mesh is not None and layout.classes:
            raise ValueError(
                f"kernel: expected all classes on every device, for the loss to see them, got {layout.kernel}: "
                "jax.sharding.reshard(kernel, jax.P()), or jax.shard_map and a loss that knows class_axis_name"
            )
        batch = h.shape[:-1]
        arguments = _as_arrays(arguments)
        _per_token(arguments, batch)
        operands = {
            "hidden": h,
            "kernel": k,
            "arguments": arguments,
            "bias": None if bias is None else checks.as_bias("bias", bias, k.shape[0 if transposed else 1]),
            "weights": _checked_weights(weights, h),
            "denominator": denominator,
        }
        axis = layout.batch_axis_name if layout.mesh is not None else batch_axis_name
        static = _Chunked(
            loss, has_aux, reduction, chunk_size, adds_up_in, _checked_softcap(softcap), transposed, axis, layout
        )
        static.check(operands)
        return _by_chunks(static, operands)

    return chunked


def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    target: Target | ArrayLike,
    *,
    smoothing: ArrayLike = 0.0,
    prior: Prior | None = None,
    spread: Spread = "all",
    bias: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_where: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    denominator: ArrayLike | None = None,
    transposed: bool = False,
    plan: Plan = "auto",
    chunk_size: int | None = None,
    block_size: int | None = None,
    accumulate: DTypeLike | None = None,
    hidden_spec: PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
    class_axis_name: AxisName | None = None,
    batch_axis_name: AxisName | None = None,
) -> Array:
    """Returns the `cross_entropy` of an output layer, z = hidden · kernel + bias, without ever holding all logits.

    Two plans give the same numbers. Token chunks take three matrix products and hold the logits of a chunk and, for a
    narrow kernel, its gradient in float32, D·K numbers. Class blocks take four products and hold the logits of a block
    and the gradient of `hidden` in float32, N·D numbers. `plan="auto"` takes class blocks for a kernel of at most 16
    bits and K ≥ 2 N, N the tokens of a device, unless the target is written out: `Dense` (*batch, K), `Rows`.

    Args:
      hidden: (*batch, D), any float dtype; products accumulate in float32.
      kernel: (D, K), or (K, D) if `transposed`, as tied embeddings lie.
      target: a `Target`, or integers (*batch,); smoothed by `smoothing`, `prior`, `spread` as in `smooth`.
      bias: (K,).
      weights: (*batch,); a mean divides by their sum, over all devices; a token of weight 0 is absent.
      where, ignore_index: tokens that do not count, booleans (*batch,) and a label: as weights of 0.
      class_where, class_weights, z_loss: as in `cross_entropy`: (K,), (K,) and a number.
      softcap: c, for c · tanh(z / c) in place of z.
      reduction, batch_axis_name: as in `chunked_loss`; denominator: as in `mean`.
      plan: "tokens" with `chunk_size` tokens, "classes" with `block_size` classes, or "auto"; None: from the shapes.
      accumulate: dtype in which gradients add up: that of the kernel over chunks, that of `hidden` over blocks, and
        that of a split kernel over devices. If None, float32 on a device and the kernel's dtype between devices.
      hidden_spec, kernel_spec: on an `Auto` mesh in context (`jax.set_mesh`), how the two lie. Inside `jax.shard_map`,
        `kernel_spec` says which of the tokens' axes split the kernel (FSDP). On an `Explicit` mesh they are read off.
      class_axis_name: inside `jax.shard_map`, the mesh axis that K is split over; labels stay global.

    Returns:
      A number; with "none", (*batch,). A label that names no class makes it NaN, all of it if reduced.

    Raises:
      ValueError: a layout that no plan serves, with the `reshard` that mends it.
      TypeError: class blocks for a target that is no function of linear sums and single logits.

    Example:
      >>> hidden, embeddings = jnp.ones((2, 5, 4)), jnp.zeros((1000, 4))
      >>> labels = jnp.zeros((2, 5), jnp.int32)
      >>> print(f"{linear_cross_entropy(hidden, embeddings, labels, smoothing=0.1, transposed=True):.4f}")
      6.9078

    References:
      Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024; Hsu et al., Liger Kernel, 2024.
    """
    h, k = _checked(hidden, kernel)
    adds_up_in, class_axis = _checked_accumulate(accumulate), 0 if transposed else 1
    wire = None if accumulate is None else adds_up_in
    for name, mesh_axes in (("batch_axis_name", batch_axis_name), ("class_axis_name", class_axis_name)):
        if not isinstance(mesh_axes, str | tuple | None):
            checks.check_mesh_axes(name, mesh_axes)
    layout = Layout.of(h, k, transposed, hidden_spec, kernel_spec, class_axis_name, batch_axis_name, wire)
    _check_product(h, k, transposed, layout)
    layout.check_sizes(h.shape[:-1], k, class_axis)
    num_classes = k.shape[class_axis] * _gathered(layout, class_axis)
    logits = jax.ShapeDtypeStruct((*h.shape[:-1], num_classes), h.dtype)
    if not isinstance(target, Target):
        target = jnp.asarray(target)
        checks.assert_target("target", target, logits)
    if ignore_index is not None:
        where = _kept(target, where, ignore_index)
    plain = isinstance(smoothing, int | float) and smoothing == 0 and prior is None
    if not plain:
        # A uniform prior takes its classes from the loss.
        kept = None if prior is None else class_where
        target = smooth(target, smoothing, prior=prior, spread=spread, class_where=kept)
    checks.check_option("spread", spread, ("all", "others"))
    q = as_target(target)
    operands = {
        "hidden": h,
        "kernel": k,
        "target": q,
        "weights": _checked_weights(weights, h),
        "where": None if where is None else checks.as_where("where", where, h.shape[:-1]),
        "bias": None if bias is None else checks.as_bias("bias", bias, num_classes),
        "denominator": denominator,
    } | _shared(logits.shape[-1:], class_where, class_weights, z_loss)
    _per_token(q, h.shape[:-1])
    tokens = math.prod(h.shape[:-1]) // _split(layout)
    static = _Layer(
        chosen(plan, tokens, num_classes, k.dtype, adds_up_in, written_out=_written_out(q)),
        reduction,
        chunk_size,
        block_size,
        adds_up_in,
        _checked_softcap(softcap),
        transposed,
        layout,
    )
    for name, size in (("chunk_size", chunk_size), ("block_size", block_size)):
        if size is not None:
            checks.check_size(name, size)
    normalizer(jnp.ones(()), reduction, denominator=denominator)
    return _linear_cross_entropy(static, operands)


# Token chunks of any loss.


@dataclass(frozen=True)
class _Chunked:
    """The static part of a chunked loss."""

    loss: Callable[..., Any]
    has_aux: bool
    reduction: Reduction
    chunk_size: int | None
    accumulate: Any
    softcap: float | None
    transposed: bool
    batch_axis_name: AxisName | None
    layout: Layout

    def check(self, operands: dict[str, Any]) -> None:
        normalizer(jnp.ones(()), self.reduction, denominator=operands["denominator"])
        if self.chunk_size is not None:
            checks.check_size("chunk_size", self.chunk_size)


@functools.partial(jax.jit, static_argnums=0)
def _by_chunks(static: _Chunked, operands: dict[str, Any]) -> Any:
    """Compiled once for each loss and shapes."""
    losses = static.layout.batch if static.reduction == "none" else PartitionSpec()
    out_specs = (losses, static.layout.batch) if static.has_aux else losses
    return static.layout.local(functools.partial(_chunked_on_a_device, static), operands, out_specs)


def _chunked_on_a_device(static: _Chunked, operands: dict[str, Any]) -> Any:
    h, k, bias, arguments = (operands[name] for name in ("hidden", "kernel", "bias", "arguments"))
    axis, layout, class_axis = static.batch_axis_name, static.layout, 0 if static.transposed else 1
    batch, num_classes = h.shape[:-1], k.shape[class_axis] * layout.gathering.parts(class_axis)
    each = jnp.ones(batch, checks.wide(h.dtype))
    w = each if operands["weights"] is None else operands["weights"]
    count = normalizer(w, static.reduction, denominator=operands["denominator"], batch_axis_name=axis)
    own, common = chunks.partition(arguments, _per_token(arguments, batch))
    # Marked so, gradients are summed over devices once, not in every chunk.
    over_tokens, over_classes = fences.varying_axes(h), fences.varying_axes(k)
    others = (bias, common)
    h = fences.varying(h, over_classes)
    k, others = fences.varying((k, others), over_tokens)
    counts_late = static.reduction == "none"

    def on_logits(logits: Array, own: Any, others: Any) -> Any:
        bias, common = others
        logits = logits if bias is None else logits + bias[None].astype(logits.dtype)
        if static.softcap is not None:
            logits = static.softcap * jnp.tanh(logits / static.softcap)
        if not batch:
            # Shapes would not tell what is a token's from what is shared: the loss sees the one token as it is.
            logits, own = jax.tree.map(lambda x: x[0], (logits, own))
        out = static.loss(logits, *chunks.combine(own, common))
        losses, aux = _checked_output(out, static.has_aux, logits.shape[:-1])
        return (losses, aux) if batch else jax.tree.map(lambda x: x[None], (losses, aux))

    parts = chunk_count(math.prod(batch), h.shape[-1], num_classes, static.chunk_size)
    tokens = fences.varying(chunks.Tokens(h, w if counts_late else w / count, own), over_tokens)
    tokens = chunks.split(tokens, len(batch), parts)
    plan = chunks.Plan(
        on_logits, parts, static.transposed, layout.gathering, _at_least(static.accumulate, k.dtype), over_tokens
    )
    plan, shared = chunks.close(plan, tokens, chunks.Shared(k, others))
    if static.reduction == "none":
        value, aux = chunks.each(plan, tokens, shared)
        value = _per_batch(value, batch)
    else:
        value, aux = cast(tuple[Array, Any], chunks.total(plan, tokens, shared))
        value = sum_over_devices(value, axis)
    return (value, jax.tree.map(lambda x: _per_batch(x, batch), aux)) if static.has_aux else value


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


# An output layer by either plan.


@dataclass(frozen=True)
class _Layer:
    """The static part of `linear_cross_entropy`."""

    plan: str
    reduction: Reduction
    chunk_size: int | None
    block_size: int | None
    accumulate: Any
    softcap: float | None
    transposed: bool
    layout: Layout


@functools.partial(jax.jit, static_argnums=0)
def _linear_cross_entropy(static: _Layer, operands: dict[str, Any]) -> Array:
    """Compiled once for the same options and shapes."""
    out_specs = static.layout.batch if static.reduction == "none" else PartitionSpec()
    run = _layer_by_classes if static.plan == "classes" else _layer_by_tokens
    return static.layout.local(functools.partial(run, static), operands, out_specs)


def _layer_by_tokens(static: _Layer, operands: dict[str, Any]) -> Array:
    options = {name: operands[name] for name in ("class_where", "class_weights", "z_loss") if name in operands}
    options = fences.varying(options, fences.varying_axes(operands["hidden"]))
    class_axis_name = static.layout.class_axis_name
    weights, counted = _weights(operands)

    def loss(logits: Array, target: Target, counted: Array | None) -> Array:
        return cross_entropy(logits, target, where=counted, class_axis_name=class_axis_name, **options)

    chunked = _Chunked(
        loss,
        False,
        static.reduction,
        static.chunk_size,
        static.accumulate,
        static.softcap,
        static.transposed,
        static.layout.batch_axis_name,
        static.layout,
    )
    given = {name: operands[name] for name in ("hidden", "kernel", "bias", "denominator")}
    return _chunked_on_a_device(chunked, given | {"arguments": (operands["target"], counted), "weights": weights})


def _layer_by_classes(static: _Layer, operands: dict[str, Any]) -> Array:
    h, k, target = operands["hidden"], operands["kernel"], operands["target"]
    batch, class_axis, layout = h.shape[:-1], 0 if static.transposed else 1, static.layout
    weights, counted = _weights(operands)
    z_loss = operands.get("z_loss")
    if counted is not None:
        h = jnp.where(counted[..., None], h, 0)
        target = target.counted(counted)
    parts = layout.gathering.parts(class_axis)
    size, tpu_size = block_sizes(h.shape[-1], k.shape[class_axis], parts, static.block_size)
    blocks = classes.Blocks(
        size,
        k.shape[class_axis],
        parts,
        static.transposed,
        static.softcap,
        layout.gathering,
        _at_least(static.accumulate, h.dtype),
        tpu_size,
    )

    def formula(z: classes.BlockLogits, q: Target) -> Array:
        losses = z.mass(q) * z.log_total - z.dot(q)
        return losses if z_loss is None else losses + z_loss.astype(losses.dtype) * jnp.square(z.lse)

    losses = classes.on_blocks(
        formula,
        blocks,
        classes.Layer(h.reshape(-1, h.shape[-1]), k, operands["bias"], operands.get("class_where")),
        {"q": target},
        batch=batch,
        rows=counted,
        class_weights=operands.get("class_weights"),
        class_axis_name=layout.class_axis_name,
        any_mode=static.reduction == "none",
    )
    losses = losses if counted is None else jnp.where(counted, losses, 0)
    axis = layout.batch_axis_name
    w = jnp.ones_like(losses) if weights is None else weights
    count = normalizer(w, static.reduction, denominator=operands["denominator"], batch_axis_name=axis)
    weighted = multiply(w, losses)
    return weighted if static.reduction == "none" else sum_over_devices(jnp.sum(weighted), axis) / count


def _weights(operands: dict[str, Any]) -> tuple[Array | None, Array | None]:
    """The weights of the tokens, 0 for those that `where` leaves out, and which of them are not 0."""
    w, where = operands["weights"], operands["where"]
    if where is not None:
        one = jnp.ones(where.shape, checks.wide(operands["hidden"].dtype))
        w = jnp.where(where, one if w is None else w, 0)
    return w, None if w is None else w != 0


# Arguments.


def _checked(hidden: ArrayLike, kernel: ArrayLike) -> tuple[Array, Array]:
    h = checks.as_array("hidden", hidden, "real numbers (*batch, D)")
    k = checks.as_array("kernel", kernel, "real numbers (D, K), or (K, D) if transposed")
    checks.assert_kind("hidden", h, float, "real numbers (*batch, D)")
    checks.assert_min_rank("hidden", h, 1, "real numbers (*batch, D)")
    checks.assert_kind("kernel", k, float, "real numbers (D, K), or (K, D) if transposed")
    checks.assert_rank("kernel", k, 2, "a matrix (D, K), or (K, D) if transposed")
    return h, k


def _check_product(h: Array, k: Array, transposed: bool, layout: Layout) -> None:
    features = h.shape[-1] // _gathered(layout, 1 if transposed else 0)
    shape = (k.shape[0], features) if transposed else (features, k.shape[1])
    checks.assert_shape("kernel", k, [shape], f"{shape}, for hidden {checks.describe(h)}")
    if 0 in shape:
        raise ValueError(f"kernel: expected at least one feature and one class, got {checks.describe(k)}")


def _checked_weights(weights: ArrayLike | None, h: Array) -> Array | None:
    each = jax.ShapeDtypeStruct(h.shape[:-1], checks.wide(h.dtype))
    return None if weights is None else checks.as_broadcast("weights", weights, each)


def _checked_softcap(softcap: float | None) -> float | None:
    if softcap is None:
        return None
    if isinstance(softcap, Tracer) or np.ndim(softcap):
        raise TypeError(f"softcap: expected a static number, got {softcap!r}")
    checks.check_values("softcap", softcap, lambda c: (c > 0) & (c < math.inf), "a finite number > 0")
    return float(softcap)


def _checked_accumulate(dtype: DTypeLike | None) -> Any:
    dtype = jnp.float32 if dtype is None else dtype
    try:
        found = jnp.dtype(dtype)
        known = jnp.issubdtype(found, jnp.floating) and jnp.finfo(found).bits >= 16
    except TypeError:
        known = False
    if not known:
        raise TypeError(f"accumulate: expected a float dtype of 16 bits or more, got {dtype!r}")
    return jnp.dtype(dtype)


def _at_least(accumulate: Any, dtype: DTypeLike) -> Any:
    """The dtype that gradients of arrays of `dtype` add up in: never narrower than the arrays."""
    return max((jnp.dtype(accumulate), jnp.dtype(dtype)), key=lambda x: x.itemsize)


def _kept(target: Target | Array, where: ArrayLike | None, ignore_index: int) -> Array:
    """Which tokens `ignore_index` and `where` leave."""
    if isinstance(target, Target) or not jnp.issubdtype(target.dtype, jnp.integer):
        raise TypeError("ignore_index: expected integer labels as target, for ignore_index to name one")
    checks.check_integer("ignore_index", ignore_index)
    kept = checks.as_labels("target", target) != ignore_index
    return kept if where is None else kept & checks.as_where("where", where, kept.shape)


def _gathered(layout: Layout, axis: int) -> int:
    """Into how many parts the tokens' devices split a kernel of which this call got one, inside `jax.shard_map`."""
    return layout.gathering.parts(axis) if layout.mesh is None else 1


def _split(layout: Layout) -> int:
    """Over how many devices the tokens of this call are split."""
    return math.prod(layout.mesh.shape[name] for name in layout.tokens) if layout.mesh is not None else 1


def _written_out(target: Target) -> bool:
    """Whether a target has K numbers for each token."""
    nodes = jax.tree.leaves(target, is_leaf=lambda x: isinstance(x, Dense | Rows))
    return any(isinstance(x, Rows) or (isinstance(x, Dense) and x.probabilities.ndim > 1) for x in nodes)


def _shared(
    shape: tuple[int, ...], class_where: ArrayLike | None, class_weights: ArrayLike | None, z_loss: ArrayLike
) -> dict[str, Array]:
    """The options of `cross_entropy` that are given, as arrays that all tokens share."""
    given: dict[str, Array] = {}
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


def _as_arrays(arguments: Any) -> Any:
    """Arguments as arrays, Python numbers too; targets as they are."""

    def convert(path: Any, x: Any) -> Any:
        return x if isinstance(x, Target) else checks.as_array(f"argument{jax.tree_util.keystr(path)}", x)

    return jax.tree_util.tree_map_with_path(convert, arguments, is_leaf=lambda x: isinstance(x, Target))


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


def _per_batch(x: Array, batch: tuple[int, ...]) -> Array:
    return x[: math.prod(batch)].reshape(*batch, *x.shape[1:])
