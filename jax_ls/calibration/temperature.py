"""T of temperature scaling: the one number that calibrates most of what training left uncalibrated."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jax_ls import checks
from jax_ls.calibration.reliability import Array, as_examples, total
from jax_ls.class_axis import AxisName, ClassAxis, flat, is_split, saved
from jax_ls.reductions import sum_over_devices

__all__ = ["fit_temperature"]

MAX_STEPS = 30

# Steps converge quadratically: after one this small nothing is left that float32 could tell.
TOLERANCE = 3e-4

# A logit this far below the largest has no probability, and its square is still finite.
FURTHEST = 1e15

# So hot that what is less far below the largest keeps its probability, and what is further still has none.
HOTTEST = 1e-12

# Rows of a first fit, from which that of all rows is a step or two away.
SAMPLE = 2**14

# Numbers of a block of logits on CPU, for what is computed of them to stay in its cache.
CACHED = 2**18


def fit_temperature(
    logits: Array,
    labels: Array,
    *,
    where: Array | None = None,
    bounds: tuple[Array, Array] = (0.05, 20.0),
    batch_axis_name: AxisName | None = None,
) -> jax.Array:
    """The temperature of the best likelihood, argmin_T Σ −log softmax(z / T)_y: scaled logits are z / T.

    T > 1 says overconfident, T < 1 underconfident, as smoothing leaves a network that is nearly always right. Fit on
    data that neither training nor the figures to report have seen.

    Newton's method within a bracket, a few passes over the logits; `jax.vmap` fits many models at once.

    Args:
      logits: z, real numbers (*batch, K).
      labels: y, integers (*batch,).
      where: boolean (*batch,), the examples that count.
      bounds: of T. A set that is separable, every example right, is likelier the colder it gets: its T is exactly
        bounds[0], and says no more than that. One worse than chance gets exactly bounds[1]. Traced bounds that are
        none give NaN.
      batch_axis_name: mesh axes that the examples are split over, inside `jax.shard_map`; the result is that of all.

    Returns:
      T, a number, and a constant for differentiation; NaN where logits are, where a label names no class, and where
      none gives a finite likelihood, a label's logit being −inf. 1, brought within bounds, where one is as good as
      another: no example counts, or the logits of each are all the same, those 10¹⁴ or further below aside.

    Raises:
      AssertionError: dtypes, ranks or shapes that do not fit, by name.
      TypeError, ValueError: bounds that are not two numbers, 0 < low <= high.

    Example:
      >>> from jax_ls import calibration
      >>> logits = jnp.log(jnp.array([[0.99, 0.01]] * 4))
      >>> T = calibration.fit_temperature(logits, jnp.array([0, 0, 0, 1]))  # right 3 times of 4
      >>> print(f"{jax.nn.softmax(logits[0] / T)[0]:.3f}")
      0.750

    References:
      Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    z, y, kept = jax.lax.stop_gradient(as_examples(logits, labels, where))
    low, high = (jax.lax.stop_gradient(bound.astype(z.dtype)) for bound in _as_bounds(bounds))
    return _temperature(z, y, kept, low, high, batch_axis_name)


# Compiled, for the loops of the fit to be compiled once and not at each call.
@functools.partial(jax.jit, static_argnames="batch_axis_name")
def _temperature(
    z: jax.Array,
    y: jax.Array,
    kept: jax.Array,
    low: jax.Array,
    high: jax.Array,
    batch_axis_name: AxisName | None,
) -> jax.Array:
    """T within the bounds, of logits in float32 or wider."""
    if not is_split(z):
        z, y, kept = z.reshape(y.size, z.shape[-1]), flat(y), flat(kept)
    top = saved(jnp.max(z, axis=-1))
    axis = ClassAxis(z.shape[-1])
    label = axis.take(z, y[..., None])[..., 0]
    short = jnp.where(axis.contains(y) & (label > -jnp.inf), jnp.minimum(top - label, FURTHEST), jnp.nan)
    weight = kept.astype(z.dtype)
    fit = functools.partial(_fit, low=1 / high, high=1 / low, batch_axis_name=batch_axis_name)
    beta = jnp.clip(jnp.ones((), z.dtype), 1 / high, 1 / low)
    if y.size >= 2 * SAMPLE and not is_split(z):
        step = y.size // SAMPLE
        beta = fit(z[::step], top[::step], short[::step], weight[::step], beta)
    beta = fit(z, top, short, weight, beta)
    cold, hot = beta >= 1 / low, beta <= 1 / high
    fitted = jnp.where(cold, low, jnp.where(hot, high, 1 / beta))
    return jnp.where((low > 0) & (low <= high), fitted, jnp.nan)


def _as_bounds(bounds: Any) -> list[jax.Array]:
    """Two numbers, 0 < low <= high as far as they are known now."""
    expected = f"bounds: expected two numbers, 0 < low <= high, got {bounds!r}"
    try:
        low, high = bounds
    except (TypeError, ValueError) as error:
        raise TypeError(expected) from error
    pair = [checks.as_weight("bounds", bound) for bound in (low, high)]
    for bound in pair:
        checks.assert_shape("bounds", bound, [()], "two numbers, 0 < low <= high")
    known = [bound for bound in (low, high) if not isinstance(bound, Tracer)]
    if not all(bound > 0 for bound in known) or (len(known) == 2 and low > high):
        raise ValueError(expected)
    return pair


def _fit(
    z: jax.Array,
    top: jax.Array,
    short: jax.Array,
    weight: jax.Array,
    beta: jax.Array,
    *,
    low: jax.Array,
    high: jax.Array,
    batch_axis_name: AxisName | None,
) -> jax.Array:
    """β = 1/T in [low, high] at which Σ E_p[d] = Σ d_y, for d = max z − z: the NLL is convex in β, this its slope.

    In the logarithm, because the left side falls off exponentially where most examples are right.
    """

    def summed(x: jax.Array) -> jax.Array:
        x = total(jnp.where(weight > 0, x, 0))
        return sum_over_devices(x, batch_axis_name)

    def unfinished(state: tuple[jax.Array, ...]) -> jax.Array:
        steps, beta, before, *_ = state
        # NaN is finished.
        return (steps < MAX_STEPS) & (jnp.abs(beta - before) > TOLERANCE * before)

    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        steps, beta, _, below, above = state
        expected, variance = (summed(x) for x in _moments(z, top, beta))
        below, above = jnp.where(expected > aim, beta, below), jnp.where(expected > aim, above, beta)
        newton = jnp.clip(beta + (jnp.log(expected) - jnp.log(aim)) * expected / variance, low, high)
        # All probabilities 0 and 1: nothing to go by, so from the other end.
        newton = jnp.where((expected == 0) & (below == 0), low, newton)
        between = jnp.sqrt(jnp.maximum(below, low) * jnp.minimum(above, high))
        new = jnp.where((newton >= below) & (newton <= above), newton, between)
        new = jnp.where(expected == aim, beta, new)
        return steps + 1, jnp.where(jnp.isnan(expected - aim), jnp.nan, new), beta, below, above

    aim = summed(short)
    # A set with every label at the top starts where all d show: to stay there without any, to go to `high` with some.
    # Of the type that a step gives back, which inside `jax.shard_map` says over which devices it varies, and on an
    # explicit mesh, under `jax.vmap`, over which it is split.
    none, before, below, above = (jnp.where(aim > 0, x, x) for x in (0.0, -1.0, 0.0, jnp.inf))
    start = none.astype(jnp.int32), jnp.where(aim == 0, HOTTEST, beta), before, below, above
    found = jax.lax.while_loop(unfinished, step, start)[1]
    return jnp.where(found == HOTTEST, beta, found)


def _moments(z: jax.Array, top: jax.Array, beta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E_p[d] and Var_p[d] of each row, for p = softmax(β z)."""

    def at_once(z: jax.Array, top: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Bounded, for −inf to weigh nothing: its 0 · inf would be NaN.
        d = jnp.minimum(top[..., None] - z, FURTHEST)
        e = jnp.exp(-beta * d)
        sums = [saved(jnp.sum(x, axis=-1)) for x in (e, e * d, e * d * d)]
        mean = sums[1] / sums[0]
        return mean, sums[2] / sums[0] - mean * mean

    def in_blocks(z: jax.Array, top: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = min(max(1, CACHED // z.shape[-1]), top.size)
        if rows == 0:
            return top, top

        def block(i: jax.Array, out: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            # The last block overlaps the one before, and finds the same there.
            start = jnp.minimum(i * rows, top.size - rows)
            parts = at_once(*(jax.lax.dynamic_slice_in_dim(x, start, rows) for x in (z, top)))
            updated = [jax.lax.dynamic_update_slice_in_dim(*pair, start, 0) for pair in zip(out, parts, strict=True)]
            return updated[0], updated[1]

        return jax.lax.fori_loop(0, -(-top.size // rows), block, (top, top))

    if is_split(z):
        return at_once(z, top)
    return jax.lax.platform_dependent(z, top, cpu=in_blocks, default=at_once)
