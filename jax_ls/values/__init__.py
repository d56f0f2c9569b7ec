"""Values in reinforcement learning: a scalar return -> q over bins, and back. The loss is `cross_entropy(logits, q)`.

A `Support` has atoms, the values that its bins stand for, and edges, the borders between bins. `two_hot` and
`categorical_projection` divide mass among atoms, and `hl_gauss` among bins. `expected_value` turns logits over bins
into the mean of the atoms.
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
