"""Online label smoothing: u is the mean prediction for each class, over the examples that the model gets right.

    state = online.init(num_classes)
    loss = mean(smoothed_cross_entropy(logits, labels, 0.5, prior=online.target(state, labels)))
    state = online.update(state, logits, labels)             # after each step
    state = online.next_epoch(state)                         # after each epoch

`average_predictions` keeps one prediction for each example instead of one for each class.

That is the published loss, ½ CE(z, δ_y) + ½ CE(z, S_y), where S_y is row y of the matrix of the epoch before. State in,
state out: it goes through `jit`, buffer donation, `scan` and checkpoints like any other pytree. `flax.serialization`
takes it once `jax_ls.nnx` is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import pytree
from jax_ls.class_axis import AxisName, align, everywhere, is_split, laid_as, look_up, whole_rows_of
from jax_ls.logits import Logits, is_correct, on_logits
from jax_ls.reductions import sum_over_devices
from jax_ls.running_sums import accumulate, as_running, sums_by_row
from jax_ls.targets import Rows

__all__ = ["OnlineState", "average_predictions", "init", "next_epoch", "target", "update"]


@pytree()
@dataclass(frozen=True)
class OnlineState:
    """The state of online smoothing.

    Args:
      matrix: S, (K, K); row y is the soft label of class y.
      sums: Σ p over this epoch's correct predictions of each class, (K, K). None if the state has a `decay`.
      counts: how many correct predictions those are, whole numbers (K,) in float32. None if the state has a `decay`.
      decay: ρ of the running mean, (). None if the state counts epochs.
      lost_sums, lost_counts: the rounding errors of `sums` and `counts`, so that no number of examples makes them
        wrong. None if the state has a `decay`.

    Example:
      >>> from jax_ls import online
      >>> state = online.init(3)
      >>> state.matrix.shape, state.sums.shape, state.counts.shape, state.decay
      ((3, 3), (3, 3), (3,), None)
    """

    matrix: Array
    sums: Array | None
    counts: Array | None
    decay: Array | None
    lost_sums: Any = None
    lost_counts: Any = None


def init(
    num_classes: int,
    *,
    first: Literal["zeros", "uniform"] = "zeros",
    decay: ArrayLike | None = None,
    limit: int = 2**30,
) -> OnlineState:
    """Returns the first state of online smoothing.

    Args:
      num_classes: K. Memory is 12 K² bytes, 4 K² with `decay`.
      first: the matrix before anything is learned. "zeros" is published: the first epoch trains on ½ CE(z, δ_y) alone.
        "uniform" is 1/K everywhere: the first epoch has plain smoothing.
      decay: ρ in [0, 1), for a running mean in place of epochs; may be traced.
      limit: how many bytes the state may take.

    Returns:
      An `OnlineState`.

    Raises:
      ValueError: an unknown `first`, a concrete ρ outside [0, 1), or a state of more than `limit` bytes.

    Example:
      >>> from jax_ls import online
      >>> online.init(2, first="uniform").matrix.tolist()
      [[0.5, 0.5], [0.5, 0.5]]

    References:
      Zhang et al., Delving Deep into Label Smoothing, 2021.
    """
    size = checks.check_size("num_classes", num_classes)
    checks.check_option("first", first, ("zeros", "uniform"))
    needed = 4 * size * size * (1 if decay is not None else 3)
    if needed > limit:
        raise ValueError(
            f"num_classes: expected a state of at most {limit:,} bytes, got {size} classes: {needed:,} bytes"
        )
    matrix = jnp.full((size, size), 0.0 if first == "zeros" else 1 / size, jnp.float32)
    if decay is None:
        sums, counts = jnp.zeros((2, size, size), jnp.float32), jnp.zeros((2, size), jnp.float32)
        return OnlineState(matrix, sums[0], counts[0], None, sums[1], counts[1])
    rho = jnp.array(checks.as_weight("decay", decay))
    checks.assert_shape("decay", rho, [()], "a number")
    checks.check_values("decay", decay, lambda x: (x >= 0) & (x < 1), "a number in [0, 1)")
    return OnlineState(matrix, None, None, rho)


def update(
    state: OnlineState,
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    batch_axis_name: AxisName | None = None,
) -> OnlineState:
    """Returns the state after one more batch. Only correct predictions count, argmax p = y.

    A state that counts epochs adds their p up until `next_epoch`, and keeps its matrix. A state with `decay` changes
    row y of its matrix if class y had a correct prediction: S_y <- ρ S_y + (1 − ρ) mean p. A row that begins at zeros
    so grows to mass 1.

    Args:
      state: from `init`, `update` or `next_epoch`.
      logits: z, real numbers (*batch, K); constants for differentiation.
      labels: y, integers (*batch,). For a label that names no class, no prediction is correct.
      where: boolean (*batch,), the examples that count.
      batch_axis_name: inside `jax.shard_map`, the mesh axes that split the batch, as in `mean`; the state is then the
        same on all devices.

    Returns:
      An `OnlineState`.

    Example:
      >>> from jax_ls import online
      >>> state = online.init(2, decay=0.0)
      >>> logits = jnp.log(jnp.array([[0.75, 0.25], [0.75, 0.25]]))
      >>> online.update(state, logits, jnp.array([0, 1])).matrix.round(4).tolist()
      [[0.75, 0.25], [0.0, 0.0]]

    References:
      Zhang et al., Delving Deep into Label Smoothing, 2021.
    """
    z = jax.lax.stop_gradient(checks.as_logits("logits", logits))
    checks.assert_num_classes("logits", z, state.matrix.shape[0])
    y = checks.as_labels("labels", labels)
    checks.assert_batch("labels", y, z)
    z = z.astype(state.matrix.dtype)
    right = is_correct(z, y)
    if where is not None:
        right &= checks.as_where("where", where, y.shape)
    p = jnp.where(right[..., None], jax.nn.softmax(z, axis=-1), 0)
    rows = jnp.where(right, y, z.shape[-1])
    sums = _as_placed(sums_by_row(p, rows, z.shape[-1]), state.matrix)
    counts = sums_by_row(right.astype(jnp.int32), rows, z.shape[-1])
    sums, counts = sum_over_devices((sums, counts), batch_axis_name)
    if state.sums is not None and state.counts is not None:
        sums, lost_sums = accumulate(state.sums, state.lost_sums, sums)
        counts, lost_counts = accumulate(state.counts, state.lost_counts, *as_running(counts, sums.dtype))
        return replace(state, sums=sums, counts=counts, lost_sums=lost_sums, lost_counts=lost_counts)
    rho = checks.as_weight("decay", state.decay).astype(sums.dtype)
    matrix = jnp.where(counts[:, None] > 0, rho * state.matrix + (1 - rho) * _mean(sums, counts), state.matrix)
    return replace(state, matrix=matrix)


def next_epoch(state: OnlineState) -> OnlineState:
    """Returns the state for the next epoch: row y is this epoch's mean prediction for class y, and the sums are 0.

    A class without a correct prediction keeps the row that it has learned. If it has never learned a row, it gets 1/K,
    as in the published code.

    Args:
      state: a state that counts epochs: `init` without `decay`.

    Returns:
      An `OnlineState`.

    Raises:
      ValueError: a state with `decay`, which does not count epochs.

    Example:
      >>> from jax_ls import online
      >>> state = online.update(online.init(2), 99 * jnp.eye(2), jnp.array([0, 1]))
      >>> online.next_epoch(state).matrix.tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    if state.sums is None or state.counts is None:
        raise ValueError("state: expected one with epochs, got one with decay, which updates its matrix at each step")
    known = jnp.any(state.matrix != 0, axis=-1, keepdims=True)
    kept = jnp.where(known, state.matrix, 1 / state.matrix.shape[-1])
    matrix = jnp.where(state.counts[:, None] > 0, _mean(state.sums, state.counts), kept)
    emptied = {name: getattr(state, name) for name in ("sums", "counts", "lost_sums", "lost_counts")}
    return replace(state, matrix=matrix, **jax.tree.map(jnp.zeros_like, emptied))


def target(state: OnlineState, labels: ArrayLike) -> Rows:
    """Returns row y of the matrix for each label, as the `prior` of a loss or as a target.

    In a state that began with "zeros" a row has mass 0 until the first `next_epoch`, or with `decay` until the class
    has a correct prediction. Its share of the loss is then 0. `class_where` divides by the mass: begin with "uniform".

    Args:
      state: from `init`, `update` or `next_epoch`.
      labels: integers (*batch,).

    Returns:
      A `Target`, constant for differentiation.

    Example:
      >>> from jax_ls import online
      >>> q = online.target(online.init(4, first="uniform"), jnp.array([2]))
      >>> print(cross_entropy(jnp.zeros((1, 4)), q).round(4))
      [1.3863]
    """
    return Rows(jax.lax.stop_gradient(state.matrix), checks.as_labels("labels", labels))


def average_predictions(
    averages: ArrayLike,
    indices: ArrayLike,
    logits: ArrayLike,
    *,
    decay: ArrayLike = 0.7,
    where: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns the running mean prediction of each example, after one more batch: t_i <- ρ t_i + (1 − ρ) p_i.

    At ρ = 0 it is the last prediction, the teacher of self-distillation by the epoch before. Begin with
    `jnp.zeros((num_examples, K))`: from zeros the mass of a row grows to 1 as it learns. Only the rows of the batch
    move; donate the array to `jit`, which then updates it in place.

    Args:
      averages: t, real numbers (N, K), a row for each example of the data.
      indices: integers (*batch,), which examples these are. One outside [0, N) is left out.
      logits: z, real numbers (*batch, K); constants for differentiation.
      decay: ρ in [0, 1), a number, traced or not.
      where: boolean (*batch,), the examples that count. Of an example that a batch has twice, one counts.
      class_where: boolean (K,) or (*batch, K), the classes that exist.
      class_axis_name: inside `jax.shard_map`, the mesh axis that K is split over; t comes as the local slice.

    Returns:
      An array (N, K) in the dtype of `averages`.

    Raises:
      ValueError: a concrete ρ outside [0, 1).

    Example:
      >>> from jax_ls import online
      >>> averages = jnp.zeros((3, 2))
      >>> online.average_predictions(averages, jnp.array([1]), jnp.zeros((1, 2)), decay=0.5).tolist()
      [[0.0, 0.0], [0.25, 0.25], [0.0, 0.0]]

    References:
      Laine and Aila, Temporal Ensembling for Semi-Supervised Learning, 2017; Liu et al., Early-Learning Regularization,
      2020; ρ = 0: Kim et al., Self-Knowledge Distillation with Progressive Refinement of Targets, 2021.
    """
    old = checks.as_array("averages", averages)
    checks.assert_kind("averages", old, float, "real numbers (N, K)")
    checks.assert_rank("averages", old, 2, "real numbers (N, K)")
    z = jax.lax.stop_gradient(checks.as_logits("logits", logits))
    checks.assert_num_classes("logits", z, old.shape[-1])
    index = checks.as_batch_labels("indices", indices, z.shape[:-1])
    rho = checks.as_parameter("decay", decay, lambda x: (x >= 0) & (x < 1), "a number in [0, 1)")
    rho = checks.as_scalar("decay", rho)
    if where is not None:
        kept = checks.as_where("where", where, index.shape)
        index, z = jnp.where(kept, index, -1), jnp.where(kept[..., None], z, 0)
    lse = on_logits(_lse, z, class_where=class_where, class_axis_name=class_axis_name)
    p = jnp.exp(z.astype(lse.dtype) - lse[..., None])
    if class_where is not None:
        exists = checks.as_class_where("class_where", class_where)
        p = jnp.where(align(exists, p.ndim), p, 0)
    # A negative row would count from the end; one beyond the last is dropped.
    index = jnp.where((index >= 0) & (index < old.shape[0]), index, old.shape[0])
    index = laid_as(index, z, index.ndim)
    before = laid_as(look_up(old, index), z, index.ndim, over_classes=True).astype(p.dtype)
    moved = rho.astype(p.dtype) * before + (1 - rho.astype(p.dtype)) * p
    # The rows of all devices, as the classes of the averages lie.
    rows = laid_as(moved.astype(old.dtype), old, 0, over_classes=True)
    whole = whole_rows_of(old)
    out = jax.typeof(whole).sharding if is_split(whole) else None
    return _as_placed(whole.at[everywhere(index)].set(rows, mode="drop", out_sharding=out), old)


def _lse(z: Logits) -> Array:
    return z.lse


def _mean(sums: Array, counts: Array) -> Array:
    return sums / jnp.maximum(counts.astype(sums.dtype), 1)[:, None]


def _as_placed(x: Array, like: Array) -> Array:
    """Returns `x` laid over the devices of an explicit mesh as `like` is."""
    sharding = jax.typeof(like).sharding
    if not any(sharding.spec) and not any(jax.typeof(x).sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, sharding.spec))
