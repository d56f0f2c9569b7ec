"""The bins of a scalar: the value that each stands for, and the borders between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import pytree
from jax_ls.checks import as_parameter

__all__ = ["Support"]

Numbers = Array | np.ndarray


@pytree(atoms=1, edges=1)
@dataclass(frozen=True, eq=False, init=False)
class Support:
    """Bins for a scalar: B equally spaced atoms from `low` to `high`, and B + 1 edges midway between them.

    The outer edges lie half a bin outside. `from_atoms` and `from_edges` make bins of any widths. For outer edges at
    `low` and `high`, take `Support.from_edges(jnp.linspace(low, high, B + 1))`.

    Args:
      low, high: numbers, low < high. May be traced; if low ≥ high the bins are then NaN.
      num_bins: B ≥ 2, static.

    Raises:
      ValueError: concrete low ≥ high or numbers that are not finite, fewer than two bins, or bins empty by rounding.

    Example:
      >>> from jax_ls.values import Support
      >>> support = Support(-1, 1, 3)
      >>> print(support.atoms, support.edges)
      [-1.  0.  1.] [-1.5 -0.5  0.5  1.5]
      >>> Support.from_edges(jnp.array([0.0, 1.0, 3.0])).atoms.tolist()
      [0.5, 2.0]

    References:
      Bellemare et al., A Distributional Perspective on Reinforcement Learning, 2017.
    """

    atoms: Array
    edges: Array

    def __init__(self, low: ArrayLike, high: ArrayLike, num_bins: int) -> None:
        size = checks.check_size("num_bins", num_bins)
        if size < 2:
            raise ValueError(f"num_bins: expected at least 2, got {size}")
        first, last = checks.same_dtype(_as_end("low", low), _as_end("high", high))
        if any(isinstance(x, Tracer) for x in (low, high)):
            atoms = jnp.linspace(first, last, size)
        else:
            ends = np.asarray(low, float), np.asarray(high, float)
            if not ends[0] < ends[1]:
                raise ValueError(f"low: expected a number below high, got {low} and {high}")
            atoms = np.linspace(*ends, size).astype(first.dtype)
        self._set("low", atoms, _midway(atoms))

    @classmethod
    def from_atoms(cls, atoms: ArrayLike) -> Self:
        """Returns bins with increasing atoms (B,), such as `symexp(jnp.linspace(-20, 20, 255))`, and edges midway."""
        values = _as_increasing("atoms", atoms, 2)
        return object.__new__(cls)._set("atoms", values, _midway(values))

    @classmethod
    def from_edges(cls, edges: ArrayLike) -> Self:
        """Returns bins with increasing edges (B + 1,), and atoms midway between them."""
        values = _as_increasing("edges", edges, 3)
        return object.__new__(cls)._set("edges", (values[1:] + values[:-1]) / 2, values)

    @property
    def num_bins(self) -> int:
        """B, the number of logits that a network needs."""
        return self.atoms.shape[-1]

    def pad(self, bins: int) -> Self:
        """Returns the support with `bins` more bins at each end, as wide as the outermost."""
        steps = jnp.arange(1, as_count("bins", bins) + 1, dtype=self.edges.dtype)
        below, above = self.edges[1] - self.edges[0], self.edges[-1] - self.edges[-2]

        def extended(x: Array) -> Array:
            return jnp.concatenate([x[0] - below * steps[::-1], x, x[-1] + above * steps])

        return object.__new__(type(self))._set("bins", extended(self.atoms), extended(self.edges))

    def _set(self, name: str, atoms: Numbers, edges: Numbers) -> Self:
        """Sets the fields. If rounding makes a bin empty, NumPy arrays raise ValueError and JAX arrays become NaN."""
        if isinstance(atoms, np.ndarray) and not all((np.diff(x) > 0).all() for x in (atoms, edges)):
            bins = f"{atoms.size} from {atoms[0]} to {atoms[-1]}"
            raise ValueError(f"{name}: expected bins that {atoms.dtype} can tell apart, got {bins}")
        increasing = jnp.all(jnp.diff(atoms) > 0) & jnp.all(jnp.diff(edges) > 0)
        for field, values in (("atoms", atoms), ("edges", edges)):
            object.__setattr__(self, field, jnp.where(increasing, values, jnp.nan))
        return self


def as_support(x: object) -> Support:
    """Returns `x`, which must be a `Support`."""
    if not isinstance(x, Support):
        raise TypeError(f"support: expected a Support, got {checks.describe(x)}")
    return x


def as_count(name: str, x: int) -> int:
    """Returns a static number of bins, 0 or more."""
    checks.check_integer(name, x)
    if x < 0:
        raise ValueError(f"{name}: expected 0 or more bins, got {x}")
    return int(x)


def _as_real(x: Any) -> Any:
    """Integers as the real numbers that −10.0 would be: float64 in 64-bit mode."""
    kind = x.dtype.kind if hasattr(x, "dtype") else np.asarray(x).dtype.kind
    if kind not in "iu":
        return x
    return (x if isinstance(x, Array) else np.asarray(x)).astype(jnp.result_type(float))


def _as_end(name: str, x: ArrayLike) -> Array:
    end = as_parameter(name, _as_real(x), lambda x: abs(x) < np.inf, "a finite number")
    checks.assert_rank(name, end, 0, "a number")
    return end


def _as_increasing(name: str, x: ArrayLike, fewest: int) -> Numbers:
    """Increasing numbers, in NumPy where they are known."""
    x = _as_real(x)
    values = checks.as_weight(name, x)
    checks.assert_rank(name, values, 1, f"increasing numbers, at least {fewest}")
    if values.size < fewest:
        raise ValueError(f"{name}: expected at least {fewest} increasing numbers, got {values.size}")
    if isinstance(x, Tracer):
        return values
    given = np.asarray(x)
    if not (np.isfinite(given).all() and (np.diff(given) > 0).all()):
        raise ValueError(f"{name}: expected finite increasing numbers, got {given}")
    return given.astype(values.dtype)


def _midway(atoms: Numbers) -> Numbers:
    """Returns edges midway between atoms. The outermost edge lies as far outside its atom as the next lies inside."""
    middle = (atoms[1:] + atoms[:-1]) / 2
    xp = np if isinstance(atoms, np.ndarray) else jnp
    return xp.concatenate([2 * atoms[:1] - middle[:1], middle, 2 * atoms[-1:] - middle[-1:]])
