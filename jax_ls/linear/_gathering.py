"""A kernel that is split over the tokens' devices (FSDP). Kernel and tokens have to meet, and one of them is sent.

Either the kernel is made whole for the products, and its gradient split again; or, where its classes are split and the
tokens are fewer, each device sees the tokens of all and keeps its own classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jax_ls.algebra import Target

__all__ = ["Gathering", "told"]


def told(node: Any) -> list[tuple[Array, bool, bool]]:
    """Returns each array of a target or argument, whether it has an entry for each token, and for each class."""
    leaves = jax.tree.leaves(node)
    if isinstance(node, Target):
        return list(zip(leaves, node.per_example(), node.over_classes(), strict=True))
    return [(x, True, False) for x in leaves]


@dataclass(frozen=True)
class Gathering:
    """How the tokens' mesh axes split a kernel, inside `jax.shard_map`. Static.

    Args:
      axes: for each axis of the kernel, the mesh axes that split it and that split the tokens too.
      wire: dtype in which gradients are summed over devices; None for that of their array.
      visits: the mesh axes whose devices see each other's tokens. They split classes and tokens, and are not in `axes`.
    """

    axes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    wire: Any = None
    visits: tuple[str, ...] = ()

    def whole(self, kernel: Array) -> Array:
        """Returns the kernel, or a block of it, gathered from the devices that hold its parts."""
        for axis, names in enumerate(self.axes):
            if names:
                kernel = jax.lax.all_gather(kernel, names, axis=axis, tiled=True)
        return kernel

    def shard(self, gradient: Array, dtype: DTypeLike) -> Array:
        """Returns this device's part of the gradient of `whole`, summed over the devices."""
        if not any(self.axes):
            return gradient.astype(dtype)
        gradient = gradient.astype(self.wire or dtype)
        for axis, names in reversed(list(enumerate(self.axes))):
            if names:
                gradient = jax.lax.psum_scatter(gradient, names, scatter_dimension=axis, tiled=True)
        return gradient.astype(dtype)

    def parts(self, axis: int) -> int:
        """Returns into how many parts the tokens' devices split the kernel along `axis`."""
        return jax.lax.axis_size(self.axes[axis]) if self.axes[axis] else 1

    def visited(self, axis: int) -> Gathering:
        """Returns how tokens are sent, where the kernel would be gathered along `axis`."""
        axes = tuple(() if i == axis else names for i, names in enumerate(self.axes))
        return replace(self, axes=axes, visits=self.axes[axis])

    @property
    def visitors(self) -> int:
        """How many devices see each other's tokens."""
        return jax.lax.axis_size(self.visits) if self.visits else 1

    def all_tokens(self, x: Array) -> Array:
        """Returns x (n, ...) of all devices that see each other's tokens, one device's after another's."""
        return jax.lax.all_gather(x, self.visits, axis=0, tiled=True) if self.visits else x

    def own_tokens(self, x: Array) -> Array:
        """Returns the entries of this device's tokens, of those that `all_tokens` returned."""
        return self._own(x, 0)

    def summed_for_own_tokens(self, x: Array, dtype: DTypeLike) -> Array:
        """Returns Σ of x (n, ...) over the devices that see each other's tokens, for this device's tokens."""
        if not self.visits:
            return x
        # Narrow floats but bfloat16 would need a unit of their own, the same on all devices.
        wire = self.wire or (dtype if dtype == jnp.bfloat16 else x.dtype)
        return jax.lax.psum_scatter(x.astype(wire), self.visits, scatter_dimension=0, tiled=True).astype(x.dtype)

    def own_classes(self, x: Array) -> Array:
        """Returns the entries of this device's classes, of x (..., K) for those of all that it sees the tokens of."""
        return self._own(x, x.ndim - 1)

    def _own(self, x: Array, axis: int) -> Array:
        """Returns this device's part of `x` along an axis that holds those of all devices in `visits`."""
        if not self.visits:
            return x
        size = x.shape[axis] // self.visitors
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.visits) * size, size, axis=axis)

    def met(self, tree: Any) -> Any:
        """Returns arguments of all tokens, (n, ...) each, and targets of all tokens and this device's classes."""

        def one(node: Any) -> Any:
            leaves: list[Array] = []
            for x, by_token, by_class in told(node):
                x = self.own_classes(x) if by_class else x
                leaves.append(self.all_tokens(x) if by_token else x)
            return jax.tree.unflatten(jax.tree.structure(node), leaves)

        return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Target)) if self.visits else tree
