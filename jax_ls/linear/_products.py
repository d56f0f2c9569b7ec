"""Matrix products of an output layer, and gradients that narrow dtypes can hold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jax_ls import checks

__all__ = ["narrowed", "product", "stored_dtype", "unit_of"]


def product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Returns the contraction of two matrices, multiplied in the wider of their dtypes, in float32 or wider."""
    a, b = checks.same_dtype(a, b)
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=checks.wide(a.dtype))


def stored_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype that slopes of an array of `dtype` are kept in: bfloat16 for 8 bits, else `dtype`."""
    return jnp.dtype(jnp.bfloat16 if jnp.finfo(dtype).bits < 16 else dtype)


def unit_of(largest: Array, dtype: DTypeLike) -> Array | None:
    """Returns the power of two to divide by, so that numbers up to `largest` fill the range of `dtype`.

    None where the dtype has the exponents of float32: nothing is lost there. The slope p/N of a class that is not the
    label is less than float16 can hold from K = 2¹⁴ on.
    """
    finfo = jnp.finfo(dtype)
    if finfo.maxexp >= jnp.finfo(jnp.float32).maxexp:
        return None
    sane = jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1)
    _, exponent = jnp.frexp(sane)
    # Units below 2⁻¹²⁰ would be subnormal numbers, which accelerators take for 0.
    return jnp.ldexp(jnp.ones_like(sane), jnp.maximum(exponent - (int(finfo.maxexp) - 1), -120))


def narrowed(x: Array, unit: Array | None, dtype: DTypeLike) -> Array:
    """Returns x / unit in `dtype`."""
    return x.astype(dtype) if unit is None else (x / unit).astype(dtype)
