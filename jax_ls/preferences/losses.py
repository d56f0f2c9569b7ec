"""Losses of pairs of answers: Bradley-Terry and direct preference optimisation."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.checks import as_parameter, as_positive
from jax_ls.class_axis import AxisName
from jax_ls.linear.output_layer import linear_cross_entropy
from jax_ls.losses import cross_entropy, sigmoid_cross_entropy

__all__ = ["Preference", "bradley_terry", "dpo", "robust_dpo", "robust_smoothing", "sequence_log_probability"]


class Preference(NamedTuple):
    """What direct preference optimisation returns of each pair, (*batch,) each.

    `accuracy` is 1 where the chosen answer has the larger implicit reward, else 0.

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
    """The loss of a reward model: −(1−ε) log σ(h) − ε log σ(−h), h = r_chosen − r_rejected.

    Least at σ(h) = 1 − ε. Where a share ε of the pairs is flipped, ε itself is conservative: rewards shrink; and
    `robust_smoothing(ε)` unbiased.

    Args:
      chosen_reward, rejected_reward: real numbers (*batch,).
      smoothing: ε, () or (*batch,); any sign, may be traced.
      where: boolean (*batch,), the pairs that count; elsewhere loss and gradient are exactly 0.

    Returns:
      Losses (*batch,) in float32 or wider.

    Raises:
      AssertionError: dtypes or shapes that do not fit, by name.
      TypeError: rewards or smoothing that are no real numbers.

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
    """Direct preference optimisation: `bradley_terry` of the implicit rewards β (log π − log π_ref).

    −(1−ε) log σ(h) − ε log σ(−h), conservative for ε > 0: least at a difference of rewards h = log((1−ε)/ε), where
    plain DPO goes on for ever.

    Args:
      policy_chosen, policy_rejected: log π of whole answers, (*batch,); see `sequence_log_probability`.
      reference_chosen, reference_rejected: log π_ref of the same answers. Wrap them in `jax.lax.stop_gradient` if they
        depend on what is trained.
      beta: β > 0, () or (*batch,). May be traced; NaN there if not positive.
      smoothing: ε, () or (*batch,); any sign, may be traced.
      where: boolean (*batch,), the pairs that count; elsewhere all is 0.

    Returns:
      A `Preference`: loss, implicit rewards and accuracy of each pair.

    Raises:
      AssertionError: shapes that do not fit, by name.
      TypeError, ValueError: arguments that are no real numbers, a β that is not positive.

    Example:
      >>> from jax_ls.preferences import dpo
      >>> out = dpo(jnp.array([-10.0]), jnp.array([-30.0]), jnp.array([-20.0]), jnp.array([-20.0]), smoothing=0.1)
      >>> print(out.loss.round(4), out.chosen_reward, out.rejected_reward, out.accuracy)
      [0.3269] [1.] [-1.] [1.]

    References:
      Rafailov et al., Direct Preference Optimization, 2023; Mitchell, A Note on DPO with Noisy Preferences and
      Relationship to IPO, 2023.
    """
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
    better, worse = (factor * x for x in gains)
    accuracy = (better > worse).astype(better.dtype)
    return Preference(bradley_terry(better, worse, smoothing, where=where), better, worse, accuracy)


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
    """DPO that flipped pairs do not bias: `dpo` at ε = −e/(1−2e), whose mean over flips is the loss without them.

    Where a pair is always won, the loss has no least value: stop early, or keep β h in reach by other means.

    Args:
      policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, where: as in `dpo`.
      flip_rate: e < 1/2, the share of flipped pairs, () or (*batch,). May be traced; NaN there if not below 1/2.

    Returns:
      A `Preference`. Losses may be negative.

    Raises:
      AssertionError, TypeError: as `dpo`.
      ValueError: e ≥ 1/2, where labels tell nothing; a β that is not positive.

    Example:
      >>> from jax_ls.preferences import robust_dpo
      >>> pair = jnp.array([-10.0]), jnp.array([-30.0]), jnp.array([-20.0]), jnp.array([-20.0])
      >>> print(robust_dpo(*pair, flip_rate=0.1).loss.round(4))
      [-0.1231]

    References:
      Chowdhury et al., Provably Robust DPO: Aligning Language Models with Noisy Feedback, 2024.
    """
    pairs = policy_chosen, policy_rejected, reference_chosen, reference_rejected
    return dpo(*pairs, beta=beta, smoothing=robust_smoothing(flip_rate), where=where)


def robust_smoothing(flip_rate: ArrayLike) -> Array:
    """−e/(1−2e): the smoothing that makes a binary loss unbiased where a share e of the labels is flipped.

    Args:
      flip_rate: e < 1/2, any shape. May be traced; NaN there if not below 1/2.

    Returns:
      A negative smoothing for `bradley_terry`, `dpo` or `sigmoid_cross_entropy` with `prior=0`.

    Raises:
      TypeError, ValueError: no real numbers, or not below 1/2.

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
    """log π of whole sequences, Σ_t log p(y_t): of logits, or of hidden states and a kernel without their logits.

    Args:
      outputs: logits (*batch, T, K); with a kernel, hidden states (*batch, T, D).
      labels: y, integers (*batch, T), already shifted: outputs at t predict label t.
      kernel: the output layer, (D, K), or (K, D) if transposed.
      where: boolean (*batch, T), the tokens that count: no prompt, no padding. Any label may stand elsewhere.
      class_where: boolean (K,), the classes that exist.
      bias, softcap, chunk_size, transposed: of the layer, as in `linear_cross_entropy`; only with a kernel.
      class_axis_name: as in `cross_entropy`.

    Returns:
      Log-probabilities (*batch,) in float32 or wider; NaN for a sequence with a label that names no class.

    Raises:
      AssertionError: dtypes or shapes that do not fit, by name.
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


def _pairs(**given: ArrayLike) -> list[Array]:
    """Real numbers of one shape, that of the first, in the widest of their dtypes."""
    values = {name: checks.as_weight(name, x) for name, x in given.items()}
    shape = next(iter(values.values())).shape
    for name, x in values.items():
        checks.assert_shape(name, x, [shape], f"{shape}, one number a pair")
    return checks.same_dtype(*values.values())
