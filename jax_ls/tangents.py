"""Derivatives along some of the arguments of a function, for rules of `jax.custom_jvp`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jax_ls import fences

__all__ = ["along", "elementwise"]


def along(function: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    """Returns the derivative of `function(*primals)` along `tangents`.

    A rule with `symbolic_zeros=True` is told which arguments do not change, by a `SymbolicZero` for each. They are
    constants here: multiplied by zeros, they would cost as much as the others.
    """
    leaves, tree = jax.tree.flatten(tuple(primals))
    changes = jax.tree.leaves(tuple(tangents))
    moving = [i for i, change in enumerate(changes) if not isinstance(change, SymbolicZero)]

    def moved(*given: Any) -> Any:
        return function(
            *jax.tree.unflatten(tree, [given[moving.index(i)] if i in moving else x for i, x in enumerate(leaves)])
        )

    if not moving:
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(moved))
    return jax.jvp(moved, tuple(leaves[i] for i in moving), tuple(changes[i] for i in moving))[1]


def elementwise(function: Callable[..., Array]) -> Callable[..., Array]:
    """Returns an elementwise loss of logits, its first argument, whose derivative is computed apart from the loss."""
    apart = jax.custom_jvp(function)

    @functools.partial(apart.defjvp, symbolic_zeros=True)
    def _(primals: Any, tangents: Any) -> Any:
        logits, *others = primals
        return apart(*primals), along(function, (fences.for_derivatives(logits), *others), tangents)

    return jax.jit(apart)
