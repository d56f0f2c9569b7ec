"""Learns rewards from comparisons of which a known share is flipped: plain, conservative and robust.

    pip install -e ".[examples]"
    python examples/studies/preferences.py --out runs/preferences

After Chowdhury et al. 2024, "Provably Robust DPO", and Mitchell 2023, "A Note on DPO with Noisy Preferences", in small:
sixteen answers have true rewards from −2 to 2, and who wins a comparison is drawn from the Bradley-Terry model. A share
ε of the outcomes is then flipped. Rewards are fitted by `bradley_terry` at smoothing 0 (plain), ε (conservative) and
−ε/(1−2ε) (robust), 50 times each for every ε and number of comparisons, in one compiled program.

Expect, after 9 seconds of CPU: the plain fit shrinks rewards, the conservative one shrinks them more, both
by what the minimum of their expected loss says (lines in the picture); the robust fit has slope 1, 1.05 ± 0.10 at
ε = 0.4. It pays in variance: with five comparisons of each pair its error is the largest of the three, and its loss may
have no minimum at all. --out keeps preferences.md, .json and .png.
"""

from __future__ import annotations

import interrupts

if __name__ == "__main__":
    interrupts.end_in_one_line()

import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forests
import jax
import jax.numpy as jnp
import numpy as np
import optax
from files import claimed
from flags import COUNT, OneLineParser, directory
from tables import new_figure, table, write

from jax_ls.preferences import bradley_terry, robust_smoothing

DESCRIPTION = "Fit rewards to comparisons with flipped outcomes: plain, conservative and robust."
EXAMPLES = """\
examples:
  python examples/studies/preferences.py                        the table
  python examples/studies/preferences.py --out runs/preferences the picture and the figures too
  python examples/studies/preferences.py --quick                a glimpse: 8 seeds, few updates
"""

TRUE = np.linspace(-2, 2, 16, dtype=np.float32)
FIRST, SECOND = np.triu_indices(len(TRUE), k=1)
FLIPS = (0.0, 0.1, 0.2, 0.3, 0.4)
# Comparisons of each of the 120 pairs; the last is that of the table.
SIZES = (5, 20, 80, 320)
SIZE_FLIP = 0.2
RATE = 0.05

METHODS = {"plain": lambda flip: 0 * flip, "conservative": lambda flip: flip, "robust": robust_smoothing}
# Okabe and Ito's colours, told apart by all common kinds of colour vision.
LOOKS = {"plain": ("#000000", "o"), "conservative": ("#0072B2", "^"), "robust": ("#D55E00", "s")}


def win_share(flip: jax.Array) -> jax.Array:
    """How often the first of each pair is seen to win: e + (1 − 2e) σ(r_i − r_j)."""
    return flip + (1 - 2 * flip) * jax.nn.sigmoid(jnp.asarray(TRUE[FIRST] - TRUE[SECOND]))


def fit(share: jax.Array, smoothing: jax.Array, steps: int) -> jax.Array:
    """Rewards of mean 0 for the observed share of wins of each pair."""
    rule = optax.adam(optax.cosine_decay_schedule(RATE, steps))

    def loss(rewards: jax.Array) -> jax.Array:
        first, second = rewards[FIRST], rewards[SECOND]
        won, lost = bradley_terry(first, second, smoothing), bradley_terry(second, first, smoothing)
        return jnp.mean(share * won + (1 - share) * lost)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        rewards, state = carry
        updates, state = rule.update(jax.grad(loss)(rewards), state)
        return (optax.apply_updates(rewards, updates), state), None

    rewards = jnp.zeros(len(TRUE))
    (rewards, _), _ = jax.lax.scan(step, (rewards, rule.init(rewards)), length=steps)
    return rewards - rewards.mean()


def experiment(seeds: int, steps: int) -> dict[str, np.ndarray]:
    """Fitted rewards, (methods, flips or sizes, seeds, answers), and those of infinitely many comparisons."""

    def smoothings(flips: jax.Array) -> jax.Array:
        return jnp.stack([method(flips) for method in METHODS.values()])

    def sampled(key: jax.Array, flip: jax.Array, size: jax.Array, smoothing: jax.Array) -> jax.Array:
        """All methods see the same comparisons of a seed."""
        return fit(jax.random.binomial(key, size, win_share(flip)) / size, smoothing, steps)

    over_seeds = jax.vmap(sampled, (0, None, None, None))
    # Cells of the experiment: every share of flips at the largest size, and every size at one share.
    cell_flips = jnp.array([*FLIPS, *[SIZE_FLIP] * len(SIZES)])
    cell_sizes = jnp.array([*[SIZES[-1]] * len(FLIPS), *SIZES], jnp.float32)
    over_cells = jax.vmap(over_seeds, (None, 0, 0, 0))
    over_methods = jax.vmap(over_cells, (None, None, None, 0))
    keys = jax.random.split(jax.random.key(0), seeds)
    fitted = np.asarray(jax.jit(over_methods)(keys, cell_flips, cell_sizes, smoothings(cell_flips)))

    flips = jnp.array(FLIPS)
    exact = jax.vmap(jax.vmap(lambda flip, smoothing: fit(win_share(flip), smoothing, steps)), (None, 0))
    expected = np.asarray(jax.jit(exact)(flips, smoothings(flips)))
    return {"by_flip": fitted[:, : len(FLIPS)], "by_size": fitted[:, len(FLIPS) :], "expected": expected}


def slope(rewards: np.ndarray) -> np.ndarray:
    """By how much fitted rewards grow for each unit of the true ones, over the last axis."""
    return rewards @ TRUE / (TRUE @ TRUE)


def rmse(rewards: np.ndarray) -> np.ndarray:
    """Root mean squared error of rewards, over answers and seeds."""
    return np.sqrt(np.square(rewards - TRUE).mean(axis=(-2, -1)))


def scores(results: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row for each method and share of flips."""
    rows = []
    for i, method in enumerate(METHODS):
        for j, flip in enumerate(FLIPS):
            slopes = slope(results["by_flip"][i, j])
            rows.append(
                {
                    "method": method,
                    "flipped": flip,
                    "slope": float(slopes.mean()),
                    "slope_deviation": float(slopes.std(ddof=1)) if len(slopes) > 1 else 0.0,
                    "slope_expected": float(slope(results["expected"][i, j])),
                    "rmse": float(rmse(results["by_flip"][i, j])),
                    "runs": slopes.astype(float).round(5).tolist(),
                }
            )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Slope (expected), then error, of each method: a row for each share of flips."""
    lines = [["flipped", *(f"{name}: slope (expected)" for name in METHODS), *(f"{name}: RMSE" for name in METHODS)]]
    for flip in FLIPS:
        of = [row for row in rows if row["flipped"] == flip]
        cells = [f"{r['slope']:.3f} ± {r['slope_deviation']:.3f} ({r['slope_expected']:.3f})" for r in of]
        lines.append([f"{flip:.0%}", *cells, *(f"{r['rmse']:.3f}" for r in of)])
    return table(lines)


def size_markdown(results: dict[str, np.ndarray]) -> str:
    """Error by the number of comparisons."""
    lines = [["comparisons of each pair", *METHODS]]
    errors = rmse(results["by_size"])
    lines += [[str(size), *(f"{x:.3f}" for x in errors[:, k])] for k, size in enumerate(SIZES)]
    return table(lines)


def draw(path: Path, results: dict[str, np.ndarray]) -> None:
    """Fitted against true rewards, the slope by the share of flips, the error by the number of comparisons."""
    figure = new_figure(15, 4.8, dpi=100)
    rewards, slopes, errors = figure.subplots(1, 3)
    shown = FLIPS.index(SIZE_FLIP)
    for i, (name, (colour, marker)) in enumerate(LOOKS.items()):
        fitted = results["by_flip"][i]
        style = {"color": colour, "capsize": 2, "fmt": marker, "ms": 5, "lw": 1}
        rewards.errorbar(TRUE, fitted[shown].mean(axis=0), fitted[shown].std(axis=0), label=name, **style)
        rewards.plot(TRUE, results["expected"][i, shown], color=colour, lw=1)
        each = slope(fitted)
        slopes.errorbar(FLIPS, each.mean(axis=1), each.std(axis=1), label=name, **style)
        slopes.plot(FLIPS, slope(results["expected"][i]), color=colour, lw=1)
        errors.loglog(SIZES, rmse(results["by_size"][i]), f"{marker}-", color=colour, ms=5, label=name)
    rewards.plot(TRUE, TRUE, ":", color="0.5", label="truth")
    rewards.set(title=f"{SIZE_FLIP:.0%} of the outcomes flipped", xlabel="true reward", ylabel="fitted reward")
    slopes.axhline(1, ls=":", color="0.5")
    slopes.set(title="Slope of fitted on true rewards", xlabel="share of flipped outcomes ε", ylabel="slope")
    slopes.set_ylim(0, 1.25)
    errors.set(title=f"{SIZE_FLIP:.0%} flipped: robust needs data", ylabel="RMSE (logarithmic)")
    errors.set_xlabel("comparisons of each pair (logarithmic)")
    errors.set_xticks(SIZES, [str(size) for size in SIZES])
    errors.minorticks_off()
    for axes in (rewards, slopes, errors):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    rewards.plot([], [], "-", color="0.4", lw=1, label="least expected loss")
    forests.one_legend(figure, [rewards])
    figure.savefig(path, format="png")


def run(args: Namespace) -> None:
    """From flags to the tables."""
    start = time.perf_counter()
    results = experiment(args.seeds, args.steps)
    rows = scores(results)
    print(markdown(rows))
    by_size = f"RMSE with {SIZE_FLIP:.0%} flipped:\n\n{size_markdown(results)}"
    print(f"\n{by_size}")
    print(f"\ntime: {time.perf_counter() - start:.0f} s")
    if args.out is not None:
        caption = (
            f"Rewards fitted to comparisons with flipped outcomes: mean ± standard deviation over {args.seeds} seeds "
            f"of the slope of fitted on true rewards, {SIZES[-1]} comparisons of each of {len(FIRST)} pairs. In "
            "brackets: the slope that minimises the expected loss."
        )
        errors = {name: rmse(results["by_size"][i]).round(5).tolist() for i, name in enumerate(METHODS)}
        record = {
            "settings": {"seeds": args.seeds, "steps": args.steps, "jax": jax.__version__},
            "rows": rows,
            "sizes": {"comparisons": SIZES, "flipped": SIZE_FLIP} | errors,
        }
        text = f"{caption}\n\n{markdown(rows)}\n\n{by_size}\n"
        write(args.out, "preferences", text, record, lambda path: draw(path, results))


def main(argv: Sequence[str] | None = None) -> None:
    """Whatever the user got wrong ends in one line and exit code 2."""
    parser = OneLineParser(
        prog="preferences.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("--seeds", type=COUNT, metavar="N", help="fits of each method and share (default 50)")
    parser.add_argument("--steps", type=COUNT, metavar="N", help="updates of each fit (default 600)")
    parser.add_argument("--quick", action="store_true", help="8 seeds and 300 updates unless said otherwise")
    parser.add_argument("--out", type=directory, metavar="DIR", help="write the figures and the picture here")
    args = parser.parse_args(argv)
    args.seeds = args.seeds or (8 if args.quick else 50)
    args.steps = args.steps or (300 if args.quick else 600)
    with parser.reporting("; nothing was written"), claimed(args.out):
        run(args)


if __name__ == "__main__":
    main()
