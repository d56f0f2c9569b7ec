"""Reinforcement learning from comparisons: which of two answers is better, when some of the comparisons are wrong.

A comparison is a binary label, and a loss here is `sigmoid_cross_entropy` of a difference of rewards, or a cousin of it
(`exo_pair`, `ipo`). With ε as the share of flipped pairs, smoothing by ε makes it conservative, and by −ε/(1−2ε)
unbiased. Policies are in `policies.py`.
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
