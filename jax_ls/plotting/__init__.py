"""Charts of targets, calibration, sweeps and the penultimate layer. They need the extra `jax_ls[plot]`.

Each function takes the axes to draw on, or makes a figure, and returns the axes, whose titles, limits and scales you
may change. Call them outside `jit`, with concrete arrays.
"""

from jax_ls.plotting.charts import plot_confidence, plot_reliability, plot_sweep, plot_targets
from jax_ls.plotting.penultimate import penultimate_projection, plot_penultimate

__all__ = [
    "penultimate_projection",
    "plot_confidence",
    "plot_penultimate",
    "plot_reliability",
    "plot_sweep",
    "plot_targets",
]
