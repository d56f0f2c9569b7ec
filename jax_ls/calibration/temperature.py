"""Temperature scaling: the T that makes softmax(z / T) most likely on held-out labels."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_ls import checks, fences
from jax_ls.calibration.reliability import as_examples, total
from jax_ls.class_axis import AxisName, ClassAxis, flat, is_split
from jax_ls.reductions import sum_over_devices

__all__ = ["fit_temperature"]

MAX_STEPS = 30

# Newton's steps converge quadratically: after a relative step this small, the error is below float32's precision.
TOLERANCE = 3e-4

# A logit this far below the largest has probability 0, and the square of this number is finite.
FURTHEST = 1e15

# The first β = 1/T if every label has the largest logit. At this β a logit 10¹² below the largest still has
# probability, and one `FURTHEST` below has none: E_p[d] is 0 only if no logit counts but the largest.
HOTTEST = 1e-12

# Rows of a first fit. The fit of all rows starts from its result and needs a step or two.
SAMPLE = 2**14

# Numbers in a block of logits on CPU, so few that all intermediate results stay in its cache.
CACHED = 2**18


def fit_temperature(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    bounds: tuple[ArrayLike, ArrayLike] = (0.05, 20.0),
    batch_axis_name: AxisName | None = None,
) -> Array:
    """Returns the temperature T of the best likelihood, argmin_T Σ −log softmax(z / T)_y.

    The calibrated model is softmax(z / T). T > 1 means that the model was overconfident, T < 1 underconfident.
    Smoothing makes a network underconfident if nearly all of its answers are right. Fit on data that are used neither
    for training nor for the figures that you report.

    The method is Newton's within a bracket. It reads the logits a few times. `jax.vmap` fits many models at once.

    Args:
      logits: z, real numbers (*batch, K).
      labels: y, integers (*batch,).
      where: boolean (*batch,), the examples that count.
      bounds: the least and the largest T. If every example is right, a lower T is always likelier, and the result is
        exactly bounds[0]. If the model is worse than chance, the result is exactly bounds[1]. Traced bounds that are
        not 0 < low <= high give NaN.
      batch_axis_name: mesh axes that the examples are split over, inside `jax.shard_map`; the result is that of all.

    Returns:
      T, a number; a constant for differentiation. NaN if a logit is NaN, if a label names no class, or if a label's
      logit is −inf, so that no T gives a finite likelihood. If the likelihood does not depend on T, returns 1 clipped
      to `bounds`: no example counts, or the logits of each example are all equal, logits 10¹⁴ or more below aside.

    Raises:
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


# Under `jit`, so that the loops of the fit are compiled once and not at each call.
@functools.partial(jax.jit, static_argnames="batch_axis_name")
def _temperature(
    z: Array,
    y: Array,
    kept: Array,
    low: Array,
    high: Array,
    batch_axis_name: AxisName | None,
) -> Array:
    """Returns T within the bounds, for logits in float32 or wider."""
    if not is_split(z):
        z, y, kept = z.reshape(y.size, z.shape[-1]), flat(y), flat(kept)
    top = fences.end_of_sum(jnp.max(z, axis=-1))
    axis = ClassAxis(z.shape[-1])
    label = axis.take(z, y[..., None])[..., 0]
    label_gap = jnp.where(axis.contains(y) & (label > -jnp.inf), jnp.minimum(top - label, FURTHEST), jnp.nan)
    weight = kept.astype(z.dtype)
    fit = functools.partial(_fit, low=1 / high, high=1 / low, batch_axis_name=batch_axis_name)
    beta = jnp.clip(jnp.ones((), z.dtype), 1 / high, 1 / low)
    if y.size >= 2 * SAMPLE and not is_split(z):
        step = y.size // SAMPLE
        beta = fit(z[::step], top[::step], label_gap[::step], weight[::step], beta)
    beta = fit(z, top, label_gap, weight, beta)
    cold, hot = beta >= 1 / low, beta <= 1 / high
    fitted = jnp.where(cold, low, jnp.where(hot, high, 1 / beta))
    return jnp.where((low > 0) & (low <= high), fitted, jnp.nan)


def _as_bounds(bounds: Any) -> list[Array]:
    """Returns the two bounds as arrays. Those that are concrete must satisfy 0 < low <= high."""
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
    z: Array,
    top: Array,
    label_gap: Array,
    weight: Array,
    beta: Array,
    *,
    low: Array,
    high: Array,
    batch_axis_name: AxisName | None,
) -> Array:
    """Returns the β = 1/T in [low, high] at which Σ E_p[d] = Σ d_y, for d = max z − z and p = softmax(β z).

    The negative log-likelihood is convex in β, and its slope is Σ d_y − Σ E_p[d]. Newton's method solves for equal
    logarithms, because Σ E_p[d] falls exponentially in β where most examples are right.
    """

    def summed(x: Array) -> Array:
        x = total(jnp.where(weight > 0, x, 0))
        return sum_over_devices(x, batch_axis_name)

    def unfinished(state: tuple[Array, ...]) -> Array:
        steps, beta, before, *_ = state
        # A comparison with NaN is False, which ends the loop.
        return (steps < MAX_STEPS) & (jnp.abs(beta - before) > TOLERANCE * before)

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        steps, beta, _, below, above = state
        expected, variance = (summed(x) for x in _moments(z, top, beta))
        below, above = jnp.where(expected > aim, beta, below), jnp.where(expected > aim, above, beta)
        newton = jnp.clip(beta + (jnp.log(expected) - jnp.log(aim)) * expected / variance, low, high)
        # All probabilities are 0 or 1, so the slope says nothing: go on from the lower end.
        newton = jnp.where((expected == 0) & (below == 0), low, newton)
        between = jnp.sqrt(jnp.maximum(below, low) * jnp.minimum(above, high))
        new = jnp.where((newton >= below) & (newton <= above), newton, between)
        new = jnp.where(expected == aim, beta, new)
        return steps + 1, jnp.where(jnp.isnan(expected - aim), jnp.nan, new), beta, below, above

    aim = summed(label_gap)
    # If every label has the largest logit, start at HOTTEST, where every finite d has weight. The loop stays there if
    # all d are 0, and goes to `high` if some are not.
    # `where` gives the start the type of a step's result: inside `jax.shard_map` it names the axes that the result
    # varies over, and on an explicit mesh, under `jax.vmap`, those that split it.
    none, before, below, above = (jnp.where(aim > 0, x, x) for x in (0.0, -1.0, 0.0, jnp.inf))
    start = none.astype(jnp.int32), jnp.where(aim == 0, HOTTEST, beta), before, below, above
    found = jax.lax.while_loop(unfinished, step, start)[1]
    return jnp.where(found == HOTTEST, beta, found)


def _moments(z: Array, top: Array, beta: Array) -> tuple[Array, Array]:
    """Returns E_p[d] and Var_p[d] of each row, for p = softmax(β z)."""

    def at_once(z: Array, top: Array) -> tuple[Array, Array]:
        # A bound on d lets a logit of −inf count for nothing: 0 · inf would be NaN.
        d = jnp.minimum(top[..., None] - z, FURTHEST)
        e = jnp.exp(-beta * d)
        sums = [fences.end_of_sum(jnp.sum(x, axis=-1)) for x in (e, e * d, e * d * d)]
        mean = sums[1] / sums[0]
        return mean, sums[2] / sums[0] - mean * mean

    def in_blocks(z: Array, top: Array) -> tuple[Array, Array]:
        rows = min(max(1, CACHED // z.shape[-1]), top.size)
        if rows == 0:
            return top, top

        def block(i: Array, out: tuple[Array, Array]) -> tuple[Array, Array]:
            # The last block overlaps the one before it, and writes the same numbers there again.
            start = jnp.minimum(i * rows, top.size - rows)
            parts = at_once(*(jax.lax.dynamic_slice_in_dim(x, start, rows) for x in (z, top)))
            updated = [jax.lax.dynamic_update_slice_in_dim(*pair, start, 0) for pair in zip(out, parts, strict=True)]
            return updated[0], updated[1]

        return jax.lax.fori_loop(0, -(-top.size // rows), block, (top, top))

    if is_split(z):
        return at_once(z, top)
    return jax.lax.platform_dependent(z, top, cpu=in_blocks, default=at_once)
