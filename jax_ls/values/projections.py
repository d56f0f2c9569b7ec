"""Scalar returns -> q over bins: `hl_gauss`, `two_hot` and `categorical_projection`. Back: `expected_value`."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jax_ls import checks, fences
from jax_ls.algebra import Target
from jax_ls.checks import as_positive
from jax_ls.class_axis import align, everywhere, look_up
from jax_ls.targets import Dense, Sparse
from jax_ls.values.support import Support, as_count, as_support

__all__ = ["categorical_projection", "expected_value", "hl_gauss", "two_hot"]


def hl_gauss(returns: ArrayLike, support: Support, *, sigma_ratio: ArrayLike = 0.75, padding: int = 0) -> Target:
    """Returns the histogram of a Gaussian around the return: p_i ∝ Φ((e_{i+1} − t)/σ) − Φ((e_i − t)/σ).

    For equal bins and σ of ¾ to 2 bins, ⌈4σ⌉ bins of padding make the mean of the histogram the clipped return, to 1e-4
    of a bin. Without padding the tails are cut off, and the mean of a return near an end moves inwards.

    Args:
      returns: t, real numbers (*batch,). A return outside is clipped to the outermost atom.
      support: the bins, with edges e.
      sigma_ratio: σ in bins, > 0, () or (*batch,). May be traced; NaN if not positive. If bins differ, σ is in units of
        their mean width. For bins that grow outwards, transform the returns instead: `hl_gauss(symlog(t), even)`.
      padding: how many bins at each end are only for the tails: returns are clipped to the atoms between. To cover
        [low, high], take `Support(low, high, num_bins).pad(padding)`.

    Returns:
      A `Target` of mass 1; a NaN return makes its own row NaN.

    Raises:
      TypeError: `support` is no `Support`.
      ValueError: a concrete σ ≤ 0, or padding that leaves no bin.

    Example:
      >>> from jax_ls.values import Support, expected_value, hl_gauss
      >>> support = Support(-2, 2, 5)
      >>> print(hl_gauss(jnp.array([0.5]), support, sigma_ratio=0.5).probs(5).round(4))
      [[0.     0.0227 0.4773 0.4773 0.0227]]
      >>> wide = support.pad(3)
      >>> target = hl_gauss(jnp.array([1.3, 1e6]), wide, padding=3)
      >>> print(expected_value(jnp.log(target.probs(wide.num_bins)), wide).round(3))
      [1.3 2. ]

    References:
      Imani and White, Improving Regression Performance with Distributional Losses, 2018; Farebrother et al., Stop
      Regressing: Training Value Functions via Classification for Scalable Deep RL, 2024.
    """
    given = checks.as_weight("returns", returns)
    ratio = as_positive("sigma_ratio", sigma_ratio)
    checks.assert_shape("sigma_ratio", ratio, [(), given.shape], f"() or {given.shape}, the shape of the returns")
    first, support = as_count("padding", padding), as_support(support)
    last = support.num_bins - 1 - first
    if first > last:
        raise ValueError(f"padding: expected to leave some of {support.num_bins} bins, got {padding}")
    t, edges = checks.same_dtype(given, support.edges)
    t = jnp.clip(t, support.atoms[first].astype(t.dtype), support.atoms[last].astype(t.dtype))
    sigma = ratio.astype(t.dtype) * (edges[-1] - edges[0]) / support.num_bins
    scale = align((math.sqrt(0.5) / sigma)[..., None], t.ndim + 1)

    def twice_mass(lower: Array, upper: Array) -> Array:
        x, y = ((align(e, t.ndim + 1) - t[..., None]) * scale for e in (lower, upper))
        around = ((x < 0) & (y >= 0)).astype(t.dtype)
        return jnp.where(
            y - x < NARROW,
            _narrow((x + y) / 2, align(upper - lower, t.ndim + 1) * scale),
            (_tail(x) - _tail(y)) + 2 * around,
        )

    # Without the fence, XLA on CPU computes the sum of a row once for each of its bins.
    return Dense(twice_mass(edges[:-1], edges[1:]) / fences.end_of_sum(twice_mass(edges[:1], edges[-1:])))


def two_hot(returns: ArrayLike, support: Support) -> Target:
    """Returns a target on the two atoms around the return, whose mean is the return.

    Atom a_i gets (a_{i+1} − t) / (a_{i+1} − a_i), and a_{i+1} the rest.

    Args:
      returns: t, real numbers (*batch,). A return outside is clipped to the outermost atom.
      support: the bins.

    Returns:
      A `Target` with 2 entries for each return; a NaN return makes its own row NaN.

    Example:
      >>> from jax_ls.values import Support, two_hot
      >>> two_hot(jnp.array([0.25, 2.0, 7.0]), Support(-2, 2, 5)).probs(5).tolist()
      [[0.0, 0.0, 0.75, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0]]

    References:
      Schrittwieser et al., Mastering Atari, Go, Chess and Shogi by Planning with a Learned Model, 2020; Hafner et al.,
      Mastering Diverse Domains through World Models, 2023.
    """
    return _between_atoms(checks.as_weight("returns", returns), support)


def categorical_projection(returns: ArrayLike, probs: ArrayLike, support: Support) -> Target:
    """Returns a distribution over returns as a target over atoms with the same mean: Σ_j p_j `two_hot`(t_j).

    Bellman's t_j = r + γ a_j, with the probabilities p_j of the next state, gives the target of C51.

    Args:
      returns: t, real numbers (*batch, S) or (S,). A return outside is clipped to the outermost atom.
      probs: p, real numbers (*batch, S), the probability of each return.
      support: the bins.

    Returns:
      A `Target` with 2S entries for each example.

    Example:
      >>> from jax_ls.values import Support, categorical_projection
      >>> support = Support(-2, 2, 5)
      >>> bellman = 1 + 0.5 * support.atoms
      >>> print(categorical_projection(bellman, jnp.full(5, 0.2), support).probs(5).round(2))
      [0.  0.  0.3 0.4 0.3]

    References:
      Bellemare et al., A Distributional Perspective on Reinforcement Learning, 2017.
    """
    p = checks.as_class_values("probs", probs)
    t = checks.as_weight("returns", returns)
    checks.assert_shape("returns", t, [p.shape[-1:], p.shape], f"{p.shape[-1:]} or {p.shape}, as probs has")
    hot = _between_atoms(jnp.broadcast_to(align(t, p.ndim), p.shape), support)
    flat = (*p.shape[:-1], 2 * p.shape[-1])
    weights = hot.weights * p[..., None].astype(hot.weights.dtype)
    return Sparse(hot.indices.reshape(flat), weights.reshape(flat), support.num_bins)


def expected_value(logits: ArrayLike, support: Support) -> Array:
    """Returns the mean value under logits over bins: Σ_i softmax(z)_i a_i, for atoms a.

    Args:
      logits: z, real numbers (*batch, B).
      support: the bins.

    Returns:
      Values (*batch,) in float32 or wider.

    Example:
      >>> from jax_ls.values import Support, expected_value
      >>> expected_value(jnp.zeros((2, 5)), Support(1, 3, 5)).tolist()
      [2.0, 2.0]

    References:
      Farebrother et al., Stop Regressing, 2024.
    """
    z = checks.as_logits("logits", logits)
    checks.assert_num_classes("logits", z, as_support(support).num_bins)
    z, atoms = checks.same_dtype(z.astype(checks.wide(z.dtype)), support.atoms)
    # Relative to an atom in the middle: for atoms far from 0, the rounding of Σ p would show.
    middle = atoms[support.num_bins // 2]
    return middle + jnp.sum(jax.nn.softmax(z, axis=-1) * align(atoms - middle, z.ndim), axis=-1)


def _between_atoms(returns: Array, support: Support) -> Sparse:
    t, atoms = checks.same_dtype(returns, as_support(support).atoms)
    t = jnp.clip(t, atoms[0], atoms[-1])
    lower = jnp.clip(_count_up_to(atoms, t) - 1, 0, atoms.size - 2)
    below, above = look_up(atoms, lower), look_up(atoms, lower + 1)
    upper_share = (t - below) / (above - below)
    indices = jnp.stack([lower, lower + 1], axis=-1)
    return Sparse(indices, jnp.stack([1 - upper_share, upper_share], axis=-1), support.num_bins)


def _count_up_to(atoms: jax.Array, t: jax.Array) -> jax.Array:
    """How many atoms are t or less; on an explicit mesh, each device for its own returns."""
    sharding = jax.typeof(t).sharding
    search = functools.partial(jnp.searchsorted, side="right")
    if not any(sharding.spec):
        return search(atoms, t)
    specs = {"in_specs": (PartitionSpec(), sharding.spec), "out_specs": sharding.spec}
    return jax.shard_map(search, mesh=sharding.mesh, **specs)(everywhere(atoms), t)


# Bins narrower than this, in units of √2 σ, have no digits left in a difference of tails.
NARROW = 0.02


def _narrow(middle: Array, width: Array) -> Array:
    """Returns erf(middle + width / 2) − erf(middle − width / 2), to the fourth order of the width."""
    square = middle * middle
    return 2 / math.sqrt(math.pi) * width * jnp.exp(-square) * (1 + (square / 6 - 1 / 12) * width * width)


def _tail(x: Array) -> Array:
    """Returns sign(x) erfc|x|, which keeps its digits in both tails, where erf rounds to ±1.

    It jumps by 2 at 0. The caller adds 2 to the bin around 0, so the jump needs no derivative.
    """
    sign = jnp.where(x < 0, -1, 1).astype(x.dtype)
    return sign * jax.lax.erfc(sign * x)
