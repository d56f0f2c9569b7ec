"""Smoothing that knows the order of the classes, on real ones: the progression of diabetes in 442 patients.

    pip install -e ".[examples]"
    python examples/studies/ordinal.py --out runs/ordinal

Efron et al. 2004 measured ten things of each patient (age, blood pressure, blood serum, ...), and a year later how far
the disease had come; scikit-learn, which mlxtend brings, ships the data. Here that progression is cut into ten classes
of equally many patients, in order: to take class 3 for class 4 is a smaller mistake than to take it for class 9. A
network 10-64-10 is trained without smoothing, with the uniform distribution, and with three priors that know the order:
Gaussian (Galdran et al. 2020), SORD (Diaz and Marathe 2019) and binomial (Liu et al. 2020).

Five-fold cross-validation, eight times, of each prior and six ε, in one compiled program: 1,920 small trainings, 35
seconds of CPU. ε is chosen for each fold by patients that are not in it.

Expect the priors that know the order to beat uniform smoothing by about 0.02 of ranked probability score and 0.1 of
NLL, three to eight standard errors, and after temperature scaling too. Uniform smoothing gains nothing in that score at
its best ε, and loses beyond. All of them are right one time in five, and 1.7 classes off on average: there the
order makes no difference that this many patients could show.

--out keeps ordinal.md, .json and .png.
"""

from __future__ import annotations

import interrupts

if __name__ == "__main__":
    interrupts.end_in_one_line()

import functools
import math
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import forests
import jax
import jax.numpy as jnp
import numpy as np
import trials
from diabetes import CLASSES, HIDDEN, RATE, Patients, fit, load, scores
from files import claimed
from flags import COUNT, OneLineParser, directory
from tables import COLOURS, MARKERS, finish, new_figure, table, write

import jax_ls
from jax_ls import plotting, priors
from jax_ls.sweeps import SweepResult, grid, sweep

NAME = "ordinal"
DESCRIPTION = "Uniform smoothing and smoothing that knows the classes' order, on the progression of diabetes."
EXAMPLES = """\
examples:
  python examples/studies/ordinal.py                     the tables
  python examples/studies/ordinal.py --out runs/ordinal  figures and picture too
  python examples/studies/ordinal.py --quick             a glimpse: one cross-validation, three ε
"""

FOLDS = 5

# About where the network without smoothing is best: smoothing must do more than stand in for stopping early.
STEPS = 80

SMOOTHING = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)

PRIORS = {
    "uniform": jnp.full((CLASSES, CLASSES), 1 / CLASSES),
    "Gaussian, σ = 1": priors.gaussian(CLASSES, sigma=1.0),
    "SORD, β = 1": priors.sord(CLASSES, beta=1.0),
    "binomial": priors.binomial(CLASSES),
}

# Score of an example -> title, digits after the point. Lower is better, but for the last.
SCORES = {
    "distance": ("absolute error", 3),
    "rps": ("RPS", 3),
    "rps_scaled": ("RPS at T*", 3),
    "nll": ("NLL", 3),
    "nll_scaled": ("NLL at T*", 3),
    "correct": ("accuracy", 3),
}


def cross_validate(key: jax.Array, point: Any, *, data: Patients) -> dict[str, jax.Array]:
    """Scores (n,) of each patient by a network that has not seen it, and what chooses ε for each fold.

    The fold after a fold is held out too for that choice, and scored by a network that has seen neither.
    """
    split_key, init_key = jax.random.split(key)
    labels = jnp.asarray(data.labels)
    fold = jax.random.permutation(split_key, len(labels)) % FOLDS
    u = jax_ls.Rows(jnp.stack([*PRIORS.values()])[point["prior"].astype(jnp.int32)], labels)
    target = jax_ls.smooth(labels, point["smoothing"], prior=u)

    def held_out(tested: jax.Array) -> tuple[jax.Array, jax.Array]:
        others = fold != tested
        choosing = fold == (tested + 1) % FOLDS
        logits = fit(init_key, data, others, target, STEPS)
        rps = scores(fit(init_key, data, others & ~choosing, target, STEPS), labels)["rps"]
        return jnp.where(others[:, None], 0, logits), jax_ls.mean(rps, choosing)

    parts, choice = jax.vmap(held_out)(jnp.arange(FOLDS))
    logits = jnp.sum(parts, axis=0)
    cooled = scores(trials.scaled(logits, labels)[0], labels)
    after = {f"{name}_scaled": cooled[name] for name in ("rps", "nll")}
    return {"fold": fold, "choice": choice, **scores(logits, labels), **after}


class Findings(NamedTuple):
    """Scores (priors, ε, repetitions, patients), and at the ε that is chosen (1 + priors, patients); those ε."""

    fixed: dict[str, np.ndarray]
    chosen: dict[str, np.ndarray]
    smoothing: np.ndarray


def judge(result: SweepResult, smoothing: Sequence[float]) -> Findings:
    """Chooses ε by the fold beside; the first row is without smoothing. Repetitions are averaged at the end."""
    shape = (len(PRIORS), len(smoothing))
    every = {name: x.reshape(*shape, *x.shape[1:]) for name, x in result.metrics.items()}
    best = every["choice"].argmin(axis=1)  # (priors, repetitions, folds)
    of_patient = np.stack([np.take_along_axis(b, every["fold"][0, 0], axis=-1) for b in best])
    chosen = {}
    for name in SCORES:
        picked = np.take_along_axis(every[name], of_patient[:, None], axis=1)[:, 0]
        chosen[name] = np.concatenate([every[name][:1, 0], picked]).mean(axis=1)
    return Findings({name: every[name] for name in SCORES}, chosen, np.asarray(smoothing)[best])


def mean_and_error(x: np.ndarray) -> tuple[float, float]:
    """Over patients."""
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(x.size))


def gains(found: Findings, beaten: int = 1) -> dict[str, dict[str, tuple[float, float]]]:
    """By how much each prior beats a row of `found.chosen`, 0 no smoothing, 1 uniform, patient by patient."""
    names = [*PRIORS][beaten:]
    signs = {name: -1 if name == "correct" else 1 for name in SCORES}
    return {
        prior: {name: mean_and_error(signs[name] * (x[beaten] - x[row])) for name, x in found.chosen.items()}
        for row, prior in enumerate(names, start=beaten + 1)
    }


def markdown(found: Findings) -> str:
    """The scores, and the gains over none and over uniform smoothing, also in units of their standard errors."""
    titles = [title for title, _ in SCORES.values()]
    body = [["prior", "mean ε", *titles]]
    for row, prior in enumerate(["no smoothing", *PRIORS]):
        epsilon = f"{found.smoothing[row - 1].mean():.2f}" if row else "0"
        cells = [
            "{0:.{2}f} ± {1:.{2}f}".format(*mean_and_error(found.chosen[name][row]), places)
            for name, (_, places) in SCORES.items()
        ]
        body.append([prior, epsilon, *cells])
    parts = [table(body)]
    for beaten, name in enumerate(("no smoothing", "uniform")):
        beside = [[f"better than {name} by", *titles]]
        for prior, row in gains(found, beaten).items():
            cells = [f"{mean:+.3f} ± {error:.3f} ({mean / error:+.1f})" for mean, error in row.values()]
            beside.append([prior, *cells])
        parts.append(table(beside))
    return "\n\n".join(parts)


def in_words(args: Namespace) -> str:
    """How to read the tables."""
    return (
        "Diabetes progression of 442 patients (scikit-learn), 10 ordered classes of equal size. Network "
        f"10-{HIDDEN}-10, {STEPS} full-batch steps of Adam {RATE:g}. {args.repeats} x {FOLDS}-fold cross-validation; "
        "ε for each fold is the one of the best RPS on another fold, from "
        f"{', '.join(f'{x:g}' for x in args.smoothing)}. Mean ± standard error over patients; gains are paired by "
        "patient, in brackets divided by their standard error. Absolute error: how many classes the median is from the "
        "true one. RPS: ranked probability score, the sum of squared differences of the cumulative probabilities. T*: "
        "the temperature of the best likelihood, fitted on the other half of the patients."
    )


def draw(path: Path, smoothing: Sequence[float], found: Findings) -> None:
    """The targets of one prior, the RPS over ε, the gains over uniform smoothing."""
    figure = new_figure(13.5, 4.7, dpi=90)
    heat, lines, forest = figure.subplots(1, 3, width_ratios=(1, 1.15, 1.1))
    prior = "Gaussian, σ = 1"
    plotting.plot_targets(PRIORS[prior], rows=range(CLASSES), ax=heat)
    heat.set_title(f"Where the mass goes: {prior}", fontsize=11)
    draw_lines(lines, smoothing, found)
    draw_gains(forest, gains(found))
    forests.one_legend(figure, [lines])
    figure.savefig(path, format="png")


def draw_lines(axes: Any, smoothing: Sequence[float], found: Findings) -> None:
    rps = found.fixed["rps"]
    axes.axhline(rps[0, 0].mean(), color="0.4", ls=":", label="no smoothing")
    for row, (prior, runs) in enumerate(zip(PRIORS, rps, strict=True)):
        # The Gaussian and SORD nearly agree: neither may cover the other.
        style = {"ls": "--", "mfc": "none", "ms": 8, "zorder": 3} if prior.startswith("SORD") else {"ms": 5}
        axes.plot(smoothing, runs.mean(axis=(1, 2)), color=COLOURS[row], marker=MARKERS[row], label=prior, **style)
    low, high = rps[1:].mean(axis=(2, 3)).min(), rps[0, 0].mean()
    axes.set_ylim(low - 0.25 * (high - low), high + 2.5 * (high - low))
    axes.set(xlabel="smoothing ε", ylabel="ranked probability score, RPS (lower is better)")
    axes.set_title("Every ε; uniform soon leaves the picture", fontsize=11)
    finish(axes)
    axes.get_legend().remove()


def draw_gains(axes: Any, found: dict[str, dict[str, tuple[float, float]]]) -> None:
    names = ["distance", "rps", "rps_scaled", "nll", "nll_scaled"]
    axes.axvline(0, color="0.4", ls="-", lw=1)
    for row, (prior, cells) in enumerate(found.items(), start=1):
        mean, error = np.array([cells[name] for name in names]).T
        height = np.arange(len(names)) + 0.2 * (row - 2)
        style = {"color": COLOURS[row], "marker": MARKERS[row], "ms": 5, "capsize": 3, "ls": "none"}
        axes.errorbar(mean, height, xerr=1.96 * error, label=prior, **style)
    axes.set_yticks(range(len(names)), [SCORES[name][0] for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("better than uniform by (paired, 95 % interval)")
    axes.locator_params(axis="x", nbins=6)
    axes.set_title("ε chosen by cross-validation", fontsize=11)
    finish(axes)
    axes.get_legend().remove()


def report(args: Namespace, found: Findings) -> None:
    """Prints the tables, and keeps them."""
    text = f"{markdown(found)}\n\n{in_words(args)}\n"
    print(text)
    if args.out is not None:
        settings = {name: getattr(args, name) for name in ("repeats", "smoothing")} | {
            "steps": STEPS,
            "jax": jax.__version__,
        }
        record = {"settings": settings, **as_record(found)}
        write(args.out, NAME, text, record, lambda path: draw(path, args.smoothing, found))


def run(args: Namespace) -> None:
    """From flags to the tables."""
    start = time.perf_counter()
    points = grid(prior=range(len(PRIORS)), smoothing=args.smoothing)
    train = functools.partial(cross_validate, data=load())
    found = judge(sweep(train, points, args.repeats, batch=args.batch), args.smoothing)
    print(f"time: {time.perf_counter() - start:.0f} s\n")
    report(args, found)


def as_record(found: Findings) -> dict[str, Any]:
    """What ordinal.json holds beside the settings; "patients" has the scores of each, for paired differences."""

    def rounded(pair: tuple[float, float]) -> dict[str, float]:
        return {"mean": round(pair[0], 5), "standard_error": round(pair[1], 5)}

    rows = enumerate(["no smoothing", *PRIORS])
    return {
        "chosen": {row: {k: rounded(mean_and_error(x[i])) for k, x in found.chosen.items()} for i, row in rows},
        "chosen_smoothing": {prior: float(x.mean()) for prior, x in zip(PRIORS, found.smoothing, strict=True)},
        **{
            f"better_than_{name}": {
                prior: {k: rounded(pair) for k, pair in row.items()} for prior, row in gains(found, beaten).items()
            }
            for beaten, name in enumerate(("none", "uniform"))
        },
        "patients": {
            row: {k: x[i].astype(float).round(4).tolist() for k, x in found.chosen.items()}
            for i, row in enumerate(["no smoothing", *PRIORS])
        },
        "every_smoothing": {
            prior: {k: x[i].mean(axis=(1, 2)).astype(float).round(5).tolist() for k, x in found.fixed.items()}
            for i, prior in enumerate(PRIORS)
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Whatever the user got wrong ends in one line and exit code 2."""
    parser = OneLineParser(prog=f"{NAME}.py", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--repeats", type=COUNT, metavar="N", help="cross-validations of each prior and ε (default 8)")
    parser.add_argument("--batch", type=COUNT, metavar="N", default=24, help="of them at a time (default 24)")
    parser.add_argument("--quick", action="store_true", help="1 cross-validation unless said otherwise, and 3 ε")
    parser.add_argument("--out", type=directory, metavar="DIR", help="write figures and picture here")
    args = parser.parse_args(argv)
    args.repeats = args.repeats or (1 if args.quick else 8)
    args.smoothing = (0.0, 0.4, 1.0) if args.quick else SMOOTHING
    with parser.reporting(), claimed(args.out):
        run(args)


if __name__ == "__main__":
    main()
