"""Losses that correct for wrong labels, and functions that make wrong labels.

`jax_ls.noise.labels` defines the two rates of noise, e (`flip_rate`) and α (`resample_rate`). Each loss takes the
options of `cross_entropy`, except `class_weights`.
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
