"""The parameters of a sweep, from a grid or at random, and its seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks

__all__ = ["grid", "log_uniform"]

Values = ArrayLike | Sequence[float]

# The most runs of a sweep: memory would not hold a larger table.
MOST_RUNS = 2**24


def grid(**axes: Values) -> dict[str, np.ndarray]:
    """Returns all combinations of the values of several parameters, for `sweep`. The last parameter varies fastest.

    Args:
      axes: name=values, (n,) each.

    Returns:
      An array for each name. Their length is the product of the lengths of the arguments.

    Raises:
      ValueError: no parameters, or a parameter without values.

    Example:
      >>> from jax_ls import sweeps
      >>> {name: x.tolist() for name, x in sweeps.grid(smoothing=[0.0, 0.5], noise=[1.0, 2.0]).items()}
      {'smoothing': [0.0, 0.0, 0.5, 0.5], 'noise': [1.0, 2.0, 1.0, 2.0]}
    """
    if not axes:
        raise ValueError("grid: expected name=values, got nothing")
    arrays = [_as_values(name, values) for name, values in axes.items()]
    return {name: x.ravel() for name, x in zip(axes, np.meshgrid(*arrays, indexing="ij"), strict=True)}


def log_uniform(seed: int | Array, low: float, high: float, num: int) -> np.ndarray:
    """Returns random values whose logarithms are uniform on [log low, log high], in ascending order.

    Args:
      seed: an integer or a key.
      low, high: 0 < low < high.
      num: n, how many values.

    Returns:
      Values (n,), float32.

    Raises:
      TypeError: a `seed` that is neither an integer nor a key.
      ValueError: bounds that are not 0 < low < high.

    Example:
      >>> from jax_ls import sweeps
      >>> values = sweeps.log_uniform(0, 1e-3, 0.5, 100)
      >>> bool(values[0] >= 1e-3), bool(values[-1] <= 0.5)
      (True, True)

    References:
      Bergstra and Bengio, Random Search for Hyper-Parameter Optimization, 2012.
    """
    for name, bound in (("low", low), ("high", high)):
        checks.assert_rank(name, checks.as_weight(name, bound), 0, "a number")
    if not 0 < low < high < float("inf"):
        raise ValueError(f"low, high: expected 0 < low < high, got {low!r}, {high!r}")
    shape = (checks.check_size("num", num),)
    try:
        draws = jax.random.uniform(jax.random.key(seed) if isinstance(seed, int | np.integer) else seed, shape)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"seed: expected an integer or a key, got {seed!r}") from error
    share = np.sort(np.asarray(draws, dtype=np.float64))
    return np.clip((low * (high / low) ** share).astype(np.float32), np.float32(low), np.float32(high))


def _as_values(name: str, values: Any) -> np.ndarray:
    array = checks.as_weight(name, values)
    checks.assert_rank(name, array, 1, "numbers (n,)")
    if not array.size:
        raise ValueError(f"{name}: expected at least one number, got none")
    return np.asarray(array)


def as_methods(smoothing: Any) -> dict[str, Callable[..., Any]]:
    """Returns methods by name; none where `smoothing` holds numbers."""
    if not isinstance(smoothing, Mapping) or not any(callable(x) for x in smoothing.values()):
        return {}
    if not all(isinstance(name, str) and callable(x) for name, x in smoothing.items()):
        came = {name: type(x).__name__ for name, x in smoothing.items()}
        raise TypeError(f"smoothing: expected functions by name, or numbers by name, got {came}")
    return dict(smoothing)


def as_points(smoothing: Any) -> dict[str, np.ndarray]:
    """Returns parameters by name, (n,) each. An array of ε gets the name "smoothing"."""
    if not isinstance(smoothing, Mapping):
        return {"smoothing": _as_values("smoothing", smoothing)}
    if not all(isinstance(name, str) for name in smoothing):
        raise TypeError(f"smoothing: expected parameters by name, got {[*smoothing]}")
    points = {name: _as_values(f"smoothing[{name!r}]", values) for name, values in smoothing.items()}
    if len({len(values) for values in points.values()}) != 1:
        lengths = {name: len(values) for name, values in points.items()}
        raise ValueError(f"smoothing: expected parameters of one length, got {lengths}")
    return points


def as_seeds(seeds: Any, points: int) -> np.ndarray:
    """Returns distinct seeds: those given, or 0, 1, … if `seeds` is a number."""
    if not isinstance(seeds, int | np.integer) or isinstance(seeds, bool):
        given = np.asarray(seeds)
        integers = given.ndim == 1 and given.size > 0 and np.issubdtype(given.dtype, np.integer)
        if not integers or given.min() < 0 or given.max() >= 2**32 or len(set(given.tolist())) < len(given):
            raise ValueError(f"seeds: expected how many, or distinct integers in [0, 2^32), got {seeds!r}")
        return given.astype(np.uint32)
    if checks.check_size("seeds", seeds) * points > MOST_RUNS:
        raise ValueError(f"seeds: expected at most {MOST_RUNS:,} runs, got {seeds:,} for each of {points:,}")
    return np.arange(seeds, dtype=np.uint32)
