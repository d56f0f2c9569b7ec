"""Learns a value function from noisy returns by squared error, two-hot and HL-Gauss; the true values are known.

    pip install -e ".[examples]"
    python examples/studies/value_function.py --out runs/values

After Farebrother et al. 2024, "Stop Regressing: Training Value Functions via Classification for Scalable Deep RL",
their test of noisy targets in small. A network sees 2,000 states of FrozenLake's 8 x 8 map, each with the return of one
episode and uniform noise upon it, and is judged by the values that dynamic programming gives. All seeds and settings
of a method train in one compiled program: 27 seconds of CPU.

Expect the three to end level without noise, at the error of averaging over each state; in its first 200 updates squared
error is far ahead. With noise the categorical losses err a tenth to a sixth less in the end, and a quarter less early
on at the most noise: all three go on to fit it, so stopping early helps whatever the loss. With rewards a hundred times
as large squared error takes twice as long, and then is at least as good. Two-hot does no worse than HL-Gauss here,
unlike in the paper's large networks. --out keeps value_function.md, .json and .png.
"""

from __future__ import annotations

import interrupts

if __name__ == "__main__":
    interrupts.end_in_one_line()

import functools
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from files import claimed
from flags import COUNT, OneLineParser, directory
from frozen_lake import Lake, frozen_lake, returns
from tables import new_figure, table, write

import jax_ls
from jax_ls.values import Support, expected_value, hl_gauss, two_hot

DESCRIPTION = "Learn values of FrozenLake from noisy returns by squared error, two-hot and HL-Gauss."
EXAMPLES = """\
examples:
  python examples/studies/value_function.py                     the table
  python examples/studies/value_function.py --out runs/values   the picture and the figures too
  python examples/studies/value_function.py --quick             a glimpse: 2 seeds, few updates
"""

EPISODES, HIDDEN, BATCH, RATE = 2000, 64, 64, 1e-3
BINS, PADDING = 51, 3
POINTS = 10  # on a learning curve


class Setting(NamedTuple):
    """What returns go through before they are learned: scale · (return + noise · uniform(−1, 1))."""

    noise: Any
    scale: Any


SETTINGS = {
    "no noise": Setting(0.0, 1.0),
    "noise ±1": Setting(1.0, 1.0),
    "noise ±3": Setting(3.0, 1.0),
    "rewards × 100": Setting(0.0, 100.0),
}


class Method(NamedTuple):
    """How many numbers the network gives for a state, their loss against returns, and the value they stand for."""

    outputs: int
    loss: Callable[[jax.Array, jax.Array, Support], jax.Array]
    value: Callable[[jax.Array, Support], jax.Array]


METHODS = {
    "squared error": Method(1, lambda z, t, _: jnp.square(z[:, 0] - t), lambda z, _: z[:, 0]),
    "two-hot": Method(BINS, lambda z, t, s: jax_ls.cross_entropy(z, two_hot(t, s)), expected_value),
    "HL-Gauss": Method(BINS, lambda z, t, s: jax_ls.cross_entropy(z, hl_gauss(t, s, padding=PADDING)), expected_value),
}
# Okabe and Ito's colours, told apart by all common kinds of colour vision.
LOOKS = {"squared error": ("#000000", "o"), "two-hot": ("#0072B2", "^"), "HL-Gauss": ("#D55E00", "s")}


def network(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Two hidden layers."""
    for layer in ("1", "2"):
        x = jax.nn.relu(x @ params["w" + layer] + params["b" + layer][None])
    return x @ params["w3"] + params["b3"][None]


def first_params(key: jax.Array, outputs: int) -> dict[str, jax.Array]:
    sizes = (16, HIDDEN, HIDDEN, outputs)
    initial = jax.nn.initializers.he_normal()
    params = {}
    for i, (one, fan_in, fan_out) in enumerate(zip(jax.random.split(key, 3), sizes[:-1], sizes[1:], strict=True), 1):
        params |= {f"w{i}": initial(one, (fan_in, fan_out)), f"b{i}": jnp.zeros(fan_out)}
    # Near 0 at first: all bins alike, and values that need not be unlearned.
    return params | {"w3": 0.1 * params["w3"]}


def data(lake: Lake, key: jax.Array, setting: Setting) -> tuple[jax.Array, jax.Array]:
    """States and what is learned of them."""
    walk_key, noise_key = jax.random.split(key)
    states, clean = returns(lake, walk_key, EPISODES)
    noise = jax.random.uniform(noise_key, clean.shape, minval=-1, maxval=1)
    return states, setting.scale * (clean + setting.noise * noise)


def error_of(lake: Lake, values: jax.Array) -> jax.Array:
    """Root mean squared error over the states that an episode may start from."""
    return jnp.sqrt(jnp.mean(jnp.square((values - lake.values.astype(np.float32))[lake.starts])))


def averages(lake: Lake, key: jax.Array, setting: Setting) -> jax.Array:
    """The error of a table that holds the mean target of each state: what no sharing among states leaves."""
    states, targets = data(lake, jax.random.split(key, 3)[0], setting)
    count = jnp.zeros(len(lake.values)).at[states].add(1)
    means = jnp.zeros(len(lake.values)).at[states].add(targets) / jnp.maximum(count, 1)
    return error_of(lake, means / setting.scale)


def train(lake: Lake, method: Method, steps: int, key: jax.Array, setting: Setting) -> tuple[jax.Array, jax.Array]:
    """Errors along the way, (POINTS,), and the values at the end. Data and batches depend on the key alone."""
    data_key, init_key, batch_key = jax.random.split(key, 3)
    states, targets = data(lake, data_key, setting)
    # Returns lie in [0, 1]; the outer bins are for the tails of HL-Gauss.
    low, high = -setting.noise * setting.scale, (1 + setting.noise) * setting.scale
    support = Support(low, high, BINS - 2 * PADDING).pad(PADDING)
    rule = optax.adam(RATE)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, EPISODES)

        def loss(params: dict[str, jax.Array]) -> jax.Array:
            return method.loss(network(params, lake.features[states[rows]]), targets[rows], support).mean()

        updates, state = rule.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    def block(carry: Any, keys: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        carry, _ = jax.lax.scan(step, carry, keys)
        values = method.value(network(carry[0], lake.features), support) / setting.scale
        return carry, (error_of(lake, values), values)

    params = first_params(init_key, method.outputs)
    keys = jax.random.split(batch_key, (POINTS, steps // POINTS))
    _, (errors, values) = jax.lax.scan(block, (params, rule.init(params)), keys)
    return errors, values[-1]


def experiment(lake: Lake, seeds: int, steps: int) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """By method, one program each: errors (settings, seeds, POINTS) and values (settings, seeds, states).

    And the errors of plain averages, (settings, seeds).
    """
    keys = jax.random.split(jax.random.key(0), seeds)
    settings = Setting(*(jnp.array(column) for column in zip(*SETTINGS.values(), strict=True)))

    def everywhere(run: Callable[..., Any]) -> Any:
        """All settings, and all seeds in each."""
        program = jax.jit(jax.vmap(jax.vmap(run, (0, None)), (None, 0)))
        return jax.tree.map(np.asarray, program(keys, settings))

    trained = {name: everywhere(functools.partial(train, lake, method, steps)) for name, method in METHODS.items()}
    return trained, everywhere(functools.partial(averages, lake))


def mean_and_error(errors: np.ndarray) -> tuple[float, float]:
    """Over seeds, and the standard error of that mean; 0 for one seed."""
    return float(errors.mean()), float(errors.std(ddof=1) / len(errors) ** 0.5) if len(errors) > 1 else 0.0


def in_digits(errors: np.ndarray) -> list[float]:
    """Of each seed, for JSON."""
    return errors.astype(float).round(5).tolist()


def scores(trained: dict[str, tuple[np.ndarray, np.ndarray]], table_errors: np.ndarray) -> list[dict[str, Any]]:
    """Errors a fifth of the way and at the end; a row for each setting and method."""
    rows = []
    for i, setting in enumerate(SETTINGS):
        for method, (errors, _) in trained.items():
            (early, early_error), (last, last_error) = (
                mean_and_error(errors[i, :, at]) for at in (POINTS // 5 - 1, -1)
            )
            row = {"setting": setting, "method": method, "early": early, "early_standard_error": early_error}
            end = {"last": last, "last_standard_error": last_error, "runs": in_digits(errors[i, :, -1])}
            rows.append(row | end)
        mean, error = mean_and_error(table_errors[i])
        row = {"setting": setting, "method": "mean of each state", "last": mean, "last_standard_error": error}
        rows.append(row | {"runs": in_digits(table_errors[i])})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """A row for each setting; errors early → at the end."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [["RMSE, early → end", *methods]]
    for setting in SETTINGS:
        of = {row["method"]: row for row in rows if row["setting"] == setting}
        cells = []
        for row in of.values():
            early = f"{row['early']:.3f} → " if "early" in row else ""
            cells.append(f"{early}{row['last']:.3f} ± {row['last_standard_error']:.3f}")
        lines.append([setting, *cells])
    return table(lines)


def draw(path: Path, lake: Lake, trained: dict[str, tuple[np.ndarray, np.ndarray]], steps: int) -> None:
    """Learning curves, and the values that one seed learns from noise beside the true ones."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure = new_figure(16, 8, dpi=90)
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    curves, maps = halves
    x = np.arange(1, POINTS + 1) * (steps // POINTS)
    charts = curves.subplots(1, len(SETTINGS), sharey=True)
    for i, (setting, axes) in enumerate(zip(SETTINGS, charts, strict=True)):
        for name, (errors, _) in trained.items():
            colour, marker = LOOKS[name]
            mean, spread = np.array([mean_and_error(column) for column in errors[i].T]).T
            axes.plot(x, mean, color=colour, marker=marker, ms=4, label=name)
            band = "± standard error over seeds" if name == "HL-Gauss" else None
            axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0, label=band)
        axes.set(title=setting, xlabel="updates", ylabel="" if i else "RMSE / reward", xlim=(0, None))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    charts[0].set_ylim(0, None)
    charts[0].legend(edgecolor="none", framealpha=0.85)

    shown = list(SETTINGS).index("noise ±1")
    pictures = {"true values": lake.values} | {name: values[shown, 0] for name, (_, values) in trained.items()}
    side = int(len(lake.values) ** 0.5)
    shades = ScalarMappable(Normalize(-0.2, 0.8), "cividis")
    for axes, (title, values) in zip(maps.subplots(1, len(pictures)), pictures.items(), strict=True):
        axes.imshow(np.where(lake.over, np.nan, values).reshape(side, side), cmap=shades.cmap, norm=shades.norm)
        axes.set(title=title if title == "true values" else f"{title}, noise ±1, one seed", xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    maps.colorbar(shades, ax=maps.axes, label="value (blank: holes and goal)", extend="both")
    figure.savefig(path, format="png")


def run(args: Namespace) -> None:
    """From flags to the table."""
    start = time.perf_counter()
    lake = frozen_lake()
    trained, table_errors = experiment(lake, args.seeds, args.steps)
    rows = scores(trained, table_errors)
    print(markdown(rows))
    print(f"\ntime: {time.perf_counter() - start:.0f} s")
    if args.out is not None:
        caption = (
            f"Error of values learned from {EPISODES} noisy returns on FrozenLake 8 x 8, in units of the reward, after "
            f"a fifth of {args.steps} updates → after all: mean ± standard error of {args.seeds} seeds."
        )
        record = {"settings": {"seeds": args.seeds, "steps": args.steps, "jax": jax.__version__}, "rows": rows}
        text = f"{caption}\n\n{markdown(rows)}\n"
        write(args.out, "value_function", text, record, lambda path: draw(path, lake, trained, args.steps))


def main(argv: Sequence[str] | None = None) -> None:
    """Whatever the user got wrong ends in one line and exit code 2."""
    parser = OneLineParser(
        prog="value_function.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("--seeds", type=COUNT, metavar="N", help="trainings of each method and setting (default 6)")
    parser.add_argument("--steps", type=COUNT, metavar="N", help=f"updates, at least {POINTS} (default 2000)")
    parser.add_argument("--quick", action="store_true", help="2 seeds and 200 updates unless said otherwise")
    parser.add_argument("--out", type=directory, metavar="DIR", help="write the figures and the picture here")
    args = parser.parse_args(argv)
    args.seeds = args.seeds or (2 if args.quick else 6)
    args.steps = args.steps or (200 if args.quick else 2000)
    if args.steps < POINTS:
        parser.error(f"--steps: expected at least {POINTS}, got {args.steps}")
    with parser.reporting("; nothing was written"), claimed(args.out):
        run(args)


if __name__ == "__main__":
    main()
