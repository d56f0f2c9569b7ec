"""Losses of other shapes and robust ones by definition, in float64 NumPy: one example z (K,), analytic."""

import numpy as np
from reference import log_softmax

Array = np.ndarray


def focal(z: Array, q: Array, gamma):
    log_p = log_softmax(z)
    return -np.sum(q * (1 - np.exp(log_p)) ** gamma * log_p)


def poly(z: Array, q: Array, coefficients):
    log_p = log_softmax(z)
    p = np.exp(log_p)
    return sum(
        q[k] * (-log_p[k] + sum(c * (1 - p[k]) ** (j + 1) for j, c in enumerate(coefficients))) for k in range(len(z))
    )


def logit_norm(z: Array, q: Array, temperature):
    return -np.sum(q * log_softmax(z / (temperature * np.sqrt(np.sum(z**2)))))


def log_t(x, t):
    return np.log(x) if t == 1 else (x ** (1 - t) - 1) / (1 - t)


def exp_t(x, t):
    return np.exp(x) if t == 1 else (1 + (1 - t) * x) ** (1 / (1 - t))


def tempered_softmax(z: Array, t):
    """By the fixed point of the paper's algorithm 1."""
    top = z[np.argmax(z.real)]
    start = z - top
    if t == 1:
        return np.exp(log_softmax(z))
    scaled = start
    for _ in range(400):
        scaled = start * np.sum(exp_t(scaled, t)) ** (1 - t)
    return exp_t(start + log_t(1 / np.sum(exp_t(scaled, t)), t), t)


def bi_tempered(z: Array, q: Array, t1, t2):
    p = tempered_softmax(z, t2)
    some = q > 0
    match = np.sum(q[some] * (log_t(q[some], t1) - log_t(p[some], t1)))
    return match - np.sum(q[some] ** (2 - t1)) / (2 - t1) + np.sum(p ** (2 - t1)) / (2 - t1)


def generalized_cross_entropy(z: Array, label: int, exponent, truncation=0.0):
    p = np.exp(log_softmax(z)[label])
    return (1 - (p if p.real > np.real(truncation) else truncation) ** exponent) / exponent


def symmetric_cross_entropy(z: Array, label: int, alpha, beta=1.0, log_zero=-4.0):
    log_p = log_softmax(z)
    reverse = -sum(np.exp(log_p[k]) * log_zero for k in range(len(z)) if k != label)
    return -alpha * log_p[label] + beta * reverse


def early_learning(z: Array, label: int, average: Array, weight):
    log_p = log_softmax(z)
    return -log_p[label] + weight * np.log(1 - (1 - 1e-4) * np.sum(np.exp(log_p) * average))


def asymmetric(z, q, up, down, margin):
    """One element, z a number."""
    p = 1 / (1 + np.exp(-z))
    rest = p - margin if (p - margin).real > 0 else 0
    return -q * (1 - p) ** up * np.log(p) - (1 - q) * (rest**down * np.log(1 - rest) if rest != 0 else 0)


def label_aware(counts: Array, head, tail, shape: str) -> Array:
    x = (counts - counts.min()) / (counts.max() - counts.min())
    f = {
        "sine": np.sin(np.pi * x / 2),
        "linear": x,
        "quadratic": x**2,
        "cosine": 1 + np.sin(1.5 * np.pi + np.pi * x / 2),
    }
    return tail + (head - tail) * f[shape]


def ctc(z: Array, labels: list[int], blank: int = 0):
    """−log of the sum over all paths, each spelled out; z (T, K)."""
    log_p = np.array([log_softmax(row) for row in z])
    paths = [[]]
    for _ in z:
        paths = [[*path, k] for path in paths for k in range(z.shape[1])]

    def spelled(path):
        return [k for i, k in enumerate(path) if k != blank and (i == 0 or path[i - 1] != k)]

    return -np.log(
        sum(np.exp(sum(log_p[t, k] for t, k in enumerate(path))) for path in paths if spelled(path) == labels)
    )
