"""Charts of targets, calibration, confidence and sweeps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import Target
from jax_ls.calibration.reliability import Reliability
from jax_ls.plotting._canvas import BLUE, COLORS, MARKERS, VERMILION, finish, new_axes, numbers
from jax_ls.sweeps.results import SweepResult
from jax_ls.targets import as_target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_confidence", "plot_reliability", "plot_sweep", "plot_targets"]


# The most rows or columns of a heat map whose cells have room for their numbers.
MOST_WRITTEN = 12


def plot_targets(
    target: Target | ArrayLike,
    num_classes: int | None = None,
    *,
    rows: Sequence[object] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws targets as a heat map: a row for each example, a column for each class, with numbers if they fit.

    Args:
      target: a `Target` of (N,) examples, probabilities (N, K), or integers (N,).
      num_classes: K; not needed for probabilities.
      rows: (N,) names of the rows, such as the labels; their numbers if None.
      ax: matplotlib axes to draw on; a new figure if None.

    Returns:
      The axes.

    Raises:
      AssertionError, ValueError: a target without examples, or of examples that are not (N,).
      ImportError: matplotlib is missing.
      ValueError: `rows` that are not N names.

    Example:
      >>> from jax_ls import plotting
      >>> plotting.plot_targets(smooth(jnp.arange(5), 0.1), 5).get_xlabel()
      'class $k$'
    """
    if not isinstance(target, Target):
        given: Any = np.asarray(target)
        if jnp.issubdtype(given.dtype, jnp.floating):
            checks.assert_rank("target", given, 2, "probabilities (N, K)")
            num_classes = given.shape[1] if num_classes is None else num_classes
    q = numbers("target", as_target(target).probs(checks.check_size("num_classes", num_classes)))
    checks.assert_rank("target", q, 2, "targets of (N,) examples")
    if not len(q):
        raise ValueError(f"target: expected at least one example, got {checks.describe(q)}")
    if rows is not None and len(rows) != len(q):
        raise ValueError(f"rows: expected {len(q)} names, got {rows!r}")
    axes = new_axes(ax, (1.5 + 0.45 * min(q.shape[1], 10), 0.9 + 0.4 * min(q.shape[0], 10)))
    # A label that names no class has a row of NaN, which stays white.
    shown = q[np.isfinite(q)]
    image = axes.imshow(q, cmap="cividis", vmin=shown.min(initial=0), vmax=shown.max(initial=0), aspect="auto")
    if max(q.shape) <= MOST_WRITTEN:
        middle = (image.norm.vmin + image.norm.vmax) / 2
        for (row, column), value in np.ndenumerate(q):
            ink = "white" if value <= middle else "black"
            axes.text(column, row, _without_zero(value), ha="center", va="center", color=ink, fontsize=7.5)
        axes.set(xticks=range(q.shape[1]), yticks=range(q.shape[0]))
    if rows is not None:
        axes.set_yticks(range(q.shape[0]), [str(row) for row in rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(title="Smoothed targets", xlabel="class $k$", ylabel="example" if rows is None else "label $y$")
    axes.figure.colorbar(image, ax=axes, label="target probability $q_k$")
    return axes


def plot_reliability(bins: Reliability, *, ax: Axes | None = None) -> Axes:
    """Draws accuracy against confidence: each bin's gap from the diagonal, and above it the bin's count, logarithmic.

    Args:
      bins: the result of `calibration.reliability`.
      ax: matplotlib axes to draw on; a new figure if None. The counts are drawn in axes of their own above.

    Returns:
      The axes.

    Raises:
      AssertionError: the bins of several classes or models.
      ImportError: matplotlib is missing.

    Example:
      >>> from jax_ls import calibration, plotting
      >>> bins = calibration.reliability(jnp.array([[2.0, 0.0]]), jnp.array([0]))
      >>> plotting.plot_reliability(bins).get_ylabel()
      'accuracy'

    References:
      Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    edges, count, confidence, accuracy = _arrays_of(bins)
    axes = new_axes(ax, (4.6, 5.6))
    full = (count > 0) & (np.diff(edges) > 0)
    left, width = edges[:-1][full], np.diff(edges)[full]
    confidence, accuracy = confidence[full], accuracy[full]
    box = {"width": width, "align": "edge"}
    axes.bar(left, accuracy, **box, color=BLUE, edgecolor="white", lw=0.8, label="accuracy")
    # An outline: the bar of an underconfident bin lies behind its gap, and is to be seen whole.
    gap = {"facecolor": "none", "edgecolor": VERMILION, "hatch": "////", "lw": 0.8, "label": "gap to confidence"}
    axes.bar(left, confidence - accuracy, **box, bottom=accuracy, **gap)
    axes.plot([0, 1], [0, 1], ":", color="0.25", lw=1.4, label="calibrated")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    error, excess = float(bins.error()), float(bins.overconfidence)
    sense = "over" if excess > 0 else "under"
    title = _missing(bins) or f"ECE {error:.1%}; {sense}confident by {abs(excess):.1%}"
    finish(axes, title=title, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    _counts(axes, left, width, count[full])
    return axes


def plot_confidence(
    bins: Reliability, *, label: str | None = None, color: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draws a histogram of confidence, its mean (dashed) and the accuracy (solid).

    Several models may be drawn on the same axes. Each has a color and a marker of its own.

    Args:
      bins: the result of `calibration.reliability`; with `num_bins=50` the histogram shows more detail.
      label: name of the model in the legend.
      color: a matplotlib color; the next of a color-blind safe palette if None.
      ax: matplotlib axes to draw on; a new figure if None.

    Returns:
      The axes.

    Raises:
      AssertionError: the bins of several classes or models.
      ImportError: matplotlib is missing.

    Example:
      >>> from jax_ls import calibration, plotting
      >>> bins = calibration.reliability(jnp.array([[2.0, 0.0]]), jnp.array([0]))
      >>> plotting.plot_confidence(bins, label="plain").get_xlabel()
      'confidence'

    References:
      Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    edges, count, _, _ = _arrays_of(bins)
    axes = new_axes(ax, (5.2, 3.6))
    models = len(axes.patches) // 2
    color, marker = color or COLORS[models % len(COLORS)], MARKERS[models % len(MARKERS)]
    total = max(count.sum(), 1)
    axes.stairs(count / total, edges, fill=True, color=color, alpha=0.3, lw=0)
    mean, right = float(np.sum(bins.confidence_sum)) / total, float(np.sum(bins.correct)) / total
    name = "" if label is None else f"{label}: "
    axes.stairs(count / total, edges, color=color, lw=1.4)
    missing = _missing(bins)
    if missing:
        axes.plot([], [], color=color, marker=marker, lw=1.6, label=f"{name}{missing}")
    else:
        # From the bottom of the axes to the top, where the marker is.
        style = {
            "transform": axes.get_xaxis_transform(),
            "color": color,
            "marker": marker,
            "mfc": "none",
            "ms": 8,
            "markevery": [1],
        }
        for x, line, text in ((mean, "--", "mean confidence"), (right, "-", "accuracy")):
            axes.plot([x, x], [0, 1], ls=line, lw=1.6, label=f"{name}{text} {x:.1%}", clip_on=False, **style)
    axes.set(xlabel="confidence", ylabel="share of the predictions", xlim=(0, 1))
    finish(axes)
    return axes


def plot_sweep(
    result: SweepResult, metric: str | None = None, *, label: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draws a metric against ε: mean over seeds, its standard error, a dot for each run, a ring around the best mean.

    Crosses on the ε axis say where runs diverged. The other runs of that ε make its mean.

    Args:
      result: the result of `sweeps.sweep` over one parameter, ε or another.
      metric: the name of a metric with one number per run. If None, `result.metric`, or the only such metric.
        The ring, around `result.best`, is drawn only for `result.metric`.
      label: name of the curve in the legend.
      ax: matplotlib axes to draw on, which may hold other curves; a new figure if None.

    Returns:
      The axes.

    Raises:
      ImportError: matplotlib is missing.
      ValueError: `result` is a sweep over several parameters, or has no such metric.

    Example:
      >>> from jax_ls import plotting, sweeps
      >>> train = lambda key, eps: {"loss": (eps - 0.2) ** 2}
      >>> result = sweeps.sweep(train, [0.0, 0.1, 0.2, 0.3], metric="loss", mode="min")
      >>> plotting.plot_sweep(result).get_ylabel()
      'loss'
    """
    parameter, metric = _names_of(result, metric)
    values, runs = result.points[parameter], np.asarray(result.metrics[metric], float)
    mean, error = result.mean(metric), np.nan_to_num(result.standard_error(metric))
    order = np.argsort(values)
    axes = new_axes(ax, (5.2, 3.6))
    color, marker = (options[len(axes.containers) % len(COLORS)] for options in (COLORS, MARKERS))
    name = label or ("mean ± standard error" if runs.shape[-1] > 1 else None)
    style = {"color": color, "marker": marker, "ms": 5, "capsize": 3, "lw": 1.4}
    axes.errorbar(values[order], mean[order], yerr=error[order], label=name, **style)
    if runs.shape[-1] > 1:
        axes.plot(
            values[order], np.where(np.isfinite(runs), runs, np.nan)[order], ".", color=color, alpha=0.5, ms=6, mew=0
        )
    lost = ~np.isfinite(runs).all(axis=-1)
    if lost.any():
        crosses = {"marker": "x", "ls": "none", "mew": 2, "ms": 8, "clip_on": False, "zorder": 3}
        text = f"{np.sum(~np.isfinite(runs))} runs diverged"
        axes.plot(
            values[lost], 0 * values[lost], transform=axes.get_xaxis_transform(), color=color, label=text, **crosses
        )
    best = result.best_index
    if metric == result.metric and best is not None:
        symbol = "ε" if parameter == "smoothing" else parameter
        text = f"best: {symbol} = {values[best]:.3g}, {mean[best]:.4g}"
        axes.plot(values[best], mean[best], "o", label=text, mfc="none", mec=color, mew=2, ms=13)
    axes.set(xlabel="smoothing ε" if parameter == "smoothing" else parameter, ylabel=metric)
    finish(axes)
    return axes


def _names_of(result: Any, metric: str | None) -> tuple[str, str]:
    """Returns the names of the parameter and the metric that `plot_sweep` draws."""
    if not isinstance(result, SweepResult):
        raise TypeError(f"result: expected a SweepResult, of sweeps.sweep, got {checks.describe(result)}")
    parameters = list(result.points)
    if len(parameters) != 1:
        raise ValueError(f"result: expected a sweep over one parameter, got {', '.join(parameters)}")
    numbers_a_run = [name for name, x in result.metrics.items() if x.ndim == 2]
    if metric is None:
        metric = numbers_a_run[0] if result.metric is None and len(numbers_a_run) == 1 else result.metric
    checks.check_option("metric", metric, numbers_a_run)
    return parameters[0], str(metric)


def _without_zero(value: float) -> str:
    """Returns a number in three digits without its leading zero: .25 for 0.25."""
    text = f"{value:.3f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else re.sub(r"^(-?)0\.", r"\1.", text)


def _missing(bins: Reliability) -> str:
    """Returns why there are no figures for the legend, or "" if there are."""
    if not np.sum(bins.count):
        return "no examples"
    return "confidence of NaN" if np.isnan(np.sum(bins.confidence_sum)) else ""


def _arrays_of(bins: Any) -> tuple[np.ndarray, ...]:
    """Returns edges, count, confidence and accuracy of the bins of one model."""
    if not isinstance(bins, Reliability):
        raise TypeError(f"bins: expected a Reliability, of calibration.reliability, got {checks.describe(bins)}")
    checks.assert_rank("bins", bins.count, 1, "the bins of one model, count (B,)")
    return tuple(np.asarray(x, float) for x in (bins.edges, bins.count, bins.confidence, bins.accuracy))


def _counts(axes: Any, left: np.ndarray, width: np.ndarray, count: np.ndarray) -> None:
    """Draws the count of each bin, on a logarithmic scale, above the axes."""
    from mpl_toolkits.axes_grid1 import make_axes_locatable

    top = make_axes_locatable(axes).append_axes("top", size="22%", pad=0.08, sharex=axes)
    top.bar(left, count, width, align="edge", color="0.6", edgecolor="white", lw=0.8, log=True)
    narrow = width.size > 0 and width.min() < 0.06
    for x, n in zip(left + width / 2, count, strict=True):
        text = f"{n:.0f}" if n < 1000 else f"{n / 1000:.1f}k" if n < 1e6 else f"{n / 1e6:.1f}M"
        place = {"textcoords": "offset points", "ha": "center", "va": "bottom", "rotation": 90 if narrow else 0}
        top.annotate(text, (x, n), (0, 2), fontsize=6.5, **place)
    # Room for the numbers, which take the place of ticks.
    top.set(ylabel="count\n(log)", ylim=(0.5, max(count.max(initial=1), 10) ** 1.5))
    top.tick_params(left=False, labelleft=False, labelbottom=False, which="both")
    top.spines[["top", "right", "left"]].set_visible(False)
