"""Logits that are never whole, as a formula sees them in class blocks.

A formula of `BlockLogits` runs twice. The first run, in which the logits are only a shape, records the linear sums
⟨w, z⟩ and the labels that it asks for. One sweep over the blocks then takes them all. The second run gets those sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from jax_ls import checks, fences
from jax_ls.algebra import Target
from jax_ls.class_axis import AxisName, ClassAxis, align
from jax_ls.fences import varying, varying_axes
from jax_ls.linear._class_blocks import Blocks, Layer, Sums, sweep, sweep_in_any_mode
from jax_ls.logits import Logits

__all__ = ["BlockLogits", "on_blocks"]


@dataclass
class _Asked:
    """The linear sums and labels that a formula asked for in its first run."""

    weights: list[Any] = field(default_factory=list)
    labels: list[Array] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Unseen:
    """What stands for the logits: a shape, so that whoever computes with them raises at once."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)


class BlockLogits:
    """Logits that are never whole: the sums over classes that a sweep over blocks can take, each (*batch,).

    The methods are those of `jax_ls.logits.Logits`. The ones that need all logits of a token at once are missing.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, axis: ClassAxis, class_weights: Array | None) -> None:
        self.values = _Unseen(shape, dtype)
        self._axis = _BlockAxis(axis.size, axis.where, axis.rows, class_axis_name=axis.class_axis_name, logits=self)
        self._class_weights, self._asked = class_weights, _Asked()
        self._sums: Sums | None = None
        self._answered = [0, 0]

    @property
    def shift(self) -> Array:
        """max_k z_k, as a constant."""
        return self._unknown() if self._sums is None else jax.lax.stop_gradient(self._sums.top)

    @property
    def log_total(self) -> Array:
        """lse(z) − max z."""
        return self._unknown() if self._sums is None else jnp.log(self._sums.total)

    @property
    def lse(self) -> Array:
        """log Σ_k exp z_k."""
        return self.log_total + self.shift

    def dot(self, q: Target) -> Array:
        """⟨q, z − max z⟩."""
        return self._weighted(q).contract(self.values, self._axis)  # pyright: ignore[reportArgumentType]

    def mass(self, q: Target) -> Array:
        """Σ_k q_k."""
        return self._weighted(q).contract(None, self._axis).astype(self.values.dtype)

    cross_entropy = Logits.cross_entropy  # of dot, mass and log_total alone

    def pick(self, y: Array) -> Array:
        """z_y − max z at labels (*batch,); NaN where no class is y."""
        return self._axis.pick(self.values, y[..., None])[..., 0]  # pyright: ignore[reportArgumentType]

    def log_prob(self, y: Array) -> Array:
        """log p_y at labels (*batch,)."""
        return self.pick(y) - self.log_total

    def mean(self) -> Array:
        """mean_k z_k − max z."""
        return self._axis.mean(self.values)  # pyright: ignore[reportArgumentType]

    def __getattr__(self, name: str) -> Any:
        raise TypeError(
            f'plan: class blocks know lse, dot, mass, mean, pick and log_prob of the logits, not {name}: plan="tokens"'
        )

    def _weighted(self, q: Target) -> Target:
        return q if self._class_weights is None else q.weighted(self._class_weights)

    def _unknown(self) -> Array:
        return jnp.full(self.values.shape[:-1], jnp.nan, self.values.dtype)

    def _linear(self, w: Array | None) -> Array:
        """Σ_k w_k (z_k − max z)."""
        if self._sums is None:
            self._asked.weights.append(w)
            return self._unknown()
        self._answered[0] += 1
        return fences.infinite(self._sums.linear[self._answered[0] - 1])

    def _take(self, index: Array) -> Array:
        """z_i − max z at classes (*batch, S) of this device; 0 − max z where it holds none of them."""
        if self._sums is None:
            self._asked.labels.append(index)
            return jnp.full(index.shape, jnp.nan, self.values.dtype)
        self._answered[1] += 1
        return self._sums.picked[self._answered[1] - 1]


@dataclass(frozen=True)
class _BlockAxis(ClassAxis):
    """A class axis whose sums over the logits are those of `BlockLogits`; over other values it is a `ClassAxis`."""

    logits: Any = None

    def sum(self, values: Any, q: Array | None) -> Array:
        return self.logits._linear(q) if values is self.logits.values else super().sum(values, q)

    def take(self, values: Any, labels: Array) -> Array:
        if values is not self.logits.values:
            return super().take(values, labels)
        taken = self.logits._take(labels - self.start)
        return taken - self.logits.shift[..., None]


def on_blocks(
    formula: Callable[..., Any],
    blocks: Blocks,
    layer: Layer,
    operands: dict[str, Any],
    *,
    batch: tuple[int, ...],
    rows: Array | None,
    class_weights: Array | None,
    class_axis_name: AxisName | None,
    any_mode: bool,
) -> Any:
    """Returns formula(BlockLogits, **operands), for hidden (N, D) of tokens (*batch,)."""
    size = blocks.parts * blocks.classes
    axis = ClassAxis(size, where=layer.exists, rows=rows, class_axis_name=class_axis_name)
    z = BlockLogits((*batch, size), checks.wide(layer.hidden.dtype), axis, class_weights)
    try:
        formula(z, **operands)
    except TypeError as error:
        raise TypeError(f'plan: class blocks cannot take this loss or target ({error}); use plan="tokens"') from error
    count = len(layer.hidden)
    weights = [None if w is None else _by_token(w, batch, count) for w in z._asked.weights]
    labels = [jnp.clip(y, -1, size).astype(jnp.int32).reshape(count, y.shape[-1]) for y in z._asked.labels]
    # All alike differ over the mesh axes of tokens and classes: gradients are summed over devices once, outside.
    everywhere = frozenset(name for x in jax.tree.leaves((layer, weights, labels)) for name in varying_axes(x))
    layer, weights, labels = varying((layer, weights, labels), everywhere)
    take = sweep_in_any_mode if any_mode else sweep
    sums, masses = cast(tuple[Sums, list[Array]], take(blocks, layer, weights, labels))
    if class_axis_name is not None:
        sums = _over_devices(axis, sums, masses)
    sums = jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), sums)
    if rows is not None:
        # The stand-in of a label may name no class. Its logit, −inf, would make the slope in ε NaN.
        total = jnp.where(rows, sums.total, 1)
        sums = jax.tree.map(lambda x: jnp.where(rows if x.ndim == rows.ndim else rows[..., None], x, 0), sums)
        sums = sums._replace(total=total)
    z._sums = sums
    return formula(z, **operands)


def _by_token(w: Array, batch: tuple[int, ...], count: int) -> Array:
    """Weights (K,) as they are, else (N, K)."""
    if w.size == w.shape[-1] and (w.ndim == 1 or count != 1):
        return w.reshape(-1)
    return jnp.broadcast_to(align(w, len(batch) + 1), (*batch, w.shape[-1])).reshape(count, w.shape[-1])


def _over_devices(axis: ClassAxis, sums: Sums, masses: Sequence[Array]) -> Sums:
    """The sums over the classes of all devices, from those of each."""
    top = -jax.lax.pmin(-jax.lax.stop_gradient(sums.top), axis.class_axis_name)
    total = axis.psum(sums.total * jnp.exp(sums.top - top))
    linear = tuple(axis.psum(x + m * (sums.top - top)) for x, m in zip(sums.linear, masses, strict=True))
    return Sums(top, total, linear, [axis.psum(x) for x in sums.picked])
