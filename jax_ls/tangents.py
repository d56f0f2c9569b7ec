"""Functions whose derivative is a rule of ours, and derivatives along some of their arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun  # pyright: ignore[reportPrivateImportUsage]
from jax.interpreters import ad, batching, mlir

from jax_ls import fences

__all__ = ["along", "elementwise", "with_jvp"]


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


Arrays = Sequence[Array]


class with_jvp:  # noqa: N801 - as jax.custom_jvp
    """A function whose derivative is the rule that `defjvp` gives it.

    As `jax.custom_jvp` with `symbolic_zeros=True`, whose rule is lost where the gradient of a `jax.lax.scan` is
    differentiated once more: JAX then differentiates the function itself, and a variadic `jax.lax.reduce` has no
    derivative. Here the function is an operation of JAX, which no transformation takes apart.

    Args:
      function: of hashable arguments, then of trees of arrays; it closes over no array that is traced.
      static: how many arguments are no arrays.
    """

    def __init__(self, function: Callable[..., Any], static: int = 0) -> None:
        functools.update_wrapper(self, function)
        self.function, self.static = function, static

    def defjvp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Gives the function its rule: (*static, primals, tangents) -> (result, tangent of the result)."""
        self.rule = rule
        return rule

    def __call__(self, *arguments: Any) -> Any:
        static, arrays = arguments[: self.static], arguments[self.static :]
        leaves, tree = jax.tree.flatten(arrays)

        def of_leaves(*leaves: Array) -> Any:
            return self.function(*static, *jax.tree.unflatten(tree, leaves))

        def jvp(primals: Arrays, tangents: Sequence[Any]) -> tuple[Arrays, Arrays]:
            value, tangent = self.rule(*static, *(jax.tree.unflatten(tree, x) for x in (primals, tangents)))
            return jax.tree.leaves(value), jax.tree.leaves(tangent)

        closed, shape = jax.make_jaxpr(of_leaves, return_shape=True)(*leaves)
        out = OPERATION.bind(*leaves, jaxpr=closed, jvp=jvp)
        return jax.tree.unflatten(jax.tree.structure(shape), out)


OPERATION = Primitive("jax_ls_with_jvp")
OPERATION.multiple_results = True


@OPERATION.def_impl
def _evaluated(*arrays: Array, jaxpr: ClosedJaxpr, jvp: Any) -> Arrays:
    return jaxpr_as_fun(jaxpr)(*arrays)


@OPERATION.def_abstract_eval
def _abstractly(*_: Any, jaxpr: ClosedJaxpr, jvp: Any) -> Any:
    return jaxpr.out_avals


def _differentiated(primals: Arrays, tangents: Sequence[Any], *, jaxpr: ClosedJaxpr, jvp: Any) -> Any:
    return jvp(primals, [SymbolicZero(x.aval) if isinstance(x, ad.Zero) else x for x in tangents])


def _batched(arrays: Arrays, axes: Sequence[int | None], *, jaxpr: ClosedJaxpr, jvp: Any) -> Any:
    def of_many(primals: Arrays, tangents: Sequence[Any]) -> tuple[Arrays, Arrays]:
        moving = [i for i, x in enumerate(tangents) if not isinstance(x, SymbolicZero)]

        def of_one(primals: Arrays, moved: Arrays) -> tuple[Arrays, Arrays]:
            zeros = [SymbolicZero(jax.typeof(x).to_tangent_aval()) for x in primals]
            return jvp(primals, [moved[moving.index(i)] if i in moving else x for i, x in enumerate(zeros)])

        return jax.vmap(of_one, (list(axes), [axes[i] for i in moving]))(list(primals), [tangents[i] for i in moving])

    closed = jax.make_jaxpr(jax.vmap(jaxpr_as_fun(jaxpr), tuple(axes)))(*arrays)
    out = OPERATION.bind(*arrays, jaxpr=closed, jvp=of_many)
    return out, [0] * len(out)


def _lowered(ctx: Any, *arrays: Any, jaxpr: ClosedJaxpr, jvp: Any) -> Any:
    return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *arrays)


ad.primitive_jvps[OPERATION] = _differentiated
batching.primitive_batchers[OPERATION] = _batched
mlir.register_lowering(OPERATION, _lowered)
