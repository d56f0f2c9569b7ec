"""Priors by their definitions, in float64 NumPy with loops. All are analytic in their parameters: see `reference`."""

import itertools
import math

import numpy as np

Array = np.ndarray


def normalized(weights: Array) -> Array:
    return weights / np.sum(weights)


def unigram(counts: Array, pseudo_count=1.0, temperature=1.0, where: Array | None = None) -> Array:
    kept = np.ones(len(counts), bool) if where is None else where
    powers = [(c + pseudo_count) ** (1 / temperature) if k else 0 for c, k in zip(counts, kept, strict=True)]
    return normalized(np.array(powers))


def similarity(scores: Array, temperature) -> Array:
    """softmax over the other classes."""
    rows = np.exp(scores / temperature) * (1 - np.eye(len(scores)))
    return np.array([normalized(row) for row in rows])


def cosine(embeddings: Array) -> Array:
    def length(v):
        return np.sqrt(np.sum(v * v))

    return np.array([[a @ b / (length(a) * length(b)) for b in embeddings] for a in embeddings])


def rates(confusion: Array) -> Array:
    return np.array([row / row.sum() if row.sum() != 0 else row for row in confusion])


def lowest_common_ancestor_heights(parents: list[int], classes: list[int]) -> Array:
    """By walking up from both classes; a node's height is its longest way down to a leaf."""

    def ancestors(node):
        return [node] if parents[node] == -1 else [node, *ancestors(parents[node])]

    def height(node):
        children = [child for child, parent in enumerate(parents) if parent == node]
        return 1 + max(map(height, children)) if children else 0

    return np.array([[height(next(n for n in ancestors(a) if n in ancestors(b))) for b in classes] for a in classes])


def hierarchy(distances: Array, beta) -> Array:
    farthest = distances[np.unravel_index(np.argmax(distances.real), distances.shape)]
    return np.array([normalized(np.exp(-beta * row / farthest)) for row in distances])


def sord(ranks: Array, phi, beta=1.0) -> Array:
    return np.array([normalized(np.array([np.exp(-beta * phi(y, k)) for k in ranks])) for y in ranks])


def gaussian(ranks: Array, sigma) -> Array:
    return np.array([normalized(np.exp(-((y - ranks) ** 2) / (2 * sigma**2))) for y in ranks])


def binomial(size: int, margin) -> Array:
    n = size - 1
    p = [margin + (1 - 2 * margin) * y / max(n, 1) for y in range(size)]
    return np.array([[math.comb(n, k) * p_y**k * (1 - p_y) ** (n - k) for k in range(size)] for p_y in p])


def geometric(size: int, alpha, left=None) -> Array:
    table = np.zeros((size, size), np.result_type(alpha, float if left is None else left, float))
    for y in range(size):
        a = alpha if np.ndim(alpha) == 0 else alpha[y]
        total = {side: sum(a ** abs(j - y) for j in range(size) if (j - y) * side > 0) for side in (-1, 1)}
        for k in range(size):
            if k == y:
                table[y, k] = 1 - a
            elif left is None:
                table[y, k] = a * a ** abs(k - y) / (total[-1] + total[1])
            else:
                share = 0 if y == 0 else 1 if y == size - 1 else left if np.ndim(left) == 0 else left[y]
                side = -1 if k < y else 1
                table[y, k] = a * (share if side < 0 else 1 - share) * a ** abs(k - y) / total[side]
    return table


def triangular_cdf(x, low, high, peak):
    """As dlordinal writes it, at peaks too."""
    if np.real(x - low) <= 0:
        return 0
    if np.real(x - high) >= 0:
        return 1
    if np.real(x - peak) <= 0:
        return (x - low) ** 2 / ((high - low) * (peak - low))
    return 1 - (high - x) ** 2 / ((high - low) * (high - peak))


def triangular(size: int, alpha) -> Array:
    """Of a scale from 0 to K; class k is [k, k + 1]."""
    rows = []
    for y in range(size):
        half, whole = 0.5 / (1 - np.sqrt(2 * alpha)), 1 / (1 - np.sqrt(alpha))
        low, high, peak = y + 0.5 - half, y + 0.5 + half, y + 0.5
        if y == 0:
            low, high, peak = 0, whole, 0
        elif y == size - 1:
            low, high, peak = size - whole, size, size
        cut = [triangular_cdf(x, low, high, peak) for x in range(size + 1)]
        rows.append(normalized(np.diff(np.array(cut))))
    return np.array(rows)


def poisson(rates: Array) -> Array:
    k = range(len(rates))
    return np.array([normalized(np.array([np.exp(-rate) * rate**i / math.factorial(i) for i in k])) for rate in rates])


def neighbors(labels: Array, offsets, weights, num_classes: int, where: Array | None = None) -> Array:
    """u of each step of one sequence (T,): (T, K)."""
    kept = np.ones(len(labels), bool) if where is None else where
    u = np.zeros((len(labels), num_classes), np.result_type(weights, float))
    for t in range(len(labels)):
        votes = [(s, w) for d, w in zip(offsets, weights, strict=True) if 0 <= (s := t + d) < len(labels) and kept[s]]
        total = sum(w for _, w in votes)
        for s, w in votes if total != 0 else [(t, total := 1)]:
            u[t, labels[s]] += w / total
    return u


def spatial(label_map: Array, kernel_size: int, sigma, num_classes: int, where: Array | None = None) -> Array:
    """q of each pixel of one map (*space,): (*space, K)."""
    kept = np.ones(label_map.shape, bool) if where is None else where
    reach = range(-(kernel_size // 2), kernel_size // 2 + 1)
    q = np.zeros((*label_map.shape, num_classes), np.result_type(sigma, float))
    for pixel in np.ndindex(label_map.shape):
        votes = []
        for offset in itertools.product(reach, repeat=label_map.ndim):
            at = tuple(min(max(x + d, 0), n - 1) for x, d, n in zip(pixel, offset, label_map.shape, strict=True))
            if any(offset) and kept[at]:
                votes.append((label_map[at], np.exp(-sum(d * d for d in offset) / (2 * sigma**2))))
        votes = votes or [(label_map[pixel], 1.0)]
        q[(*pixel, label_map[pixel])] += 0.5
        for label, vote in votes:
            q[(*pixel, label)] += 0.5 * vote / sum(g for _, g in votes)
    return q


def teacher(logits: Array, temperature) -> Array:
    return normalized(np.exp(logits / temperature))
