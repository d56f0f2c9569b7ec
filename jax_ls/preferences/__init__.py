"""Losses of comparisons between two answers, some of which may be flipped, and smoothed policies.

A comparison is a binary label, and each loss is `sigmoid_cross_entropy` of a difference of rewards, or a cousin
of it (`exo_pair`, `ipo`). If a share e of the
pairs is flipped, smoothing by e makes the loss conservative, and smoothing by −e/(1−2e) makes it unbiased.
"""

from jax_ls.preferences.losses import (
    Preference,
    bradley_terry,
    dpo,
    exo_pair,
    ipo,
    robust_dpo,
    robust_smoothing,
    sequence_log_probability,
)
from jax_ls.preferences.policies import dirichlet_noise, epsilon_greedy, smooth_policy

__all__ = [
    "Preference",
    "bradley_terry",
    "dirichlet_noise",
    "dpo",
    "epsilon_greedy",
    "exo_pair",
    "ipo",
    "robust_dpo",
    "robust_smoothing",
    "sequence_log_probability",
    "smooth_policy",
]
