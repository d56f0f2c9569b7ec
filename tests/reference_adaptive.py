"""Adaptive and online smoothing by definition, in float64 NumPy: one example at a time, written from the formulas."""

import numpy as np
import reference


def belief(z, exists=None):
    """p over the classes that exist; 0 for the others."""
    return np.exp(reference.log_softmax(z, exists))


def confidence(z, y, epsilon, exists=None, gamma=1.0):
    return epsilon * belief(z, exists)[y] ** gamma


def uncertainty(z, y, epsilon, exists=None):
    p = belief(z, exists)
    return epsilon * (p.sum() - p[y])


def margin(z, y, epsilon, exists=None):
    p = belief(z, exists)
    rivals = np.delete(p, y)
    return epsilon * max(0, p[y] - max(rivals, default=0))


def entropy(z, y, epsilon, exists=None):
    del y
    p = belief(z, exists)
    size = len(p) if exists is None else exists.sum()
    if size == 1:
        return epsilon
    return epsilon * (1 + np.sum(p[p > 0] * np.log(p[p > 0])) / np.log(size))


RULES = {"confidence": confidence, "uncertainty": uncertainty, "margin": margin, "entropy": entropy}


def each(rule, z, y, epsilon, *, class_where=None, where=None, **options):
    """A rule for every example of a batch, classes last; 0 for those that do not count."""
    out = np.zeros(z.shape[:-1], np.result_type(z, epsilon, *options.values()))
    for i in np.ndindex(out.shape):
        if where is None or where[i]:
            own = {name: reference.pick(x, i) for name, x in options.items()}
            out[i] = rule(z[i], y[i], reference.pick(epsilon, i), reference.pick(class_where, i, 1), **own)
    return out


def beta(draws, averaged, epsilon, where):
    """Of the examples that count, the k-th least believed gets the k-th smallest draw b, and ε (1 − b)."""
    out = np.zeros(len(averaged))
    counted = [i for i in range(len(averaged)) if where[i]]
    by_belief = sorted(counted, key=lambda i: averaged[i])
    for i, b in zip(by_belief, sorted(draws[j] for j in counted), strict=True):
        out[i] = epsilon * (1 - b)
    return out


def controller(batches, *, initial, low, high, rate, decay):
    """ε and the running gap after each batch of (logits, labels, where)."""
    epsilon, gap, history = initial, 0.0, []
    for z, y, where in batches:
        counted = [i for i in np.ndindex(y.shape) if where[i]]
        if counted:
            surplus = [belief(z[i]).max() - (np.argmax(z[i]) == y[i]) for i in counted]
            gap = decay * gap + (1 - decay) * sum(surplus) / len(surplus)
            epsilon = min(max(epsilon + rate * gap, low), high)
        history.append((epsilon, gap))
    return history


def online_epoch(matrix, batches):
    """The matrix after an epoch of batches of (logits, labels, where); a row of zeros, not learned yet, gets 1/K."""
    size = len(matrix)
    new = np.where(np.any(matrix != 0, axis=1, keepdims=True), matrix, 1 / size)
    for k in range(size):
        beliefs = [
            belief(z[i])
            for z, y, where in batches
            for i in np.ndindex(y.shape)
            if where[i] and y[i] == k and np.argmax(z[i]) == k
        ]
        if beliefs:
            new[k] = np.mean(beliefs, axis=0)
    return new


def online_average(matrix, batches, decay):
    """The matrix as a running mean over batches."""
    for batch in batches:
        seen = online_epoch(np.full_like(matrix, np.nan), [batch])
        matrix = np.where(np.isnan(seen), matrix, decay * matrix + (1 - decay) * seen)
    return matrix
