"""Reinforcement learning: a scalar return -> q over bins, and back. The loss is `cross_entropy(logits, q)`.

A `Support` has atoms, the values that bins stand for, and edges, where one bin ends and the next begins. `two_hot` and
`categorical_projection` share mass among atoms, `hl_gauss` among bins, and `expected_value` reads all three by atoms.
"""

from jax_ls.values.projections import categorical_projection, expected_value, hl_gauss, two_hot
from jax_ls.values.support import Support
from jax_ls.values.transforms import signed_hyperbolic, signed_parabolic, symexp, symlog

__all__ = [
    "Support",
    "categorical_projection",
    "expected_value",
    "hl_gauss",
    "signed_hyperbolic",
    "signed_parabolic",
    "symexp",
    "symlog",
    "two_hot",
]
