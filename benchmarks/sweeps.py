"""A sweep of ε and seeds against the same runs one after the other, each jitted before.

pip install -e ".[bench]" && python benchmarks/sweeps.py
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import machine, table

from jax_ls import mean, smoothed_cross_entropy
from jax_ls.sweeps import sweep

SMOOTHING = np.linspace(0.0, 0.35, 8, dtype=np.float32)
SEEDS = 4
EXAMPLES, FEATURES, CLASSES, BATCH = 4000, 64, 10, 64


def data() -> tuple[jax.Array, jax.Array]:
    """Ten overlapping clouds."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, EXAMPLES)
    centres = rng.normal(size=(CLASSES, FEATURES)) * 0.3
    inputs = centres[labels] + rng.normal(size=(EXAMPLES, FEATURES))
    return jnp.asarray(inputs, dtype=jnp.float32), jnp.asarray(labels, dtype=jnp.int32)


def trainer(width: int, steps: int) -> Callable[[jax.Array, jax.Array], dict[str, jax.Array]]:
    """A network 64-width-width-10, Adam, batches of 64."""
    inputs, labels = data()
    rule = optax.adam(1e-3)

    def predict(params: Any, x: jax.Array) -> jax.Array:
        for kernel, bias in params[:-1]:
            x = jax.nn.relu(x @ kernel + bias)
        return x @ params[-1][0] + params[-1][1]

    def train(key: jax.Array, smoothing: jax.Array) -> dict[str, jax.Array]:
        init_key, shuffle_key = jax.random.split(key)
        sizes = (FEATURES, width, width, CLASSES)
        params = [
            (jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, jnp.zeros(n))
            for k, m, n in zip(jax.random.split(init_key, 3), sizes, sizes[1:], strict=False)
        ]

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            rows = jax.random.randint(key, (BATCH,), 0, EXAMPLES)

            def loss(params: Any) -> jax.Array:
                return mean(smoothed_cross_entropy(predict(params, inputs[rows]), labels[rows], smoothing))

            updates, state = rule.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, rule.init(params)), jax.random.split(shuffle_key, steps))
        logits = predict(params, inputs)
        return {
            "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == labels),
            "nll": mean(smoothed_cross_entropy(logits, labels, 0.0)),
        }

    return train


def seconds_of(function: Callable[[], Any]) -> np.ndarray:
    """By the clock, and of all cores: a busy machine adds to the first alone."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(function())
    return np.array([time.perf_counter() - wall, time.process_time() - cpu])


def measure_case(width: int, steps: int, repeat: int) -> list[list[str]]:
    """Each way in turns; the fastest of each counts."""
    train = trainer(width, steps)
    keys, epsilons = [jax.random.key(seed) for seed in range(SEEDS)], [jnp.asarray(e) for e in SMOOTHING]
    single = jax.jit(train)

    def loop() -> Any:
        return [jax.block_until_ready(single(key, epsilon)) for epsilon in epsilons for key in keys]

    ways: dict[str, Callable[[], Any]] = {
        "one after the other": loop,
        "sweep": lambda: sweep(train, SMOOTHING, SEEDS).metrics,
        "sweep, batch=8": lambda: sweep(train, SMOOTHING, SEEDS, batch=8).metrics,
    }
    first = {
        "one after the other": seconds_of(lambda: single(keys[0], epsilons[0])),
        "sweep": seconds_of(ways["sweep"]),
        "sweep, batch=8": seconds_of(ways["sweep, batch=8"]),
    }
    spent: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    for _ in range(repeat):
        for name, way in ways.items():
            spent[name].append(seconds_of(way))
    best = {name: np.min(times, axis=0) for name, times in spent.items()}
    shape, rows = f"{FEATURES}-{width}-{width}-{CLASSES}", []
    for name, (wall, cpu) in best.items():
        ratio = best[name] / best["one after the other"]
        once = 1 / (len(SMOOTHING) * SEEDS) if name == "one after the other" else 1
        compiling = first[name][1] - cpu * once
        rows.append(
            [shape, name, f"{wall:.2f}", f"{ratio[0]:.2f}×", f"{cpu:.2f}", f"{ratio[1]:.2f}×", f"{compiling:.1f}"]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--widths", nargs="+", type=int, default=[16, 32, 64, 128], help="of the two hidden layers")
    parser.add_argument("--steps", type=int, default=1000, help="of each training")
    parser.add_argument("--repeat", type=int, default=5, help="how often each way is timed; the fastest counts")
    args = parser.parse_args()
    # A device a core: XLA on CPU splits no work as small as this.
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    rows = [row for width in args.widths for row in measure_case(width, args.steps, args.repeat)]
    print(f"{machine()}; {len(SMOOTHING)} ε × {SEEDS} seeds, {args.steps} steps each\n")
    print(table(["network", "how", "s", "ratio", "CPU s", "ratio", "compiling, CPU s"], rows))


if __name__ == "__main__":
    main()
