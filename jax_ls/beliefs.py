"""Targets that the model sets itself: p, its likeliest class, and functions of the logits that penalties are made of.

Any loss, weight and sum of targets takes them; of those of mass 0 a cross-entropy leaves nothing but −⟨q, z⟩.

XLA on CPU reads a row once for a sum over classes, as long as what it sums is arithmetic, and shares none of its
arrays with another sum: constants too are arrays of the logits' size once two sums share them. Hence `own`.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from jax_ls import checks
from jax_ls.algebra import Target, pytree
from jax_ls.class_axis import ClassAxis, align, saved
from jax_ls.targets import Uniform


@pytree()
@dataclass(frozen=True, eq=False)
class Belief(Target):
    """q = p, gradient and all: the cross-entropy of p with itself is its entropy."""

    def contract(self, values: jax.Array | None, axis: ClassAxis) -> jax.Array:
        if values is None:
            return jnp.ones(())
        top, floor = own(maximum(values, axis), float(jnp.finfo(values.dtype).min))
        d = values - top[..., None]
        # p · log p is 0 where log p is −inf.
        moment = saved(axis.psum(jnp.sum(jnp.exp(d) * jnp.maximum(d, floor[..., None]), axis=-1)))
        return moment / total(values, axis)


@pytree()
@dataclass(frozen=True, eq=False)
class Likeliest(Target):
    """q = δ of the likeliest class, a constant to differentiation; of those that tie, the first."""

    def contract(self, values: jax.Array | None, axis: ClassAxis) -> jax.Array:
        if values is None:
            return jnp.ones(())
        first = saved(axis.first(jax.lax.stop_gradient(values), maximum(values, axis)))
        return axis.pick(values, first[..., None].astype(jnp.int32))[..., 0]


@pytree(margin=0)
@dataclass(frozen=True, eq=False)
class Beneath(Target):
    """−⟨q, z⟩ = mean_k max(0, max z − z_k − margin), of mass 0."""

    margin: jax.Array

    def contract(self, values: jax.Array | None, axis: ClassAxis) -> jax.Array:
        if values is None:
            return jnp.zeros(())
        top, margin = maximum(values, axis), _of_rows(self.margin, values)
        at, least, zero = own(top, margin, 0)
        depth = _mean(jnp.minimum(values - at[..., None] + least[..., None], zero[..., None]), axis)
        # The share of classes beneath is what the maximum counts in its derivative.
        at, least, zero, one, steep = own(top, jax.lax.stop_gradient(margin), 0, 1, 2e30)
        gap = at[..., None] - jax.lax.stop_gradient(values) - least[..., None]
        gap = jnp.maximum(gap, zero[..., None])
        beneath = jnp.minimum(steep[..., None] * gap, one[..., None])
        return depth - _mean(beneath, axis) * slope(values, axis)


@pytree(margin=0, over=0, under=0)
@dataclass(frozen=True, eq=False)
class Conditional(Target):
    """−⟨q, z⟩ = over · max(0, max z − margin)² + under · mean_{k ≠ argmax} max(0, max z − z_k − margin)², of mass 0."""

    margin: jax.Array
    over: jax.Array
    under: jax.Array

    def contract(self, values: jax.Array | None, axis: ClassAxis) -> jax.Array:
        if values is None:
            return jnp.zeros(())
        margin, over, under = (_of_rows(x, values) for x in (self.margin, self.over, self.under))
        top = maximum(values, axis)
        at, least, zero = own(top, margin, 0)
        depths = jnp.minimum(values - at[..., None] + least[..., None], zero[..., None])
        depths = _mean(-jnp.square(depths), axis)
        count = num_classes(values, axis)
        excess = jax.nn.relu(top + slope(values, axis) - margin)
        return under * depths * (count / jnp.maximum(count - 1, 1)) - over * jnp.square(excess)


@pytree()
@dataclass(frozen=True, eq=False)
class Square(Target):
    """−⟨q, z⟩ = ½ ‖z‖², of mass 0."""

    def contract(self, values: jax.Array | None, axis: ClassAxis) -> jax.Array:
        if values is None:
            return jnp.zeros(())
        shown = values if axis.where is None else jnp.where(align(axis.where, values.ndim), values, 0)
        return -saved(axis.psum(jnp.sum(jnp.square(shown), axis=-1))) / 2


@pytree(alpha=0)
@dataclass(frozen=True, eq=False)
class Jensen(Target):
    """−⟨q, z⟩ = the skew Jensen divergence of p and the prior, of mass 0.

    J_α(u ‖ p) = J_{1−α}(p ‖ u), so that α ≤ ½ may be had: of (a, b) = (u, p), else (p, u), and c = min(α, 1 − α),
    J = Σ_k b s / (1 − c) − (a + b c / (1 − c)) log(1 + c (eˢ − 1)) / c with s = log(b / a), and nothing cancels as
    c -> 0.
    """

    alpha: jax.Array
    prior: Target

    def contract(self, values: jax.Array | None, axis: ClassAxis) -> jax.Array:
        if values is None:
            return jnp.zeros(())
        alpha = _of_rows(self.alpha, values)
        c = jnp.minimum(alpha, 1 - alpha)
        per_c = jnp.where(c == 0, 0, 1 / jnp.where(c == 0, 1, c))
        first = jnp.where(alpha <= 0.5, 1, 0).astype(values.dtype)
        u = self._prior(values, axis)
        # An exponent of 60 is as good as more, and its derivative too, but where c is 0: there s counts in full, and
        # a (log m) / c is b − a.
        at, log_total, c, per_c, scale, ends, flip, first, second, high, zero, low = own(
            *(maximum(values, axis), jnp.log(total(values, axis)), c, per_c, 1 / (1 - c), c == 0),
            *(2 * first - 1, first, 1 - first, 60, 0, -1e30),
        )
        log_p = _at_least(values - at[..., None] - log_total[..., None], low[..., None])
        p = jnp.exp(log_p)
        s = flip[..., None] * (log_p - jnp.log(jnp.maximum(u, 1e-24)))
        e = _at_most(s, high[..., None])
        beyond = jax.lax.stop_gradient(ends[..., None] * jnp.maximum(s - high[..., None], zero[..., None]))
        log_m = jnp.log1p(c[..., None] * jnp.expm1(e))
        a, b = (x[..., None] * u + y[..., None] * p for x, y in ((first, second), (second, first)))
        terms = scale[..., None] * b * (e - log_m + beyond) - a * (per_c[..., None] * log_m)
        terms = terms - ends[..., None] * (b - a)
        return -saved(axis.psum(jnp.sum(terms, axis=-1)))

    def _prior(self, values: jax.Array, axis: ClassAxis) -> jax.Array:
        """(*batch, K), or 1 in place of K if all classes share alike."""
        if isinstance(self.prior, Uniform) and self.prior.class_where is None and axis.where is None:
            (share,) = jax.lax.optimization_barrier((1 / num_classes(values, axis),))
            return jnp.broadcast_to(share, (*values.shape[:-1], 1))
        u = self.prior.probs_on(axis).astype(values.dtype)
        return align(u, values.ndim)


def maximum(values: jax.Array, axis: ClassAxis) -> jax.Array:
    """max_k v_k as the losses take it, so that XLA takes it once."""
    top = axis.max(values)
    return saved(jnp.where(jnp.isfinite(top), top, 0))


def total(values: jax.Array, axis: ClassAxis) -> jax.Array:
    """Σ_k exp(v_k − max v) as the losses take it, so that XLA takes it once."""
    return saved(axis.psum(jnp.sum(jnp.exp(values - maximum(values, axis)[..., None]), axis=-1)))


def num_classes(values: jax.Array, axis: ClassAxis) -> jax.Array:
    """K over all devices, of the classes that exist: () or (*batch,)."""
    kept = jnp.ones(values.shape[-1], values.dtype) if axis.where is None else axis.where.astype(values.dtype)
    return axis.psum(jnp.sum(kept, axis=-1))


def own(top: jax.Array, *constants: jax.Array | float) -> tuple[jax.Array, ...]:
    """`top` and constants as rows (*batch,) that no sum shares which asks for other constants."""
    rows = (jnp.broadcast_to(jnp.asarray(x, top.dtype), top.shape) for x in constants)
    return jax.lax.optimization_barrier((top, *rows))


def slope(values: jax.Array, axis: ClassAxis) -> jax.Array:
    """0, with the derivative of max_k v_k: the classes that tie share it, as in `jnp.max`."""
    top = maximum(values, axis)
    at, steep, one, zero = own(top, 1e30, 1, 0)
    below = jax.lax.stop_gradient(values) - at[..., None]
    hits = jnp.maximum(one[..., None] + steep[..., None] * below, zero[..., None])
    ties = saved(axis.psum(jnp.sum(hits, axis=-1)))
    return axis.psum(_slope(values, top, 1 / ties))


@jax.custom_jvp
def _slope(values: jax.Array, top: jax.Array, share: jax.Array) -> jax.Array:
    # 0, but like the values different on each device.
    return (values[..., 0] > jnp.inf).astype(values.dtype)


@_slope.defjvp
def _slope_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    values, top, share = primals
    at_top = jnp.where(values == top[..., None], share[..., None], 0)
    return _slope(*primals), jnp.sum(tangents[0] * at_top, axis=-1)


def _of_rows(x: jax.Array, values: jax.Array) -> jax.Array:
    """A parameter () or (*batch,) as (*batch,), in the dtype of the values."""
    if x.ndim:
        checks.assert_batch("parameter", x, values)
    return jnp.broadcast_to(x.astype(values.dtype), values.shape[:-1])


def _mean(terms: jax.Array, axis: ClassAxis) -> jax.Array:
    """Mean over the classes that exist of terms (*batch, K)."""
    return replace(axis, offset=None).mean(terms)


@jax.custom_jvp
def _at_least(x: jax.Array, low: jax.Array) -> jax.Array:
    """max(x, low), the same as x to differentiation: arithmetic, where a select would be written out."""
    return jnp.maximum(x, low)


@_at_least.defjvp
def _at_least_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    return _at_least(*primals), tangents[0]


@jax.custom_jvp
def _at_most(x: jax.Array, high: jax.Array) -> jax.Array:
    """min(x, high), the same as x to differentiation."""
    return jnp.minimum(x, high)


@_at_most.defjvp
def _at_most_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    return _at_most(*primals), tangents[0]
