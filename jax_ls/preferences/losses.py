"""Losses of pairs of answers: Bradley-Terry, and direct preference optimisation (DPO)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.checks import as_parameter, as_positive
from jax_ls.class_axis import AxisName
from jax_ls.linear.output_layer import linear_cross_entropy
from jax_ls.losses import cross_entropy, sigmoid_cross_entropy

__all__ = [
    "Preference",
    "bradley_terry",
    "dpo",
    "exo_pair",
    "ipo",
    "robust_dpo",
    "robust_smoothing",
    "sequence_log_probability",
]


class Preference(NamedTuple):
    """The loss, implicit rewards and accuracy of each pair in direct preference optimisation, (*batch,) each.

    `accuracy` is 1 if the chosen answer has the larger implicit reward, else 0.

    Example:
      >>> from jax_ls.preferences import dpo
      >>> pair = dpo(jnp.array([-10.0]), jnp.array([-30.0]), jnp.array([-20.0]), jnp.array([-20.0]), beta=0.5)
      >>> (pair.chosen_reward - pair.rejected_reward).tolist()
      [10.0]
    """

    loss: Array
    chosen_reward: Array
    rejected_reward: Array
    accuracy: Array


def bradley_terry(
    chosen_reward: ArrayLike, rejected_reward: ArrayLike, smoothing: ArrayLike = 0.0, *, where: ArrayLike | None = None
) -> Array:
    """Returns the loss of a reward model, −(1−ε) log σ(h) − ε log σ(−h) with h = r_chosen − r_rejected.

    Its minimum is at σ(h) = 1 − ε. If a share e of the pairs is flipped, ε = e is conservative: rewards shrink.
    ε = `robust_smoothing(e)` is unbiased.

    Args:
      chosen_reward, rejected_reward: real numbers (*batch,).
      smoothing: ε, () or (*batch,); any sign, may be traced.
      where: boolean (*batch,), the pairs that count; elsewhere loss and gradient are exactly 0.

    Returns:
      Losses (*batch,) in float32 or wider.

    Example:
      >>> from jax_ls.preferences import bradley_terry
      >>> losses = bradley_terry(jnp.array([2.0, 0.0]), jnp.array([-2.0, 0.0]), 0.1)
      >>> print(losses.round(4))
      [0.4182 0.6931]

    References:
      Bradley and Terry, Rank Analysis of Incomplete Block Designs, 1952; Christiano et al., Deep Reinforcement
      Learning from Human Preferences, 2017.
    """
    chosen, rejected = _pairs(chosen_reward=chosen_reward, rejected_reward=rejected_reward)
    if where is not None:
        where = checks.as_where("where", where, chosen.shape)
        chosen, rejected = (jnp.where(where, x, 0) for x in (chosen, rejected))
    margin = chosen - rejected
    return sigmoid_cross_entropy(margin, jnp.ones_like(margin), smoothing, prior=0.0, where=where)


def dpo(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> Preference:
    """Returns the loss of direct preference optimisation: `bradley_terry` of the rewards β (log π − log π_ref).

    −(1−ε) log σ(h) − ε log σ(−h) for a difference of rewards h. With ε > 0 the loss is conservative: its minimum is at
    h = log((1−ε)/ε), while plain DPO pushes h to infinity.

    Args:
      policy_chosen, policy_rejected: log π of whole answers, (*batch,); see `sequence_log_probability`.
      reference_chosen, reference_rejected: log π_ref of the same answers. If they depend on trained parameters, wrap
        them in `jax.lax.stop_gradient`.
      beta: β > 0, () or (*batch,). May be traced; NaN if not positive.
      smoothing: ε, () or (*batch,); any sign, may be traced.
      where: boolean (*batch,), the pairs that count; elsewhere all numbers are 0.

    Returns:
      A `Preference`: loss, implicit rewards and accuracy of each pair.

    Raises:
      ValueError: a concrete β ≤ 0.

    Example:
      >>> from jax_ls.preferences import dpo
      >>> out = dpo(jnp.array([-10.0]), jnp.array([-30.0]), jnp.array([-20.0]), jnp.array([-20.0]), smoothing=0.1)
      >>> print(out.loss.round(4), out.chosen_reward, out.rejected_reward, out.accuracy)
      [0.3269] [1.] [-1.] [1.]

    References:
      Rafailov et al., Direct Preference Optimization, 2023; Mitchell, A Note on DPO with Noisy Preferences and
      Relationship to IPO, 2023.
    """
    better, worse, where = _rewards(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, where)
    return _preference(bradley_terry(better, worse, smoothing, where=where), better, worse)


def exo_pair(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    smoothing: ArrayLike = 1e-3,
    where: ArrayLike | None = None,
) -> Preference:
    """EXO on pairs: the reverse divergence KL(p ‖ (1 − ε, ε)) of p = σ(h), h the difference of implicit rewards.

    σ(h) log(σ(h) / (1 − ε)) + σ(−h) log(σ(−h) / ε): where DPO covers the smoothed preference, this seeks it. Least, 0,
    at h = log((1−ε)/ε), as `dpo`.

    Args:
      policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, where: as in `dpo`.
      smoothing: ε in (0, 1), () or (*batch,). May be traced; NaN there if outside.

    Returns:
      A `Preference`.

    Raises:
      AssertionError, TypeError: as `dpo`.
      ValueError: ε outside (0, 1); a β that is not positive.

    Example:
      >>> from jax_ls.preferences import exo_pair
      >>> pair = jnp.array([-10.0]), jnp.array([-30.0]), jnp.array([-20.0]), jnp.array([-20.0])
      >>> print(exo_pair(*pair, smoothing=0.1).loss.round(4))
      [0.0019]

    References:
      Ji et al., Towards Efficient Exact Optimization of Language Model Alignment, 2024.
    """
    better, worse, where = _rewards(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, where)
    epsilon = as_parameter("smoothing", smoothing, lambda x: (x > 0) & (x < 1), "numbers in (0, 1)")
    epsilon = checks.as_broadcast("smoothing", epsilon, better)
    if where is not None:
        epsilon = jnp.where(where, epsilon, 0.5)
    h = better - worse
    wins, loses = -jax.nn.softplus(-h), -jax.nn.softplus(h)
    losses = jnp.exp(wins) * (wins - jnp.log1p(-epsilon)) + jnp.exp(loses) * (loses - jnp.log(epsilon))
    return _preference(losses if where is None else jnp.where(where, losses, 0), better, worse)


def ipo(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> Preference:
    """Identity preference optimisation: (1−ε) (h − 1/2β)² + ε (h + 1/2β)², h the difference of log π − log π_ref.

    Bounded differences even where a pair is always won: least at h = (1 − 2ε) / 2β. Plain IPO is ε = 0.

    Args:
      policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, where: as in `dpo`; β is the τ of the
        paper.
      smoothing: ε, () or (*batch,); any sign, may be traced.

    Returns:
      A `Preference`, its rewards times β as in `dpo`.

    Raises:
      AssertionError, TypeError: as `dpo`.
      ValueError: a β that is not positive.

    Example:
      >>> from jax_ls.preferences import ipo
      >>> pair = jnp.array([-10.0]), jnp.array([-12.0]), jnp.array([-20.0]), jnp.array([-20.0])
      >>> ipo(*pair, beta=0.125).loss.tolist()
      [4.0]

    References:
      Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences, 2024.
    """
    better, worse, where = _rewards(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, where)
    factor = checks.as_broadcast("beta", as_positive("beta", beta), better)
    epsilon = checks.as_broadcast("smoothing", smoothing, better)
    if where is not None:
        factor, epsilon = jnp.where(where, factor, 1), jnp.where(where, epsilon, 0)
    h, half = (better - worse) / factor, 0.5 / factor
    losses = (1 - epsilon) * jnp.square(h - half) + epsilon * jnp.square(h + half)
    return _preference(losses if where is None else jnp.where(where, losses, 0), better, worse)


def robust_dpo(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    flip_rate: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> Preference:
    """Returns the loss of DPO without the bias of flipped pairs: `dpo` at ε = −e/(1−2e).

    Its mean over the flips is the loss of the true pairs. If one answer of a pair always wins, the loss is unbounded
    below: stop early, or limit h by other means.

    Args:
      policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, where: as in `dpo`.
      flip_rate: e < 1/2, the share of flipped pairs, () or (*batch,). May be traced; NaN if not below 1/2.

    Returns:
      A `Preference`. Losses may be negative.

    Raises:
      ValueError: a concrete e ≥ 1/2, at which labels carry no information, or a concrete β ≤ 0.

    Example:
      >>> from jax_ls.preferences import robust_dpo
      >>> pair = jnp.array([-10.0]), jnp.array([-30.0]), jnp.array([-20.0]), jnp.array([-20.0])
      >>> print(robust_dpo(*pair, flip_rate=0.1).loss.round(4))
      [-0.1231]

    References:
      Chowdhury et al., Provably Robust DPO: Aligning Language Models with Noisy Feedback, 2024.
    """
    pairs = policy_chosen, policy_rejected, reference_chosen, reference_rejected
    checks.as_broadcast("flip_rate", flip_rate, checks.as_weight("policy_chosen", policy_chosen))
    return dpo(*pairs, beta=beta, smoothing=robust_smoothing(flip_rate), where=where)


def robust_smoothing(flip_rate: ArrayLike) -> Array:
    """Returns −e/(1−2e), the smoothing at which a binary loss is unbiased if a share e of the labels is flipped.

    Args:
      flip_rate: e < 1/2, any shape. May be traced; NaN if not below 1/2.

    Returns:
      A negative smoothing for `bradley_terry`, `dpo` or `sigmoid_cross_entropy` with `prior=0`.

    Raises:
      ValueError: a concrete e ≥ 1/2.

    Example:
      >>> from jax_ls.preferences import robust_smoothing
      >>> robust_smoothing(0.25).tolist()
      -0.5

    References:
      Natarajan et al., Learning with Noisy Labels, 2013; Chowdhury et al., Provably Robust DPO, 2024.
    """
    rate = as_parameter("flip_rate", flip_rate, lambda x: x < 0.5, "a share of flipped pairs below 1/2")
    return -rate / (1 - 2 * rate)


def sequence_log_probability(
    outputs: ArrayLike,
    labels: ArrayLike,
    *,
    kernel: ArrayLike | None = None,
    where: ArrayLike | None = None,
    class_where: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
    transposed: bool = False,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns log π of whole sequences, Σ_t log p(y_t), from logits, or from hidden states without their logits.

    Args:
      outputs: logits (*batch, T, K), or hidden states (*batch, T, D) if there is a kernel.
      labels: y, integers (*batch, T), already shifted: outputs at t predict label t.
      kernel: the kernel of the output layer, (D, K), or (K, D) if `transposed`.
      where: boolean (*batch, T), the tokens that count: leave out prompt and padding, whose labels may be any integer.
      class_where: boolean (K,), the classes that exist.
      bias, softcap, chunk_size, transposed: options of the layer as in `linear_cross_entropy`, only with a kernel.
      class_axis_name: as in `cross_entropy`.

    Returns:
      Log-probabilities (*batch,) in float32 or wider; NaN for a sequence with a label that names no class.

    Raises:
      TypeError: an option of the layer without a kernel.

    Example:
      >>> from jax_ls.preferences import sequence_log_probability
      >>> hidden, kernel = jnp.ones((1, 3, 2)), jnp.zeros((2, 4))
      >>> answer = jnp.array([[False, True, True]])
      >>> print(sequence_log_probability(hidden, jnp.array([[-100, 1, 2]]), kernel=kernel, where=answer).round(4))
      [-2.7726]

    References:
      Rafailov et al., Direct Preference Optimization, 2023.
    """
    y, x = checks.as_labels("labels", labels), checks.as_logits("outputs", outputs)
    checks.assert_min_rank("labels", y, 1, "integers (*batch, T)")
    checks.assert_shape("labels", y, [x.shape[:-1]], f"integers {x.shape[:-1]}, for outputs {checks.describe(x)}")
    kept = None if where is None else checks.as_where("where", where, y.shape)
    if kernel is None:
        layer = {"bias": bias, "softcap": softcap, "chunk_size": chunk_size, "transposed": transposed or None}
        if alone := [name for name, option in layer.items() if option is not None]:
            raise TypeError(f"{alone[0]}: expected None without a kernel, got {checks.describe(layer[alone[0]])}")
        losses = cross_entropy(x, y, where=kept, class_where=class_where, class_axis_name=class_axis_name)
    else:
        losses = linear_cross_entropy(
            x,
            kernel,
            y,
            bias=bias,
            weights=None if kept is None else kept.astype(jnp.float32),
            class_where=class_where,
            softcap=softcap,
            chunk_size=chunk_size,
            transposed=transposed,
            reduction="none",
            class_axis_name=class_axis_name,
        )
    return -jnp.sum(losses, axis=-1)


def _rewards(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    beta: ArrayLike,
    where: ArrayLike | None,
) -> tuple[Array, Array, Array | None]:
    """Implicit rewards β (log π − log π_ref) of both answers, 0 for pairs that do not count, and which count."""
    chosen, rejected, chosen_before, rejected_before = _pairs(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )
    factor = checks.as_broadcast("beta", as_positive("beta", beta), chosen)
    gains = chosen - chosen_before, rejected - rejected_before
    if where is not None:
        where = checks.as_where("where", where, chosen.shape)
        gains = tuple(jnp.where(where, x, 0) for x in gains)
        factor = jnp.where(where, factor, 1)
    better, worse = (factor * x for x in gains)
    return better, worse, where


def _preference(losses: Array, better: Array, worse: Array) -> Preference:
    return Preference(losses, better, worse, (better > worse).astype(better.dtype))


def _pairs(**given: ArrayLike) -> list[Array]:
    """Returns the arguments as real numbers in the widest of their dtypes. All must have the shape of the first."""
    values = {name: checks.as_weight(name, x) for name, x in given.items()}
    shape = next(iter(values.values())).shape
    for name, x in values.items():
        checks.assert_shape(name, x, [shape], f"{shape}, one number a pair")
    return checks.same_dtype(*values.values())
