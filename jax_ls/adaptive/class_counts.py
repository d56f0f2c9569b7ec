"""ε by how often the class of the label occurs."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.class_axis import everywhere, look_up

__all__ = ["label_aware"]

SHAPES = {
    "sine": lambda x: jnp.sin(jnp.pi / 2 * x),
    "linear": lambda x: x,
    "quadratic": jnp.square,
    "cosine": lambda x: 1 - jnp.cos(jnp.pi / 2 * x),
}


def label_aware(
    labels: ArrayLike,
    counts: ArrayLike,
    head: ArrayLike = 0.3,
    tail: ArrayLike = 0.0,
    *,
    shape: Literal["sine", "linear", "quadratic", "cosine"] = "sine",
) -> Array:
    """Returns ε by class frequency: the labels of frequent classes are smoothed most, those of rare ones least.

    ε_k = ε_tail + (ε_head − ε_tail) f(x_k), x_k = (N_k − N_min) / (N_max − N_min). If all classes are equally frequent,
    x_k = 1. On long tails a model is surest of the head. With `logits + priors.logit_adjustment(counts)` the prior has
    to be the class frequencies, `priors.unigram(counts, pseudo_count=0)`: a uniform one undoes the adjustment.

    Args:
      labels: y, integers (*batch,).
      counts: N, (K,) numbers ≥ 0, whole even where classes are split over devices.
      head, tail: ε_head ≥ ε_tail, numbers.
      shape: f. "sine", sin(π x / 2), rises early; "cosine", 1 − cos(π x / 2), late: the concave and the convex form of
        the paper. "linear", x, and "quadratic", x², lie between.

    Returns:
      ε of each example, (*batch,), in float32 or wider; NaN for a label that names no class, and for all where traced
      counts or ε are out of range.

    Raises:
      ValueError: counts that are negative or not finite, ε_head < ε_tail, an unknown `shape`.

    Example:
      >>> from jax_ls import adaptive
      >>> adaptive.label_aware(jnp.array([0, 1, 2]), jnp.array([1000, 505, 10]), 0.4, 0.1).round(4).tolist()
      [0.4, 0.3121, 0.1]

    References:
      Zhong et al., Improving Calibration for Long-Tailed Recognition, 2021. The paper writes spread="others", its code
      spread="all".
    """
    checks.check_option("shape", shape, tuple(SHAPES))
    y = checks.as_labels("labels", labels)
    n = everywhere(checks.as_amount("counts", counts))
    checks.assert_rank("counts", n, 1, "(K,), one number a class")
    head, tail = (checks.as_scalar(name, checks.as_weight(name, x)) for name, x in (("head", head), ("tail", tail)))
    n, head, tail = checks.same_dtype(n, head, tail)
    if not isinstance(head, Tracer) and not isinstance(tail, Tracer) and not np.all(head >= tail):
        raise ValueError(f"head: expected at least tail, {tail}, got {head}")
    low, high = jnp.min(n), jnp.max(n)
    place = jnp.where(high > low, (n - low) / jnp.where(high > low, high - low, 1), 1) + 0 * n
    table = tail + jnp.where(head >= tail, head - tail, jnp.nan) * SHAPES[shape](place)
    return jnp.where((y >= 0) & (y < n.size), look_up(table, y), jnp.nan)
