"""Returns on another scale: odd functions that shrink the large and keep the small, and their inverses.

A network that learns the transformed return, `two_hot(symlog(returns), support)` say, is read by the inverse of its
mean, which is not the mean of the inverse: with noisy returns that is biased towards 0. Atoms at the inverse,
`Support.from_atoms(symexp(grid))` with plain returns, are not.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.checks import as_amount

__all__ = ["signed_hyperbolic", "signed_parabolic", "symexp", "symlog"]


def symlog(x: ArrayLike) -> Array:
    """sign(x) log(1 + |x|), element by element; slope 1 at 0.

    Args:
      x: real numbers of any shape.

    Returns:
      An array in the shape of x, in float32 or wider.

    Raises:
      TypeError: x that is no real number.

    Example:
      >>> from jax_ls.values import symlog
      >>> symlog(jnp.array([0.0, -jnp.e + 1])).tolist()
      [0.0, -1.0]

    References:
      Hafner et al., Mastering Diverse Domains through World Models, 2023.
    """
    x = checks.as_weight("x", x)
    # Not |x|: its derivative at 0 is 0.
    sign = _sign(x)
    return sign * jnp.log1p(sign * x)


def symexp(x: ArrayLike) -> Array:
    """sign(x) (exp|x| − 1), the inverse of `symlog`.

    Args:
      x: real numbers of any shape.

    Returns:
      An array in the shape of x, in float32 or wider.

    Raises:
      TypeError: x that is no real number.

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
    """sign(x) (√(|x| + 1) − 1) + ε x, element by element.

    Args:
      x: real numbers of any shape.
      epsilon: ε ≥ 0, a number; it bounds the slope of the inverse. May be traced; NaN there if negative.

    Returns:
      An array in the shape of x, in float32 or wider.

    Raises:
      AssertionError, TypeError, ValueError: x that is no real number, ε that is no number ≥ 0.

    Example:
      >>> from jax_ls.values import signed_hyperbolic
      >>> signed_hyperbolic(jnp.array([3.0, -8.0]), 0.25).tolist()
      [1.75, -4.0]

    References:
      Pohlen et al., Observe and Look Further: Achieving Consistent Performance on Atari, 2018.
    """
    x, epsilon = _with_epsilon(x, epsilon)
    finite = jnp.where(jnp.isinf(x), 0, x)
    # √(a + 1) − 1 = a / (√(a + 1) + 1), which loses no digits near 0.
    return jnp.where(jnp.isinf(x), x, finite * (1 / (jnp.sqrt(1 + jnp.abs(finite)) + 1) + epsilon))


def signed_parabolic(x: ArrayLike, epsilon: ArrayLike = 1e-3) -> Array:
    """The inverse of `signed_hyperbolic`: sign(x) u (u + 2) with ε u² + (1 + 2ε) u = |x|.

    Args:
      x: real numbers of any shape.
      epsilon: ε ≥ 0, a number, as there.

    Returns:
      An array in the shape of x, in float32 or wider.

    Raises:
      AssertionError, TypeError, ValueError: x that is no real number, ε that is no number ≥ 0.

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
    # The root of the quadratic without a difference, so that ε may be 0 and x small.
    ratio = 2 / (b + jnp.sqrt(b * b + 4 * epsilon * jnp.abs(finite)))
    return jnp.where(jnp.isinf(x), x, finite * ratio * (ratio * jnp.abs(finite) + 2))


def _sign(x: Array) -> Array:
    """±1, and 1 at 0."""
    return jnp.where(x < 0, -1, 1).astype(x.dtype)


def _with_epsilon(x: ArrayLike, epsilon: ArrayLike) -> tuple[Array, Array]:
    values, slope = checks.as_weight("x", x), as_amount("epsilon", epsilon)
    checks.assert_rank("epsilon", slope, 0, "a number")
    return values, slope.astype(values.dtype)
