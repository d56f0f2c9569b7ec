"""What smoothing did: scores on held-out examples, a table of them, a picture."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from tables import new_figure

from jax_ls import calibration, plotting
from jax_ls.plotting._canvas import finish

BINS = 15

# The accuracy of a bin with fewer images is noise: it counts in the error, but draws a wild line.
FEW = 10
COLUMNS = {
    "accuracy": "accuracy",
    "confidence": "confidence",
    "nll": "NLL",
    "nll_scaled": "NLL scaled",
    "ece": "ECE",
    "ece_scaled": "ECE scaled",
}

# Okabe and Ito's colours, told apart by all common kinds of colour vision; those for two networks first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#F0E442", "#882255")


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The columns of the table."""
    bins, scaled = judge(logits, labels), temperature_scaled(logits, labels)
    return {
        "accuracy": float(bins.correct.sum()) / len(labels),
        "confidence": float(bins.confidence_sum.sum()) / len(labels),
        "nll": float(calibration.negative_log_likelihood(logits, labels)),
        "nll_scaled": float(calibration.negative_log_likelihood(scaled, labels)),
        "ece": float(bins.error()),
        "ece_scaled": float(judge(scaled, labels).error()),
    }


def judge(logits: np.ndarray, labels: np.ndarray) -> calibration.Reliability:
    """Confidence against accuracy: Guo et al., "On Calibration of Modern Neural Networks", 2017."""
    return calibration.reliability(logits, labels, num_bins=BINS)


def temperature_scaled(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Divides the logits of each half by the temperature that suits the other half best."""
    half = np.arange(len(labels)) % 2 == 0
    scaled = logits.copy()
    for fitted in (half, ~half):
        scaled[~fitted] /= np.asarray(calibration.fit_temperature(logits, labels, where=fitted))
    return scaled


def table(rows: dict[str, dict[str, float]], examples: int) -> str:
    """`rows` maps a title to its scores."""
    head = f"{examples:,} held-out images"
    width = max(len(title) for title in (head, *rows))
    lines = [f"{head:<{width}}" + "".join(f"{name:>12}" for name in COLUMNS.values())]
    for title, row in rows.items():
        cells = (f"{row[key]:.4f}" if key.startswith("nll") else f"{row[key]:.2%}" for key in COLUMNS)
        lines.append(f"{title:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
    lines.append("ECE: expected calibration error, 15 bins; scaled: after temperature scaling fitted on the other half")
    return "\n".join(lines)


def mean_prediction(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Row y: what the network answers for images of y, on average; NaN where there are none."""
    p = np.asarray(jax.nn.softmax(logits, axis=-1))
    empty = np.full(p.shape[-1], np.nan)
    return np.stack([p[labels == k].mean(axis=0) if np.any(labels == k) else empty for k in range(p.shape[-1])])


def draw(path: Path, heat: np.ndarray, words: tuple[str, str], curves: dict[str, Any], answers: dict[str, Any]) -> None:
    """`heat`, with its title and unit; `curves`: title -> metrics of each epoch; `answers`: title -> last `judge`."""
    figure = new_figure(15 if len(answers) <= 2 else 18, 4.7, dpi=120)
    figure.get_layout_engine().set(w_pad=0.12, wspace=0.03)
    left, loss, calibration = figure.subplots(1, 3)
    draw_matrix(left, heat, *words)
    draw_losses(loss, curves)
    draw_reliability(calibration, answers)
    figure.savefig(path, format="png")


def draw_matrix(axes: Any, targets: np.ndarray, title: str, unit: str) -> None:
    """One row for each label."""
    plotting.plot_targets(targets, rows=range(len(targets)), ax=axes)
    axes.set(title=title, aspect="equal")
    axes.figure.axes[-1].set_ylabel(unit)


def draw_losses(axes: Any, curves: dict[str, Any]) -> None:
    """The training loss has the smoothed targets' entropy as its floor; the held-out one has 0."""
    from matplotlib.ticker import MaxNLocator

    crowded = len(curves) > 2
    for (title, rows), colour in zip(curves.items(), COLOURS, strict=False):
        epochs = [row["epoch"] for row in rows]
        training, held_out = (None, None) if crowded else (f"{title}: training", f"{title}: held-out NLL")
        axes.plot(epochs, [row["train_loss"] for row in rows], "o-", color=colour, ms=4, label=training)
        axes.plot(epochs, [row["nll"] for row in rows], "s--", color=colour, ms=4, mfc="white", label=held_out)
    if crowded:
        axes.plot([], "o-", color="0.4", ms=4, label="training")
        axes.plot([], "s--", color="0.4", ms=4, mfc="white", label="held-out NLL")
    axes.set(title="Losses", xlabel="epoch", ylabel="loss (nats per image)", box_aspect=1)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    finish(axes)


def draw_reliability(axes: Any, answers: dict[str, calibration.Reliability]) -> None:
    """Above the diagonal the network is right more often than it says."""
    axes.plot([0, 1], [0, 1], ":", color="0.4", label="perfectly calibrated")
    for (title, bins), colour in zip(answers.items(), COLOURS, strict=False):
        count, confidence, accuracy = (np.asarray(x) for x in (bins.count, bins.confidence, bins.accuracy))
        drawn, share = count >= FEW, count / count.sum()
        at = confidence[drawn], accuracy[drawn]
        axes.plot(*at, "o-", color=colour, lw=1, ms=2.5, label=f"{title}: ECE {float(bins.error()):.1%}")
        axes.scatter(*at, s=400 * share[drawn], color=colour, alpha=0.5, linewidths=0, clip_on=False)
    axes.set(title="Reliability on held-out images", xlabel="confidence", ylabel="accuracy")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    beside = {"loc": "upper left", "bbox_to_anchor": (1.02, 1)} if len(answers) > 2 else {}
    finish(axes, **beside, title=f"circle area: share of the images;\nbins of fewer than {FEW} are not drawn")
