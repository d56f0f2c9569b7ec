"""Values over bins and preferences by their definitions, in float64 NumPy: one example at a time, from the formulas.

`math.erfc` is real, so derivatives of the histogram are central differences of it; all else is analytic.
"""

import math
from itertools import pairwise

import numpy as np


def atoms(low, high, num_bins):
    return np.array([low + (high - low) * i / (num_bins - 1) for i in range(num_bins)])


def edges_between(z):
    inner = [(a + b) / 2 for a, b in pairwise(z)]
    return np.array([2 * z[0] - inner[0], *inner, 2 * z[-1] - inner[-1]])


def normal_mass(a, b):
    """P(a < x < b) of a standard normal, from the tail that holds both."""
    if a > 0:
        return (math.erfc(a / math.sqrt(2)) - math.erfc(b / math.sqrt(2))) / 2
    if b < 0:
        return normal_mass(-b, -a)
    return 1 - (math.erfc(-a / math.sqrt(2)) + math.erfc(b / math.sqrt(2))) / 2


def hl_gauss(t, z, edges, sigma_ratio, padding=0):
    t = min(max(t, z[padding]), z[len(z) - 1 - padding])
    sigma = sigma_ratio * (edges[-1] - edges[0]) / len(z)
    p = np.array([normal_mass((a - t) / sigma, (b - t) / sigma) for a, b in pairwise(edges)])
    return p / p.sum()


def hl_gauss_slope(t, *args):
    """∂p/∂t."""
    h = 1e-6
    return (hl_gauss(t + h, *args) - hl_gauss(t - h, *args)) / (2 * h)


def two_hot(t, z):
    """Each atom's share falls linearly to 0 at its neighbours."""
    t = min(max(t, z[0]), z[-1])
    q = np.zeros(len(z))
    for i in range(len(z)):
        if i and z[i - 1] < t <= z[i]:
            q[i] = (t - z[i - 1]) / (z[i] - z[i - 1])
        if i + 1 < len(z) and z[i] <= t < z[i + 1]:
            q[i] = (z[i + 1] - t) / (z[i + 1] - z[i])
    if t == z[0]:
        q[0] = 1.0
    return q


def categorical(returns, probs, z):
    return sum(p * two_hot(t, z) for t, p in zip(returns, probs, strict=True))


def log_sigmoid(h):
    return -np.log1p(np.exp(-h)) if h.real > -30 else h - np.log1p(np.exp(h))


def preference(h, epsilon):
    """−(1−ε) log σ(h) − ε log σ(−h)."""
    return -(1 - epsilon) * log_sigmoid(h) - epsilon * log_sigmoid(-h)


def exo_pair(h, epsilon):
    """KL of (σ(h), σ(−h)) to (1 − ε, ε)."""
    won, lost = np.exp(log_sigmoid(h)), np.exp(log_sigmoid(-h))
    return won * (log_sigmoid(h) - np.log(1 - epsilon)) + lost * (log_sigmoid(-h) - np.log(epsilon))


def ipo(h, epsilon, beta=0.1):
    """Of h, already times β."""
    return (1 - epsilon) * (h / beta - 1 / (2 * beta)) ** 2 + epsilon * (-h / beta - 1 / (2 * beta)) ** 2


def robust(h, epsilon):
    """The unbiased estimate: what a flipped and an unflipped pair cost, weighed so that flips cancel."""
    return ((1 - epsilon) * -log_sigmoid(h) - epsilon * -log_sigmoid(-h)) / (1 - 2 * epsilon)


def sequence_log_probability(logits, labels, where):
    total = 0.0
    for z, y, counts in zip(logits, labels, where, strict=True):
        if counts:
            total += z[y] - z.max() - np.log(np.exp(z - z.max()).sum())
    return total
