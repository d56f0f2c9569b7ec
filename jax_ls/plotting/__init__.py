"""Pictures of what smoothing does: targets, calibration, sweeps, clusters. They need the extra `jax_ls[plot]`.

Each takes the axes to draw on, or makes a figure, and returns the axes: titles, limits and scales remain yours. Arrays
are drawn as they are now, outside `jit`.
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
