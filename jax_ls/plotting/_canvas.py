"""The style that all charts share, and the axes that they are drawn on."""

from __future__ import annotations

from typing import Any

import numpy as np

# Okabe and Ito's blue, vermilion, green and purple, which all common kinds of color vision can distinguish.
BLUE, VERMILION, GREEN, PURPLE = COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = ("o", "^", "s", "D")


def numbers(name: str, x: Any) -> Any:
    """Returns `x` as a NumPy array of real numbers."""
    try:
        return np.asarray(x, float)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected real numbers, got {x!r}") from error


def new_axes(ax: Any, size: tuple[float, float]) -> Any:
    """Returns `ax`, or the axes of a new figure of `size` inches."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('jax_ls.plotting: expected matplotlib; pip install "jax_ls[plot]" brings it') from error
    return pyplot.subplots(figsize=size, dpi=120, layout="constrained")[1] if ax is None else ax


def finish(axes: Any, **legend: Any) -> None:
    """Draws grid and legend in the shared style."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(edgecolor="none", framealpha=0.85, fontsize=8.5, title_fontsize=8.5, alignment="left", **legend)
