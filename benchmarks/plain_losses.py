"""Every loss as its formula, in the few lines of jnp that one would write by hand, to measure the library against.

Each takes the logits (batch, K) and the arrays of a batch, and computes in the logits' dtype. Nothing is masked, and
nothing is made safe against overflow beyond what jax.nn does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.nn import log_softmax, logsumexp, relu, softmax


class Batch(NamedTuple):
    """What a loss may be given beside the logits (batch, K). A loss that does not read an array does not pay for it."""

    labels: Any  # integers (batch,)
    smoothing: Any  # ε, ()
    where: Any = None  # boolean (batch,)
    class_where: Any = None  # boolean (K,)
    each_class_where: Any = None  # boolean (batch, K)
    class_weights: Any = None  # (K,)
    prior: Any = None  # u, (K,)
    each_prior: Any = None  # (batch, K)
    table: Any = None  # (K, K)
    indices: Any = None  # integers (batch, S)
    weights: Any = None  # (batch, S)
    averaged: Any = None  # p_y by a moving average of the model, (batch,)
    many_labels: Any = None  # zeros and ones (batch, K)


Loss = Callable[[Array, Batch], Array]


def sequences(z: Array, batch: Batch) -> tuple[Array, Array]:
    """Rows as sequences of 128 frames, with 16 of their labels."""
    return z.reshape(-1, 128, z.shape[-1]), batch.labels.reshape(-1, 128)[:, :16]


def pick(z: Array, labels: Array) -> Array:
    return jnp.take_along_axis(z, labels[:, None], axis=-1)[:, 0]


def one_hot_smoothed(z: Array, batch: Batch) -> Array:
    """optax's way to smooth."""
    hard = jax.nn.one_hot(batch.labels, z.shape[-1], dtype=z.dtype)
    return optax.softmax_cross_entropy(z, optax.smooth_labels(hard, batch.smoothing.astype(z.dtype)))


def integer(z: Array, batch: Batch) -> Array:
    """optax's loss of integer labels, which does not smooth."""
    return optax.softmax_cross_entropy_with_integer_labels(z, batch.labels)


def smoothed(z: Array, batch: Batch, smoothing: Any = None) -> Array:
    epsilon = (batch.smoothing if smoothing is None else jnp.asarray(smoothing)).astype(z.dtype)
    return logsumexp(z, axis=-1) - (1 - epsilon) * pick(z, batch.labels) - epsilon * z.mean(axis=-1)


def jax_nn(z: Array, batch: Batch) -> Array:
    """−Σ q log p with jax.nn's log_softmax and one_hot."""
    epsilon = batch.smoothing.astype(z.dtype)
    q = (1 - epsilon) * jax.nn.one_hot(batch.labels, z.shape[-1], dtype=z.dtype) + epsilon / z.shape[-1]
    return -jnp.sum(q * log_softmax(z), axis=-1)


@jax.custom_vjp
def _by_hand(z: Array, labels: Array, epsilon: Array) -> Array:
    return _by_hand_forward(z, labels, epsilon)[0]


def _by_hand_forward(z: Array, labels: Array, epsilon: Array) -> tuple[Array, Any]:
    wide = z.astype(jnp.float32)
    lse = logsumexp(wide, axis=-1)
    loss = lse - (1 - epsilon) * pick(z, labels).astype(jnp.float32) - epsilon * wide.mean(axis=-1)
    return loss, (z, labels, epsilon, lse)


def _by_hand_backward(saved: Any, cotangent: Array) -> tuple[Array, None, None]:
    z, labels, epsilon, lse = saved
    hit = jnp.arange(z.shape[-1])[None] == labels[:, None]
    q = (1 - epsilon) * hit.astype(jnp.float32) + epsilon / z.shape[-1]
    gradient = (jnp.exp(z.astype(jnp.float32) - lse[:, None]) - q) * cotangent[:, None]
    return gradient.astype(z.dtype), None, None


_by_hand.defvjp(_by_hand_forward, _by_hand_backward)


def custom_vjp(z: Array, batch: Batch) -> Array:
    """The closed form with its gradient written by hand: maximum, then Σ exp, then softmax − q."""
    return _by_hand(z, batch.labels, batch.smoothing)


def dense(z: Array, batch: Batch) -> Array:
    return -jnp.sum(batch.each_prior.astype(z.dtype) * log_softmax(z), axis=-1)


def kl_divergence(z: Array, batch: Batch) -> Array:
    epsilon = batch.smoothing.astype(z.dtype)
    hard = jax.nn.one_hot(batch.labels, z.shape[-1], dtype=z.dtype)
    return optax.kl_divergence(log_softmax(z), optax.smooth_labels(hard, epsilon))


def sigmoid(z: Array, batch: Batch) -> Array:
    """Summed over the classes."""
    epsilon = batch.smoothing.astype(z.dtype)
    q = (1 - epsilon) * batch.many_labels.astype(z.dtype) + epsilon / 2
    return jnp.sum(optax.sigmoid_binary_cross_entropy(z, q), axis=-1)


def entropy(z: Array) -> Array:
    log_p = log_softmax(z)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def confidence_penalty(z: Array, batch: Batch) -> Array:
    return -0.1 * entropy(z)


def jensen(z: Array, batch: Batch) -> Array:
    alpha, u, log_p = 0.3, 1 / z.shape[-1], log_softmax(z)
    p = jnp.exp(log_p)
    m = (1 - alpha) * u + alpha * p
    from_prior = jnp.sum(u * (jnp.log(u) - jnp.log(m)), axis=-1)
    from_model = jnp.sum(p * (log_p - jnp.log(m)), axis=-1)
    return ((1 - alpha) * from_prior + alpha * from_model) / (alpha * (1 - alpha))


def max_suppression(z: Array, batch: Batch) -> Array:
    return z.max(axis=-1) - z.mean(axis=-1)


def margin(z: Array, batch: Batch) -> Array:
    return relu(z.max(axis=-1, keepdims=True) - z - 10).mean(axis=-1)


def conditional(z: Array, batch: Batch) -> Array:
    top = z.max(axis=-1)
    depths = jnp.square(relu(jax.lax.stop_gradient(top)[:, None] - z - 10))
    return jnp.square(relu(top - 10)) + 0.1 * depths.sum(axis=-1) / (z.shape[-1] - 1)


def squared_logits(z: Array, batch: Batch) -> Array:
    return jnp.square(z).sum(axis=-1) / 2


def z_loss(z: Array, batch: Batch) -> Array:
    return jnp.square(logsumexp(z, axis=-1))


def focal(z: Array, batch: Batch) -> Array:
    log_p = pick(log_softmax(z), batch.labels)
    return -((1 - jnp.exp(log_p)) ** 2) * log_p


def poly_1(z: Array, batch: Batch) -> Array:
    epsilon = batch.smoothing.astype(z.dtype)
    p = jnp.exp(pick(log_softmax(z), batch.labels))
    return smoothed(z, batch) + 2 * (1 - (1 - epsilon) * p - epsilon / z.shape[-1])


def smoothed_focal(z: Array, batch: Batch) -> Array:
    epsilon, log_p = batch.smoothing.astype(z.dtype), log_softmax(z)
    terms = -((1 - jnp.exp(log_p)) ** 2) * log_p
    return (1 - epsilon) * pick(terms, batch.labels) + epsilon * terms.mean(axis=-1)


def poly_1_by_prior(z: Array, batch: Batch) -> Array:
    epsilon, log_p = batch.smoothing.astype(z.dtype), log_softmax(z)
    u, p = batch.prior.astype(z.dtype)[None], jnp.exp(log_p)
    of_q = (1 - epsilon) * pick(p, batch.labels) + epsilon * jnp.sum(u * p, axis=-1)
    cross_entropy = -(1 - epsilon) * pick(log_p, batch.labels) - epsilon * jnp.sum(u * log_p, axis=-1)
    return cross_entropy + 2 * (1 - of_q)


def bi_tempered(z: Array, batch: Batch) -> Array:
    """By the published fixed point, of five steps; t₁ = 0.8, t₂ = 1.2."""

    def exp_t(x: Array) -> Array:
        return relu(1 - 0.2 * x) ** -5

    shifted = top_removed = z - z.max(axis=-1, keepdims=True)
    for _ in range(5):
        shifted = top_removed * exp_t(shifted).sum(axis=-1, keepdims=True) ** -0.2
    total = exp_t(shifted).sum(axis=-1, keepdims=True)
    p = exp_t(top_removed + ((1 / total) ** -0.2 - 1) / -0.2)
    of_label = (1 - pick(p, batch.labels) ** 0.2) / 0.2
    return of_label - (1 - jnp.sum(p**1.2, axis=-1)) / 1.2


def asymmetric(z: Array, batch: Batch) -> Array:
    """Summed over the classes."""
    y, p = batch.many_labels.astype(z.dtype), jax.nn.sigmoid(z)
    p_m = relu(p - 0.05)
    return -jnp.sum(y * (1 - p) * jax.nn.log_sigmoid(z) + (1 - y) * p_m**4 * jnp.log(1 - p_m), axis=-1)


def early_learning(z: Array, batch: Batch) -> Array:
    log_p = log_softmax(z)
    agreed = jnp.sum(jnp.exp(log_p) * batch.each_prior.astype(z.dtype), axis=-1)
    return -pick(log_p, batch.labels) + 3 * jnp.log(1 - 0.9999 * agreed)


def ctc(z: Array, batch: Batch) -> Array:
    """Of sequences of 128 frames and 16 labels, with KL(u ‖ p) of every frame."""
    frames, labels = sequences(z, batch)
    padding = jnp.zeros(frames.shape[:2], z.dtype)
    with jax.numpy_dtype_promotion("standard"):  # which optax asks for
        paths = optax.ctc_loss(frames, padding, labels, jnp.zeros(labels.shape, z.dtype)).astype(z.dtype)
    apart = logsumexp(frames, axis=-1) - frames.mean(axis=-1) - jnp.log(z.shape[-1]).astype(z.dtype)
    return (1 - batch.smoothing.astype(z.dtype)) * paths + batch.smoothing.astype(z.dtype) * apart.sum(axis=-1)


def logit_norm(z: Array, batch: Batch) -> Array:
    norm = jnp.sqrt(jnp.square(z).sum(axis=-1, keepdims=True))
    return -pick(log_softmax(z / (0.04 * norm)), batch.labels)


def generalized(z: Array, batch: Batch) -> Array:
    return (1 - jnp.exp(0.7 * pick(log_softmax(z), batch.labels))) / 0.7


def symmetric(z: Array, batch: Batch) -> Array:
    log_p = pick(log_softmax(z), batch.labels)
    return -0.1 * log_p + 4 * (1 - jnp.exp(log_p))


def forward_correction(z: Array, batch: Batch) -> Array:
    return -jnp.log(0.8 * jnp.exp(pick(log_softmax(z), batch.labels)) + 0.2 / z.shape[-1])


def forward_correction_by_matrix(z: Array, batch: Batch) -> Array:
    seen = batch.table.T.astype(z.dtype)[batch.labels]
    return -jnp.log(jnp.sum(softmax(z) * seen, axis=-1))


def backward_correction(z: Array, batch: Batch) -> Array:
    return smoothed(z, batch, -0.2 / (1 - 0.2))


def label_relaxation(z: Array, batch: Batch) -> Array:
    log_p = pick(log_softmax(z), batch.labels)
    p = jnp.exp(log_p)
    inside = p >= 0.9
    apart = 0.9 * (jnp.log(0.9) - log_p) + 0.1 * (jnp.log(0.1) - jnp.log(1 - jnp.where(inside, 0.5, p)))
    return jnp.where(inside, 0, apart)


def soft_bootstrap(z: Array, batch: Batch) -> Array:
    return -0.95 * pick(log_softmax(z), batch.labels) + 0.05 * entropy(z)


def hard_bootstrap(z: Array, batch: Batch) -> Array:
    log_p = log_softmax(z)
    likeliest = jax.lax.stop_gradient(jnp.argmax(z, axis=-1))
    return -0.8 * pick(log_p, batch.labels) - 0.2 * pick(log_p, likeliest)


def by_confidence(z: Array, batch: Batch) -> Array:
    p = jax.lax.stop_gradient(jnp.exp(pick(log_softmax(z), batch.labels)))
    return smoothed(z, batch, batch.smoothing.astype(z.dtype) * p)


def by_uncertainty(z: Array, batch: Batch) -> Array:
    p = jax.lax.stop_gradient(jnp.exp(pick(log_softmax(z), batch.labels)))
    return smoothed(z, batch, batch.smoothing.astype(z.dtype) * (1 - p))


def by_margin(z: Array, batch: Batch) -> Array:
    p = jax.lax.stop_gradient(softmax(z))
    others = jnp.arange(z.shape[-1])[None] != batch.labels[:, None]
    lead = pick(p, batch.labels) - jnp.where(others, p, 0).max(axis=-1)
    return smoothed(z, batch, batch.smoothing.astype(z.dtype) * relu(lead))


def by_entropy(z: Array, batch: Batch) -> Array:
    sure = 1 - jax.lax.stop_gradient(entropy(z)) / jnp.log(z.shape[-1]).astype(z.dtype)
    return smoothed(z, batch, batch.smoothing.astype(z.dtype) * sure)


def by_rank(z: Array, batch: Batch) -> Array:
    draws = jnp.sort(jax.random.uniform(jax.random.key(0), batch.averaged.shape) ** (1 / 3))
    b = jnp.zeros_like(draws).at[jnp.argsort(batch.averaged)].set(draws)
    epsilon = (batch.smoothing * (1 - b)).astype(z.dtype)
    others = (z.sum(axis=-1) - pick(z, batch.labels)) / (z.shape[-1] - 1)
    return logsumexp(z, axis=-1) - (1 - epsilon) * pick(z, batch.labels) - epsilon * others


def prior_rows(z: Array, batch: Batch) -> Array:
    epsilon = batch.smoothing.astype(z.dtype)
    soft = jnp.sum(batch.table.astype(z.dtype)[batch.labels] * z, axis=-1)
    return logsumexp(z, axis=-1) - (1 - epsilon) * pick(z, batch.labels) - epsilon * soft
