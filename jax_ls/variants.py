"""Cross-entropies of another shape: focal, poly, bi-tempered, of normalised logits, and asymmetric for many labels.

Each takes integer labels, dense labels or any `Target`, smoothed by `smoothing` as in `smoothed_cross_entropy`. Losses
for wrong labels are in `jax_ls.noise`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import Target
from jax_ls.class_axis import AxisName, align, laid_as, multiply
from jax_ls.logits import Batch, Logits, at_least
from jax_ls.losses import as_loss_target, smoothed_target
from jax_ls.smoothing import Prior, Spread, smooth, smooth_binary_labels
from jax_ls.tangents import elementwise
from jax_ls.targets import OneHot

__all__ = ["asymmetric_loss", "bi_tempered_loss", "focal_loss", "logit_norm_loss", "poly_loss"]


@checks.named_options
def focal_loss(
    logits: ArrayLike,
    labels: Target | ArrayLike,
    gamma: ArrayLike = 2.0,
    smoothing: ArrayLike = 0.0,
    *,
    prior: Prior | None = None,
    spread: Spread = "all",
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_where: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns the softmax focal loss, −Σ_k q_k (1 − p_k)^γ log p_k: what the model is sure of counts less.

    Without smoothing that is −(1 − p_y)^γ log p_y; γ = 0 is cross-entropy. Labels alone take one pass over the
    logits, a smoothed target one more.

    Args:
      logits: z, real numbers with K classes on `axis`.
      labels: integers (*batch,), probabilities in the shape of the logits, or a `Target`.
      gamma: γ ≥ 0, () or (*batch,), NaN for an example whose traced γ is negative; `adaptive.focal_gamma` gives the γ
        of Mukhoti et al. for each example.
      smoothing, prior, spread: as in `smoothed_cross_entropy`.
      where, ignore_index, class_where, z_loss, axis, class_axis_name: as in `cross_entropy`.
      class_weights: (K,), multiplies q_k: the α of the paper.

    Returns:
      Losses (*batch,) in float32 or wider.

    Raises:
      ValueError: a concrete γ < 0.

    Example:
      >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5]]))
      >>> print(jax_ls.focal_loss(logits, jnp.array([0, 0]), 2.0).round(4))
      [0.0011 0.1733]

    References:
      Lin et al., Focal Loss for Dense Object Detection, 2017; with the softmax, and for calibration: Mukhoti et al.,
      Calibrating Deep Neural Networks using Focal Loss, 2020; smoothed as in Keras.
    """
    batch = Batch.of(logits, where, class_where, class_weights, z_loss, axis, class_axis_name)
    gamma = checks.as_batch_numbers("gamma", checks.as_amount("gamma", gamma), batch.shape)
    batch, q = _smoothed(batch, labels, smoothing, prior, spread, ignore_index)
    return batch.apply(_focal, target=q, gamma=gamma)


def _focal(z: Logits, target: Target, gamma: Array) -> Array:
    # Below 0 by less than any rounding, for (1 − p)^γ to have derivatives where p is 1.
    floor = float(jnp.finfo(z.dtype).eps) ** 2

    def term(log_p: Array, gamma: Array, floor: Array) -> Array:
        log_p = -at_least(-log_p, floor)
        return -log_p * jnp.exp(gamma * jnp.log(-jnp.expm1(log_p)))

    return z.expect(target, term, gamma.astype(z.dtype), jnp.asarray(floor, z.dtype))


@checks.named_options
def poly_loss(
    logits: ArrayLike,
    labels: Target | ArrayLike,
    coefficients: ArrayLike = 2.0,
    smoothing: ArrayLike = 0.0,
    *,
    prior: Prior | None = None,
    spread: Spread = "all",
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_where: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns cross-entropy with other leading coefficients, Σ_k q_k [−log p_k + Σ_j ε_j (1 − p_k)^j].

    One coefficient is Poly-1, CE + ε₁ (1 − p_y); N of them are Poly-N. Cross-entropy itself has 1/j as the factor of
    (1 − p)^j, so that ε_j = −1/j takes a power away. Labels alone take one pass over the logits, and so does Poly-1
    with uniform smoothing; any other smoothed target takes one more.

    Args:
      logits: z, real numbers with K classes on `axis`.
      labels: integers (*batch,), probabilities in the shape of the logits, or a `Target`.
      coefficients: ε₁, a number, or ε_1 to ε_N, (N,); any sign, may be traced.
      smoothing, prior, spread: as in `smoothed_cross_entropy`.
      where, ignore_index, class_where, class_weights, z_loss, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Losses (*batch,) in float32 or wider.

    Example:
      >>> losses = jax_ls.poly_loss(jnp.zeros((1, 4)), jnp.array([2]), 1.0)
      >>> print(losses.round(4))
      [2.1363]

    References:
      Leng et al., PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions, 2022.
    """
    batch = Batch.of(logits, where, class_where, class_weights, z_loss, axis, class_axis_name)
    epsilons = jnp.atleast_1d(checks.as_weight("coefficients", coefficients))
    checks.assert_rank("coefficients", epsilons, 1, "a number, or (N,)")
    hard = as_loss_target(batch, labels, "labels")
    short = len(epsilons) == 1 and class_weights is None and prior is None and spread == "all"
    if short and isinstance(hard, OneHot) and not _is_zero(smoothing):
        target = smooth(hard, smoothing)
        epsilon = checks.as_batch_numbers("smoothing", smoothing, batch.shape)
        batch = batch.ignoring(hard, ignore_index)
        return batch.apply(_poly_1, target=target, y=hard.labels, smoothing=epsilon, c1=epsilons[0])
    batch, q = _smoothed(batch, hard, smoothing, prior, spread, ignore_index)
    return batch.apply(_poly, target=q, **{f"c{j + 1}": epsilon for j, epsilon in enumerate(epsilons)})


def _poly_1(z: Logits, target: Target, y: Array, smoothing: Array, c1: Array) -> Array:
    # ⟨q, p⟩ = (1 − ε) p_y + ε/K.
    epsilon = smoothing.astype(z.dtype)
    missing = -(1 - epsilon) * jnp.expm1(z.log_prob(y)) + epsilon * (1 - 1 / z.num_classes)
    return z.cross_entropy(target) + c1.astype(z.dtype) * missing


def _poly(z: Logits, target: Target, **coefficients: Array) -> Array:
    def term(log_p: Array, *coefficients: Array) -> Array:
        missing = -jnp.expm1(log_p)
        # Horner's rule.
        total = coefficients[-1] * missing
        for c in coefficients[-2::-1]:
            total = (total + c) * missing
        return total

    ordered = [coefficients[f"c{j + 1}"].astype(z.dtype) for j in range(len(coefficients))]
    return z.cross_entropy(target) + z.expect(target, term, *ordered)


@checks.named_options
def logit_norm_loss(
    logits: ArrayLike,
    labels: Target | ArrayLike,
    temperature: ArrayLike = 0.04,
    smoothing: ArrayLike = 0.0,
    *,
    prior: Prior | None = None,
    spread: Spread = "all",
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_where: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns LogitNorm, the cross-entropy of z / (τ ‖z‖): only the direction of the logits can lower the loss.

    Confidence cannot grow with the norm. `penalties.squared_logits` makes the norm cost something instead, and leaves
    the loss as it is. A common offset of the logits changes this loss. The sum of the scaled exponentials waits for
    the norm: two passes over the logits.

    Args:
      logits: z, real numbers with K classes on `axis`; a norm below 1e-7 counts as 1e-7.
      labels: integers (*batch,), probabilities in the shape of the logits, or a `Target`.
      temperature: τ > 0, () or (*batch,), NaN for an example whose traced τ is not positive.
      smoothing, prior, spread: as in `smoothed_cross_entropy`.
      where, ignore_index, class_where, class_weights, axis, class_axis_name: as in `cross_entropy`.
      z_loss: as in `cross_entropy`, of z before it is normalised.

    Returns:
      Losses (*batch,) in float32 or wider, at most log(1 + (K − 1) e^(√2/τ)) for a label.

    Raises:
      ValueError: a concrete τ ≤ 0.

    Example:
      >>> logits = jnp.array([[3.0, 4.0], [30.0, 40.0]])
      >>> print(jax_ls.logit_norm_loss(logits, jnp.array([1, 1]), 1.0).round(4))
      [0.5981 0.5981]

    References:
      Wei et al., Mitigating Neural Network Overconfidence with Logit Normalization, 2022.
    """
    batch = Batch.of(logits, where, class_where, class_weights, z_loss, axis, class_axis_name)
    tau = checks.as_batch_numbers("temperature", checks.as_positive("temperature", temperature), batch.shape)
    batch, q = _smoothed(batch, labels, smoothing, prior, spread, ignore_index)
    return batch.apply(_logit_norm, target=q, tau=tau)


def _logit_norm(z: Logits, target: Target, tau: Array) -> Array:
    squares = z.sum(jnp.square, shifted=False)
    per_norm = 1 / (tau.astype(z.dtype) * jnp.sqrt(jnp.where(squares > 1e-14, squares, 1e-14)))
    total = z.sum(lambda d, scale: jnp.exp(d * scale), per_norm)
    # The maximum of z/(τ‖z‖) moves with the norm, but the difference to it is all that counts.
    dot = multiply(per_norm, z.dot(target))
    return z.mass(target) * jnp.log(total) - dot


@checks.named_options
def bi_tempered_loss(
    logits: ArrayLike,
    labels: Target | ArrayLike,
    t1: ArrayLike = 0.8,
    t2: ArrayLike = 1.2,
    smoothing: ArrayLike = 0.0,
    *,
    prior: Prior | None = None,
    spread: Spread = "all",
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_where: ArrayLike | None = None,
    z_loss: ArrayLike = 0.0,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> Array:
    """Returns the bi-tempered logistic loss, the Bregman divergence of a tempered softmax and the target.

    Σ_k q_k (log_t1 q_k − log_t1 p_k) − (q_k^(2−t1) − p_k^(2−t1)) / (2 − t1), p_k = exp_t2(z_k − λ), with log_t x =
    (x^(1−t) − 1)/(1 − t) and λ such that p sums to 1. t1 < 1 bounds the loss of a wrong label; t2 > 1 gives p a heavy
    tail. At t1 = t2 = 1 it is `kl_divergence`, for a label cross-entropy. λ has no closed form: Newton's method takes
    a pass over the logits for each of its six steps. The loss is not linear in the target: no `class_weights`.

    Args:
      logits: z, real numbers with K classes on `axis`.
      labels: integers (*batch,), probabilities in the shape of the logits, or a `Target`; no negative mass.
      t1: t₁ ≤ 1, () or (*batch,).
      t2: t₂ ≥ 1, () or (*batch,). An example whose traced temperature is out of range gets NaN.
      smoothing, prior, spread: as in `smoothed_cross_entropy`; the published `label_smoothing` is spread="others".
      where, ignore_index, class_where, z_loss, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Losses (*batch,) in float32 or wider; derivatives in t₁ and t₂ are exact but at 1, where they are 0.

    Raises:
      ValueError: concrete temperatures out of range.

    Example:
      >>> losses = jax_ls.bi_tempered_loss(jnp.array([[2.0, 0.0], [-99.0, 0.0]]), jnp.array([0, 0]))
      >>> print([f"{loss:.4f}" for loss in losses])
      ['0.1096', '4.7596']

    References:
      Amid et al., Robust Bi-Tempered Logistic Loss Based on Bregman Divergences, 2019.
    """
    batch = Batch.of(logits, where, class_where, None, z_loss, axis, class_axis_name)
    t1 = checks.as_parameter("t1", t1, lambda x: x <= 1, "temperatures t1 ≤ 1 ≤ t2")
    t2 = checks.as_parameter("t2", t2, lambda x: x >= 1, "temperatures t1 ≤ 1 ≤ t2")
    t1, t2 = (checks.as_batch_numbers(name, t, batch.shape) for name, t in (("t1", t1), ("t2", t2)))
    batch, q = _smoothed(batch, labels, smoothing, prior, spread, ignore_index)
    return batch.apply(_bi_tempered, target=q, t1=t1, t2=t2)


SOLVED, REFINED = 4, 2
"""Newton steps to λ. Those that refine are differentiated: each doubles the order of the derivatives that are exact."""


def _bi_tempered(z: Logits, target: Target, t1: Array, t2: Array) -> Array:
    heavy, light = t2.astype(z.dtype) - 1, 1 - t1.astype(z.dtype)
    offset = jnp.zeros(z.shift.shape, z.dtype)
    for _ in range(SOLVED):
        offset = jax.lax.stop_gradient(_newton(z, offset, jax.lax.stop_gradient(heavy)))
    for _ in range(REFINED):
        offset = _newton(z, offset, heavy)
    q = z.probs(target)

    def term(d: Array, offset: Array, heavy: Array, light: Array, tiny: Array) -> Array:
        log_p = _log_exp_t(d - offset, heavy)
        # NaN for a label that names no class, and for negative mass.
        log_q = jnp.log(jnp.where(q == 0, 1, q))
        apart = q * (_log_t(log_q, light) - _log_t(log_p, light))
        power = jnp.where(q == 0, 0, jnp.exp((1 + light) * log_q))
        return apart - (power - jnp.exp((1 + light) * log_p)) / (1 + light)

    return z.sum(term, offset, heavy, light, 0.0)


def _newton(z: Logits, offset: Array, heavy: Array) -> Array:
    """A step to Σ_k exp_t2(z_k − max z − λ) = 1, on log_t2 of that sum: concave in λ, linear where all z are the same.

    From the left, where the sum is above 1, no step goes too far.
    """

    def powers(d: Array, offset: Array, heavy: Array) -> tuple[Array, Array]:
        log_p = _log_exp_t(d - offset, heavy)
        return jnp.exp(log_p), jnp.exp((1 + heavy) * log_p)

    total, slope = z.sum(powers, offset, heavy)
    log_total = jnp.log(total)
    # log_t total, over its slope −total^−t · slope.
    return offset + _log_t(log_total, -heavy) * jnp.exp((1 + heavy) * log_total) / slope


def _log_exp_t(u: Array, heavy: Array) -> Array:
    """log exp_t u = −log(1 − (t − 1) u) / (t − 1) for u ≤ 0; u itself at t = 1."""
    u = at_least(u, -1e30)
    is_plain = heavy == 0
    return jnp.where(is_plain, u, -jnp.log1p(-heavy * u) / jnp.where(is_plain, 1, heavy))


def _log_t(log_x: Array, light: Array) -> Array:
    """log_t x = (x^(1 − t) − 1) / (1 − t) of log x; log x itself at t = 1."""
    is_plain = light == 0
    return jnp.where(is_plain, log_x, jnp.expm1(light * log_x) / jnp.where(is_plain, 1, light))


@checks.named_options
def asymmetric_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    smoothing: ArrayLike = 0.0,
    *,
    gamma_positive: ArrayLike = 1.0,
    gamma_negative: ArrayLike = 4.0,
    margin: ArrayLike = 0.05,
    prior: ArrayLike = 0.5,
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_weights: ArrayLike | None = None,
) -> Array:
    """Returns the asymmetric loss for many labels an example, element by element: easy negatives count least.

    −q (1 − p)^γ₊ log p − (1 − q) p_m^γ₋ log(1 − p_m), p = σ(z), p_m = max(0, p − m), q = (1 − ε) y + ε · prior. With
    γ₊ = γ₋ = m = 0 it is `sigmoid_cross_entropy`.

    Args:
      logits: z, real numbers of any shape.
      labels: y, in the shape of the logits; 0 and 1, or probabilities.
      smoothing, prior: ε and what a label is drawn to, broadcastable to the labels; see `smooth_binary_labels`.
      gamma_positive, gamma_negative: γ₊, γ₋ ≥ 0, broadcastable to the labels.
      margin: m in [0, 1), broadcastable to the labels: negatives of a lower probability cost nothing. An element
        whose traced γ or m is out of range gets NaN.
      where, ignore_index, class_weights: as in `sigmoid_cross_entropy`.

    Returns:
      Losses in the shape of the logits, in float32 or wider. The gradient goes through the focal factors too, which
      the published code leaves to an option.

    Raises:
      ValueError: a concrete γ < 0, m outside [0, 1).

    Example:
      >>> print(jax_ls.asymmetric_loss(jnp.array([0.0, 0.0, -4.0]), jnp.array([1, 0, 0])).round(4))
      [0.3466 0.0245 0.    ]

    References:
      Ridnik et al., Asymmetric Loss For Multi-Label Classification, 2021.
    """
    z = checks.as_array("logits", logits)
    checks.assert_kind("logits", z, float, "real numbers")
    y = checks.as_array("labels", labels)
    checks.assert_shape("labels", y, [z.shape], f"{z.shape}, the shape of the logits")
    where = checks.as_kept(y, where, ignore_index)
    weights = None
    if class_weights is not None:
        weights = checks.as_class_values("class_weights", class_weights)
        checks.assert_shape("class_weights", weights, [z.shape[-1:]], f"{z.shape[-1:]}, one weight a class")
    numbers = {
        "smoothing": smoothing,
        "prior": prior,
        "gamma_positive": checks.as_amount("gamma_positive", gamma_positive),
        "gamma_negative": checks.as_amount("gamma_negative", gamma_negative),
        "margin": checks.as_parameter("margin", margin, lambda x: (x >= 0) & (x < 1), "numbers in [0, 1)"),
    }
    numbers = {name: checks.as_weight(name, x) for name, x in numbers.items()}
    for name, x in numbers.items():
        checks.as_broadcast(name, x, z)
    return _asymmetric_elements(z, y, numbers, where, weights)


@elementwise
def _asymmetric_elements(
    z: Array, y: Array, numbers: dict[str, Array], where: Array | None, class_weights: Array | None
) -> Array:
    z = z.astype(checks.wide(z.dtype))
    y = checks.as_weight("labels", y).astype(z.dtype)
    rows = [
        checks.as_broadcast(name, numbers[name], z)
        for name in ("smoothing", "prior", "gamma_positive", "gamma_negative", "margin")
    ]
    # On an explicit mesh, as the logits lie.
    y, *rows = (laid_as(x, z, z.ndim) for x in (y, *rows))
    if where is not None:
        where = laid_as(where, z, z.ndim)
        z, y, *rows = (jnp.where(where, x, jnp.zeros((), x.dtype)) for x in (z, y, *rows))
    epsilon, base_rate, up, down, m = rows
    q = smooth_binary_labels(y, epsilon, prior=base_rate)
    tail = jnp.log1p(jnp.exp(-jnp.abs(z)))
    log_p, log_rest = jnp.minimum(z, 0) - tail, -jnp.maximum(z, 0) - tail
    positive = -log_p * jnp.exp(up * log_rest)
    over = jnp.exp(log_p) - m
    counts = over > 0
    # log(1 − p + m), which is log(1 − p) for m = 0 down to where 1 − p is no number any more.
    log_m = jnp.log(jnp.where(m > 0, m, 1))
    log_missing = jnp.where(m > 0, jnp.logaddexp(log_rest, log_m), log_rest)
    log_over = jnp.where(m > 0, jnp.log(jnp.where(counts, over, 1)), log_p)
    negative = jnp.where(counts | (m == 0), -log_missing * jnp.exp(down * log_over), 0)
    losses = multiply(q, positive) + multiply(1 - q, negative) + 0 * (up + down + m)
    if class_weights is not None:
        losses = losses * align(class_weights, z.ndim).astype(z.dtype)
    return losses if where is None else jnp.where(where, losses, 0)


def _smoothed(
    batch: Batch,
    labels: Target | ArrayLike,
    smoothing: ArrayLike,
    prior: Prior | None,
    spread: Spread,
    ignore_index: int | None,
) -> tuple[Batch, Target]:
    """The batch without the examples to ignore, and the target; plain labels where `smoothing` is the number 0."""
    batch, hard, smoothed = smoothed_target(batch, labels, smoothing, prior, spread, ignore_index)
    return batch, hard if _is_zero(smoothing) else smoothed


def _is_zero(x: ArrayLike) -> bool:
    """Whether `x` is known to be the number 0."""
    return not isinstance(x, Tracer) and np.ndim(x) == 0 and bool(np.asarray(x) == 0)
