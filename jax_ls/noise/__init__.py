"""Losses that correct for wrong labels, and functions that make wrong labels.

There are two rates of noise: e (`flip_rate`) is the share of labels that are wrong, and α (`resample_rate`) the share
drawn anew from all classes, α = e K/(K−1). Each loss takes the options of `cross_entropy`, except `class_weights`.
`generalized_cross_entropy`, `symmetric_cross_entropy` and `early_learning` need no rate.
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
