"""The definition, in float64 NumPy: −Σ_k q_k log p_k, written from the formulas and not from the library.

One example at a time over K classes; `losses` loops over a batch. All of it is analytic in the logits, ε, priors and
weights, so that `gradient` differentiates the definition itself, to 16 digits and by no formula of ours.
"""

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def log_sum_exp(z: Array) -> complex:
    top = z.real.max()
    return top + np.log(np.sum(np.exp(z - top)))


def log_softmax(z: Array, exists: Array | None = None) -> Array:
    """log p of the classes that exist; −inf for the others."""
    exists = np.ones(len(z), bool) if exists is None else exists
    out = np.full(z.shape, -np.inf, z.dtype)
    out[exists] = z[exists] - log_sum_exp(z[exists])
    return out


def one_hot(label: int, num_classes: int) -> Array:
    """δ_y; NaN everywhere for a label that names no class."""
    if not 0 <= label < num_classes:
        return np.full(num_classes, np.nan)
    return (np.arange(num_classes) == label).astype(float)


def sparse(indices: Array, weights: Array, num_classes: int) -> Array:
    q = np.zeros(num_classes, weights.dtype)
    for index, weight in zip(indices, weights, strict=True):
        q[index] += weight
    return q


def uniform(num_classes: int, exists: Array | None = None) -> Array:
    exists = np.ones(num_classes, bool) if exists is None else exists
    return exists / exists.sum()


def restrict(u: Array, exists: Array | None) -> Array:
    """u given that the class exists."""
    return u if exists is None else u * exists / np.sum(u * exists)


def others(label: int, epsilon: complex, u: Array, exists: Array | None = None) -> Array:
    """Exactly 1 − ε on the label; ε over the others as u shares it among them, or equally if u gives them nothing."""
    rest = np.ones(len(u)) if exists is None else exists.astype(float)
    rest[label] = 0
    if rest.sum() == 0:
        return one_hot(label, len(u))
    shares = u * rest if np.sum(u * rest) != 0 else rest
    q = epsilon * shares / np.sum(shares)
    q[label] = 1 - epsilon
    return q


def smooth(
    hard: Array | int, epsilon: complex, num_classes: int, *, prior=None, spread="all", exists: Array | None = None
) -> Array:
    """(1 − ε) δ_y + ε u. A soft label is a mixture of hard ones, and is smoothed as such."""
    hard = one_hot(hard, num_classes) if np.ndim(hard) == 0 else hard
    u = uniform(num_classes, exists) if prior is None else restrict(prior, exists)
    if spread == "all":
        return (1 - epsilon) * hard + epsilon * u
    rows = (share * others(label, epsilon, u, exists) for label, share in enumerate(hard) if share != 0)
    return sum(rows, np.zeros(num_classes))


def cross_entropy(
    z: Array, q: Array, *, exists: Array | None = None, class_weights: Array | None = None, z_loss=0.0, relative=False
) -> complex:
    """−Σ_k q_k w_k log p_k over the classes that exist and have mass; `relative` to the entropy of q w."""
    q = q if exists is None else np.where(exists, q, 0)
    q = q if class_weights is None else q * class_weights
    log_p = log_softmax(z, exists)
    has_mass = q != 0
    total = -np.sum(q[has_mass] * log_p[has_mass])
    if relative:
        total += np.sum(q[has_mass] * np.log(q[has_mass]))
    kept = z if exists is None else z[exists]
    return total + z_loss * log_sum_exp(kept) ** 2


def sigmoid_cross_entropy(z: Array, labels: Array, epsilon: Array, prior: Array) -> Array:
    """−q log σ(z) − (1 − q) log σ(−z), element by element, q = (1 − ε) y + ε · prior."""
    q = (1 - epsilon) * labels + epsilon * prior
    return q * _softplus(-z) + (1 - q) * _softplus(z)


def _softplus(z: Array) -> Array:
    """log(1 + exp z) = −log σ(−z), without overflow."""
    return np.maximum(z.real, 0) + np.log(np.exp(-np.maximum(z.real, 0)) + np.exp(z - np.maximum(z.real, 0)))


def pick(x, example: tuple[int, ...], event: int = 0):
    """What one example sees of `x`: all of it where its shape is that of a single example, with `event` axes."""
    return x if x is None or np.ndim(x) == event else x[example]


def losses(
    z: Array,
    labels: Array,
    epsilon,
    *,
    prior=None,
    spread="all",
    class_where=None,
    where=None,
    ignore_index=None,
    class_weights=None,
    z_loss=0.0,
) -> Array:
    """Smoothed cross-entropy of each example, classes last; 0 for those that do not count."""
    out = np.zeros(z.shape[:-1], complex)
    for i in np.ndindex(out.shape):
        dropped = ignore_index is not None and labels[i] == ignore_index
        if dropped or (where is not None and not where[i]):
            continue
        exists = pick(class_where, i, 1)
        q = smooth(labels[i], pick(epsilon, i), z.shape[-1], prior=pick(prior, i, 1), spread=spread, exists=exists)
        out[i] = cross_entropy(z[i], q, exists=exists, class_weights=class_weights, z_loss=z_loss)
    return out if any(map(np.iscomplexobj, (z, labels, epsilon, prior, class_weights, z_loss))) else out.real


def gradient(f: Callable[[Array], complex], x) -> Array:
    """∂f/∂x by the complex step, Im f(x + ih) / h: no difference is taken, so no digits are lost."""
    x = np.array(x, complex)
    out = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        moved = x.copy()
        moved[i] += 1e-30j
        out[i] = np.imag(f(moved)) / 1e-30
    return out


def gradient_by_class(f: Callable[[Array], Array], x: Array) -> Array:
    """∂f_i/∂x_ik, where each example's f_i sees its own x_i alone: one step moves class k of all of them."""
    out = np.zeros(x.shape)
    for k in range(x.shape[-1]):
        moved = x.astype(complex)
        moved[..., k] += 1e-30j
        out[..., k] = np.imag(f(moved)) / 1e-30
    return out
