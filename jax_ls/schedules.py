"""ε by step: optax schedules that smoothing has names for, made of optax's own.

Any `optax.Schedule` is a schedule of ε: optax.linear_schedule, optax.cosine_decay_schedule and the like need no
wrapper. Steps may be traced, and so may ε.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jax_ls import checks

__all__ = ["plain_then_negative", "to_zero", "two_stage", "warmup"]


def to_zero(
    smoothing: ArrayLike, steps: int, *, begin: int = 0, shape: Literal["linear", "cosine"] = "linear"
) -> optax.Schedule:
    """ε until step `begin`, then down to 0 over `steps` steps, and 0 from there on.

    Args:
      smoothing: ε at the start, a number.
      steps: how long the descent takes.
      begin: when it starts.
      shape: "linear", or "cosine", ε (1 + cos πt) / 2.

    Returns:
      step -> ε.

    Raises:
      TypeError, ValueError: steps that are no positive integer, a negative `begin`, an unknown shape.

    Example:
      >>> from jax_ls import schedules
      >>> schedule = schedules.to_zero(0.1, 100)
      >>> [f"{schedule(step):.3f}" for step in (0, 50, 100, 200)]
      ['0.100', '0.050', '0.000', '0.000']

    References:
      Xu et al., Towards Understanding Label Smoothing, 2020, for why late smoothing costs.
    """
    checks.check_option("shape", shape, ("linear", "cosine"))
    epsilon, steps = _number(smoothing), checks.check_size("steps", steps)
    if shape == "linear":
        descent = optax.linear_schedule(epsilon, 0.0, steps)
    else:
        descent = _in_floats(optax.cosine_decay_schedule(epsilon, steps))
    held = _then(optax.constant_schedule(epsilon), _step("begin", begin), descent)
    # XLA's division by a constant leaves 1e-8 of ε where 0 is promised.
    return _then(held, begin + steps, optax.constant_schedule(0.0))


def warmup(smoothing: ArrayLike, steps: int, *, begin: int = 0) -> optax.Schedule:
    """0 until step `begin`, then up to ε over `steps` steps, and ε from there on: weak early, strong near convergence.

    Args:
      smoothing: ε at the end, a number of any sign.
      steps: how long the rise takes.
      begin: when it starts.

    Returns:
      step -> ε.

    Raises:
      TypeError, ValueError: steps that are no positive integer, a negative `begin`.

    Example:
      >>> from jax_ls import schedules
      >>> schedule = schedules.warmup(0.1, 100, begin=50)
      >>> [f"{schedule(step):.3f}" for step in (0, 50, 100, 150, 200)]
      ['0.000', '0.000', '0.050', '0.100', '0.100']

    References:
      Pereyra et al., Regularizing Neural Networks by Penalizing Confident Output Distributions, 2017.
    """
    rise = optax.linear_schedule(0.0, _number(smoothing), checks.check_size("steps", steps))
    return _then(optax.constant_schedule(0.0), _step("begin", begin), rise)


def two_stage(smoothing: ArrayLike, drop_at: int) -> optax.Schedule:
    """ε before step `drop_at`, 0 from it on: smoothed gradients vary less early, hard labels fit better late.

    Args:
      smoothing: ε, a number.
      drop_at: the first step on hard labels.

    Returns:
      step -> ε.

    Raises:
      TypeError, ValueError: `drop_at` that is no integer ≥ 0, ε that is no number.

    Example:
      >>> from jax_ls import schedules
      >>> schedule = schedules.two_stage(0.1, 1000)
      >>> [f"{schedule(step):.1f}" for step in (0, 999, 1000)]
      ['0.1', '0.1', '0.0']

    References:
      Xu et al., Towards Understanding Label Smoothing (TSLA), 2020.
    """
    return _then(optax.constant_schedule(_number(smoothing)), _step("drop_at", drop_at), optax.constant_schedule(0.0))


def plain_then_negative(smoothing: ArrayLike, switch_at: int) -> optax.Schedule:
    """0 before step `switch_at`, ε < 0 from it on: fit the labels first, then turn against the noise in them.

    With ε < 0 the loss is unbounded below: start from a trained model, and stop early or decay the learning rate.

    Args:
      smoothing: ε < 0, a number. May be traced; NaN there if not negative.
      switch_at: the first step of negative smoothing.

    Returns:
      step -> ε.

    Raises:
      TypeError, ValueError: `switch_at` that is no integer ≥ 0, ε ≥ 0.

    Example:
      >>> from jax_ls import schedules
      >>> schedule = schedules.plain_then_negative(-0.5, 1000)
      >>> [f"{schedule(step):.1f}" for step in (0, 999, 1000)]
      ['0.0', '0.0', '-0.5']

    References:
      Wei et al., To Smooth or Not? When Label Smoothing Meets Noisy Labels, 2022.
    """
    epsilon = checks.as_parameter("smoothing", smoothing, lambda x: x < 0, "a negative number")
    checks.as_scalar("smoothing", epsilon)
    return _then(optax.constant_schedule(0.0), _step("switch_at", switch_at), optax.constant_schedule(epsilon))


def _then(first: optax.Schedule, step: int, second: optax.Schedule) -> optax.Schedule:
    return optax.join_schedules([first, second], [step]) if step else second


def _in_floats(schedule: optax.Schedule) -> optax.Schedule:
    """The same schedule; optax's cosine mixes integers and floats, which strict promotion refuses."""
    return lambda step: schedule(jnp.asarray(step, float))


def _number(smoothing: ArrayLike) -> ArrayLike:
    checks.assert_rank("smoothing", checks.as_weight("smoothing", smoothing), 0, "a number")
    return smoothing


def _step(name: str, step: int) -> int:
    checks.check_integer(name, step)
    if step < 0:
        raise ValueError(f"{name}: expected a step, 0 or later, got {step}")
    return int(step)
