"""z, the second operand: a batch of logits as a loss sees it, and the one door through which every loss reaches it.

A loss is a formula over `Logits` and, where it has them, targets, labels and numbers per example:

    def poly1(z, y, epsilon):                           # Leng et al. 2022
        return -z.log_prob(y) + epsilon * (1 - jnp.exp(z.log_prob(y)))

    losses = on_logits(poly1, logits, {"y": labels, "epsilon": 1.0}, where=where)

`on_logits` checks the arguments by name, moves the classes last, widens, masks and shards, and remembers only the
logits and a few numbers per row for the backward pass.

A formula runs twice while it is traced: once to learn which sums over classes it asks for, once with the sums. So the
maximum, Σ exp and every linear sum come out of one pass over the logits on TPU and GPU (`_row_sums`). In the first run
the sums are NaN: a target whose weights depend on the logits would be NaN in the second run, not silently wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jax_ls import checks, fences
from jax_ls.algebra import Scaled, Sum, Target
from jax_ls.class_axis import AxisName, ClassAxis, align, class_axis_is_split, multiply, stand_in
from jax_ls.targets import Dense, OneHot, Uniform

__all__ = ["Batch", "Formula", "Logits", "at_least", "at_most", "is_correct", "on_logits"]

Formula = Callable[..., Any]

NO_CLASS = -(2**31)
"""The likeliest class of a row whose logits are not finite numbers."""

REMEMBERED = "jax_ls.sum_over_classes"
"""Name of the sums over classes, for checkpoint policies: a few numbers per row, kept for the backward pass."""


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
    return z.likeliest == labels


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


Sums = dict[str, Array]
"""What one pass over the logits gives, (*batch,) each: the names are those of `_Pass`."""


@dataclass
class _Wanted:
    """Which sums over classes a formula asked for, while it ran for the first time."""

    names: set[str] = field(default_factory=set)
    weights: list[Array | None] = field(default_factory=list)


class Logits:
    """A batch of logits as a formula sees it: the sums over classes, each an array (*batch,).

    Every method counts only the classes that exist, over all devices that they are split over. See `on_logits`.

    Example:
      >>> max_suppression = lambda z: z.pick(z.likeliest) - z.mean()
      >>> print(on_logits(max_suppression, jnp.array([[3.0, 0.0, 0.0]])))
      [2.]
    """

    def __init__(
        self, z: Array, narrow: Array, axis: ClassAxis, class_weights: Array | None, sums: Sums | None = None
    ) -> None:
        # z is wide and masked; `narrow` are the logits in their own dtype, from which single ones are gathered.
        self._z, self._narrow, self._class_weights, self._sums = z, narrow, class_weights, sums
        self._axis = _LogitsAxis(**vars(axis), logits=self)
        self._unknown = jnp.full_like(jnp.max(z, axis=-1, initial=-jnp.inf), jnp.nan)
        self._wanted, self._answered = _Wanted(), 0
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
        """Returns max_k p_k = 1 / Σ_k exp(z_k − max z)."""
        return 1 / self._ask("total")

    @property
    def lse(self) -> Array:
        """log Σ_k exp z_k."""
        return self.log_total + self.shift

    @property
    def likeliest(self) -> Array:
        """The class of the largest logit, integers; of those that tie, the first."""
        found = self._ask("likeliest")
        return jnp.where(jnp.isnan(found), NO_CLASS, found).astype(jnp.int32)

    @property
    def num_classes(self) -> Array:
        """K, the number of classes that exist: () or (*batch,)."""
        return self._axis.count().astype(self._z.dtype)

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
        return align(q.probs_on(self._axis).astype(self._z.dtype), self._z.ndim)

    def negentropy(self, q: Target) -> Array:
        """Σ_k q_k log q_k, with 0 log 0 = 0; NaN where q has negative entries."""
        probs = self._weighted(q).probs_on(self._axis)
        terms = jnp.where(probs == 0, 0, probs * jnp.log(jnp.where(probs == 0, 1, probs)))
        return _remembered(fences.end_of_sum(self._axis.psum(jnp.sum(terms, axis=-1)))).astype(self._z.dtype)

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

    def sum(self, term: Callable[..., Array], *rows: ArrayLike, shifted: bool = True) -> Array:
        """Returns Σ_k term(z_k − max z, *rows), one more pass over the logits, for what the other methods cannot say.

        Args:
          term: an elementwise function of the shifted logits (*batch, K) and of each of `rows`, which come as
            (*batch, 1). A constant that `term` spreads over all classes had better be one of `rows`.
          rows: numbers () or (*batch,).
          shifted: if False, `term` gets z_k itself.
        """
        batch, dtype = self._z.shape[:-1], self._z.dtype
        top = self.shift if shifted else jnp.zeros(batch, dtype)
        top, *shown = fences.unshared(top, *(jnp.broadcast_to(jnp.asarray(x, dtype), batch) for x in rows))
        z, exists = self._z, self._axis.where
        if exists is not None:
            exists = align(exists, z.ndim)
            z = jnp.where(exists, z, 0)
        terms = term(z - top[..., None] if shifted else z, *(x[..., None] for x in shown))
        terms = terms if exists is None else jnp.where(exists, terms, 0)
        return _remembered(fences.end_of_sum(self._axis.psum(jnp.sum(terms, axis=-1))))

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
        w = align(weights, self._z.ndim).astype(self.dtype)
        beneath = self._axis.pmax(jnp.max(jnp.where(w > 0, self._z, -jnp.inf), axis=-1)) - self.shift
        beneath = jnp.where(jnp.isfinite(beneath), beneath, 0)
        # Only where w is 0 can the exponent be large; that derivative in w stays finite.
        return jnp.log(self.sum(lambda d, shift: w * jnp.exp(jnp.minimum(d - shift, 60)), beneath)) + beneath

    def _weighted(self, q: Target) -> Target:
        return q if self._class_weights is None else q.weighted(self._class_weights)

    def _ask(self, name: str) -> Array:
        if self._sums is None:
            self._wanted.names.add(name)
            return self._unknown
        return self._sums[name]

    def _linear(self, weights: Array | None) -> Array:
        """Σ_k w_k (z_k − max z)."""
        if self._sums is None:
            self._wanted.weights.append(weights if weights is None else _laid_like(weights, self._z))
            return self._unknown
        self._answered += 1
        return self._sums[f"linear {self._answered - 1}"]

    def _take(self, index: Array) -> Array:
        """Returns z_i − max z at local classes i (*batch, S), which are clipped into range."""
        picked = _remembered(_pick(self._z, jax.lax.stop_gradient(self._narrow), index))
        if self._axis.rows is not None:
            picked = jnp.where(self._axis.rows[..., None], picked, 0)
        return picked - self.shift[..., None]


@dataclass(frozen=True)
class _LogitsAxis(ClassAxis):
    """A class axis whose sums over the logits are those of `Logits`; over other values it is a `ClassAxis`."""

    logits: Any = None

    def sum(self, values: Array, q: Array | None) -> Array:
        return self.logits._linear(q) if values is self.logits.values else super().sum(values, q)

    def take(self, values: Array, labels: Array) -> Array:
        if values is not self.logits.values or class_axis_is_split(values):
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
        checks.check_integer("ignore_index", ignore_index)
        kept = labels.labels != ignore_index
        return replace(self, where=kept if self.where is None else kept & self.where)

    def classes_last(self, x: Array) -> Array:
        """Returns an array of the logits' shape as it was given with its classes last."""
        return jnp.moveaxis(x, self.axis, -1)

    def apply(self, formula: Formula, **operands: Any) -> Any:
        """Returns formula(Logits, **operands), masked. Operands are targets and arrays () or (*batch,)."""
        return _evaluate(
            formula,
            self.class_axis_name,
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


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(
    jax.checkpoint, static_argnums=(0, 1), policy=jax.checkpoint_policies.save_only_these_names(REMEMBERED)
)
def _evaluate(
    formula: Formula,
    class_axis_name: AxisName | None,
    logits: Array,
    operands: dict[str, Any],
    where: Array | None,
    class_where: Array | None,
    class_weights: Array | None,
    z_loss: Array | None,
) -> Any:
    """Returns the formula over masked logits. The backward pass recomputes all but the `_remembered` sums."""
    z = logits.astype(checks.wide(logits.dtype))
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
        return value if z_loss is None else value + z_loss.astype(value.dtype) * jnp.square(z.lse)

    first = Logits(z, logits, axis, class_weights)
    loss(first)
    wanted = first._wanted
    sums = _row_sums(_Pass(frozenset(wanted.names), class_axis_name), z, tuple(wanted.weights))
    value = loss(Logits(z, logits, axis, class_weights, sums))
    if where is None:
        return value
    return jax.tree.map(lambda x: jnp.where(where, x, jnp.zeros((), x.dtype)), value)


def _masked(x: Any, where: Array) -> Any:
    """Returns an operand with stand-ins for the examples that do not count, so that their NaN cannot spread."""
    if isinstance(x, Target):
        return x.counted(where)
    return x if x.ndim == 0 and where.ndim else jnp.where(where, x, stand_in(x.dtype))


def _remembered(x: Array) -> Array:
    """Returns a sum over classes under the name by which it is kept for the backward pass."""
    return checkpoint_name(x, REMEMBERED)


# The one pass over the logits.


class _Pass(NamedTuple):
    """What is static of a pass: which sums are asked for, and the mesh axis of the classes.

    "top" is max_k z_k. "ties" counts the classes that have it. "likeliest" is the first of them, as a real number.
    "total" is Σ_k eᵈ and "moment" Σ_k d eᵈ with d = z_k − max z. "linear i" is Σ_k w_k d for the i-th weights.
    """

    names: frozenset[str]
    class_axis_name: AxisName | None

    def __contains__(self, name: object) -> bool:
        return name in self.names


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _row_sums(wanted: _Pass, z: Array, weights: tuple[Array | None, ...]) -> Sums:
    """Returns the sums over the classes of wide logits (*batch, K) that are wanted."""
    if not wanted.names and not weights:
        return {}
    implementations = {
        "cpu": _separate_sums,
        "cuda": functools.partial(_one_reduction, longest=CUDA_LONGEST_ROW),
        "rocm": functools.partial(_one_reduction, longest=CUDA_LONGEST_ROW),
        "default": _one_reduction,
    }
    chosen = {platform: functools.partial(f, wanted) for platform, f in implementations.items()}
    sums = jax.lax.platform_dependent(z, weights, **chosen)
    return sums if wanted.class_axis_name is None else _over_devices(wanted, z, weights, sums)


@functools.partial(_row_sums.defjvp, symbolic_zeros=True)
def _row_sums_jvp(wanted: _Pass, primals: Any, tangents: Any) -> Any:
    z, weights = primals
    dz, dweights = tangents
    sums = jax.tree.map(_remembered, _row_sums(wanted, z, weights))
    derivatives = {name: jnp.zeros_like(x) for name, x in sums.items()}
    if not sums:
        return sums, derivatives
    axis = ClassAxis(class_axis_name=wanted.class_axis_name)
    top = sums["top"][..., None]

    def summed(terms: Array) -> Array:
        return axis.psum(jnp.sum(terms, axis=-1))

    if not isinstance(dz, SymbolicZero):
        share = jnp.exp(z - top)
        if "ties" in wanted:
            derivatives["top"] = summed(jnp.where(z == top, dz, 0)) / sums["ties"]
        if "total" in wanted:
            derivatives["total"] = summed(share * dz)
        if "moment" in wanted:
            derivatives["moment"] = summed(share * (1 + fences.finite(z - top)) * dz)
        for i, w in enumerate(weights):
            derivatives[f"linear {i}"] = summed(dz if w is None else dz * align(w, z.ndim))
    for i, dw in enumerate(dweights):
        if dw is not None and not isinstance(dw, SymbolicZero):
            # Bounded, for what is multiplied by it and by 0 afterwards to stay finite.
            d = jnp.maximum(z - top, -jnp.sqrt(jnp.finfo(z.dtype).max))
            derivatives[f"linear {i}"] += summed(d * align(dw, z.ndim))
    return sums, derivatives


def _separate_sums(wanted: _Pass, z: Array, weights: tuple[Array | None, ...]) -> Sums:
    """Returns each sum by itself, over z − max z: XLA on CPU takes four times as long for a variadic reduction."""

    def summed(terms: Array) -> Array:
        return fences.end_of_sum(jnp.sum(terms, axis=-1))

    def shifted(*constants: float) -> tuple[Array, ...]:
        """Returns z − max z and constants, as arrays that no other sum shares."""
        rows = fences.unshared(top, *(jnp.full_like(top, x) for x in constants))
        return z - rows[0][..., None], *(x[..., None] for x in rows[1:])

    top = jnp.max(z, axis=-1, initial=-jnp.inf)
    top = fences.end_of_sum(jnp.where(top == -jnp.inf, fences.lowest(z.dtype), top))
    sums = {"top": top}
    if "ties" in wanted:
        d, steep, one, zero = shifted(1e30, 1, 0)
        sums["ties"] = summed(jnp.maximum(one + steep * d, zero))
    if "total" in wanted:
        sums["total"] = summed(jnp.exp(z - top[..., None]))
    if "moment" in wanted:
        d, low = shifted(fences.lowest(z.dtype))
        # p · log p is 0 where log p is −inf.
        sums["moment"] = summed(jnp.exp(d) * jnp.maximum(d, low))
    if "likeliest" in wanted:
        sums["likeliest"] = _first_at(z, top)
    for i, w in enumerate(weights):
        d, *_ = shifted()
        sums[f"linear {i}"] = fences.infinite(summed(_weighted(d, w)))
    return sums


def _laid_like(x: Array, z: Array) -> Array:
    """Returns class weights laid over an explicit mesh as the logits are. Otherwise XLA would gather the logits."""
    sharding = jax.typeof(z).sharding
    if not any(sharding.spec):
        return x
    spec = PartitionSpec(*sharding.spec[z.ndim - x.ndim :])
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def _weighted(values: Array, w: Array | None) -> Array:
    # Values first: with the shared factor first, XLA on CPU takes three times as long.
    return values if w is None else fences.finite(values) * align(w, values.ndim)


def _first_at(z: Array, top: Array) -> Array:
    """Returns the first class whose logit is `top`, as a real number; NaN where `top` is not finite.

    As a maximum of real numbers: XLA on CPU takes five times as long over an argmax.
    """
    # Numbers below 1, which the least difference of all, 2⁻¹²⁶, times the largest float exceeds.
    scale = 2.0**-31
    numbers = jnp.arange(z.shape[-1], dtype=jnp.int32).astype(z.dtype) * scale
    row_top, numbers = fences.unshared(top, numbers)
    below = (z - row_top[..., None]) * jnp.finfo(z.dtype).max
    return jnp.max(below - align(numbers, z.ndim), axis=-1, initial=-jnp.inf) / -scale


CUDA_LONGEST_ROW = 16384
"""Longest row that XLA on GPU reduces in one kernel. It splits longer ones in about √K parts, which it writes out."""


def _one_reduction(wanted: _Pass, z: Array, weights: tuple[Array | None, ...], longest: int | None = None) -> Sums:
    """Returns all sums from one variadic reduction, which reads the logits once.

    It is an online softmax: the sums are rescaled whenever the maximum grows (Milakov and Gimelshein, Online normalizer
    calculation for softmax, 2018).
    """
    low = fences.lowest(z.dtype)
    ones, zeros = jnp.ones_like(z), jnp.zeros_like(z)
    operands: dict[str, Array] = {"top": fences.finite(z)}
    starts: dict[str, float] = {"top": low}
    if "ties" in wanted:
        operands["ties"], starts["ties"] = ones, 0
    if "total" in wanted or "moment" in wanted:
        operands["total"], starts["total"] = ones, 0
    if "moment" in wanted:
        operands["moment"], starts["moment"] = zeros, 0
    if "likeliest" in wanted:
        index = jnp.arange(z.shape[-1], dtype=jnp.int32)
        operands["likeliest"], starts["likeliest"] = jnp.broadcast_to(align(index, z.ndim), z.shape), z.shape[-1]
    for i, w in enumerate(weights):
        shown = ones if w is None else jnp.broadcast_to(align(w, z.ndim).astype(z.dtype), z.shape)
        operands[f"linear {i}"], starts[f"linear {i}"] = zeros, 0
        operands[f"mass {i}"], starts[f"mass {i}"] = shown, 0
    order = tuple(operands)

    def combine(left: Any, right: Any) -> Any:
        a, b = dict(zip(order, left, strict=True)), dict(zip(order, right, strict=True))
        step = a["top"] - b["top"]
        left_wins = step > 0
        out = {"top": jnp.maximum(a["top"], b["top"])}
        small = jnp.exp(-jnp.abs(step))

        def scaled(x: Array, y: Array) -> Array:
            return jnp.where(left_wins, x + y * small, x * small + y)

        if "ties" in a:
            of_winner = jnp.where(left_wins, a["ties"], b["ties"])
            out["ties"] = jnp.where(step == 0, a["ties"] + b["ties"], of_winner)
        if "total" in a:
            out["total"] = scaled(a["total"], b["total"])
        if "moment" in a:
            # Σ eᵈ d of the side whose maximum is exceeded by |step|: d falls by |step|.
            lost = jnp.where(left_wins, b["total"], a["total"]) * jnp.abs(step) * small
            out["moment"] = scaled(a["moment"], b["moment"]) - lost
        if "likeliest" in a:
            first = jnp.where(left_wins, a["likeliest"], b["likeliest"])
            out["likeliest"] = jnp.where(step == 0, jnp.minimum(a["likeliest"], b["likeliest"]), first)
        for i in range(len(weights)):
            out_of, mass = f"linear {i}", f"mass {i}"
            moved = jnp.where(left_wins, -b[mass], a[mass]) * step
            out[out_of], out[mass] = a[out_of] + b[out_of] + moved, a[mass] + b[mass]
        return tuple(out[name] for name in order)

    def reduced(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        starting = tuple(jnp.asarray(starts[name], x.dtype) for name, x in zip(order, arrays, strict=True))
        return tuple(jax.lax.reduce(arrays, starting, combine, (arrays[0].ndim - 1,)))

    arrays = tuple(operands.values())
    parts = _parts(z, longest)
    if parts > 1:
        arrays = reduced(tuple(x.reshape(*x.shape[:-1], parts, -1) for x in arrays))
    found = dict(zip(order, reduced(arrays), strict=True))
    sums = {name: x for name, x in found.items() if name == "top" or name in wanted}
    top = sums["top"]
    if "total" in wanted:
        sums["total"] = jnp.where(top <= low, 0, found["total"])
    if "likeliest" in wanted:
        is_known = jnp.isfinite(top) & (top > low)
        sums["likeliest"] = jnp.where(is_known, found["likeliest"].astype(z.dtype), jnp.nan)
    for i in range(len(weights)):
        sums[f"linear {i}"] = fences.infinite(found[f"linear {i}"])
    return sums


def _parts(z: Array, longest: int | None) -> int:
    """Returns into how many equal parts of at most `longest` classes a row is divided; 1 if no number divides it."""
    size = z.shape[-1]
    if longest is None or class_axis_is_split(z) or size <= longest:
        return 1
    fewest = -(-size // longest)
    return next((parts for parts in range(fewest, 8 * fewest) if size % parts == 0), 1)


def _over_devices(wanted: _Pass, z: Array, weights: tuple[Array | None, ...], local: Sums) -> Sums:
    """Returns the sums over all devices that the classes are split over, from the sums of each device."""
    axis = ClassAxis(z.shape[-1], class_axis_name=wanted.class_axis_name)
    top = axis.pmax(local["top"])
    step = local["top"] - top
    scale = jnp.exp(step)
    sums = {"top": top}
    if "ties" in wanted:
        sums["ties"] = axis.psum(jnp.where(step == 0, local["ties"], 0))
    if "total" in wanted:
        sums["total"] = axis.psum(local["total"] * scale)
    if "moment" in wanted:
        sums["moment"] = axis.psum((local["moment"] + local["total"] * step) * scale)
    if "likeliest" in wanted:
        # NaN where the local maximum is not finite: then the class is another device's.
        number = local["likeliest"] + jnp.asarray(axis.start).astype(z.dtype)
        here = jnp.where((step == 0) & ~jnp.isnan(number), number, jnp.inf)
        first = -axis.pmax(-here)
        sums["likeliest"] = jnp.where(jnp.isinf(first), jnp.nan, first)
    for i, w in enumerate(weights):
        mass = z.shape[-1] if w is None else jnp.broadcast_to(jnp.sum(w, axis=-1).astype(z.dtype), top.shape)
        sums[f"linear {i}"] = axis.psum(local[f"linear {i}"] + mass * step)
    return sums


# One logit of a row.


@jax.custom_jvp
def _pick(z: Array, narrow: Array, index: Array) -> Array:
    """Returns z at classes (*batch, S), gathered from `narrow` before it is widened.

    A gather from wide logits makes XLA on TPU write them out.
    """
    return jnp.take_along_axis(narrow, index, axis=-1, mode="clip").astype(z.dtype)


MOST_COMPARED = 32
"""How many labels of an example are found by comparison in the gradient. More are scattered."""


@functools.partial(_pick.defjvp, symbolic_zeros=True)
def _pick_jvp(primals: Any, tangents: Any) -> Any:
    z, narrow, index = primals
    dz = tangents[0]
    picked = _pick(z, narrow, index)
    if isinstance(dz, SymbolicZero):
        return picked, jnp.zeros_like(picked)
    if index.shape[-1] > MOST_COMPARED:
        return picked, jnp.take_along_axis(dz, index, axis=-1, mode="clip")
    # A scatter, which a gather differentiates to, would write a wide array of the logits' size.
    classes = align(jnp.arange(z.shape[-1], dtype=index.dtype), z.ndim)
    hits = (jnp.sum(jnp.where(index[..., s, None] == classes, dz, 0), axis=-1) for s in range(index.shape[-1]))
    return picked, jnp.stack(list(hits), axis=-1)
