"""Policies smoothed: (1 − ε) π + ε u over the actions that are legal.

They come written out, (*batch, A), to be sampled from; `cross_entropy` takes them as targets for imitation too. The
entropy bonus of policy gradients is the smoothing of a loss instead: `jax_ls.penalties.confidence_penalty`. What TD3
calls target policy smoothing, noise on actions, is another thing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import Restricted
from jax_ls.checks import as_positive
from jax_ls.class_axis import align
from jax_ls.smoothing import smooth
from jax_ls.targets import Dense

__all__ = ["dirichlet_noise", "epsilon_greedy", "smooth_policy"]


def smooth_policy(
    policy: ArrayLike,
    smoothing: ArrayLike,
    *,
    legal_actions: ArrayLike | None = None,
    prior: ArrayLike | None = None,
    from_logits: bool = False,
) -> Array:
    """A policy with a share ε of its mass spread: (1 − ε) π + ε u, all of it on legal actions.

    Args:
      policy: π, probabilities (*batch, A), or logits.
      smoothing: ε, () or (*batch,); may be traced.
      legal_actions: boolean (A,) or (*batch, A); π and u are renormalised over those.
      prior: u, (A,) or (*batch, A); uniform if None.
      from_logits: `policy` is logits: π = softmax over the legal actions.

    Returns:
      Probabilities (*batch, A). A row without a legal action is NaN, and so is one whose π or u has no mass on any.

    Raises:
      AssertionError: dtypes or shapes that do not fit, by name.
      TypeError: a smoothing that is no real number.

    Example:
      >>> from jax_ls.preferences import smooth_policy
      >>> smooth_policy(jnp.array([0.5, 0.0, 0.5]), 0.5, legal_actions=jnp.array([True, True, False])).tolist()
      [0.75, 0.25, 0.0]

    References:
      Sutton and Barto, Reinforcement Learning, 2018, §5.4 (ε-soft policies).
    """
    given = checks.as_class_values("policy", policy)
    epsilon = checks.as_weight("smoothing", smoothing)
    batch = given.shape[:-1]
    checks.assert_shape("smoothing", epsilon, [(), batch], f"() or {batch}, the shape of the batch")
    legal = _as_legal(legal_actions, given)
    if prior is not None:
        prior = checks.as_class_values("prior", prior)
        checks.assert_class_values("prior", prior, given)
    if legal is None:
        pure = Dense(_softmax(given, None) if from_logits else given)
        return smooth(pure, epsilon, prior=prior).probs(given.shape[-1])
    # A row with nothing legal is worked out as if all were: a NaN on the way would reach the slope of a shared ε.
    some = jnp.any(legal, axis=-1, keepdims=True)
    shown = legal | ~some
    pure = Restricted(Dense(_softmax(given, shown) if from_logits else given), shown)
    smoothed = smooth(pure, epsilon, prior=prior, class_where=shown).probs(given.shape[-1])
    return jnp.where(align(some, smoothed.ndim), smoothed, jnp.nan)


def epsilon_greedy(action_values: ArrayLike, smoothing: ArrayLike, *, legal_actions: ArrayLike | None = None) -> Array:
    """The greedy policy, smoothed: 1 − ε on the best legal action, and ε over all legal ones.

    Args:
      action_values: real numbers (*batch, A); equal best actions share alike.
      smoothing: ε, () or (*batch,); may be traced.
      legal_actions: boolean (A,) or (*batch, A).

    Returns:
      Probabilities (*batch, A). A row without a legal action, or with a NaN on one, is NaN.

    Raises:
      AssertionError: dtypes or shapes that do not fit, by name.
      TypeError: a smoothing that is no real number.

    Example:
      >>> from jax_ls.preferences import epsilon_greedy
      >>> epsilon_greedy(jnp.array([1.0, 3.0, 2.0, 9.0]), 0.75, legal_actions=jnp.arange(4) < 3).tolist()
      [0.25, 0.5, 0.25, 0.0]

    References:
      Watkins, Learning from Delayed Rewards, 1989.
    """
    values = checks.as_class_values("action_values", action_values)
    legal = _as_legal(legal_actions, values)
    if legal is not None:
        values = jnp.where(align(legal, values.ndim), values, -jnp.inf)
    best = (values == jnp.max(values, axis=-1, keepdims=True, initial=-jnp.inf)).astype(values.dtype)
    return smooth_policy(best / jnp.sum(best, axis=-1, keepdims=True), smoothing, legal_actions=legal)


def dirichlet_noise(
    key: Array,
    probs: ArrayLike,
    *,
    fraction: ArrayLike = 0.25,
    alpha: ArrayLike = 0.3,
    legal_actions: ArrayLike | None = None,
) -> Array:
    """Exploration at the root of a search: (1 − f) π + f η, η ~ Dirichlet(α) over the legal actions.

    Args:
      key: a key of `jax.random`.
      probs: π, probabilities (*batch, A).
      fraction: f, () or (*batch,).
      alpha: α > 0, (), (A,) or (*batch, A): small ones choose few actions. May be traced; NaN there if not positive.
      legal_actions: boolean (A,) or (*batch, A).

    Returns:
      Probabilities (*batch, A); a row without a legal action is NaN.

    Raises:
      AssertionError: dtypes or shapes that do not fit, by name.
      TypeError, ValueError: a fraction that is no real number, an α that is not positive.

    Example:
      >>> from jax_ls.preferences import dirichlet_noise
      >>> noisy = dirichlet_noise(jax.random.key(0), jnp.array([0.5, 0.5, 0.0]), alpha=1e6)
      >>> print(f"{noisy[0]:.2f} {noisy[1]:.2f} {noisy[2]:.2f}")
      0.46 0.46 0.08

    References:
      Silver et al., Mastering the Game of Go without Human Knowledge, 2017.
    """
    p = checks.as_class_values("probs", probs)
    share = checks.as_weight("fraction", fraction)
    checks.assert_shape("fraction", share, [(), p.shape[:-1]], f"() or {p.shape[:-1]}, the shape of the batch")
    concentration = checks.as_broadcast("alpha", as_positive("alpha", alpha), p)
    # Of logarithms, for at a small α most gammas are below the least float.
    noise = _softmax(jax.random.loggamma(key, concentration), _as_legal(legal_actions, p))
    return smooth_policy(p, share, legal_actions=legal_actions, prior=noise)


def _softmax(logits: Array, legal: Array | None) -> Array:
    z = logits if legal is None else jnp.where(align(legal, logits.ndim), logits, -jnp.inf)
    return jax.nn.softmax(z, axis=-1)


def _as_legal(legal_actions: ArrayLike | None, values: Array) -> Array | None:
    if legal_actions is None:
        return None
    legal = checks.as_class_where("legal_actions", legal_actions)
    checks.assert_class_values("legal_actions", legal, values)
    return legal
