"""Many ε, many seeds, one compiled program."""

from jax_ls.sweeps.results import SweepResult
from jax_ls.sweeps.search import grid, log_uniform
from jax_ls.sweeps.sweep import sweep

__all__ = ["SweepResult", "grid", "log_uniform", "sweep"]
