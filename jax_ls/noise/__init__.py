"""Losses that correct for wrong labels, and the labels themselves: see `jax_ls.noise.labels` for how noise is told.

Those of `losses.py` know how labels go wrong, those of `robust.py` do not ask. All are `cross_entropy` of another
target, or a function of log p, so that what holds for it holds here.
"""

from jax_ls.noise.labels import disturb_labels, flip_labels, optimal_smoothing
from jax_ls.noise.losses import backward_correction, bootstrap, forward_correction, label_relaxation
from jax_ls.noise.robust import early_learning, generalized_cross_entropy, symmetric_cross_entropy

__all__ = [
    "backward_correction",
    "bootstrap",
    "disturb_labels",
    "early_learning",
    "flip_labels",
    "forward_correction",
    "generalized_cross_entropy",
    "label_relaxation",
    "optimal_smoothing",
    "symmetric_cross_entropy",
]
