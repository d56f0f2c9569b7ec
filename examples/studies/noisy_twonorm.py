"""Reproduces Wei et al. 2022, "To Smooth or Not? When Label Smoothing Meets Noisy Labels", on Twonorm.

    pip install -e ".[examples]"
    python examples/studies/noisy_twonorm.py --out runs/twonorm

Generalised smoothing lets r in q = (1 − r) δ_y + r/2 be negative. Where a share e of two classes' labels is wrong, the
paper's theory puts the best r at −2e / (1 − 2e): the more noise, the more negative. This trains a small network for
every r and e, five times each, in one compiled program: 200 trainings, 14 seconds of CPU.

Expect accuracy to fall with the noise at r ≥ 0, to 75 % at e = 0.4, and to jump to the Bayes rate, 97.7 %, or near it
(97.0 % at e = 0.4), beyond the r of the theory. --out keeps noisy_twonorm.md, .json and .png, and runs.jsonl, from
which an interrupted sweep continues. examples/README.md has the published figures beside ours.
"""

from __future__ import annotations

import interrupts

if __name__ == "__main__":
    interrupts.end_in_one_line()

import math
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import trials
from files import claimed
from flags import COUNT, OneLineParser, directory
from tables import new_figure, table, write

import jax_ls
from jax_ls import noise
from jax_ls.sweeps import SweepResult, grid

DESCRIPTION = "Train on Twonorm with wrong labels, smoothed by positive and negative amounts (Wei et al. 2022)."
EXAMPLES = """\
examples:
  python examples/studies/noisy_twonorm.py                    the table, 200 trainings
  python examples/studies/noisy_twonorm.py --out runs/twonorm the picture and the figures too; continues if interrupted
  python examples/studies/noisy_twonorm.py --quick            a glimpse: one seed, few epochs
"""

FEATURES, TRAIN, TEST = 20, 5920, 1480
MEAN = 2 / math.sqrt(FEATURES)
HIDDEN, BATCH, RATE = 64, 128, 1e-3

# Φ(‖mean‖): no classifier is right more often.
BAYES = 0.5 * (1 + math.erf(MEAN * math.sqrt(FEATURES) / math.sqrt(2)))

SMOOTHING = (0.8, 0.4, 0.0, -0.4, -1.0, -2.0, -4.0, -8.0)
NOISE = (0.0, 0.1, 0.2, 0.3, 0.4)

R_LABELS = [f"{r:g}".replace("-", "−") for r in SMOOTHING]

# Test accuracy in Wei et al., Table 1: a row for each r, a column for each e.
PUBLISHED = np.array(
    [
        [0.990, 0.990, 0.986, 0.982, 0.968],
        [0.990, 0.990, 0.987, 0.983, 0.971],
        [0.990, 0.989, 0.987, 0.985, 0.973],
        [0.986, 0.988, 0.988, 0.986, 0.972],
        [0.986, 0.986, 0.988, 0.985, 0.977],
        [0.986, 0.986, 0.986, 0.986, 0.978],
        [0.986, 0.986, 0.986, 0.986, 0.983],
        [0.986, 0.986, 0.986, 0.985, 0.986],
    ]
)


def best_smoothing(share: Any) -> np.ndarray:
    """r that Theorem 7 calls best, −2e / (1 − 2e), if r = 0 is best without noise."""
    return np.asarray(noise.optimal_smoothing(share, num_classes=2)) + 0  # no −0


def twonorm(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Breiman's Twonorm: x ~ N(±a·1, I), a = 2/√20, both classes equally often."""
    class_key, noise_key = jax.random.split(key)
    labels = jax.random.bernoulli(class_key, shape=(size,)).astype(jnp.int32)
    sign = 2 * labels.astype(jnp.float32) - 1
    return MEAN * sign[:, None] + jax.random.normal(noise_key, (size, FEATURES)), labels


def predict(params: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    """Logits of a network 20-64-2."""
    hidden = jax.nn.relu(inputs @ params["w1"] + params["b1"][None])
    return hidden @ params["w2"] + params["b2"][None]


def train(key: jax.Array, point: dict[str, jax.Array], *, epochs: int) -> dict[str, jax.Array]:
    """One training, to its last step. Data, first weights and shuffles depend on the key alone."""
    train_key, test_key, flip_key, init_key, shuffle_key = jax.random.split(key, 5)
    inputs, clean = twonorm(train_key, TRAIN)
    test_inputs, test_labels = twonorm(test_key, TEST)
    labels = noise.flip_labels(flip_key, clean, point["noise"], num_classes=2)

    first, second = jax.random.split(init_key)
    params = {
        "w1": jax.random.normal(first, (FEATURES, HIDDEN)) * math.sqrt(2 / FEATURES),
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(second, (HIDDEN, 2)) * math.sqrt(1 / HIDDEN),
        "b2": jnp.zeros(2),
    }
    rule = optax.adam(RATE)

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        params, state = carry

        def loss(params: dict[str, jax.Array]) -> jax.Array:
            logits = predict(params, inputs[rows])
            return jax_ls.mean(jax_ls.smoothed_cross_entropy(logits, labels[rows], point["smoothing"]))

        updates, state = rule.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry: Any, key: jax.Array) -> tuple[Any, None]:
        rows = jax.random.permutation(key, TRAIN)[: TRAIN // BATCH * BATCH]
        return jax.lax.scan(step, carry, rows.reshape(-1, BATCH))

    (params, _), _ = jax.lax.scan(epoch, (params, rule.init(params)), jax.random.split(shuffle_key, epochs))
    correct = jnp.argmax(predict(params, test_inputs), axis=-1) == test_labels
    return {"accuracy": jnp.mean(correct.astype(jnp.float32))}


def accuracies(result: SweepResult) -> tuple[np.ndarray, np.ndarray]:
    """Mean accuracy and its standard error: a row for each r, a column for each e."""
    shape = (len(SMOOTHING), len(NOISE))
    return result.mean("accuracy").reshape(shape), result.standard_error("accuracy").reshape(shape)


def markdown(accuracy: np.ndarray, error: np.ndarray) -> str:
    """Our table; the published accuracy in brackets."""
    head = ["r", *(f"e = {share:g}" for share in NOISE)]
    rows = [head]
    for r, means, errors, published in zip(SMOOTHING, accuracy, error, PUBLISHED, strict=True):
        spread = ["" if math.isnan(x) else f" ± {x:.3f}" for x in errors]
        cells = [f"{x:.3f}{s} ({y:.3f})" for x, s, y in zip(means, spread, published, strict=True)]
        rows.append([f"{r:g}", *cells])
    rows.append(["best by theory", *(f"{r:.3g}" for r in best_smoothing(np.array(NOISE)))])
    return table(rows)


def keep(out: Path, args: Namespace, result: SweepResult) -> None:
    """noisy_twonorm.md, .json and .png."""
    accuracy, error = accuracies(result)
    runs = result.metrics["accuracy"].astype(float).reshape(*accuracy.shape, args.seeds)
    caption = (
        f"Test accuracy on Twonorm, mean ± standard error of {args.seeds} seeds after {args.epochs} epochs; in "
        f"brackets Wei et al. 2022, Table 1. r: smoothing, e: share of wrong training labels. Bayes rate: {BAYES:.4f}."
    )
    record = {
        "paper": "Wei et al., To Smooth or Not? When Label Smoothing Meets Noisy Labels, 2022",
        "settings": {"seeds": args.seeds, "epochs": args.epochs, "jax": jax.__version__},
        "smoothing": SMOOTHING,
        "noise": NOISE,
        "accuracy": accuracy.round(5).tolist(),
        "standard_error": None if args.seeds == 1 else error.round(5).tolist(),
        "runs": runs.round(5).tolist(),
        "published": PUBLISHED.tolist(),
        "best_smoothing_by_theory": best_smoothing(np.array(NOISE)).round(4).tolist(),
        "bayes_rate": BAYES,
    }
    text = f"{caption}\n\n{markdown(accuracy, error)}\n"
    write(out, "noisy_twonorm", text, record, lambda path: draw(path, accuracy, error))


def draw(path: Path, accuracy: np.ndarray, error: np.ndarray) -> None:
    """Accuracy over (r, e), and along r for each e, with the theory's best r in both."""
    figure = new_figure(12, 4.8, dpi=100)
    heat, lines = figure.subplots(1, 2, width_ratios=(1, 1.15))
    draw_heat(figure, heat, accuracy)
    draw_lines(lines, accuracy, error)
    figure.savefig(path, format="png")


def row_of(r: Any) -> Any:
    """Where r stands on an axis on which the rows of the table are one apart."""
    return np.interp(r, SMOOTHING[::-1], range(len(SMOOTHING))[::-1])


def draw_heat(figure: Any, axes: Any, accuracy: np.ndarray) -> None:
    from matplotlib.patheffects import withStroke

    image = axes.imshow(accuracy, cmap="cividis", aspect="auto", vmax=1)
    share = np.linspace(0, 0.45, 100)
    axes.plot(share * 10, row_of(best_smoothing(share)), "--", color="#D55E00", lw=3)
    for (row, column), value in np.ndenumerate(accuracy):
        # The colour of the cell around the digits keeps the line off them.
        stroke = withStroke(linewidth=4, foreground=image.cmap(image.norm(value)))
        colour = "white" if image.norm(value) < 0.45 else "black"
        style = {"ha": "center", "va": "center", "fontsize": 9, "color": colour, "path_effects": [stroke]}
        axes.text(column, row, f"{value:.3f}".lstrip("0"), **style)
    axes.set(title="Dashed: the theory's best $r = -2e\\,/\\,(1 - 2e)$", ylabel="smoothing $r$ (not to scale)")
    axes.set(xticks=range(len(NOISE)), yticks=range(len(SMOOTHING)), xlim=(-0.5, len(NOISE) - 0.5))
    axes.set(xticklabels=[f"{x:g}" for x in NOISE], yticklabels=R_LABELS)
    axes.set_xlabel("share $e$ of training labels that are wrong")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="test accuracy")


# Okabe and Ito's colours, told apart by all common kinds of colour vision, and a shape for each e.
LOOKS = (("#000000", "o"), ("#0072B2", "^"), ("#009E73", "s"), ("#D55E00", "D"), ("#CC79A7", "P"))


def draw_lines(axes: Any, accuracy: np.ndarray, error: np.ndarray) -> None:
    """Points where networks were trained; above them, on a line of its own, the r of the theory."""
    rows = np.arange(len(SMOOTHING))
    axes.axhline(BAYES, color="0.4", ls=":", label=f"Bayes rate {BAYES:.3f}")
    at = axes.get_xaxis_transform()
    for share, means, errors, (colour, marker) in zip(NOISE, accuracy.T, np.nan_to_num(error.T), LOOKS, strict=True):
        style = {"color": colour, "marker": marker, "ms": 5, "lw": 1.5, "capsize": 2, "mfc": "white"}
        axes.errorbar(rows, means, errors, label=f"$e$ = {share:g}", **style)
        best = row_of(best_smoothing(share))
        axes.plot(best, 1.03, "v", color=colour, ms=9, transform=at, clip_on=False)
        axes.annotate(f"{share:g}", (best, 1.05), xycoords=at, ha="center", fontsize=9, color=colour)
    axes.set_title("▼ best $r$ of the theory, for each $e$", pad=24)
    axes.set(xlabel="smoothing $r$ (steps of the table, not to scale)", ylabel="test accuracy")
    axes.set_xticks(rows, R_LABELS)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    # Room for the legend under the lowest line.
    axes.set_ylim(bottom=accuracy.min() - 0.25 * np.ptp(accuracy))
    axes.legend(loc="lower center", ncols=3, framealpha=0.9, edgecolor="none", fontsize=9)


def run(args: Namespace) -> None:
    """From flags to the table."""
    start = time.perf_counter()
    points = grid(smoothing=SMOOTHING, noise=NOISE)
    result = trials.run_all(lambda key, point: train(key, point, epochs=args.epochs), points, args)
    print(markdown(*accuracies(result)))
    print(f"\nBayes rate {BAYES:.4f}; published in brackets")
    print(f"time: {time.perf_counter() - start:.0f} s")
    if args.out is not None:
        keep(args.out, args, result)


def main(argv: Sequence[str] | None = None) -> None:
    """Whatever the user got wrong ends in one line and exit code 2."""
    parser = OneLineParser(
        prog="noisy_twonorm.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("--seeds", type=COUNT, metavar="N", help="trainings of each r and e (default 5)")
    parser.add_argument("--epochs", type=COUNT, metavar="N", help="passes over the data (default 60)")
    parser.add_argument("--batch", type=COUNT, metavar="N", help="trainings at a time (default 40)", default=40)
    parser.add_argument("--quick", action="store_true", help="1 seed and 4 epochs unless said otherwise")
    parser.add_argument(
        "--out", type=directory, metavar="DIR", help="write figures and picture here, and continue from here"
    )
    args = parser.parse_args(argv)
    args.seeds = args.seeds or (1 if args.quick else 5)
    args.epochs = args.epochs or (4 if args.quick else 60)
    with parser.reporting(trials.kept(args)), claimed(args.out):
        run(args)


if __name__ == "__main__":
    main()
