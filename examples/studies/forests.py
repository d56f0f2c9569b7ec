"""Charts with a line for each method: means with their errors, and calibration before and after a temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tables import BLUE, VERMILION

Rows = Sequence[dict[str, Any]]
"""What `trials.row` gives, a dictionary for each method."""

SEEDS, BOTH = "± error over seeds", "± error over seeds and held-out images"


def numbers(rows: Rows, metric: str, factor: float, name: str = "mean") -> np.ndarray:
    """One number of a metric for each method; NaN for those that have none."""
    values = ((row[metric] or {}).get(name) for row in rows)
    return np.array([np.nan if x is None else x for x in values], float) * factor


def draw_means(axes: Any, rows: Rows, metric: str, factor: float, **style: Any) -> None:
    """A marker for each method: a thick line for the error over seeds, a thin one for both errors together.

    A metric without an error over digits has the thick line alone.
    """
    mean, over_seeds, over_digits = (
        numbers(rows, metric, factor, name) for name in ("mean", "standard_error", "over_digits")
    )
    height = np.arange(len(rows)) + style.pop("offset", 0.0)
    colour, label = style.setdefault("color", BLUE), style.pop("label", None)
    over_seeds = np.nan_to_num(over_seeds)
    if np.isfinite(over_digits).any():
        both = np.hypot(over_seeds, np.nan_to_num(over_digits))
        axes.errorbar(mean, height, xerr=both, fmt="none", ecolor=colour, elinewidth=1, capsize=3)
    axes.errorbar(mean, height, xerr=over_seeds, fmt="none", ecolor=colour, elinewidth=3.5, alpha=0.45)
    axes.plot(mean, height, **({"marker": "o", "ms": 6, "ls": "none", "label": label} | style))
    for y in height[~np.isfinite(mean)]:
        axes.annotate("diverged", (0.02, y), xycoords=("axes fraction", "data"), va="center", color=colour, fontsize=9)


def draw_calibration(axes: Any, rows: Rows) -> None:
    """ECE as trained, an open circle, and after temperature scaling, a square inside or beside it."""
    before, after = (numbers(rows, name, 100) for name in ("ece", "ece_scaled"))
    axes.hlines(np.arange(len(rows)), after, before, color="0.75", lw=1.5, zorder=0)
    style = {"color": VERMILION, "mfc": "none", "mew": 1.6, "ms": 8, "label": "as trained"}
    draw_means(axes, rows, "ece", 100, **style)
    draw_means(axes, rows, "ece_scaled", 100, marker="s", ms=4, label="after temperature scaling")
    axes.set_xlabel("ECE (%)")


def lay_out(axes: Any, names: Sequence[str] | None) -> None:
    """The first name on top. None leaves the names to the chart on the left."""
    if names is not None:
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def one_legend(figure: Any, panels: Sequence[Any], columns: int = 6) -> None:
    """Below all charts, each word once."""
    pairs = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels)
    shown = {name: handle for panel in pairs for handle, name in panel}
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=min(len(shown), columns), frameon=False
    )


def error_bars(axes: Any, *words: str) -> None:
    """Entries of the legend for the two kinds of lines, drawn nowhere."""
    for word in words:
        both = word == BOTH
        axes.plot([], [], color="0.35", lw=1 if both else 3.5, alpha=1 if both else 0.45, label=word)
