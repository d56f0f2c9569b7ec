"""What a study chooses between: the loss of a batch, and what a method knows or learns beside the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import digits
import jax
import jax.numpy as jnp
import numpy as np

import jax_ls
from jax_ls import adaptive, noise, online, penalties, priors

Memory = Any
"""Arrays that a method keeps between steps; {} for most."""

STRENGTH_OF_ALL = 0.5
"""A strength that is in the range of every method."""


class Batch(NamedTuple):
    """What a loss may look at: `smoothing` is the method's strength, `rows` says which training examples these are."""

    logits: jax.Array
    labels: jax.Array
    where: jax.Array
    smoothing: jax.Array
    memory: Memory
    rows: jax.Array


def nothing(images: jax.Array, labels: jax.Array) -> Memory:
    return {}


def forget(memory: Memory, batch: Batch) -> Memory:
    return memory


def towards(prior: Callable[[Memory, jax.Array], Any]) -> Callable[[Batch], jax.Array]:
    """Smoothing to what `prior` says of the labels."""

    def loss(batch: Batch) -> jax.Array:
        u = prior(batch.memory, batch.labels)
        return jax_ls.smoothed_cross_entropy(batch.logits, batch.labels, batch.smoothing, prior=u, where=batch.where)

    return loss


DECAY = 0.7
"""Of the running mean that early-learning regularisation keeps, as published."""


def uniform(memory: Memory, labels: jax.Array) -> None:
    return None


def plain(batch: Batch) -> jax.Array:
    return jax_ls.cross_entropy(batch.logits, batch.labels, where=batch.where)


def confidence(batch: Batch) -> jax.Array:
    epsilon = adaptive.confidence(batch.logits, batch.labels, batch.smoothing, where=batch.where)
    return towards(uniform)(batch._replace(smoothing=epsilon))


@dataclass(frozen=True)
class Method:
    """Either where the mass goes, or the loss of each example; and what is kept in memory.

    `begin` looks at the training images, (n, ...) of floats, and labels, `learn` at each batch, `turn` ends an epoch.
    """

    prior: Callable[[Memory, jax.Array], Any] | None = None
    loss: Callable[[Batch], jax.Array] | None = None
    begin: Callable[[jax.Array, jax.Array], Memory] = nothing
    learn: Callable[[Memory, Batch], Memory] = forget
    turn: Callable[[Memory], Memory] = lambda memory: memory
    takes_negative: bool = True

    def losses(self, batch: Batch) -> jax.Array:
        loss = self.loss if self.prior is None else towards(self.prior)
        assert loss is not None, "a method has a prior or a loss"
        return loss(batch)

    def targets(self, memory: Memory, smoothing: float) -> np.ndarray | None:
        """Row y is the target of label y, (K, K); None where that depends on the network's answers."""
        if self.prior is None:
            return None
        classes = jnp.arange(digits.CLASSES)
        return np.asarray(jax_ls.smooth(classes, smoothing, prior=self.prior(memory, classes)).probs(digits.CLASSES))


def frequencies(images: jax.Array, labels: jax.Array) -> jax.Array:
    return priors.unigram(jnp.bincount(labels, length=digits.CLASSES))


def likeness(images: jax.Array, labels: jax.Array) -> jax.Array:
    """Digits whose mean images, less the mean of all, point the same way are alike."""
    x = images.reshape(len(images), -1)
    member = jax.nn.one_hot(labels, digits.CLASSES, dtype=x.dtype)
    means = member.T @ x / jnp.maximum(jnp.sum(member, axis=0), 1)[:, None]
    return priors.similarity(means - jnp.mean(x, axis=0, keepdims=True), temperature=0.2)


def symmetric(batch: Batch) -> jax.Array:
    """(1 − s) CE + s A (1 − p_y) at strength s."""
    alpha = 1 - batch.smoothing
    return noise.symmetric_cross_entropy(batch.logits, batch.labels, alpha, batch.smoothing, where=batch.where)


def no_predictions(images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.zeros((len(labels), digits.CLASSES))


def early_learning(batch: Batch) -> jax.Array:
    """The averages that the loss sees hold this batch's predictions already, as in the published code."""
    number = jnp.arange(len(batch.rows))
    averages = online.average_predictions(batch.memory[batch.rows], number, batch.logits, decay=DECAY)
    return noise.early_learning(batch.logits, batch.labels, averages, batch.smoothing, where=batch.where)


def remember(memory: Memory, batch: Batch) -> Memory:
    return online.average_predictions(memory, batch.rows, batch.logits, decay=DECAY, where=batch.where)


def counts(images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.bincount(labels, length=digits.CLASSES)


def by_count(memory: Memory, labels: jax.Array) -> jax.Array:
    return priors.unigram(memory, pseudo_count=0.0)


def label_aware(batch: Batch, prior: Callable[[Memory, jax.Array], Any] = uniform) -> jax.Array:
    """Strength is ε of the most frequent class; the rarest has none."""
    epsilon = adaptive.label_aware(batch.labels, batch.memory, batch.smoothing, 0.0)
    return towards(prior)(batch._replace(smoothing=epsilon))


def adjusted(batch: Batch) -> Batch:
    return batch._replace(logits=batch.logits + priors.logit_adjustment(batch.memory)[None])


METHODS = {
    "uniform": Method(uniform),
    "unigram": Method(lambda memory, labels: memory, begin=frequencies),
    "similarity": Method(jax_ls.Rows, begin=likeness),
    "online": Method(
        online.target,
        begin=lambda images, labels: online.init(digits.CLASSES, first="uniform"),
        learn=lambda memory, batch: online.update(memory, batch.logits, batch.labels, where=batch.where),
        turn=online.next_epoch,
    ),
    "confidence": Method(loss=confidence),
    "forward-correction": Method(
        loss=lambda batch: noise.forward_correction(batch.logits, batch.labels, batch.smoothing, where=batch.where),
        takes_negative=False,
    ),
    "relaxation": Method(
        loss=lambda batch: noise.label_relaxation(batch.logits, batch.labels, batch.smoothing, where=batch.where),
        takes_negative=False,
    ),
    "max-suppression": Method(
        loss=lambda batch: plain(batch) + batch.smoothing * penalties.max_suppression(batch.logits, where=batch.where),
    ),
    "confidence-penalty": Method(
        loss=lambda batch: (
            plain(batch) + penalties.confidence_penalty(batch.logits, batch.smoothing, where=batch.where)
        ),
    ),
}

# Losses for wrong labels, and focal loss, which is not made for them.
FOR_NOISE = {
    "generalized-cross-entropy": Method(
        loss=lambda batch: noise.generalized_cross_entropy(
            batch.logits, batch.labels, batch.smoothing, where=batch.where
        ),
    ),
    "symmetric-cross-entropy": Method(loss=symmetric),
    "early-learning": Method(loss=early_learning, begin=no_predictions, learn=remember),
    "focal": Method(
        loss=lambda batch: jax_ls.focal_loss(batch.logits, batch.labels, batch.smoothing, where=batch.where)
    ),
}

# For rare classes. The logits that are adjusted in training are plain in prediction.
FOR_LONG_TAILS = {
    "label-aware": Method(loss=label_aware, begin=counts),
    "adjusted": Method(loss=lambda batch: towards(uniform)(adjusted(batch)), begin=counts),
    "adjusted, label-aware": Method(loss=lambda batch: label_aware(adjusted(batch)), begin=counts),
    "adjusted, to frequencies": Method(loss=lambda batch: towards(by_count)(adjusted(batch)), begin=counts),
    "adjusted, label-aware, to frequencies": Method(
        loss=lambda batch: label_aware(adjusted(batch), by_count),
        begin=counts,
    ),
}

ALL = METHODS | FOR_NOISE | FOR_LONG_TAILS
