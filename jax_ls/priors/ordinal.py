"""u for ordered classes: tables (K, K) whose row y falls with the distance from y."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks

__all__ = ["binomial", "gaussian", "geometric", "sord"]

Phi = Literal["absolute", "squared"] | Callable[[Array, Array], Array]


def sord(ranks: int | ArrayLike, *, phi: Phi = "absolute", beta: ArrayLike = 1.0) -> Array:
    """Returns a table of soft ordinal vectors: row y is softmax_k(−β φ(r_y, r_k)).

    Use it as `prior=Rows(table, labels)`; ε = 1 gives the published target.

    Args:
      ranks: r: K for the ranks 0 to K − 1, or real numbers (K,) such as ages, grades or depths.
      phi: "absolute" for |r_y − r_k|; "squared"; or a function from ranks (K, 1) and (1, K) to distances (K, K).
      beta: β ≥ 0, a number; a larger β gives sharper rows. May be traced; NaN if negative.

    Returns:
      A table (K, K); row y sums to 1.

    Raises:
      AssertionError: a function `phi` that does not return distances (K, K).
      ValueError: a concrete β < 0, or an unknown `phi`.

    Example:
      >>> from jax_ls import priors
      >>> priors.sord(3, beta=2.0).round(4).tolist()
      [[0.8668, 0.1173, 0.0159], [0.1065, 0.787, 0.1065], [0.0159, 0.1173, 0.8668]]

    References:
      Díaz and Marathe, Soft Labels for Ordinal Regression, 2019.
    """
    r, beta = _ranks(ranks), checks.as_scalar("beta", checks.as_amount("beta", beta))
    if callable(phi):
        distances = checks.as_weight("phi", phi(r[:, None], r[None, :]))
        checks.assert_shape("phi", distances, [(r.size, r.size)], f"distances ({r.size}, {r.size})")
    else:
        checks.check_option("phi", phi, ("absolute", "squared"))
        gaps = r[:, None] - r[None, :]
        distances = jnp.abs(gaps) if phi == "absolute" else jnp.square(gaps)
    return jax.nn.softmax(-beta.astype(distances.dtype) * distances, axis=-1)


def gaussian(ranks: int | ArrayLike, *, sigma: ArrayLike = 1.0) -> Array:
    """Returns a table whose row y is a Gaussian around y: ∝ exp(−(r_y − r_k)² / 2σ²), normalised over the classes.

    Use it as `prior=Rows(table, labels)`; ε = 1 gives the published target.

    Args:
      ranks: K, or real numbers (K,), as in `sord`.
      sigma: σ > 0, a number in units of the ranks. May be traced; NaN if not positive.

    Returns:
      A table (K, K); row y sums to 1.

    Raises:
      ValueError: a concrete σ ≤ 0.

    Example:
      >>> from jax_ls import priors
      >>> priors.gaussian(3, sigma=1.0)[0].round(4).tolist()
      [0.5741, 0.3482, 0.0777]

    References:
      Galdran et al., Non-Uniform Label Smoothing for Diabetic Retinopathy Grading, 2020.
    """
    r, sigma = _ranks(ranks), checks.as_scalar("sigma", checks.as_positive("sigma", sigma))
    gaps = r[:, None] - r[None, :]
    # Divided by σ before squaring, because σ² may underflow.
    steps = jnp.where(gaps == 0, 0, gaps / sigma.astype(r.dtype))
    return jax.nn.softmax(jnp.where(jnp.isnan(sigma), jnp.nan, -0.5 * jnp.square(steps)), axis=-1)


def binomial(num_classes: int, *, margin: ArrayLike = 0.1) -> Array:
    """Returns a table of binomials: row y is b(k; K − 1, p_y), with p_y from `margin` to 1 − `margin` in equal steps.

    The mean of row y is y + margin (K − 1 − 2y), so rows lean to the middle of the scale, the outermost by
    margin (K − 1) classes. With a margin of 1/(2K), row y peaks at y. Rows in the middle are widest. Use it as
    `prior=Rows(table, labels)`.

    Args:
      num_classes: K.
      margin: p_0, in (0, 1/2], a number. May be traced; NaN if outside.

    Returns:
      A table (K, K); row y sums to 1.

    Raises:
      ValueError: a concrete margin outside (0, 1/2].

    Example:
      >>> from jax_ls import priors
      >>> priors.binomial(3)[0].round(4).tolist()
      [0.81, 0.18, 0.01]

    References:
      Liu et al., Unimodal Regularized Neuron Stick-Breaking for Ordinal Classification, 2020.
    """
    size = checks.check_size("num_classes", num_classes)
    margin = checks.as_parameter("margin", margin, lambda x: (x > 0) & (x <= 0.5), "a number in (0, 1/2]")
    checks.as_scalar("margin", margin)
    n, k = size - 1, np.arange(size)
    log_choose = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(size)]
    p = (margin + (1 - 2 * margin) * jnp.asarray(k / max(n, 1), margin.dtype))[:, None]
    ups, downs, log_choose = (jnp.asarray(x, margin.dtype)[None] for x in (k, n - k, log_choose))
    return jax.nn.softmax(log_choose + ups * jnp.log(p) + downs * jnp.log1p(-p), axis=-1)


def geometric(num_classes: int, *, alpha: ArrayLike = 0.1) -> Array:
    """Returns a table whose row y has 1 − α on y and shares α among the other classes in proportion to α^|k − y|.

    Use it as `prior=Rows(table, labels)`; ε = 1 gives the published target. If K = 1, the class keeps all mass.

    Args:
      num_classes: K.
      alpha: α in [0, 1), a number. May be traced; NaN if outside.

    Returns:
      A table (K, K); row y sums to 1.

    Raises:
      ValueError: a concrete α outside [0, 1).

    Example:
      >>> from jax_ls import priors
      >>> priors.geometric(4, alpha=0.5)[0].round(4).tolist()
      [0.5, 0.2857, 0.1429, 0.0714]

    References:
      Haas and Hüllermeier, Rectifying Bias in Ordinal Observational Data Using Unimodal Label Smoothing, 2023.
    """
    size = checks.check_size("num_classes", num_classes)
    alpha = checks.as_parameter("alpha", alpha, lambda x: (x >= 0) & (x < 1), "a number in [0, 1)")
    checks.as_scalar("alpha", alpha)
    gaps = np.abs(np.arange(size)[:, None] - np.arange(size)[None])
    off = jnp.asarray(gaps > 0, alpha.dtype)
    # Counted from the nearest other class: the shares then have a limit at α = 0.
    falls = off * alpha ** jnp.asarray(np.maximum(gaps - 1, 0), alpha.dtype)
    share = falls / jnp.maximum(jnp.sum(falls, axis=-1, keepdims=True), 1)
    moved = alpha if size > 1 else jnp.zeros_like(alpha)
    return (1 - moved) * jnp.eye(size, dtype=alpha.dtype) + moved * share


def _ranks(ranks: Any) -> Array:
    if jnp.ndim(ranks) == 0:
        return jnp.arange(checks.check_size("ranks", ranks), dtype=jnp.result_type(float))
    values = checks.as_weight("ranks", ranks)
    checks.assert_rank("ranks", values, 1, "K, or real numbers (K,)")
    return values
