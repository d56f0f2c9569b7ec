"""Trainings with many ε and seeds in one compiled program, and the table of their results."""

from jax_ls.sweeps.results import SweepResult
from jax_ls.sweeps.search import grid, log_uniform
from jax_ls.sweeps.sweep import sweep

__all__ = ["SweepResult", "grid", "log_uniform", "sweep"]
