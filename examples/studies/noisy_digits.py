"""Fourteen methods on digits with wrong labels, after Lukasik et al. 2020.

"Does Label Smoothing Mitigate Label Noise?" compares smoothing with corrections of the loss. Beside them stand losses
made for wrong labels by Zhang & Sabuncu 2018, Wang et al. 2019 and Liu et al. 2020, and focal loss, which is not.

    pip install -e ".[examples]"
    python examples/studies/noisy_digits.py --out runs/noisy-digits

A share ρ of the training labels of real MNIST digits, 0, 0.2, 0.4 or 0.6, is another class, each equally likely. The
methods train the same small network on them, five times each from first weights and shuffles that they share, in one
compiled program: 280 trainings, 211 seconds of CPU.

Expect, at ρ = 0.2, 83 % accuracy from plain training, 87 % from smoothing by 0.4, 89 % from a forward correction that
knows the noise, 92 % from one that overstates it and from generalised cross-entropy, and 93 % from early-learning
regularisation. At ρ = 0.6 plain training has 46 %, smoothing hardly more, early learning 85 %. Smoothed networks say
far less than they know, ECE 40 % for ε = 0.4 at ρ = 0.2; a temperature fitted on clean labels mends that. --out keeps
noisy_digits.md, .json and .png, and runs.jsonl, from which an interrupted run continues. examples/README.md has the
published figures beside ours.
"""

from __future__ import annotations

import interrupts

if __name__ == "__main__":
    interrupts.end_in_one_line()

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import digits
import forests
import jax
import jax.numpy as jnp
import numpy as np
import trials
from tables import new_figure, table, write
from trials import COLUMNS, Data

from jax_ls import noise
from jax_ls.sweeps import SweepResult

PROG = "noisy_digits.py"
DESCRIPTION = "Train on digits with wrong labels, by fourteen methods (Lukasik et al. 2020)."
EXAMPLES = """\
examples:
  python examples/studies/noisy_digits.py                          the tables, 280 trainings
  python examples/studies/noisy_digits.py --out runs/noisy-digits  figures and picture too; continues if interrupted
  python examples/studies/noisy_digits.py --quick                  a glimpse: few digits, few epochs
"""

PAPER = "Lukasik et al., Does Label Smoothing Mitigate Label Noise?, 2020"
NOISE = (0.0, 0.2, 0.4, 0.6)


def matched(rho: float) -> float:
    """α of labels that are resampled, where a share ρ is flipped to one of the other classes."""
    return rho * digits.CLASSES / (digits.CLASSES - 1)


class Way(NamedTuple):
    """A row of the tables: a method of methods.py, and its strength where a share ρ of the labels is wrong."""

    title: str
    method: str
    strength: Callable[[float], float]


# Strengths as the papers have them, whatever the noise: of all methods only the forward correction is told of it.
WAYS = (
    Way("plain", "uniform", lambda rho: 0.0),
    Way("smoothing 0.1", "uniform", lambda rho: 0.1),
    Way("smoothing 0.2", "uniform", lambda rho: 0.2),
    Way("smoothing 0.4", "uniform", lambda rho: 0.4),
    Way("forward, noise known", "forward-correction", matched),
    Way("forward, overstated", "forward-correction", lambda rho: (1 + matched(rho)) / 2),
    Way("relaxation 0.1", "relaxation", lambda rho: 0.1),
    Way("confidence penalty 1", "confidence-penalty", lambda rho: 1.0),
    Way("max suppression 0.2", "max-suppression", lambda rho: 0.2),
    Way("online smoothing 0.5", "online", lambda rho: 0.5),
    Way("generalised CE 0.7", "generalized-cross-entropy", lambda rho: 0.7),
    Way("symmetric CE 1 : 10", "symmetric-cross-entropy", lambda rho: 10 / 11),
    Way("early learning 3", "early-learning", lambda rho: 3.0),
    Way("focal 2", "focal", lambda rho: 2.0),
)
REMARKS = (
    "ρ: the share of training labels that is moved to another class. The overstated forward correction assumes noise "
    "half way between ρ and pure chance. Generalised CE: (1 − p^r)/r with r = 0.7. Symmetric CE: α CE + β A (1 − p) "
    "with α : β = 1 : 10 and A = 4. Early learning: λ = 3, averages that keep 0.7. Focal: γ = 2. These strengths are "
    "the published ones, those of the first three for CIFAR-10."
)
METHODS = tuple(dict.fromkeys(way.method for way in WAYS))

# Lukasik et al. at ρ = 0.2, per cent: accuracy of ResNet-32 on CIFAR and of ResNet-50 on ImageNet, and ECE of ResNet-32
# on CIFAR-100. Their forward correction on CIFAR-10 and its accuracy on CIFAR-100 have α = 0.1.
COLUMNS_THERE = ("CIFAR-10", "CIFAR-100", "ImageNet", "ECE, CIFAR-100")
PUBLISHED: dict[str, tuple[tuple[float, ...], ...]] = {
    "plain": ((80.44, 0.63), (57.06, 0.38), (70.86,), (11.1,)),
    "smoothing 0.1": ((83.95, 0.18), (60.70, 0.28), (71.12,), (10.8,)),
    "smoothing 0.2": ((), (), (71.55,), (15.6,)),
    "smoothing 0.4": ((), (), (70.95,), ()),
    "forward, noise known": ((80.78, 0.42), (61.29, 0.38), (73.17,), (16.5,)),
    "forward, overstated": ((), (), (73.35,), ()),
}


def points() -> dict[str, np.ndarray]:
    """All methods at the first noise, then at the second, and so on."""
    rows = [(METHODS.index(way.method), way.strength(rho), rho) for rho in NOISE for way in WAYS]
    columns = zip(*rows, strict=True)
    return {name: np.array(x, np.float32) for name, x in zip(("method", "strength", "noise"), columns, strict=True)}


def trainer(data: Data, epochs: int) -> Callable[[jax.Array, Any], dict[str, jax.Array]]:
    def train(key: jax.Array, point: Any) -> dict[str, jax.Array]:
        # `key` itself begins the training: at ρ = 0 plain training is that of calibration_digits.py.
        labels = noise.flip_labels(jax.random.fold_in(key, 1), data.labels, point["noise"], num_classes=digits.CLASSES)
        params = trials.fit(key, jnp.asarray(data.inputs), labels, point, methods=METHODS, epochs=epochs)
        logits, known = trials.predict(params, jnp.asarray(data.test_inputs)), jnp.asarray(data.test_labels)
        return trials.scores(logits, known) | {"right": trials.right(logits, known)}

    return train


def figures(result: SweepResult) -> list[dict[str, Any]]:
    """A row for each method and noise, in the order of `points`."""
    rows = ((rho, way) for rho in NOISE for way in WAYS)
    return [
        {"noise": rho, "method": way.title, "strength": round(way.strength(rho), 4)}
        | trials.row(result, i, i - i % len(WAYS))
        for i, (rho, way) in enumerate(rows)
    ]


def tables(rows: list[dict[str, Any]]) -> str:
    """A table for each noise."""
    head = ["method", *(title for title, _, _ in COLUMNS.values())]
    parts = []
    for rho in NOISE:
        body = [
            [f"{row['method']}", *(trials.cell(name, row[name]) for name in COLUMNS)]
            for row in rows
            if row["noise"] == rho
        ]
        wrong = f"{rho:.0%} of the training labels are wrong" if rho else "all labels are right"
        parts.append(f"ρ = {rho:g}: {wrong}\n\n{table([head, *body])}")
    return "\n\n".join(parts)


def beside_published(rows: list[dict[str, Any]]) -> str:
    ours = {row["method"]: row for row in rows if row["noise"] == 0.2}
    body = [["ρ = 0.2", "accuracy %, ours", *COLUMNS_THERE[:3], "ECE %, ours", "CIFAR-100"]]
    for title, theirs in PUBLISHED.items():
        accuracy, ece = (trials.cell(metric, ours[title][metric]) for metric in ("accuracy", "ece"))
        cells = [" ± ".join(f"{x:.2f}" for x in pair) for pair in theirs[:3]]
        body.append([title, accuracy, *cells, ece, *([f"{x:.1f}" for x in theirs[3]] or [""])])
    return (
        "Beside the paper's, second hand: ResNet-32 on CIFAR, ResNet-50 on ImageNet. On CIFAR its forward correction "
        f"assumes half the noise for the accuracies, and all of it for the ECE.\n\n{table(body)}"
    )


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy and calibration of every method, a column for each noise, all columns on one scale."""
    figure = new_figure(14.5, 9.2)
    grid = figure.subplots(2, len(NOISE), sharey=True, sharex="row")
    for column, rho in enumerate(NOISE):
        shown = [row for row in rows if row["noise"] == rho]
        accuracy, calibration = grid[:, column]
        draw_accuracy(accuracy, shown)
        forests.draw_calibration(calibration, shown)
        wrong = f"{rho:.0%} of the labels wrong" if rho else "all labels right"
        accuracy.set_title(f"ρ = {rho:g}: {wrong}")
        for axes in (accuracy, calibration):
            forests.lay_out(axes, None)
    grid[1, 0].set_xlim(0, None)
    words = "Figures on the left: points of accuracy more than plain, ± error over seeds and held-out images"
    figure.suptitle(words, fontsize="medium", color="0.35")
    forests.lay_out(grid[0, 0], [way.title for way in WAYS])
    forests.lay_out(grid[1, 0], [way.title for way in WAYS])
    forests.error_bars(grid[0, 0], forests.SEEDS, forests.BOTH)
    forests.one_legend(figure, grid[:, 0])
    figure.savefig(path, format="png")


def draw_accuracy(axes: Any, rows: list[dict[str, Any]]) -> None:
    """On the left how much more than plain, and the error of that over seeds and digits."""
    axes.axvline(100 * rows[0]["accuracy"]["mean"], color="0.5", lw=1, ls="--", zorder=0, label="accuracy of plain")
    forests.draw_means(axes, rows, "accuracy", 100, label="accuracy")
    mean, *errors = (forests.numbers(rows, "gain", 100, x) for x in ("mean", "standard_error", "over_digits"))
    for y, (gain, error) in enumerate(zip(mean, np.sqrt(np.nansum(np.square(errors), axis=0)), strict=True)):
        if np.isfinite(gain):
            axes.annotate(
                f"{gain:+.1f} ± {error:.1f}".replace("-", "−"), (0.01, y), xycoords=TEXT_AT, va="center", fontsize=8.5
            )
    axes.set(xlabel="accuracy (%)", xlim=(18, 100))


TEXT_AT = ("axes fraction", "data")


def run(args: Namespace) -> None:
    """From flags to the tables."""
    data = trials.load(args)
    start = time.perf_counter()
    rows = figures(trials.run_all(trainer(data, args.epochs), points(), args))
    text = f"{tables(rows)}\n\n{beside_published(rows)}"
    words = f"{trials.in_words(args, data)} {REMARKS}"
    print(f"{text}\n\n{words}")
    print(f"time: {time.perf_counter() - start:.0f} s")
    if args.out is not None:
        there = {title: dict(zip(COLUMNS_THERE, theirs, strict=True)) for title, theirs in PUBLISHED.items()}
        record = {"paper": PAPER, "settings": trials.settings(args, data), "rows": rows, "published": there}
        write(args.out, "noisy_digits", f"{words}\n\n{text}\n", record, lambda path: draw(path, rows))


def main(argv: Sequence[str] | None = None) -> None:
    trials.command(trials.parser_of(PROG, (DESCRIPTION, EXAMPLES), 5), run, argv)


if __name__ == "__main__":
    main()
