"""A kernel that is split over the tokens' devices (FSDP): made whole for the products, its gradient split again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax import Array
from jax.typing import DTypeLike

__all__ = ["Gathering"]


@dataclass(frozen=True)
class Gathering:
    """How the tokens' mesh axes split a kernel, inside `jax.shard_map`. Static.

    Args:
      axes: for each axis of the kernel, the mesh axes that split it and that split the tokens too.
      wire: dtype in which gradients are summed over devices; None for the kernel's.
    """

    axes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    wire: Any = None

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
