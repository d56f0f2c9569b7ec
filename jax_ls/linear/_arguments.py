"""Checks the arguments of an output layer, by name."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jax_ls import checks
from jax_ls.algebra import Target
from jax_ls.linear._meshes import Layout

__all__ = [
    "as_accumulate",
    "as_arrays",
    "as_layer",
    "as_softcap",
    "as_weights",
    "at_least",
    "check_product",
    "gathered",
    "per_batch",
    "per_token",
]


def as_layer(hidden: ArrayLike, kernel: ArrayLike) -> tuple[Array, Array]:
    """Returns hidden states and kernel as arrays."""
    h = checks.as_array("hidden", hidden, "real numbers (*batch, D)")
    k = checks.as_array("kernel", kernel, "real numbers (D, K), or (K, D) if transposed")
    checks.assert_kind("hidden", h, float, "real numbers (*batch, D)")
    checks.assert_min_rank("hidden", h, 1, "real numbers (*batch, D)")
    checks.assert_kind("kernel", k, float, "real numbers (D, K), or (K, D) if transposed")
    checks.assert_rank("kernel", k, 2, "a matrix (D, K), or (K, D) if transposed")
    return h, k


def check_product(h: Array, k: Array, transposed: bool, layout: Layout) -> None:
    """Checks that hidden states and kernel, as this call got them, can be multiplied."""
    features = h.shape[-1] // gathered(layout, 1 if transposed else 0)
    shape = (k.shape[0], features) if transposed else (features, k.shape[1])
    checks.assert_shape("kernel", k, [shape], f"{shape}, for hidden {checks.describe(h)}")
    if 0 in shape:
        raise ValueError(f"kernel: expected at least one feature and one class, got {checks.describe(k)}")


def gathered(layout: Layout, axis: int) -> int:
    """Returns into how many parts the tokens' devices split the kernel, where this call got one: in `jax.shard_map`."""
    return layout.gathering.parts(axis) if layout.mesh is None else 1


def as_weights(weights: ArrayLike | None, h: Array) -> Array | None:
    """Returns weights (*batch,) of the tokens; None for None."""
    each = jax.ShapeDtypeStruct(h.shape[:-1], checks.wide(h.dtype))
    return None if weights is None else checks.as_broadcast("weights", weights, each)


def as_softcap(softcap: float | None) -> float | None:
    """Returns the cap as a Python number; None for None."""
    if softcap is None:
        return None
    if isinstance(softcap, Tracer) or np.ndim(softcap):
        raise TypeError(f"softcap: expected a static number, got {softcap!r}")
    checks.check_values("softcap", softcap, lambda c: (c > 0) & (c < math.inf), "a finite number > 0")
    return float(softcap)


def as_accumulate(dtype: DTypeLike | None) -> Any:
    """Returns the dtype that gradients add up in: float32 for None."""
    dtype = jnp.float32 if dtype is None else dtype
    try:
        found = jnp.dtype(dtype)
        known = jnp.issubdtype(found, jnp.floating) and jnp.finfo(found).bits >= 16
    except TypeError:
        known = False
    if not known:
        raise TypeError(f"accumulate: expected a float dtype of 16 bits or more, got {dtype!r}")
    return jnp.dtype(dtype)


def at_least(accumulate: Any, dtype: DTypeLike) -> Any:
    """Returns the dtype that gradients of arrays of `dtype` add up in: never narrower than the arrays."""
    return max((jnp.dtype(accumulate), jnp.dtype(dtype)), key=lambda x: x.itemsize)


def as_arrays(arguments: Any) -> Any:
    """Returns arguments as arrays, Python numbers too; targets as they are."""

    def convert(path: Any, x: Any) -> Any:
        return x if isinstance(x, Target) else checks.as_array(f"argument{jax.tree_util.keystr(path)}", x)

    return jax.tree_util.tree_map_with_path(convert, arguments, is_leaf=lambda x: isinstance(x, Target))


def per_token(arguments: Any, batch: tuple[int, ...]) -> Any:
    """Returns, of each array, whether it has an entry a token: targets hold some that all tokens share."""

    def flags(node: Any) -> Any:
        leaves, tree = jax.tree.flatten(node)
        own = node.per_example() if isinstance(node, Target) else [True] * len(leaves)
        for leaf, is_own in zip(leaves, own, strict=True):
            if is_own:
                shape = batch + leaf.shape[len(batch) :]
                checks.assert_shape("target or argument", leaf, [shape], f"batch axes {batch}, as hidden has")
        return jax.tree.unflatten(tree, own)

    return jax.tree.map(flags, arguments, is_leaf=lambda x: isinstance(x, Target))


def per_batch(x: Array, batch: tuple[int, ...]) -> Array:
    """Returns x (N or more, ...) as (*batch, ...)."""
    return x[: math.prod(batch)].reshape(*batch, *x.shape[1:])
