"""Rare classes: smoothing by frequency and logit adjustment on a long-tailed split of digits.

    pip install -e ".[examples]"
    python examples/studies/long_tailed_digits.py --out runs/long-tailed

Of ten classes of real MNIST digits the most frequent has 400 to train on and the rarest 4, and those between fall by
the same factor. Which digit is how frequent is drawn anew for each seed, so that no digit's difficulty passes for an
effect of its frequency. The held-out digits are equally frequent. Ten methods train the same small network: plainly,
smoothed (Szegedy et al. 2016), smoothed by the frequency of the label (label-aware, Zhong et al. 2021), with adjusted
logits (Menon et al. 2021), with both, and by focal loss (Lin et al. 2017). 20 times each: 200 trainings, 135 seconds of
CPU.

Expect 75 % accuracy from plain training, 95 % on the three most frequent classes and 46 % on the three rarest. Uniform
smoothing does not help, label-aware smoothing does (79 %), and logit adjustment more (81 %). Both together ruin the
frequent classes (61 %), unless the mass goes to the class frequencies, to which adjusted logits are neutral: 84 %.

--out keeps long_tailed_digits.md, .json and .png, and runs.jsonl, from which an interrupted run continues.
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
from flags import number
from tables import BLUE, GREEN, VERMILION, new_figure, table, write
from trials import COLUMNS, Data

from jax_ls.sweeps import SweepResult

NAME = "long_tailed_digits"
PROG = f"{NAME}.py"
DESCRIPTION = "Train on digits of which some are rare, smoothed and with adjusted logits (Zhong 2021, Menon 2021)."
EXAMPLES = f"""\
examples:
  python examples/studies/{NAME}.py                         the tables
  python examples/studies/{NAME}.py --out runs/long-tailed  figures and picture too; continues if interrupted
  python examples/studies/{NAME}.py --quick                 a glimpse: few digits, few epochs
"""

PAPERS = (
    "Zhong et al., Improving Calibration for Long-Tailed Recognition, 2021",
    "Menon et al., Long-tail Learning via Logit Adjustment, 2021",
)


class Way(NamedTuple):
    title: str
    method: str
    strength: float


WAYS = (
    Way("plain", "uniform", 0.0),
    Way("smoothing 0.1", "uniform", 0.1),
    Way("smoothing 0.3", "uniform", 0.3),
    Way("label-aware 0.3 to 0", "label-aware", 0.3),
    Way("logit adjustment", "adjusted", 0.0),
    Way("adjustment, smoothing 0.1", "adjusted", 0.1),
    Way("adjustment, label-aware", "adjusted, label-aware", 0.3),
    Way("adjustment, smoothing 0.1 to π", "adjusted, to frequencies", 0.1),
    Way("adjustment, label-aware to π", "adjusted, label-aware, to frequencies", 0.3),
    Way("focal 2", "focal", 2.0),
)
METHODS = tuple(dict.fromkeys(way.method for way in WAYS))

# Places in the order of frequency.
GROUPS = {"head": (0, 3), "middle": (3, 7), "tail": (7, 10)}
LOOKS = {"head": (BLUE, "o"), "middle": (GREEN, "^"), "tail": (VERMILION, "s")}

COLUMNS_HERE = (
    {name: COLUMNS[name] for name in ("accuracy", "gain")}
    | {group: (f"{group} %", 100, 1) for group in GROUPS}
    | {name: title for name, title in COLUMNS.items() if name not in ("accuracy", "gain")}
)


def points() -> dict[str, np.ndarray]:
    rows = [(METHODS.index(way.method), way.strength) for way in WAYS]
    columns = zip(*rows, strict=True)
    return {name: np.array(x, np.float32) for name, x in zip(("method", "strength"), columns, strict=True)}


def sizes(most: int, imbalance: float) -> np.ndarray:
    """How many digits each class has, most frequent first: each fewer than the last by the same factor, at least 1."""
    places = np.arange(digits.CLASSES) / (digits.CLASSES - 1)
    return np.maximum(1, np.round(most * imbalance**-places)).astype(int)


def pool_of(labels: np.ndarray) -> np.ndarray:
    """Rows of the training digits of each class, (K, n); n is what the smallest class has."""
    rows = [np.flatnonzero(labels == k) for k in range(digits.CLASSES)]
    return np.stack([x[: min(map(len, rows))] for x in rows])


def draw_tail(key: jax.Array, pool: np.ndarray, counts: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Rows to train on, and the place of each class in the order of frequency."""
    order_key, digit_key = jax.random.split(key)
    order = jax.random.permutation(order_key, digits.CLASSES)
    keys = jax.random.split(digit_key, digits.CLASSES)
    shuffled = jax.vmap(jax.random.permutation)(keys, jnp.asarray(pool)[order])
    return jnp.concatenate([shuffled[place, :count] for place, count in enumerate(counts)]), jnp.argsort(order)


def trainer(data: Data, args: Namespace) -> Callable[[jax.Array, Any], dict[str, jax.Array]]:
    pool = pool_of(data.labels)
    counts = sizes(pool.shape[1], args.imbalance)

    def train(key: jax.Array, point: Any) -> dict[str, jax.Array]:
        rows, place = draw_tail(jax.random.fold_in(key, 1), pool, counts)
        inputs, labels = jnp.asarray(data.inputs)[rows], jnp.asarray(data.labels)[rows]
        params = trials.fit(key, inputs, labels, point, methods=METHODS, epochs=args.epochs)
        logits, known = trials.predict(params, jnp.asarray(data.test_inputs)), jnp.asarray(data.test_labels)
        right = trials.right(logits, known)
        return trials.scores(logits, known) | by_group(right, place[known]) | {"right": right}

    return train


def by_group(right: jax.Array, place: jax.Array) -> dict[str, jax.Array]:
    """Accuracy of the examples whose classes are in each group."""
    members = {group: (place >= first) & (place < end) for group, (first, end) in GROUPS.items()}
    return {group: jnp.sum(right * member) / jnp.sum(member) for group, member in members.items()}


def figures(result: SweepResult) -> list[dict[str, Any]]:
    """A row for each method; the gains of the groups are paired by seed."""
    rows = []
    for i, way in enumerate(WAYS):
        row = {"method": way.title, "strength": way.strength} | trials.row(result, i, 0, COLUMNS_HERE)
        for group in GROUPS if i else ():
            apart = result.metrics[group][i].astype(float) - result.metrics[group][0]
            error = trials.rounded(trials.standard_error(apart))
            row[f"{group}_gain"] = {"mean": trials.rounded(apart.mean()), "standard_error": error}
        rows.append(row)
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    """All scores, and the groups' accuracies less those of plain training."""
    head = ["method", *(title for title, _, _ in COLUMNS_HERE.values())]
    body = [[row["method"], *(trials.cell(name, row[name], COLUMNS_HERE) for name in COLUMNS_HERE)] for row in rows]
    beside = [["more than plain", *GROUPS]]
    beside += [[row["method"], *(trials.in_figures(row[f"{x}_gain"], 100, 1, "+") for x in GROUPS)] for row in rows[1:]]
    return f"{table([head, *body])}\n\n{table(beside)}"


def in_words(args: Namespace, data: Data) -> str:
    counts = sizes(pool_of(data.labels).shape[1], args.imbalance)
    seeds = "1 seed" if args.seeds == 1 else f"{args.seeds} seeds"
    return (
        f"{data.source}: {counts.sum():,} images to train on, {', '.join(map(str, counts))} of each class; which class "
        f"is how frequent differs from seed to seed. Head: the 3 most frequent classes, middle: 4, tail: the 3 rarest. "
        f"{len(data.test_labels):,} held out, whose classes are equally frequent. Network {trials.NETWORK}, Adam "
        f"{trials.RATE:g}, batches of {trials.BATCH}, {args.epochs} epochs, {seeds}. Label-aware: ε falls from 0.3 for "
        "the most frequent class to 0 for the rarest. Adjustment: the log of the class frequencies π, added to the "
        f"logits in training. To π: the mass goes to the frequencies, not to all classes alike. {trials.READ}"
    )


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy in head, middle and tail, and calibration error before and after temperature scaling."""
    figure = new_figure(11.5, 5.8, dpi=90)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.3, 1))
    for i, (group, (colour, marker)) in enumerate(LOOKS.items()):
        first, end = GROUPS[group]
        look = {"color": colour, "marker": marker, "offset": 0.18 * (i - 1)}
        forests.draw_means(left, rows, group, 100, label=f"{group}, {end - first} classes", **look)
    forests.draw_means(left, rows, "accuracy", 100, color="0.15", marker="D", ms=5, label="all, equally frequent")
    left.set(xlabel="accuracy (%)", title="Accuracy by the frequency of the class")
    forests.draw_calibration(right, rows)
    right.set(title="Calibration on equally frequent classes", xlim=(0, None))
    forests.error_bars(left, forests.SEEDS, forests.BOTH)
    forests.lay_out(left, [row["method"] for row in rows])
    forests.lay_out(right, None)
    forests.one_legend(figure, (left, right), columns=4)
    figure.savefig(path, format="png")


def run(args: Namespace) -> None:
    """From flags to the tables."""
    data = trials.load(args)
    start = time.perf_counter()
    rows = figures(trials.run_all(trainer(data, args), points(), args))
    words = in_words(args, data)
    print(f"{tables(rows)}\n\n{words}")
    print(f"time: {time.perf_counter() - start:.0f} s")
    if args.out is not None:
        counts = sizes(pool_of(data.labels).shape[1], args.imbalance).tolist()
        settings = trials.settings(args, data) | {"imbalance": args.imbalance, "digits_of_each_class": counts}
        record = {"papers": PAPERS, "settings": settings | {"training_digits": sum(counts)}, "rows": rows}
        write(args.out, NAME, f"{words}\n\n{tables(rows)}\n", record, lambda path: draw(path, rows))


def main(argv: Sequence[str] | None = None) -> None:
    parser = trials.parser_of(PROG, (DESCRIPTION, EXAMPLES), 20, 120)
    kind = number(float, lambda x: x >= 1, "a number of at least 1", 1e6)
    words = "the most frequent class has so many times the digits of the rarest (default 100)"
    parser.add_argument("--imbalance", type=kind, default=100.0, metavar="N", help=words)
    trials.command(parser, run, argv)


if __name__ == "__main__":
    main()
