"""Schedules of ε that the literature on smoothing has names for. Each is an optax schedule.

Any `optax.Schedule` can give ε: optax.linear_schedule or optax.cosine_decay_schedule need no wrapper. Steps may be
traced, and so may ε.
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
    """Returns a schedule that is ε until step `begin`, falls to 0 over `steps` steps, and stays 0.

    Args:
      smoothing: ε at the start, a number.
      steps: how many steps the fall takes.
      begin: the step at which it starts.
      shape: "linear", or "cosine", ε (1 + cos πt) / 2.

    Returns:
      A function step -> ε.

    Raises:
      ValueError: a negative `begin`, or an unknown `shape`.

    Example:
      >>> from jax_ls import schedules
      >>> schedule = schedules.to_zero(0.1, 100)
      >>> [f"{schedule(step):.3f}" for step in (0, 50, 100, 200)]
      ['0.100', '0.050', '0.000', '0.000']

    References:
      Xu et al., Towards Understanding Label Smoothing, 2020, on why smoothing late in training costs accuracy.
    """
    checks.check_option("shape", shape, ("linear", "cosine"))
    epsilon, steps = _number(smoothing), checks.check_size("steps", steps)
    linear = shape == "linear"
    fall = optax.linear_schedule(epsilon, 0.0, steps) if linear else optax.cosine_decay_schedule(epsilon, steps)
    descent = _in_floats(fall, epsilon)
    held = _then(optax.constant_schedule(epsilon), _step("begin", begin), descent)
    # XLA divides by a constant inexactly: the last step of the fall would be 1e-8 ε and not 0.
    return _then(held, begin + steps, optax.constant_schedule(0.0))


def warmup(smoothing: ArrayLike, steps: int, *, begin: int = 0) -> optax.Schedule:
    """Returns a schedule that is 0 until step `begin`, rises to ε over `steps` steps, and stays ε.

    Smoothing is then weak early and strong near convergence.

    Args:
      smoothing: ε at the end, a number of any sign.
      steps: how many steps the rise takes.
      begin: the step at which it starts.

    Returns:
      A function step -> ε.

    Raises:
      ValueError: a negative `begin`.

    Example:
      >>> from jax_ls import schedules
      >>> schedule = schedules.warmup(0.1, 100, begin=50)
      >>> [f"{schedule(step):.3f}" for step in (0, 50, 100, 150, 200)]
      ['0.000', '0.000', '0.050', '0.100', '0.100']

    References:
      Pereyra et al., Regularizing Neural Networks by Penalizing Confident Output Distributions, 2017.
    """
    epsilon = _number(smoothing)
    rise = _in_floats(optax.linear_schedule(0.0, epsilon, checks.check_size("steps", steps)), epsilon)
    return _then(optax.constant_schedule(0.0), _step("begin", begin), rise)


def two_stage(smoothing: ArrayLike, drop_at: int) -> optax.Schedule:
    """Returns a schedule that is ε before step `drop_at` and 0 from it on.

    Smoothed gradients vary less, which helps early. Hard labels fit better, which helps late.

    Args:
      smoothing: ε, a number.
      drop_at: the first step on hard labels.

    Returns:
      A function step -> ε.

    Raises:
      ValueError: a negative `drop_at`.

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
    """Returns a schedule that is 0 before step `switch_at` and ε < 0 from it on.

    The model fits the labels first. Negative smoothing then unlearns what is wrong in them.

    With ε < 0 the loss is unbounded below: start from a trained model, and stop early or decay the learning rate.

    Args:
      smoothing: ε < 0, a number. May be traced; NaN there if not negative.
      switch_at: the first step of negative smoothing.

    Returns:
      A function step -> ε.

    Raises:
      ValueError: a negative `switch_at`, or a concrete ε ≥ 0.

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


def _then(before: optax.Schedule, step: int, after: optax.Schedule) -> optax.Schedule:
    return optax.join_schedules([before, after], [step]) if step else after


def _in_floats(schedule: optax.Schedule, epsilon: ArrayLike) -> optax.Schedule:
    """Returns the schedule on steps in the dtype of ε: optax mixes them with ε, which strict promotion forbids."""
    dtype = jnp.result_type(epsilon) if hasattr(epsilon, "dtype") else float
    return lambda step: schedule(jnp.asarray(step, dtype))


def _number(smoothing: ArrayLike) -> ArrayLike:
    """Returns ε, an array of it in float32 or wider."""
    epsilon = checks.as_weight("smoothing", smoothing)
    checks.assert_rank("smoothing", epsilon, 0, "a number")
    return epsilon if hasattr(smoothing, "dtype") else smoothing


def _step(name: str, step: int) -> int:
    checks.check_integer(name, step)
    if step < 0:
        raise ValueError(f"{name}: expected a step, 0 or later, got {step}")
    return int(step)
