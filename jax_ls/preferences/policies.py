"""Smoothed policies (1 − ε) π + ε u over the legal actions.

Policies are arrays (*batch, A) to sample from. `cross_entropy` also takes them as targets for imitation. The entropy
bonus of policy gradients is a penalty on the loss: `jax_ls.penalties.confidence_penalty`. The target policy smoothing
of TD3 is noise on actions, and not in this library.
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
    """Returns the smoothed policy (1 − ε) π + ε u, with all mass on legal actions.

    Args:
      policy: π, probabilities (*batch, A), or logits.
      smoothing: ε, () or (*batch,); may be traced.
      legal_actions: boolean (A,) or (*batch, A); π and u are renormalised over these actions.
      prior: u, (A,) or (*batch, A); uniform if None.
      from_logits: whether `policy` holds logits; π is then their softmax over the legal actions.

    Returns:
      Probabilities (*batch, A). A row is NaN if it has no legal action, or if π or u has no mass on a legal action.

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
    # A row without a legal action is computed as if all were legal: a NaN there would reach the gradient of a shared ε.
    has_legal = jnp.any(legal, axis=-1, keepdims=True)
    shown = legal | ~has_legal
    pure = Restricted(Dense(_softmax(given, shown) if from_logits else given), shown)
    smoothed = smooth(pure, epsilon, prior=prior, class_where=shown).probs(given.shape[-1])
    return jnp.where(align(has_legal, smoothed.ndim), smoothed, jnp.nan)


def epsilon_greedy(action_values: ArrayLike, smoothing: ArrayLike, *, legal_actions: ArrayLike | None = None) -> Array:
    """Returns the smoothed greedy policy: 1 − ε on the best legal action, and ε spread over all legal actions.

    Args:
      action_values: real numbers (*batch, A); actions that tie for the best share 1 − ε equally.
      smoothing: ε, () or (*batch,); may be traced.
      legal_actions: boolean (A,) or (*batch, A).

    Returns:
      Probabilities (*batch, A). A row is NaN if it has no legal action, or a NaN on a legal action.

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
    """Returns a policy with exploration noise: (1 − f) π + f η with η ~ Dirichlet(α) over the legal actions.

    AlphaGo Zero uses it at the root of its search.

    Args:
      key: a key of `jax.random`.
      probs: π, probabilities (*batch, A).
      fraction: f, () or (*batch,).
      alpha: α > 0, (), (A,) or (*batch, A): a small α gives noise on few actions. May be traced; NaN if not > 0.
      legal_actions: boolean (A,) or (*batch, A).

    Returns:
      Probabilities (*batch, A); a row without a legal action is NaN.

    Raises:
      ValueError: a concrete α ≤ 0.

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
    # From logarithms, because at a small α most gamma variates underflow.
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
