"""z, the second operand: a batch of logits as a loss sees it, and the one door through which every loss reaches it.

A loss is a formula over `Logits` and, where it has them, targets, labels and numbers per example:

    def poly1(z, y, epsilon):                           # Leng et al. 2022
        return -z.log_prob(y) + epsilon * (1 - jnp.exp(z.log_prob(y)))

    losses = on_logits(poly1, logits, {"y": labels, "epsilon": 1.0}, where=where)

`on_logits` checks the arguments by name, moves the classes last, widens, masks and shards, and remembers only the
logits and a few numbers per row for the backward pass.

A formula runs twice while it is traced: once to learn which sums over classes it asks for, once with the sums. So the
maximum, Σ exp and every linear sum come out of one pass over the logits on TPU and GPU: `jax_ls.row_sums`. In the first
run the sums are NaN: a target whose weights depend on the logits would be NaN in the second run, not silently wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jax_ls import checks, fences
from jax_ls.algebra import Scaled, Sum, Target
from jax_ls.class_axis import AxisName, ClassAxis, align, laid_as, multiply, times_its_log, with_stand_ins
from jax_ls.row_sums import REMEMBERED, Pass, Sums, pick, remembered, row_sums
from jax_ls.targets import Dense, OneHot, Uniform
from jax_ls.term_sums import term_sums

__all__ = ["Batch", "Formula", "Logits", "at_least", "at_most", "is_correct", "on_logits"]

Formula = Callable[..., Any]

NO_CLASS = -(2**31)
"""The likeliest class of a row whose logits are not finite numbers."""


def on_logits(
    formula: Formula,
    logits: ArrayLike,
    operands: Mapping[str, Any] | None = None,
    *,
    where: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Any:
    """Returns the losses of a formula: `formula(Logits, **operands)` for each example.

    Args:
      formula: a function of `Logits` and the operands by name; it returns an array (*batch,), or a tree of them.
        Without an outer `jit`, a formula that is defined anew for each call is compiled anew for each call.
      logits: z, real numbers with K classes on `axis`; sums over K accumulate in float32 or wider.
      operands: by name, targets, integers (*batch,) for labels, and real numbers () or (*batch,). Arrays of the logits'
        shape or (K,) become `Target`s beforehand: `Dense(array)`.
      where: boolean (*batch,), the examples that count; elsewhere results and gradients are exactly 0.
      class_where: boolean (K,) or the logits' shape, the classes that exist; no others touch the result.
      class_weights: (K,), multiplies q_k in `z.dot(q)` and `z.mass(q)`.
      z_loss: (), or (*batch,), the weight of lse(z)², which is added to the result.
      axis: the class axis of the logits, and of arrays in their shape.
      class_axis_name: inside `jax.shard_map`, the mesh axis that K is split over; labels stay global, arrays over
        classes come as the local slice.

    Returns:
      What the formula returns, in float32 or wider.

    Raises:
      TypeError: an operand that is no target, integers or real numbers.

    Example:
      >>> poly1 = lambda z, y, epsilon: -z.log_prob(y) + epsilon * (1 - jnp.exp(z.log_prob(y)))
      >>> print(on_logits(poly1, jnp.zeros((1, 4)), {"y": jnp.array([2]), "epsilon": 1.0}).round(4))
      [2.1363]

    References:
      Leng et al., PolyLoss, 2022 (the example).
    """
    batch = Batch.of(logits, where, class_where, class_weights, z_loss, axis, class_axis_name)
    return batch.apply(formula, **{name: _as_operand(name, x, batch.shape) for name, x in (operands or {}).items()})


def is_correct(logits: ArrayLike, labels: Array, class_where: ArrayLike | None = None, axis: int = -1) -> Array:
    """Returns whether argmax_k z_k over the classes that exist is y, (*batch,); of those that tie, the first is taken.

    False where there are no finite numbers to compare.
    """
    return on_logits(_is_likeliest, logits, {"labels": labels}, class_where=class_where, axis=axis)


def _is_likeliest(z: Logits, labels: Array) -> Array:
    return z.is_likeliest(labels)


@jax.custom_jvp
def at_least(x: Array, low: Array) -> Array:
    """Returns max(x, low) with the derivative of x: arithmetic, where a select would be written out."""
    return jnp.maximum(x, low)


@at_least.defjvp
def _at_least_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    return at_least(*primals), tangents[0]


@jax.custom_jvp
def at_most(x: Array, high: Array) -> Array:
    """Returns min(x, high) with the derivative of x."""
    return jnp.minimum(x, high)


@at_most.defjvp
def _at_most_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    return at_most(*primals), tangents[0]


@dataclass
class _Wanted:
    """Which sums over classes a formula asked for, while it ran for the first time."""

    names: set[str] = field(default_factory=set)
    weights: list[Array | None] = field(default_factory=list)
    in_order: list[str] = field(default_factory=list)

    def of_weights(self, kind: str, weights: Array | None) -> None:
        """Adds a sum of weights. Those that came before, the same array, are read once for both."""
        place = next((i for i, x in enumerate(self.weights) if x is weights), len(self.weights))
        if place == len(self.weights):
            self.weights.append(weights)
        self.in_order.append(f"{kind} {place}")
        self.names.add(self.in_order[-1])


class Logits:
    """A batch of logits as a formula sees it: the sums over classes, each an array (*batch,).

    Every method counts only the classes that exist, over all devices that they are split over. See `on_logits`.

    Example:
      >>> max_suppression = lambda z: z.pick(z.likeliest) - z.mean()
      >>> print(on_logits(max_suppression, jnp.array([[3.0, 0.0, 0.0]])))
      [2.]
    """

    def __init__(
        self,
        z: Array,
        narrow: Array,
        axis: ClassAxis,
        class_weights: Array | None,
        sums: Sums | None = None,
        in_order: Iterable[str] = (),
    ) -> None:
        # z is wide and masked; `narrow` are the logits in their own dtype, from which single ones are gathered.
        self._z, self._narrow, self._class_weights, self._sums = z, narrow, class_weights, sums
        self._axis = _LogitsAxis(**vars(axis), logits=self)
        self._unknown = jnp.full_like(jnp.max(z, axis=-1, initial=-jnp.inf), jnp.nan)
        self._wanted, self._in_order = _Wanted(), iter(in_order)
        self.values = z - self.shift[..., None] if sums else z

    @property
    def top(self) -> Array:
        """max_k z_k; the classes that tie share its derivative, as in `jnp.max`."""
        self._ask("ties")
        return self._ask("top")

    @property
    def shift(self) -> Array:
        """max_k z_k as a constant for differentiation. `log_total`, `dot` and `mean` are relative to it."""
        return jax.lax.stop_gradient(self._ask("top"))

    @property
    def log_total(self) -> Array:
        """lse(z) − max z = log Σ_k exp(z_k − max z), from 0 to log K."""
        return jnp.log(self._ask("total"))

    @property
    def top_prob(self) -> Array:
        """Returns max_k p_k = 1 / Σ_k exp(z_k − max z); the classes that tie share its derivative."""
        return jnp.exp(self.top - self.shift) / self._ask("total")

    @property
    def lse(self) -> Array:
        """log Σ_k exp z_k."""
        return self.log_total + self.shift

    @property
    def likeliest(self) -> Array:
        """The class of the largest logit, integers; of those that tie, the first."""
        found = self._ask("likeliest")
        return jnp.where(jnp.isnan(found), NO_CLASS, found).astype(jnp.int32)

    def is_likeliest(self, y: Array) -> Array:
        """Returns whether labels (*batch,), of any integer dtype, are the class of the largest logit."""
        return self.likeliest.astype(y.dtype) == y

    @property
    def num_classes(self) -> Array:
        """K, the number of classes that exist: () or (*batch,)."""
        return self._axis.row_count().astype(self._z.dtype)

    def dot(self, q: Target) -> Array:
        """⟨q, z − max z⟩."""
        return self._weighted(q).contract(self.values, self._axis)

    def mass(self, q: Target) -> Array:
        """Σ_k q_k: (*batch,), or () where it is the same for all."""
        return self._weighted(q).contract(None, self._axis).astype(self._z.dtype)

    def cross_entropy(self, q: Target) -> Array:
        """M · lse(z) − ⟨q, z⟩ with M = Σ_k q_k."""
        # The product first: it says by name what does not fit.
        dot = self.dot(q)
        return self.mass(q) * self.log_total - dot

    @property
    def dtype(self) -> jnp.dtype:
        """float32, or wider where the logits are."""
        return self._z.dtype

    def probs(self, q: Target) -> Array:
        """q written out over the classes of this device: (*batch, K), or (*batch, 1) where all have the same share."""
        if isinstance(q, Uniform) and q.class_where is None and self._axis.where is None:
            (share,) = fences.unshared(1 / self.num_classes)
            return jnp.broadcast_to(share, (*self._z.shape[:-1], 1))
        probs = q.probs_on(self._axis.apart()).astype(self._z.dtype)
        checks.assert_class_values("target", probs, self._z)
        return align(probs, self._z.ndim)

    def negentropy(self, q: Target) -> Array:
        """Σ_k q_k log q_k, with 0 log 0 = 0; NaN where q has negative entries.

        The derivative in a q_k of 0 is −1e30 in place of −∞: times the 0 of a class that never gets mass, −∞ is NaN.
        """
        terms = times_its_log(self._weighted(q).probs_on(self._axis.apart()))
        return remembered(fences.end_of_sum(self._axis.psum(jnp.sum(terms, axis=-1)))).astype(self._z.dtype)

    def pick(self, y: Array) -> Array:
        """z_y − max z at labels (*batch,); NaN for a label that names no class."""
        return self._axis.pick(self.values, y[..., None])[..., 0]

    def contains(self, y: Array) -> Array:
        """Returns whether labels (*batch,) name classes that exist."""
        return self._axis.contains(y[..., None])[..., 0]

    def log_prob(self, y: Array) -> Array:
        """log p_y at labels (*batch,); NaN for a label that names no class."""
        return self.pick(y) - self.log_total

    def log_rival(self, y: Array) -> Array:
        """log max_{k≠y} p_k at labels (*batch,), as a constant; −inf where there is no other class."""
        beneath = (1 - self._axis.away(y, self.dtype)) * fences.lowest(self.dtype)
        others = jax.lax.stop_gradient(self._z) + beneath
        top = fences.infinite(self._axis.pmax(jnp.max(others, axis=-1)))
        return (top - self.shift) - jax.lax.stop_gradient(self.log_total)

    def mean(self) -> Array:
        """mean_k z_k − max z."""
        return self._axis.mean(self.values)

    def entropy(self) -> Array:
        """H(p) = −Σ_k p_k log p_k."""
        # In this order: "moment" needs "total" on a mesh.
        return self.log_total - self._ask("moment") / self._ask("total")

    def sum(self, term: Callable[..., Any], *rows: ArrayLike, shifted: bool = True) -> Any:
        """Returns Σ_k term(z_k − max z, *rows), one more pass over the logits, for what the other methods cannot say.

        Args:
          term: an elementwise function of the shifted logits (*batch, K) and of each of `rows`, which come as
            (*batch, 1). A constant that `term` spreads over all classes had better be one of `rows`. It may return a
            tree of arrays, whose sums one pass takes on TPU.
          rows: numbers () or (*batch,).
          shifted: if False, `term` gets z_k itself.
        """
        batch, dtype = self._z.shape[:-1], self._z.dtype
        shown = [jnp.broadcast_to(jnp.asarray(x, dtype), batch) for x in rows]
        sums = term_sums(term, self._z, self.shift if shifted else None, shown, self._axis.where)
        return jax.tree.map(lambda x: remembered(self._axis.psum(x)), sums)

    def expect(self, q: Target, term: Callable[..., Array], *rows: ArrayLike) -> Array:
        """Returns Σ_k q_k term(log p_k, *rows), for what is linear in the target but not in the logits.

        Takes one more pass over the logits for each part of the target that is not a label, and none for labels.

        Args:
          q: a target.
          term: an elementwise function of log p and of each of `rows`; finite for log p from −1e30 to 0.
          rows: numbers () or (*batch,).
        """
        if isinstance(q, Sum):
            return self.expect(q.left, term, *rows) + self.expect(q.right, term, *rows)
        if isinstance(q, Scaled):
            return multiply(q.weight.astype(self.dtype), self.expect(q.target, term, *rows))
        if isinstance(q, OneHot):
            # The mass of a label is the weight of its class.
            of_label = term(at_least(self.log_prob(q.labels), jnp.asarray(-1e30, self.dtype)), *rows)
            return self.mass(q) * fences.infinite(of_label)
        probs = self.probs(q if self._class_weights is None else self._weighted(q))

        def weighted(d: Array, log_total: Array, low: Array, *rows: Array) -> Array:
            return term(at_least(d - log_total, low), *rows) * probs

        return fences.infinite(self.sum(weighted, self.log_total, -1e30, *rows))

    def log_sum(self, weights: Array) -> Array:
        """Returns log Σ_k w_k exp(z_k) − max z for weights (*batch, K) or (K,) of no negative entry."""
        return jnp.log(self._of_weights("seen", weights)) + self._of_weights("beneath", weights)

    def _weighted(self, q: Target) -> Target:
        return q if self._class_weights is None else q.weighted(self._class_weights)

    def _ask(self, name: str) -> Array:
        if self._sums is None:
            self._wanted.names.add(name)
            return self._unknown
        return self._sums[name]

    def _of_weights(self, kind: str, weights: Array | None) -> Array:
        """A sum of `Pass` with weights, (*batch, K) or (K,); None for ones."""
        if self._sums is None:
            self._wanted.of_weights(kind, weights)
            return self._unknown
        return self._sums[next(self._in_order)]

    def _take(self, index: Array) -> Array:
        """Returns z_i − max z at local classes i (*batch, S), which are clipped into range."""
        picked = remembered(pick(self._z, jax.lax.stop_gradient(self._narrow), index))
        if self._axis.rows is not None:
            picked = jnp.where(self._axis.rows[..., None], picked, 0)
        return picked - self.shift[..., None]


@dataclass(frozen=True)
class _LogitsAxis(ClassAxis):
    """A class axis whose sums over the logits are those of `Logits`; over other values it is a `ClassAxis`."""

    logits: Any = None

    def mean(self, values: Array | None) -> Array:
        where = self.where
        if values is self.logits.values and self.weights is None and where is not None and self._is_read_by_row(where):
            return self.logits._of_weights("linear", where) / self.mass(where)
        return super().mean(values)

    def dot(self, q: Array, values: Array | None) -> Array:
        if values is self.logits.values and self.where is None and self.weights is None:
            return self.logits._of_weights("linear", q)
        return super().dot(q, values)

    def mass(self, q: Array) -> Array:
        return self.logits._of_weights("mass", q) if self._is_read_by_row(q) else super().mass(q)

    def sum(self, values: Array, q: Array | None) -> Array:
        return self.logits._of_weights("linear", q) if values is self.logits.values else super().sum(values, q)

    def _is_read_by_row(self, x: Array) -> bool:
        """Whether `x` has a number for each logit: then the pass over the logits reads it."""
        return x.ndim == self.logits.values.ndim

    def take(self, values: Array, labels: Array) -> Array:
        if values is not self.logits.values:
            return super().take(values, labels)
        index = labels - self.start
        held = (index >= 0) & (index < values.shape[-1])
        taken = self.logits._take(jnp.clip(index, 0, values.shape[-1] - 1))
        return self.psum(jnp.where(held, taken, 0))


@dataclass(frozen=True)
class Batch:
    """The arguments that all losses share, coerced once: the logits with their classes last, masks, weights, z-loss."""

    logits: Array
    axis: int
    where: Array | None
    class_where: Array | None
    class_weights: Array | None
    z_loss: Array | None
    class_axis_name: AxisName | None

    @classmethod
    def of(
        cls,
        logits: ArrayLike,
        where: ArrayLike | None,
        class_where: ArrayLike | None,
        class_weights: ArrayLike | None,
        z_loss: ArrayLike,
        axis: int,
        class_axis_name: AxisName | None,
    ) -> Batch:
        """Returns the batch, or raises by the name of the argument that does not fit."""
        z = checks.as_logits("logits", logits)
        axis = checks.check_axis("axis", axis, z.ndim)
        z = jnp.moveaxis(z, axis, -1)
        batch, classes = z.shape[:-1], z.shape[-1:]
        if where is not None:
            where = checks.as_where("where", where, batch)
        if class_where is not None:
            class_where = checks.as_class_where("class_where", class_where)
            class_where = jnp.moveaxis(class_where, axis, -1) if class_where.ndim == z.ndim else class_where
            checks.assert_class_values("class_where", class_where, z)
        if class_weights is not None:
            class_weights = checks.as_class_values("class_weights", class_weights)
            checks.assert_shape("class_weights", class_weights, [classes], "{shapes}, one weight a class")
        penalty = None
        if not (isinstance(z_loss, int | float) and z_loss == 0):
            penalty = checks.as_weight("z_loss", z_loss)
            checks.assert_shape("z_loss", penalty, [(), batch], "{shapes}, the shape of the batch")
        if class_axis_name is not None:
            checks.check_mesh_axes("class_axis_name", class_axis_name)
        return cls(z, axis, where, class_where, class_weights, penalty, class_axis_name)

    @property
    def shape(self) -> tuple[int, ...]:
        """(*batch,)."""
        return self.logits.shape[:-1]

    @property
    def num_devices(self) -> int:
        """How many devices the classes are split over."""
        return ClassAxis(class_axis_name=self.class_axis_name).num_devices

    def local(self, table: Array) -> Array:
        """Returns the columns of a table (n, K) over all classes whose classes this device holds."""
        if self.class_axis_name is None:
            return table
        size = self.logits.shape[-1]
        return jax.lax.dynamic_slice_in_dim(table, jax.lax.axis_index(self.class_axis_name) * size, size, axis=-1)

    def ignoring(self, labels: Target, ignore_index: int | None) -> Batch:
        """Returns the batch without the examples whose integer label is `ignore_index`."""
        if ignore_index is None:
            return self
        if not isinstance(labels, OneHot):
            came = checks.describe(labels.probabilities) if isinstance(labels, Dense) else type(labels).__name__
            raise TypeError(f"labels: expected integers, for ignore_index to name one, got {came}")
        kept = checks.not_ignored(labels.labels, ignore_index)
        return replace(self, where=kept if self.where is None else kept & self.where)

    def classes_last(self, x: Array) -> Array:
        """Returns an array of the logits' shape as it was given with its classes last."""
        return jnp.moveaxis(x, self.axis, -1)

    def apply(self, formula: Formula, **operands: Any) -> Any:
        """Returns formula(Logits, **operands), masked. Operands are targets and arrays () or (*batch,)."""
        return _evaluate(
            formula,
            self.class_axis_name,
            self.axis < len(self.shape),
            self.logits,
            operands,
            self.where,
            self.class_where,
            self.class_weights,
            self.z_loss,
        )


def _as_operand(name: str, x: Any, batch: tuple[int, ...]) -> Any:
    """Returns an operand as a target, as integers (*batch,), or as real numbers () or (*batch,)."""
    if isinstance(x, Target):
        return x
    if isinstance(x, Array | np.ndarray) and jnp.issubdtype(x.dtype, jnp.integer) and x.ndim == len(batch):
        return checks.as_batch_labels(name, x, batch)
    return checks.as_batch_numbers(name, x, batch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
@functools.partial(
    jax.checkpoint, static_argnums=(0, 1, 2), policy=jax.checkpoint_policies.save_only_these_names(REMEMBERED)
)
def _evaluate(
    formula: Formula,
    class_axis_name: AxisName | None,
    in_columns: bool,
    logits: Array,
    operands: dict[str, Any],
    where: Array | None,
    class_where: Array | None,
    class_weights: Array | None,
    z_loss: Array | None,
) -> Any:
    """Returns the formula over masked logits. The backward pass recomputes all but the `remembered` sums."""
    z = logits.astype(checks.wide(logits.dtype))
    # On an explicit mesh, the logits say how everything lies.
    operands = {name: x.laid_as(z) if isinstance(x, Target) else laid_as(x, z, x.ndim) for name, x in operands.items()}
    where, z_loss = (x if x is None else laid_as(x, z, x.ndim) for x in (where, z_loss))
    class_where, class_weights = (
        x if x is None else laid_as(x, z, x.ndim - 1, over_classes=True) for x in (class_where, class_weights)
    )
    if where is not None and class_where is not None and class_where.ndim == z.ndim:
        class_where = class_where | ~where[..., None]
    if class_where is not None:
        z = jnp.where(align(class_where, z.ndim), z, -jnp.inf)
    if where is not None:
        z = jnp.where(where[..., None], z, 0)
        operands = {name: _masked(x, where) for name, x in operands.items()}
    sharding = jax.typeof(z).sharding
    laid = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[-1])) if sharding.spec[-1] is not None else None
    axis = ClassAxis(z.shape[-1], class_where, where, None, class_axis_name, laid)

    def loss(z: Logits) -> Any:
        value = formula(z, **operands)
        if z_loss is not None and not isinstance(value, Array):
            raise TypeError(f"z_loss: expected a formula of one array, to be added to it, got {type(value).__name__}")
        return value if z_loss is None else value + z_loss.astype(value.dtype) * jnp.square(z.lse)

    first = Logits(z, logits, axis, class_weights)
    loss(first)
    wanted = first._wanted
    weights = tuple(w if w is None else laid_as(w, z, w.ndim - 1, over_classes=True) for w in wanted.weights)
    sums = row_sums(Pass(frozenset(wanted.names), class_axis_name, in_columns), z, weights)
    value = loss(Logits(z, logits, axis, class_weights, sums, wanted.in_order))
    if where is None:
        return value
    return jax.tree.map(lambda x: jnp.where(where, x, jnp.zeros((), x.dtype)), value)


def _masked(x: Any, where: Array) -> Any:
    """Returns an operand with stand-ins for the examples that do not count, so that their NaN cannot spread."""
    if isinstance(x, Target):
        return x.counted(where)
    return x if x.ndim == 0 and where.ndim else with_stand_ins(x, where)
