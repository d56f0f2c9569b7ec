"""Calibration by definition, in float64 NumPy: loops over bins and examples, written from the formulas."""

import itertools

import numpy as np
from reference import log_softmax

Array = np.ndarray


def probabilities(logits: Array) -> Array:
    return np.exp([log_softmax(z) for z in np.asarray(logits, np.float64)]).reshape(logits.shape)


def bins_of(confidence: Array, correct: Array, edges: Array) -> list[tuple[int, float, float]]:
    """(count, Σ confidence, number right) of each bin (lo, hi]."""
    table = []
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        table.append((int(inside.sum()), float(confidence[inside].sum()), int(correct[inside].sum())))
    return table


def equal_width(num_bins: int) -> Array:
    return np.array([b / num_bins for b in range(num_bins + 1)])


def equal_mass(confidence: Array, num_bins: int) -> Array:
    """Edges at the smallest confidence that b/B of the examples do not exceed."""
    ordered, n = sorted(confidence), len(confidence)
    inner = [next(c for c in ordered if np.sum(confidence <= c) * num_bins >= b * n) for b in range(1, num_bins)]
    return np.array([0.0, *inner, 1.0])


def error(table: list[tuple[int, float, float]], norm: float) -> float:
    examples = sum(count for count, _, _ in table)
    if examples == 0:
        return np.nan
    gaps = [abs(right - confidence) / count for count, confidence, right in table if count]
    shares = [count / examples for count, _, _ in table if count]
    if norm == np.inf:
        return max(gaps)
    return sum(share * gap**norm for share, gap in zip(shares, gaps, strict=True)) ** (1 / norm)


def expected_calibration_error(
    logits: Array, labels: Array, *, num_bins: int = 15, binning: str = "width", norm: float = 1
) -> float:
    p = probabilities(logits)
    confidence, correct = p.max(-1), p.argmax(-1) == labels
    edges = equal_width(num_bins) if binning == "width" else equal_mass(confidence, num_bins)
    return error(bins_of(confidence, correct, edges), norm)


def classwise_calibration_error(
    logits: Array, labels: Array, *, num_bins: int = 15, binning: str = "width", norm: float = 1
) -> float:
    errors = []
    for k, p in enumerate(probabilities(logits).T):
        edges = equal_width(num_bins) if binning == "width" else equal_mass(p, num_bins)
        errors.append(error(bins_of(p, labels == k, edges), norm))
    return float(np.mean(errors))


def overconfidence(logits: Array, labels: Array) -> float:
    p = probabilities(logits)
    return float(np.mean(p.max(-1)) - np.mean(p.argmax(-1) == labels))


def negative_log_likelihood(logits: Array, labels: Array) -> float:
    return float(np.mean([-log_softmax(z)[y] for z, y in zip(np.asarray(logits, np.float64), labels, strict=True)]))


def brier_score(logits: Array, labels: Array) -> float:
    return float(np.mean(np.sum((probabilities(logits) - np.eye(logits.shape[-1])[labels]) ** 2, axis=-1)))


def area_under_risk_coverage(logits: Array, labels: Array) -> float:
    """Those that tie are as wrong as their mean: what the mean over all their orders comes to."""
    p = probabilities(logits)
    confidence, wrong = p.max(-1), (p.argmax(-1) != labels).astype(float)
    for c in np.unique(confidence):
        wrong[confidence == c] = wrong[confidence == c].mean()
    ordered = wrong[np.argsort(-confidence, kind="stable")]
    return float(np.mean([ordered[: n + 1].mean() for n in range(len(ordered))]))


def temperature(logits: Array, labels: Array, low: float = 0.05, high: float = 20.0) -> float:
    """Golden section on log T, to ten digits."""
    a, b = np.log(low), np.log(high)
    shrink = (5**0.5 - 1) / 2

    def nll(log_t: float) -> float:
        return negative_log_likelihood(np.asarray(logits, np.float64) * np.exp(-log_t), labels)

    for _ in range(60):
        left, right = b - shrink * (b - a), a + shrink * (b - a)
        a, b = (a, right) if nll(left) < nll(right) else (left, b)
    return float(np.exp((a + b) / 2))
