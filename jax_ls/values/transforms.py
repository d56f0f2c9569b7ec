"""Transforms of returns: odd functions that shrink large numbers and keep small ones, and their inverses.

A network may learn the transformed return, as in `two_hot(symlog(returns), support)`. Its value is then the inverse of
a mean, which is not the mean of the inverse: with noisy returns it is biased towards 0. Plain returns with transformed
atoms, `Support.from_atoms(symexp(grid))`, have no such bias.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.checks import as_amount

__all__ = ["signed_hyperbolic", "signed_parabolic", "symexp", "symlog"]


def symlog(x: ArrayLike) -> Array:
    """Returns sign(x) log(1 + |x|), element by element. Its slope at 0 is 1.

    Args:
      x: real numbers of any shape.

    Returns:
      An array in the shape of x, in float32 or wider.

    Example:
      >>> from jax_ls.values import symlog
      >>> symlog(jnp.array([0.0, -jnp.e + 1])).tolist()
      [0.0, -1.0]

    References:
      Hafner et al., Mastering Diverse Domains through World Models, 2023.
    """
    x = checks.as_weight("x", x)
    # sign · x and not |x|, whose derivative at 0 is 0 in JAX.
    sign = _sign(x)
    return sign * jnp.log1p(sign * x)


def symexp(x: ArrayLike) -> Array:
    """Returns sign(x) (exp|x| − 1), the inverse of `symlog`.

    Args:
      x: real numbers of any shape.

    Returns:
      An array in the shape of x, in float32 or wider.

    Example:
      >>> from jax_ls.values import symexp
      >>> symexp(jnp.log(jnp.array([1.0, 3.0]))).round(4).tolist()
      [0.0, 2.0]

    References:
      Hafner et al., Mastering Diverse Domains through World Models, 2023.
    """
    x = checks.as_weight("x", x)
    sign = _sign(x)
    return sign * jnp.expm1(sign * x)


def signed_hyperbolic(x: ArrayLike, epsilon: ArrayLike = 1e-3) -> Array:
    """Returns sign(x) (√(|x| + 1) − 1) + ε x, element by element.

    Args:
      x: real numbers of any shape.
      epsilon: ε ≥ 0, a number; it limits the slope of the inverse. May be traced; NaN if negative.

    Returns:
      An array in the shape of x, in float32 or wider.

    Raises:
      ValueError: a concrete ε < 0.

    Example:
      >>> from jax_ls.values import signed_hyperbolic
      >>> signed_hyperbolic(jnp.array([3.0, -8.0]), 0.25).tolist()
      [1.75, -4.0]

    References:
      Pohlen et al., Observe and Look Further: Achieving Consistent Performance on Atari, 2018.
    """
    x, epsilon = _with_epsilon(x, epsilon)
    finite = jnp.where(jnp.isinf(x), 0, x)
    # √(a + 1) − 1 = a / (√(a + 1) + 1), and the right side loses no digits near 0.
    return jnp.where(jnp.isinf(x), x, finite * (1 / (jnp.sqrt(1 + jnp.abs(finite)) + 1) + epsilon))


def signed_parabolic(x: ArrayLike, epsilon: ArrayLike = 1e-3) -> Array:
    """Returns the inverse of `signed_hyperbolic`: sign(x) u (u + 2) with ε u² + (1 + 2ε) u = |x|.

    Args:
      x: real numbers of any shape.
      epsilon: ε ≥ 0, a number, as in `signed_hyperbolic`.

    Returns:
      An array in the shape of x, in float32 or wider.

    Raises:
      ValueError: a concrete ε < 0.

    Example:
      >>> from jax_ls.values import signed_parabolic
      >>> signed_parabolic(jnp.array([1.75, -4.0]), 0.25).tolist()
      [3.0, -8.0]

    References:
      Pohlen et al., Observe and Look Further: Achieving Consistent Performance on Atari, 2018.
    """
    x, epsilon = _with_epsilon(x, epsilon)
    finite = jnp.where(jnp.isinf(x), 0, x)
    b = 1 + 2 * epsilon
    # The root of the quadratic written without a difference: it keeps its digits at ε = 0 and for small x.
    ratio = 2 / (b + jnp.sqrt(b * b + 4 * epsilon * jnp.abs(finite)))
    return jnp.where(jnp.isinf(x), x, finite * ratio * (ratio * jnp.abs(finite) + 2))


def _sign(x: Array) -> Array:
    """Returns −1 for negative numbers, else 1."""
    return jnp.where(x < 0, -1, 1).astype(x.dtype)


def _with_epsilon(x: ArrayLike, epsilon: ArrayLike) -> tuple[Array, Array]:
    values, slope = checks.as_weight("x", x), as_amount("epsilon", epsilon)
    checks.assert_rank("epsilon", slope, 0, "a number")
    return values, slope.astype(values.dtype)
