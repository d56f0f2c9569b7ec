"""Noise losses and penalties by definition, in float64 NumPy: one example z (K,), analytic for complex steps."""

import numpy as np
from reference import log_softmax

Array = np.ndarray


def relu(x):
    return np.where(x.real > 0, x, 0)


def kl(q: Array, p: Array):
    """Σ q log(q / p), 0 log 0 = 0."""
    some = q != 0
    return np.sum(q[some] * (np.log(q[some]) - np.log(p[some])))


def symmetric(alpha, num_classes: int) -> Array:
    """T of labels that are resampled with probability α."""
    return (1 - alpha) * np.eye(num_classes) + alpha / num_classes


def forward_correction(z: Array, label: int, matrix: Array):
    return -np.log(np.exp(log_softmax(z)) @ matrix[:, label])


def backward_correction(z: Array, label: int, matrix: Array):
    return np.linalg.inv(matrix)[label] @ -log_softmax(z)


def label_relaxation(z: Array, label: int, alpha):
    """KL of p to the nearest q that has at least 1 − α on the label."""
    log_p = log_softmax(z)
    p = np.exp(log_p)
    if p[label].real >= 1 - np.real(alpha):
        return 0.0 * z[label]
    if alpha == 0:
        return -log_p[label]
    others = np.arange(len(z)) != label
    q = alpha * p / np.sum(p[others])
    q[label] = 1 - alpha
    return np.sum(q * (np.log(q) - log_p))


def bootstrap(z: Array, label: int, beta, kind: str):
    log_p = log_softmax(z)
    own = np.exp(log_p) if kind == "soft" else (np.arange(len(z)) == np.argmax(z.real)).astype(float)
    return -beta * log_p[label] - (1 - beta) * np.sum(own * log_p)


def entropy(z: Array):
    log_p = log_softmax(z)
    return -np.sum(np.exp(log_p) * log_p)


def confidence_penalty(z: Array, beta, threshold=None):
    return -beta * entropy(z) if threshold is None else beta * relu(threshold - entropy(z))


def jensen(z: Array, alpha, u: Array):
    log_p = log_softmax(z)
    p = np.exp(log_p)
    if alpha == 0:
        return np.sum(p * (log_p - np.log(u)))
    if alpha == 1:
        return np.sum(u[u > 0] * (np.log(u[u > 0]) - log_p[u > 0]))
    m = (1 - alpha) * u + alpha * p
    return ((1 - alpha) * kl(u, m) + alpha * kl(p, m)) / (alpha * (1 - alpha))


def max_suppression(z: Array):
    return z[np.argmax(z.real)] - np.mean(z)


def margin(z: Array, m):
    return np.mean(relu(z[np.argmax(z.real)] - z - m))


def conditional(z: Array, m, over, under):
    """The maximum within the second term is a constant to differentiation: its real part alone takes part."""
    top = np.argmax(z.real)
    others = np.arange(len(z)) != top
    pull = np.sum(relu(z[top].real - z[others] - m) ** 2) / max(len(z) - 1, 1)
    return over * relu(z[top] - m) ** 2 + under * pull


def logit_norm(z: Array):
    return np.sum(z**2) / 2


def z_loss(z: Array):
    top = z.real.max()
    return (top + np.log(np.sum(np.exp(z - top)))) ** 2
