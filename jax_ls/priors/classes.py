"""u from counts of classes, their similarity, a tree of them or a teacher; mixtures of targets."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import Target
from jax_ls.class_axis import everywhere
from jax_ls.targets import Dense, as_target

__all__ = ["hierarchy", "logit_adjustment", "mix", "similarity", "teacher", "tree_distances", "unigram"]


def unigram(
    counts: ArrayLike,
    *,
    pseudo_count: ArrayLike = 1.0,
    temperature: ArrayLike = 1.0,
    class_where: ArrayLike | None = None,
) -> Array:
    """Returns u in proportion to how often each class occurs: u_k ∝ (count_k + pseudo_count)^(1/T).

    T → ∞ gives the uniform distribution.

    Args:
      counts: (K,) numbers ≥ 0, of any size. May be traced; negative ones then give NaN.
      pseudo_count: a number ≥ 0 that is added to each count, so that every class gets mass.
      temperature: T > 0, a number.
      class_where: boolean (K,), the classes that get mass: leave out padding and blanks.

    Returns:
      u, (K,); it sums to 1.

    Raises:
      ValueError: concrete counts that are negative, not finite or all 0, or T ≤ 0.

    Example:
      >>> from jax_ls import priors
      >>> print(priors.unigram(jnp.array([7, 1, 0]), pseudo_count=0))
      [0.875 0.125 0.   ]
      >>> priors.unigram(jnp.array([8, 3, 0]), temperature=2.0).round(4).tolist()
      [0.5, 0.3333, 0.1667]

    References:
      Pereyra et al., Regularizing Neural Networks by Penalizing Confident Output Distributions, 2017; the temperature:
      Meister et al., Generalized Entropy Regularization, 2020.
    """
    temperature = checks.as_scalar("temperature", checks.as_positive("temperature", temperature))
    n = _counted(counts, pseudo_count)
    if class_where is not None:
        n = jnp.where(checks.as_where("class_where", class_where, n.shape), n, 0)
    top = checks.as_positive("the largest of counts", jax.lax.stop_gradient(jnp.max(n)))
    # Relative to the largest count, so that no power overflows.
    share, power = n / top, 1 / temperature.astype(n.dtype)
    # 0 to a power has slope 0 in the power, not 0 · log 0, and 0, 1 or ∞ in the share; 1e30 stands for ∞.
    of_none = share * jax.lax.stop_gradient(jnp.where(power == 1, 1.0, jnp.where(power < 1, 1e30, 0.0)))
    weights = jnp.where(n == 0, of_none, jnp.where(n == 0, 1, share) ** power) + 0 * power  # 1 to the power NaN is 1
    return weights / jnp.sum(weights)


def logit_adjustment(
    counts: ArrayLike,
    *,
    strength: ArrayLike = 1.0,
    pseudo_count: ArrayLike = 0.0,
) -> Array:
    """Returns τ log π_k, π_k = N_k / Σ N: what is added to the logits in training on classes of unequal frequency.

    The loss of `logits + logit_adjustment(counts)` makes the plain logits rank classes as if they were equally
    frequent; keep the addition out of prediction. Or train plainly and subtract it there. Smooth adjusted logits
    towards π, `unigram(counts, pseudo_count=0)`, which is what they say at z = 0.

    Args:
      counts: N, (K,) numbers > 0, of any size. May be traced; NaN there if not positive.
      strength: τ, a number; 1 is the correction for the balanced error.
      pseudo_count: a number ≥ 0 added to each count, for classes without examples.

    Returns:
      An array (K,), in float32 or wider; `.astype(logits.dtype)` for logits in half precision.

    Raises:
      ValueError: counts that are negative or not finite, or 0 without a pseudo-count.

    Example:
      >>> from jax_ls import priors
      >>> priors.logit_adjustment(jnp.array([90, 10])).round(4).tolist()
      [-0.1054, -2.3026]

    References:
      Menon et al., Long-tail Learning via Logit Adjustment, 2021; Ren et al., Balanced Meta-Softmax, 2020.
    """
    n = checks.as_positive("counts", _counted(counts, pseudo_count))
    strength = checks.as_scalar("strength", checks.as_weight("strength", strength)).astype(n.dtype)
    top = jnp.max(n)
    return strength * (jnp.log(n / top) - jnp.log(jnp.sum(n / top)))


def similarity(
    embeddings: ArrayLike | None = None,
    *,
    confusion: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    metric: Literal["cosine", "dot"] = "cosine",
) -> Array:
    """Returns a table whose row y gives the mass to classes similar to y: softmax_k(s_yk / τ) over k ≠ y.

    s_yk is the similarity of the embeddings of y and k, or the share of label y that a confusion matrix says was
    predicted as k. Use it as `prior=Rows(table, labels)`. The diagonal is 0, so a label keeps exactly 1 − ε.

    Args:
      embeddings: real numbers (K, D), a row for each class: word vectors of the names, or columns of an output layer.
      confusion: counts or rates ≥ 0, (K, K), in place of embeddings; row y has label y. A row of zeros becomes uniform.
      temperature: τ > 0, a number. May be traced; NaN if not positive.
      metric: "cosine" or "dot", how embeddings are compared.

    Returns:
      A table (K, K); row y sums to 1.

    Raises:
      AssertionError: a confusion matrix that is not square, or K < 2.
      TypeError: `embeddings` and `confusion` are both given, or neither is.
      ValueError: negative confusion, τ ≤ 0, or an unknown `metric`.

    Example:
      >>> from jax_ls import priors
      >>> names = jnp.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
      >>> priors.similarity(names, temperature=0.5)[0].round(4).tolist()
      [0.0, 0.832, 0.168]

    References:
      Liu and JaJa, Class-Similarity Based Label Smoothing for Confidence Calibration, 2021.
    """
    if (embeddings is None) == (confusion is None):
        raise TypeError("embeddings, confusion: expected one of the two")
    checks.check_option("metric", metric, ("cosine", "dot"))
    temperature = checks.as_scalar("temperature", checks.as_positive("temperature", temperature))
    scores = _similarities(embeddings, metric) if confusion is None else _confusion_rates(confusion)
    size = scores.shape[0]
    checks.assert_shape("embeddings or confusion", scores, [(max(size, 2),) * 2], "two classes or more")
    others = ~np.eye(size, dtype=bool)
    # Relative to the most similar class, so that no small τ overflows.
    below = scores - jnp.max(scores, axis=-1, keepdims=True, where=others, initial=-jnp.inf)
    return jax.nn.softmax(below / temperature.astype(scores.dtype), axis=-1, where=others)


def hierarchy(distances: ArrayLike, *, beta: ArrayLike) -> Array:
    """Returns a table whose row y falls with the distance d_yk in a tree of classes: ∝ exp(−β d_yk / d_max).

    Use it as `prior=Rows(table, labels)`; the paper has ε = 1.

    Args:
      distances: d, numbers ≥ 0, (K, K), for example from `tree_distances`.
      beta: β ≥ 0, a number: 0 is uniform, ∞ is one-hot, and the paper has 4 to 30. May be traced; NaN if negative.

    Returns:
      A table (K, K); row y sums to 1.

    Raises:
      ValueError: concrete distances that are negative or not finite, or a concrete β < 0.

    Example:
      >>> from jax_ls import priors
      >>> tree = priors.tree_distances([3, 3, 4, 4, -1])
      >>> priors.hierarchy(tree, beta=2.0)[0].round(4).tolist()
      [0.6652, 0.2447, 0.09]

    References:
      Bertinetto et al., Making Better Mistakes: Leveraging Class Hierarchies with Deep Networks, 2020.
    """
    d = _square("distances", checks.as_amount("distances", distances))
    beta = checks.as_scalar("beta", checks.as_amount("beta", beta))
    farthest = jnp.max(d, initial=0)
    # If all distances are 0, d_max is 0 too.
    return jax.nn.softmax(-beta.astype(d.dtype) * d / jnp.where(farthest == 0, 1, farthest), axis=-1)


def tree_distances(parents: Any) -> np.ndarray:
    """Returns d_yk, the height of the lowest common ancestor of classes y and k in a tree.

    The height of a node is the number of edges to its deepest leaf. d_yy is 0. If y and k have only the root in common,
    d_yk is the height of the tree.

    Args:
      parents: static integers (n,): the parent of each node, and −1 for the root. The leaves are the classes, in the
        order of their numbers. If the leaves have the lowest numbers, class k is node k.

    Returns:
      NumPy integers (K, K), for `hierarchy`.

    Raises:
      TypeError: traced parents.
      ValueError: a cycle, no root or several roots, or a parent that is no node.

    Example:
      >>> from jax_ls import priors
      >>> priors.tree_distances([3, 3, 4, 4, -1]).tolist()  # ((0 1) 2)
      [[0, 1, 2], [1, 0, 2], [2, 2, 0]]

    References:
      Bertinetto et al., Making Better Mistakes: Leveraging Class Hierarchies with Deep Networks, 2020.
    """
    if isinstance(parents, Tracer):
        raise TypeError("parents: expected static integers, got a traced array")
    try:
        parent_of = np.asarray(parents)
    except ValueError as error:
        raise TypeError(f"parents: expected integers (n,), got {parents!r}") from error
    if parent_of.size == 0 or parent_of.dtype.kind not in "iufb":
        raise ValueError(f"parents: expected integers (n,), one a node, got {parents!r}")
    checks.assert_rank("parents", jnp.asarray(parent_of), 1, "(n,), the parent of each node")
    checks.assert_kind("parents", jnp.asarray(parent_of), int, "integers (n,)")
    if np.any((parent_of < -1) | (parent_of >= len(parent_of))):
        raise ValueError(
            f"parents: expected nodes 0 to {len(parent_of) - 1}, or -1 for the root, got {parent_of.tolist()}"
        )
    paths = [_path(parent_of, node) for node in range(len(parent_of))]
    if np.sum(parent_of == -1) != 1:
        raise ValueError(f"parents: expected one root, -1, got {np.sum(parent_of == -1)}")
    leaves = np.setdiff1d(np.arange(len(parent_of)), parent_of)
    height = np.zeros(len(parent_of), int)
    for leaf in leaves:
        for steps, node in enumerate(reversed(paths[leaf])):
            height[node] = max(height[node], steps)
    # Go down from the root. The last node that two paths share is their lowest common ancestor.
    distances = np.full((len(leaves), len(leaves)), height[paths[0][0]])
    for depth in range(max(map(len, paths))):
        at = np.array([paths[leaf][depth] if depth < len(paths[leaf]) else -1 for leaf in leaves])
        shared = (at[:, None] == at) & (at >= 0)
        distances[shared] = np.broadcast_to(height[at], shared.shape)[shared]
    return distances


def teacher(logits: ArrayLike, *, temperature: ArrayLike = 1.0) -> Dense:
    """Returns another model's predictions softmax(z / T) as a target for distillation, constant for differentiation.

    `smooth(labels, α, prior=teacher(z))` mixes them with the labels.

    Args:
      logits: z, real numbers (*batch, K).
      temperature: T > 0, a number. May be traced; NaN if not positive.

    Returns:
      A `Dense` target, in float32 or wider.

    Raises:
      ValueError: a concrete T ≤ 0.

    Example:
      >>> from jax_ls import priors
      >>> priors.teacher(jnp.log(jnp.array([[16.0, 1.0, 1.0]])), temperature=2.0).probs(3).round(4).tolist()
      [[0.6667, 0.1667, 0.1667]]

    References:
      Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015.
    """
    z = jax.lax.stop_gradient(checks.as_class_values("logits", logits))
    temperature = checks.as_scalar("temperature", checks.as_positive("temperature", temperature))
    # Relative to the largest logit, so that no small T overflows.
    below = z - jnp.max(z, axis=-1, keepdims=True)
    return Dense(jax.nn.softmax(below / temperature.astype(z.dtype), axis=-1))


def mix(target_a: Any, target_b: Any, lam: ArrayLike) -> Target:
    """Returns the mixture λ a + (1 − λ) b, for mixup, and for CutMix with λ the share of the area.

    Smoothing before or after mixing gives the same q.

    Args:
      target_a, target_b: a and b: integers (*batch,), probabilities, or any `Target`.
      lam: λ, () or (*batch,).

    Returns:
      A `Target`.

    Example:
      >>> from jax_ls import priors
      >>> labels = jnp.array([0, 2])
      >>> print(priors.mix(labels, labels[::-1], jnp.array([0.75, 0.5])).probs(3))
      [[0.75 0.   0.25]
       [0.5  0.   0.5 ]]

    References:
      Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018; Yun et al., CutMix, 2019.
    """
    lam, a, b = checks.as_weight("lam", lam), as_target(target_a, "target_a"), as_target(target_b, "target_b")
    batch = a.batch_shape() or b.batch_shape()
    if batch is not None:
        checks.assert_shape("lam", lam, [(), batch], "{shapes}, the shape of the batch")
        if (other := b.batch_shape()) not in (None, batch):
            raise ValueError(f"target_b: expected a target of {batch}, as target_a is, got one of {other}")
    return lam * a + (1 - lam) * b


def _counted(counts: Any, pseudo_count: Any) -> Array:
    """Counts (K,), each with the pseudo-count added to it."""
    if not isinstance(counts, Array) and np.issubdtype(np.asarray(counts).dtype, np.integer):
        counts = np.asarray(counts, float)  # words are counted past 2³¹
    n = checks.as_amount("counts", counts)
    checks.assert_rank("counts", n, 1, "(K,), one number a class")
    if not n.size:
        raise ValueError(f"counts: expected at least one class, got {checks.describe(n)}")
    return n + checks.as_scalar("pseudo_count", checks.as_amount("pseudo_count", pseudo_count)).astype(n.dtype)


def _path(parent_of: np.ndarray, node: int) -> list[int]:
    """Returns the nodes on the path from the root to `node`."""
    path = [node]
    while (parent := int(parent_of[path[0]])) != -1:
        if parent in path:
            cycle = [*reversed(path[: path.index(parent) + 1]), parent]
            raise ValueError(f"parents: expected a tree, got the cycle {cycle}")
        path.insert(0, parent)
    return path


def _similarities(embeddings: Any, metric: str) -> Array:
    e = everywhere(checks.as_class_values("embeddings", embeddings))
    checks.assert_rank("embeddings", e, 2, "a matrix (K, D)")
    if metric == "cosine":
        squares = jnp.sum(jnp.square(e), axis=-1, keepdims=True)
        e = e * jax.lax.rsqrt(jnp.where(squares == 0, 1, squares))
    return jnp.matmul(e, e.T, precision=jax.lax.Precision.HIGHEST)


def _confusion_rates(confusion: Any) -> Array:
    counts = _square("confusion", checks.as_amount("confusion", confusion))
    total = jnp.sum(counts, axis=-1, keepdims=True)
    return counts / jnp.where(total == 0, 1, total)


def _square(name: str, x: Array) -> Array:
    checks.assert_rank(name, x, 2, "a matrix (K, K)")
    checks.assert_shape(name, x, [x.shape[:1] * 2], "a square matrix (K, K)")
    return x
