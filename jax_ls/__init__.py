"""Label smoothing for JAX: targets, losses and reductions as pure functions.

A `Raises` section names what a caller can do wrong in that function. What all functions refuse is in docs/errors.md.
`jax_ls.nnx` and `jax_ls.plotting` are loaded when they are first used, for they need packages that the others do not.
"""

import importlib as _importlib
import typing as _typing

from jax_ls import (
    adaptive,
    calibration,
    compat,
    mixing,
    noise,
    online,
    penalties,
    preferences,
    priors,
    schedules,
    sweeps,
    values,
)
from jax_ls.linear import chunked_loss, linear_cross_entropy
from jax_ls.logits import Logits, on_logits
from jax_ls.losses import (
    LossParts,
    cross_entropy,
    kl_divergence,
    sigmoid_cross_entropy,
    smoothed_cross_entropy,
    with_label_smoothing,
)
from jax_ls.reductions import mean, reduce
from jax_ls.sequences import smoothed_ctc_loss
from jax_ls.smoothing import smooth, smooth_binary_labels, smooth_labels
from jax_ls.targets import Dense, OneHot, Rows, Sparse, Target, Uniform
from jax_ls.variants import asymmetric_loss, bi_tempered_loss, focal_loss, logit_norm_loss, poly_loss

if _typing.TYPE_CHECKING:
    from jax_ls import nnx as nnx
    from jax_ls import plotting as plotting

__version__ = "0.1.0"

__all__ = [
    "Dense",
    "Logits",
    "LossParts",
    "OneHot",
    "Rows",
    "Sparse",
    "Target",
    "Uniform",
    "adaptive",
    "asymmetric_loss",
    "bi_tempered_loss",
    "calibration",
    "chunked_loss",
    "compat",
    "cross_entropy",
    "focal_loss",
    "kl_divergence",
    "linear_cross_entropy",
    "logit_norm_loss",
    "mean",
    "mixing",
    "noise",
    "on_logits",
    "online",
    "penalties",
    "poly_loss",
    "preferences",
    "priors",
    "reduce",
    "schedules",
    "sigmoid_cross_entropy",
    "smooth",
    "smooth_binary_labels",
    "smooth_labels",
    "smoothed_cross_entropy",
    "smoothed_ctc_loss",
    "sweeps",
    "values",
    "with_label_smoothing",
]


def __getattr__(name: str) -> _typing.Any:
    if name in ("nnx", "plotting"):
        return _importlib.import_module(f"jax_ls.{name}")
    raise AttributeError(f"module 'jax_ls' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, without the files that they come from."""
    return sorted([*__all__, "nnx", "plotting", *(name for name in globals() if name.startswith("__"))])
