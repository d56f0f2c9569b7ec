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
from jax_ls.class_axis import everywhere

__all__ = ["beta", "binomial", "gaussian", "geometric", "poisson", "sord", "triangular"]

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


def geometric(num_classes: int, *, alpha: ArrayLike = 0.1, left: ArrayLike | None = None) -> Array:
    """Returns a table whose row y has 1 − α on y and shares α among the other classes in proportion to α^|k − y|.

    Use it as `prior=Rows(table, labels)`; ε = 1 gives the published target. If K = 1, the class keeps all mass.

    Args:
      num_classes: K.
      alpha: α in [0, 1), a number, or (K,) for each label its own. May be traced; NaN there if outside.
      left: the share of α that goes to the classes below y, in [0, 1], a number or (K,); at the ends of the scale all
        of it goes inwards. None: every class by its distance alone.

    Returns:
      A table (K, K); row y sums to 1.

    Raises:
      ValueError: a concrete α outside [0, 1), or `left` outside [0, 1].

    Example:
      >>> from jax_ls import priors
      >>> priors.geometric(4, alpha=0.5)[0].round(4).tolist()
      [0.5, 0.2857, 0.1429, 0.0714]
      >>> priors.geometric(3, alpha=0.5, left=0.25)[1].tolist()
      [0.125, 0.5, 0.375]

    References:
      Haas and Hüllermeier, Rectifying Bias in Ordinal Observational Data Using Unimodal Label Smoothing, 2023.
    """
    size = checks.check_size("num_classes", num_classes)
    alpha = checks.as_parameter("alpha", alpha, lambda x: (x >= 0) & (x < 1), "a number in [0, 1)")
    checks.assert_shape("alpha", alpha, [(size,), ()], f"a number, or ({size},)")
    alpha = jnp.broadcast_to(alpha, (size,))[:, None]
    steps = np.arange(size)[None] - np.arange(size)[:, None]
    # Steps beyond the nearest other class, so that α = 0 has a limit.
    falls = alpha ** jnp.asarray(np.maximum(np.abs(steps) - 1, 0), alpha.dtype)
    below, above = (falls * jnp.asarray(side, alpha.dtype) for side in (steps < 0, steps > 0))
    moved = alpha if size > 1 else jnp.zeros_like(alpha)
    if left is None:
        share = _normalized(below + above)
    else:
        fraction = checks.as_skew("left", left)
        checks.assert_shape("left", fraction, [(size,), ()], f"a number, or ({size},)")
        fraction = jnp.broadcast_to(fraction, (size,))[:, None].astype(alpha.dtype)
        y = np.arange(size)[:, None]
        fraction = jnp.where(y == 0, 0, jnp.where(y == size - 1, 1, fraction)) + 0 * fraction
        share = fraction * _normalized(below) + (1 - fraction) * _normalized(above)
    return (1 - moved) * jnp.eye(size, dtype=alpha.dtype) + moved * share


def triangular(num_classes: int, *, alpha: ArrayLike = 0.01) -> Array:
    """Rows of a triangle over the scale, the share of each class its area: nothing beyond a few classes.

    The triangle is centred on class y, and wide enough to give α to each neighbour. At the ends of the scale it is a
    half with its peak at the end. Up to α = 2/9 only neighbours get mass: a row is (α, 1 − 2α, α), at the ends 1 − α.
    Use it as `prior=Rows(table, labels)`; ε = 1 is the published target.

    Args:
      num_classes: K.
      alpha: α in [0, 1/2), a number. May be traced; NaN there if outside.

    Returns:
      A table (K, K); row y sums to 1.

    Raises:
      TypeError, ValueError: K that is no positive integer, α outside [0, 1/2).

    Example:
      >>> from jax_ls import priors
      >>> priors.triangular(4, alpha=0.125)[1].round(4).tolist()
      [0.125, 0.75, 0.125, 0.0]

    References:
      Vargas et al., Soft Labelling Based on Triangular Distributions for Ordinal Classification, 2023. At the ends the
      published table has shares of its own, which differ between the first class and the last.
    """
    size = checks.check_size("num_classes", num_classes)
    alpha = checks.as_parameter("alpha", alpha, lambda x: (x >= 0) & (x < 0.5), "a number in [0, 1/2)")
    checks.as_scalar("alpha", alpha)
    # In widths of a class; what lies beyond the peak is (1 − t / width)² / 2 on either side of it.
    half_width, whole_width = 0.5 / (1 - jnp.sqrt(2 * alpha)), 1 / (1 - jnp.sqrt(alpha))
    edges, y = np.arange(size + 1)[None], np.arange(size)[:, None]
    away = jnp.asarray(edges - (y + 0.5), alpha.dtype)
    tail = jnp.square(jnp.maximum(1 - jnp.abs(away) / half_width, 0)) / 2
    inner = jnp.diff(jnp.where(away > 0, 1 - tail, tail), axis=-1)
    falling = jnp.square(jnp.maximum(1 - jnp.asarray(edges, alpha.dtype) / whole_width, 0))
    first = -jnp.diff(falling, axis=-1)
    table = jnp.where(y == 0, first, jnp.where(y == size - 1, first[:, ::-1], inner))
    return _normalized(table)


def beta(num_classes: int, *, shapes: ArrayLike | None = None) -> Array:
    """Rows of beta distributions over [0, 1], cut into K equal parts: wider in the middle than at the ends.

    Use it as `prior=Rows(table, labels)`; ε = 1 is the published target.

    Args:
      num_classes: K.
      shapes: (K, 2) numbers > 0, the two shapes (a, b) for each label. None: the distribution whose mean is the middle
        of part y and whose standard deviation is half a part, and (1, 2K − 2) and (2K − 2, 1) at the ends. The
        published table for 3 to 14 classes rounds such numbers.

    Returns:
      A table (K, K); row y sums to 1.

    Raises:
      TypeError, ValueError: K that is no positive integer, shapes that are not positive.

    Example:
      >>> from jax_ls import priors
      >>> priors.beta(3)[0].round(4).tolist()
      [0.8025, 0.1852, 0.0123]

    References:
      Vargas et al., Unimodal Regularisation Based on Beta Distribution for Deep Ordinal Regression, 2022.
    """
    size = checks.check_size("num_classes", num_classes)
    if shapes is None:
        mean = (np.arange(size) + 0.5) / size
        total = 4 * size**2 * mean * (1 - mean) - 1
        given = np.stack([mean * total, (1 - mean) * total], axis=-1)
        given[0], given[-1] = (1, max(2 * size - 2, 1)), (max(2 * size - 2, 1), 1)
        shapes = given
    ab = checks.as_positive("shapes", shapes)
    checks.assert_shape("shapes", ab, [(size, 2)], f"({size}, 2), two numbers a label")
    ab = everywhere(ab)
    edges = jnp.asarray(np.arange(size + 1) / size, ab.dtype)[None]
    below = jax.scipy.special.betainc(ab[:, :1], ab[:, 1:], edges)
    # The far tail as a difference of small numbers.
    above = jax.scipy.special.betainc(ab[:, 1:], ab[:, :1], 1 - edges)
    near = edges[:, 1:] <= ab[:, :1] / jnp.sum(ab, axis=-1, keepdims=True)
    return _normalized(jnp.where(near, jnp.diff(below, axis=-1), -jnp.diff(above, axis=-1)))


def poisson(num_classes: int, *, rates: ArrayLike | None = None) -> Array:
    """Rows ∝ λ_y^k / k!, Poisson distributions over the K classes: wider towards the upper end of the scale.

    Use it as `prior=Rows(table, labels)`; ε = 1 is the published target.

    Args:
      num_classes: K.
      rates: λ > 0, (K,), for each label. None: y + ½, whose only peak is y; at a whole λ the peak is shared by two.

    Returns:
      A table (K, K); row y sums to 1.

    Raises:
      TypeError, ValueError: K that is no positive integer, rates that are not positive.

    Example:
      >>> from jax_ls import priors
      >>> priors.poisson(3)[0].round(4).tolist()
      [0.6154, 0.3077, 0.0769]

    References:
      Beckham and Pal, Unimodal Probability Distributions for Deep Ordinal Classification, 2017. dlordinal takes a
      softmax of the probabilities at λ = y + 1, which leaves rows that are nearly uniform.
    """
    size = checks.check_size("num_classes", num_classes)
    given = np.arange(size) + 0.5 if rates is None else rates
    rate = checks.as_positive("rates", given)
    checks.assert_shape("rates", rate, [(size,)], f"({size},), one number a label")
    k = np.arange(size)
    log_factorial = jnp.asarray([math.lgamma(i + 1) for i in k], rate.dtype)
    return jax.nn.softmax(jnp.asarray(k, rate.dtype)[None] * jnp.log(rate)[:, None] - log_factorial[None], axis=-1)


def _normalized(rows: Array) -> Array:
    """Rows of numbers ≥ 0 over their sums; a row of zeros stays."""
    total = jnp.sum(rows, axis=-1, keepdims=True)
    return rows / jnp.where(total == 0, 1, total)


def _ranks(ranks: Any) -> Array:
    if jnp.ndim(ranks) == 0:
        return jnp.arange(checks.check_size("ranks", ranks), dtype=jnp.result_type(float))
    values = checks.as_weight("ranks", ranks)
    checks.assert_rank("ranks", values, 1, "K, or real numbers (K,)")
    return everywhere(values)
