"""Wrong labels: two rates that describe them, functions that make them, and the ε that corrects for them.

Symmetric noise has two descriptions. A label is *resampled* with probability α (`resample_rate`), uniformly from all K
classes: T = (1 − α) I + α/K, as smoothing with spread="all". Or a label is *flipped* with probability e (`flip_rate`)
to one of the other classes: T has 1 − e on its diagonal and e/(K−1) elsewhere, as smoothing with spread="others". Both
describe the same noise at α = e K/(K−1).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.class_axis import look_up

__all__ = ["disturb_labels", "flip_labels", "optimal_smoothing"]


def disturb_labels(key: Array, labels: ArrayLike, resample_rate: ArrayLike, *, num_classes: int) -> Array:
    """Returns labels of which each is resampled with probability α, uniformly from all K classes.

    Their mean is the smoothed label: E[δ_y'] = (1 − α) δ_y + α/K, which is `smooth(labels, resample_rate)`.
    DisturbLabel draws new labels in each step.

    Args:
      key: a key of `jax.random`.
      labels: y, integers of any shape; labels outside [0, K), such as an `ignore_index`, do not change.
      resample_rate: α, () or the shape of the labels, in [0, 1).
      num_classes: K.

    Returns:
      Labels in the shape and dtype of `labels`.

    Raises:
      ValueError: a concrete α outside [0, 1), or more classes than the dtype of the labels holds.

    Example:
      >>> from jax_ls import noise
      >>> labels = noise.disturb_labels(jax.random.key(0), jnp.zeros(10_000, int), 0.2, num_classes=10)
      >>> bool(abs((labels == 0).mean() - 0.82) < 0.01)
      True

    References:
      Xie et al., DisturbLabel: Regularizing CNN on the Loss Layer, 2016.
    """
    y, size = checks.as_labels("labels", labels), checks.check_size("num_classes", num_classes)
    dtype = _dtype_of(labels, size)
    alpha = as_rate("resample_rate", resample_rate, y.shape)
    which, what = jax.random.split(key)
    drawn = jax.random.randint(what, y.shape, 0, size, y.dtype)
    return _replaced(_chosen(which, y, alpha, size), drawn, y).astype(dtype)


def flip_labels(
    key: Array,
    labels: ArrayLike,
    flip_rate: ArrayLike | None = None,
    *,
    matrix: ArrayLike | None = None,
    num_classes: int,
) -> Array:
    """Returns wrong labels for experiments: each flipped with probability e to another class, or drawn by a matrix.

    P(y' = j | y = i) = e/(K−1) for j ≠ i, or T_ij. For a loss with a `resample_rate`, α = e K/(K−1).

    Args:
      key: a key of `jax.random`.
      labels: y, integers of any shape; labels outside [0, K) do not change.
      flip_rate: e, the share of labels that become wrong; () or the shape of the labels, in [0, 1).
      matrix: T, (K, K), in place of e: T_ij = P(seen as j | i).
      num_classes: K.

    Returns:
      Labels in the shape and dtype of `labels`.

    Raises:
      TypeError: `flip_rate` and `matrix` are both given, or neither is.
      ValueError: a concrete rate outside [0, 1), a concrete matrix whose rows are no distributions, a rate at K = 1,
        or more classes than the dtype of the labels holds.

    Example:
      >>> from jax_ls import noise
      >>> labels = noise.flip_labels(jax.random.key(0), jnp.zeros(10_000, int), 0.2, num_classes=10)
      >>> bool(abs((labels == 0).mean() - 0.8) < 0.01)
      True

    References:
      Patrini et al., Making Deep Neural Networks Robust to Label Noise, 2017.
    """
    y, size = checks.as_labels("labels", labels), checks.check_size("num_classes", num_classes)
    dtype = _dtype_of(labels, size)
    assert_one_given("flip_rate", flip_rate, matrix)
    if matrix is not None:
        rows = look_up(as_matrix("matrix", matrix, size), y)
        drawn = jax.random.categorical(key, jnp.log(rows), axis=-1).astype(y.dtype)
        return jnp.where((y >= 0) & (y < size), drawn, y).astype(dtype)
    rate = as_rate("flip_rate", flip_rate, y.shape)
    if size < 2:
        raise ValueError(f"num_classes: expected another class to flip to, got {size}")
    which, what = jax.random.split(key)
    step = jax.random.randint(what, y.shape, 1, size, y.dtype)
    return _replaced(_chosen(which, y, rate, size), (y + step) % size, y).astype(dtype)


def optimal_smoothing(flip_rate: ArrayLike, num_classes: int, *, clean: ArrayLike = 0.0) -> Array:
    """Returns the ε at which noisy labels, smoothed, have the mean of clean labels smoothed by r*.

    ε = (r* − α) / (1 − α) with α = e K/(K−1); for two classes (r* − 2e) / (1 − 2e). It is negative if α > r*. The loss
    is then unbounded below: train with ε = 0 first. `forward_correction` is bounded.

    Args:
      flip_rate: e, in [0, 1 − 1/K), any shape. Labels with a larger e carry no information.
      num_classes: K, at least 2.
      clean: r* ≤ 1, the ε that is best without noise; () or the shape of `flip_rate`.

    Returns:
      ε, in the shape of `flip_rate` and `clean`; NaN for a traced e out of range.

    Raises:
      ValueError: K < 2, or a concrete e out of range.

    Example:
      >>> from jax_ls import noise
      >>> print(noise.optimal_smoothing(jnp.array([0.0, 0.2, 0.4]), 2).round(4))
      [ 0.     -0.6667 -4.    ]

    References:
      Wei et al., To Smooth or Not? When Label Smoothing Meets Noisy Labels, 2022 (theorem 7, two classes).
    """
    size = checks.check_size("num_classes", num_classes)
    if size < 2:
        raise ValueError(f"num_classes: expected at least 2, got {size}")
    alpha = as_rate("flip_rate", flip_rate, None, 1 - 1 / size) * (size / (size - 1))
    best = checks.as_parameter("clean", clean, lambda x: (x <= 1) & (x > -np.inf), "finite numbers up to 1")
    if alpha.ndim:
        checks.assert_shape("clean", best, [(), alpha.shape], f"() or {alpha.shape}, the shape of flip_rate")
    return (best - alpha) / (1 - alpha)


def as_rate(name: str, x: object, batch: checks.Shape | None, below: float = 1.0) -> Array:
    """Returns rates in [0, below), () or `batch`. Outside, concrete rates raise and traced rates become NaN."""
    rate = checks.as_weight(name, x)
    if batch is not None:
        checks.assert_shape(name, rate, [(), batch], f"() or {batch}, the shape of the labels")
    fits = (rate >= 0) & (rate < below)
    if not isinstance(fits, Tracer) and not np.all(fits):
        raise ValueError(f"{name}: expected rates in [0, {below:g}), got {x}")
    return jnp.where(fits, rate, jnp.nan)


def assert_one_given(name: str, rate: object, matrix: object) -> None:
    """Raises unless either the rate called `name` or the matrix is given."""
    if (rate is None) == (matrix is None):
        raise TypeError(f"{name}, matrix: expected one of the two, got {'neither' if rate is None else 'both'}")


def as_matrix(name: str, x: ArrayLike, size: int) -> Array:
    """Returns T, (K, K). Rows that are no distributions raise, unless T is traced."""
    matrix = checks.as_class_values(name, x)
    checks.assert_shape(name, matrix, [(size, size)], f"({size}, {size}), a row for each class")
    if not isinstance(matrix, Tracer):
        rows = np.asarray(matrix)
        # As far as rounding to their own dtype lets them.
        given = checks.as_array(name, x).dtype
        if not (np.all(rows >= 0) and np.allclose(rows.sum(axis=1), 1, atol=max(1e-3, float(jnp.finfo(given).eps)))):
            raise ValueError(f"{name}: expected rows that are distributions, got sums {rows.sum(axis=1)}")
    return matrix


def _dtype_of(labels: ArrayLike, size: int) -> jnp.dtype:
    """The dtype of the labels, which has to hold the number of each class."""
    dtype = jnp.asarray(labels).dtype
    if jnp.iinfo(dtype).max < size - 1:
        raise ValueError(f"labels: expected integers that hold {size} classes, got {dtype}: `labels.astype(int)`?")
    return dtype


def _replaced(chosen: Array, new: Array, old: Array) -> Array:
    """New labels where they are chosen. As a sum: on an explicit mesh its operands may be split in different ways."""
    return old + (new - old) * chosen.astype(old.dtype)


def _chosen(key: Array, y: Array, rate: Array, size: int) -> Array:
    return (jax.random.uniform(key, y.shape, rate.dtype) < rate) & (y >= 0) & (y < size)
