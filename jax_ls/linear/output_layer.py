"""(hidden, kernel, q) -> loss, without ever holding the logits of all tokens."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_ls import checks, fences
from jax_ls.algebra import Target
from jax_ls.class_axis import AxisName, ClassAxis, multiply
from jax_ls.linear._arguments import (
    as_accumulate,
    as_layer,
    as_softcap,
    as_weights,
    check_product,
    gathered,
    per_token,
)
from jax_ls.linear._block_logits import BlockLogits
from jax_ls.linear._meshes import Layout
from jax_ls.linear.any_loss import Options, by_class_blocks, by_token_chunks
from jax_ls.linear.plan import Plan, chosen
from jax_ls.logits import Batch
from jax_ls.losses import LossParts, SmoothedLoss
from jax_ls.reductions import Reduction, normalizer, sum_over_devices
from jax_ls.smoothing import Prior, Spread, entropy_of_smoothed, smooth
from jax_ls.targets import Dense, OneHot, Rows, as_target

__all__ = ["linear_cross_entropy"]


@checks.named_options
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
    relative: bool = False,
    return_parts: bool = False,
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
) -> Any:
    """Returns the `cross_entropy` of an output layer, z = hidden · kernel + bias, without ever holding all logits.

    Two plans give the same numbers. Token chunks take three matrix products and hold the logits of a chunk and, for a
    narrow kernel, its gradient in float32, D·K numbers. Class blocks take four products and hold the logits of a block
    and the gradient of `hidden` in float32, N·D numbers. `plan="auto"` takes class blocks if K ≥ 2 N, N the tokens of a
    device, for a kernel of 16 bits or fewer, else if K ≥ 32 N; never for `Rows` or a `Dense` (*batch, K). Where FSDP
    splits K over devices that have fewer tokens, "auto" takes token chunks, which gather the tokens, not the kernel.

    Args:
      hidden: (*batch, D), any float dtype; products accumulate in float32.
      kernel: (D, K), or (K, D) if `transposed`, as tied embeddings lie.
      target: a `Target`, or integers (*batch,); smoothed by `smoothing`, `prior`, `spread` as in `smooth`.
      bias, weights: (K,) and (*batch,). A mean divides by Σ weights over all devices; a token of weight 0 is absent.
      where, ignore_index: tokens that do not count, booleans (*batch,) and a label: as weights of 0.
      class_where, class_weights, z_loss: as in `cross_entropy`: (K,), (K,), a number. softcap: c, for c · tanh(z / c).
      relative, return_parts: as in `smoothed_cross_entropy`; of the parts, only the loss has a derivative.
      reduction, batch_axis_name: as in `chunked_loss`; denominator: as in `mean`.
      plan: "tokens" with `chunk_size` tokens, "classes" with `block_size` classes, or "auto"; None: from the shapes.
      accumulate: dtype in which gradients add up: that of the kernel over chunks, that of `hidden` over blocks, and
        those that a layout sums over devices. If None, float32 on a device and their arrays' dtypes between devices.
      hidden_spec, kernel_spec: on an `Auto` mesh in context (`jax.set_mesh`), how the two lie. Inside `jax.shard_map`,
        `kernel_spec` says which of the tokens' axes split the kernel (FSDP). On an `Explicit` mesh they are read off.
      class_axis_name: inside `jax.shard_map`, the mesh axis that K is split over; labels stay global.

    Returns:
      A number, or `LossParts`; with "none", (*batch,). A label that names no class makes it NaN, all if reduced.

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
    h, k = as_layer(hidden, kernel)
    adds_up_in, class_axis = as_accumulate(accumulate), 0 if transposed else 1
    wire = None if accumulate is None else adds_up_in
    for name, mesh_axes in (("batch_axis_name", batch_axis_name), ("class_axis_name", class_axis_name)):
        if not isinstance(mesh_axes, str | tuple | None):
            checks.check_mesh_axes(name, mesh_axes)
    layout = Layout.of(h, k, transposed, hidden_spec, kernel_spec, class_axis_name, batch_axis_name, wire)
    check_product(h, k, transposed, layout)
    layout.check_sizes(h.shape[:-1], k, class_axis)
    num_classes = k.shape[class_axis] * gathered(layout, class_axis)
    logits = jax.ShapeDtypeStruct((*h.shape[:-1], num_classes), h.dtype)
    if not isinstance(target, Target):
        target = checks.as_array("target", target)
        checks.assert_target("target", target, logits)
    if ignore_index is not None:
        where = _kept(target, where, ignore_index)
    hard = as_target(target)
    plain = isinstance(smoothing, int | float) and smoothing == 0 and prior is None
    if not plain:
        # A uniform prior takes its classes from the loss.
        kept = None if prior is None else class_where
        if prior is not None and not isinstance(prior, Target):
            prior = checks.as_class_values("prior", prior)
            checks.assert_class_values("prior", prior, logits)
        target = smooth(target, smoothing, prior=prior, spread=spread, class_where=kept)
    checks.check_option("spread", spread, ("all", "others"))
    q = as_target(target)
    operands = {
        "hidden": h,
        "kernel": k,
        "target": q,
        "weights": as_weights(weights, h),
        "where": None if where is None else checks.as_where("where", where, h.shape[:-1]),
        "bias": None if bias is None else checks.as_bias("bias", bias, num_classes),
        "denominator": denominator,
    } | _shared(logits.shape[-1:], class_where, class_weights, z_loss)
    per_token(q, h.shape[:-1])
    # Of uniform smoothing H(q) is known before the logits are. Else it is a sum over classes that token chunks take.
    closed = isinstance(hard, OneHot) and prior is None and class_weights is None
    if relative and closed:
        operands["entropy"] = _entropy(
            smoothing, spread, operands.get("class_where"), num_classes, layout, h.shape[:-1]
        )
    summed = relative and not closed
    if summed and plan == "classes":
        raise TypeError(
            f"relative: expected integer labels, no prior, no class_weights in class blocks, got {type(hard).__name__}"
            f', {checks.describe(prior)}, {checks.describe(class_weights)}: plan="tokens"'
        )
    if return_parts:
        operands["hard"] = hard
    tokens = math.prod(h.shape[:-1]) // (1 if layout.mesh is None else layout.devices(layout.tokens))
    written_out = _written_out(q)
    visited = layout if written_out else layout.visited(h.shape[:-1], num_classes, class_axis)
    written_out, is_visited = written_out or summed, visited is not layout
    taken = chosen(plan, tokens, num_classes, k.dtype, adds_up_in, written_out=written_out, visited=is_visited)
    options = Options(
        taken,
        return_parts,
        reduction,
        chunk_size,
        block_size,
        adds_up_in,
        as_softcap(softcap),
        transposed,
        layout.batch_axis_name,
        visited if taken == "tokens" else layout,
    )
    for name, size in (("chunk_size", chunk_size), ("block_size", block_size)):
        if size is not None:
            checks.check_size(name, size)
    normalizer(jnp.ones(()), reduction, denominator=denominator)
    return _linear_cross_entropy(options, SmoothedLoss("summed" if summed else None, return_parts), operands)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _linear_cross_entropy(options: Options, formula: SmoothedLoss, operands: dict[str, Any]) -> Any:
    """Compiled once for the same options and shapes."""
    out_specs = options.layout.batch if options.reduction == "none" else PartitionSpec()
    run = _by_class_blocks if options.plan == "classes" else _by_token_chunks
    return options.layout.local(functools.partial(run, options, formula), operands, out_specs)


def _by_token_chunks(options: Options, formula: SmoothedLoss, operands: dict[str, Any]) -> Any:
    shared = {name: operands.get(name) for name in ("class_where", "class_weights", "z_loss")}
    shared = fences.varying(shared, fences.varying_axes(operands["hidden"]))
    z_weight, class_axis_name = shared.pop("z_loss"), options.layout.class_axis_name
    shared = jax.tree.map(options.layout.gathering.own_classes, shared)
    weights, counted = _weights(operands)

    def loss(logits: Array, q: Target, hard: Target | None, entropy: Array | None, counted: Array | None) -> Any:
        batch = Batch.of(logits, counted, **shared, z_loss=0.0, axis=-1, class_axis_name=class_axis_name)
        given = {"q": q, "hard": hard, "entropy": entropy, "z_weight": z_weight}
        return _with_parts(formula, batch.apply(formula, **{name: x for name, x in given.items() if x is not None}))

    arguments = (operands["target"], operands.get("hard"), operands.get("entropy"), counted)
    found = by_token_chunks(loss, options, operands | {"arguments": arguments, "weights": weights})
    return _reduced_parts(options, found, weights, operands)


def _by_class_blocks(options: Options, formula: SmoothedLoss, operands: dict[str, Any]) -> Any:
    z_weight, weights = operands.get("z_loss"), _weights(operands)[0]

    def loss(z: BlockLogits, q: Target, hard: Target | None, entropy: Array | None) -> Any:
        return _with_parts(formula, formula(z, q, hard, entropy=entropy, z_weight=z_weight))

    arguments = (operands["target"], operands.get("hard"), operands.get("entropy"))
    found = by_class_blocks(loss, options, operands | {"arguments": arguments, "weights": weights})
    return _reduced_parts(options, found, weights, operands)


def _with_parts(formula: SmoothedLoss, found: tuple[Any, Array]) -> Any:
    """Returns the losses of a formula; with parts, (losses, the other parts)."""
    losses = found[0]
    return (losses.loss, jax.lax.stop_gradient(tuple(losses[1:]))) if formula.parts else losses


def _reduced_parts(options: Options, found: Any, weights: Array | None, operands: dict[str, Any]) -> Any:
    """Returns the loss; with parts, all of them as the loss is reduced."""
    if not options.has_aux:
        return found
    loss, parts = found
    axis = options.batch_axis_name
    w = jnp.ones_like(parts[0]) if weights is None else weights.astype(parts[0].dtype)
    count = normalizer(w, options.reduction, denominator=operands["denominator"], batch_axis_name=axis)

    def reduced(x: Array) -> Array:
        x = multiply(w, x)
        return x if options.reduction == "none" else sum_over_devices(jnp.sum(x), axis) / count

    return LossParts(loss, *jax.lax.stop_gradient([reduced(x) for x in parts]))


def _entropy(
    smoothing: ArrayLike,
    spread: Spread,
    class_where: Array | None,
    num_classes: int,
    layout: Layout,
    batch: tuple[int, ...],
) -> Array:
    """Returns H(q) of labels that are smoothed uniformly over all classes, (*batch,)."""
    # Outside a mesh of its own, the call sees the classes of one device.
    axis = ClassAxis(num_classes, where=class_where, class_axis_name=None if layout.mesh else layout.class_axis_name)
    epsilon = checks.as_weight("smoothing", smoothing)
    return jnp.broadcast_to(entropy_of_smoothed(epsilon, axis.count().astype(epsilon.dtype), spread), batch)


def _weights(operands: dict[str, Any]) -> tuple[Array | None, Array | None]:
    """The weights of the tokens, 0 for those that `where` leaves out, and which of them are not 0."""
    w, where = operands["weights"], operands["where"]
    if where is not None:
        one = jnp.ones(where.shape, checks.wide(operands["hidden"].dtype))
        w = jnp.where(where, one if w is None else w, 0)
    return w, None if w is None else w != 0


def _kept(target: Target | Array, where: ArrayLike | None, ignore_index: int) -> Array:
    """Which tokens `ignore_index` and `where` leave."""
    if isinstance(target, Target) or not jnp.issubdtype(target.dtype, jnp.integer):
        raise TypeError("ignore_index: expected integer labels as target, for ignore_index to name one")
    kept = checks.not_ignored(target, ignore_index)
    return kept if where is None else kept & checks.as_where("where", where, kept.shape)


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
