"""Losses that correct for wrong labels, and the labels themselves: see `jax_ls.noise.labels` for how noise is told.

All are `cross_entropy`: of another target, or a function of −log p_y, so that what holds for it holds here.
"""

from jax_ls.noise.labels import disturb_labels, flip_labels, optimal_smoothing
from jax_ls.noise.losses import backward_correction, bootstrap, forward_correction, label_relaxation

__all__ = [
    "backward_correction",
    "bootstrap",
    "disturb_labels",
    "flip_labels",
    "forward_correction",
    "label_relaxation",
    "optimal_smoothing",
]
