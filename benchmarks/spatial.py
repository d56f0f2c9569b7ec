"""Time and memory of spatially varying smoothing against the dense route: a convolution of one-hot labels.

    python benchmarks/spatial.py                    # the table of benchmarks/README.md, under a minute
    python benchmarks/spatial.py --shape 256x256 --classes 150 --repeat 30

All peers smooth the same map of square regions and feed the same logits to a cross-entropy. Every ratio is within one
run, to the convolution. `temporaries` is what the compiled value-and-grad allocates beside its arguments and results,
in multiples of the logits. `error` is the largest relative error of a pixel's loss against float64.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from measure import interleaved_times, machine, table, temporary_bytes

import jax_ls
from jax_ls.priors import spatial

REGION = 16


def kernel() -> np.ndarray:
    """½ on the centre, ½ over its eight neighbours as a Gaussian of σ = 1 has it."""
    steps = np.arange(-1, 2)
    g = np.exp(-(np.square(steps[:, None]) + np.square(steps)) / 2)
    g[1, 1] = 0
    g /= 2 * g.sum()
    g[1, 1] = 0.5
    return g


def dense_cross_entropy(logits: jax.Array, q: jax.Array) -> jax.Array:
    return -jnp.sum(q * jax.nn.log_softmax(logits), axis=-1)


def one_hot_padded(label_map: jax.Array, classes: int) -> jax.Array:
    return jnp.pad(jax.nn.one_hot(label_map, classes), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")


def convolution(logits: jax.Array, label_map: jax.Array) -> jax.Array:
    classes = logits.shape[-1]
    weights = jnp.asarray(np.broadcast_to(kernel()[..., None, None], (3, 3, 1, classes)), logits.dtype)
    q = jax.lax.conv_general_dilated(
        one_hot_padded(label_map, classes),
        weights,
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=classes,
    )
    return dense_cross_entropy(logits, q)


def shifts(logits: jax.Array, label_map: jax.Array) -> jax.Array:
    _, height, width, classes = logits.shape
    padded, g = one_hot_padded(label_map, classes), kernel()
    q = sum(float(g[i, j]) * padded[:, i : i + height, j : j + width] for i, j in np.ndindex(3, 3))
    return dense_cross_entropy(logits, jnp.asarray(q))


def sparse(logits: jax.Array, label_map: jax.Array) -> jax.Array:
    return jax_ls.cross_entropy(logits, spatial(label_map))


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "one-hot convolution": convolution,
    "one-hot, nine shifts": shifts,
    "jax_ls.priors.spatial": sparse,
    "jax_ls, uniform smoothing": jax_ls.smoothed_cross_entropy,
}


def reference(logits: jax.Array, label_map: jax.Array) -> np.ndarray:
    """−Σ q log p in float64."""
    z, y, g = np.asarray(logits, np.float64), np.asarray(label_map), kernel()
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    padded = np.pad(y, ((0, 0), (1, 1), (1, 1)), mode="edge")
    total = np.zeros(y.shape)
    for i, j in np.ndindex(3, 3):
        beside = padded[:, i : i + y.shape[1], j : j + y.shape[2]]
        total -= g[i, j] * np.take_along_axis(log_p, beside[..., None], axis=-1)[..., 0]
    return total


def measure(logits: jax.Array, label_map: jax.Array, repeat: int) -> list[list[str]]:
    forward, both, cells = {}, {}, {}
    arguments, expected = (logits, label_map), reference(logits, label_map)
    for name, loss in LOSSES.items():

        def mean(z: jax.Array, y: jax.Array, loss: Callable[..., jax.Array] = loss) -> jax.Array:
            return loss(z, y).mean()

        compiled = [jax.jit(f).lower(*arguments).compile() for f in (mean, jax.value_and_grad(mean))]
        forward[name], both[name] = (lambda run=run: run(*arguments) for run in compiled)
        losses = np.asarray(jax.jit(loss)(*arguments), np.float64)
        error = "" if loss is jax_ls.smoothed_cross_entropy else f"{np.max(np.abs(losses / expected - 1)):.0e}"
        cells[name] = [f"{temporary_bytes(compiled[1]) / logits.nbytes:.2f}×", error]
    times = [interleaved_times(functions, repeat) for functions in (forward, both)]
    rows = []
    for name in LOSSES:
        row = [name]
        for seconds in times:
            row += [f"{1e3 * seconds[name]:.1f}", f"{seconds[name] / seconds['one-hot convolution']:.2f}×"]
        rows.append(row + cells[name])
    return rows


def parse_shape(text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH, 512x512 for one, got {text!r}") from None
    if height < 1 or width < 1:
        raise argparse.ArgumentTypeError(f"expected two positive numbers, got {text!r}")
    return height, width


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shape", type=parse_shape, default=(512, 512), metavar="HEIGHTxWIDTH")
    parser.add_argument("--classes", type=int, default=19, help="19 are those of Cityscapes")
    parser.add_argument("--repeat", type=int, default=15, help="how often each function is timed; the median counts")
    args = parser.parse_args()

    height, width = args.shape
    key_z, key_y = jax.random.split(jax.random.key(0))
    regions = jax.random.randint(key_y, (1, -(-height // REGION), -(-width // REGION)), 0, args.classes)
    label_map = jnp.repeat(jnp.repeat(regions, REGION, axis=1), REGION, axis=2)[:, :height, :width]
    logits = jax.random.normal(key_z, (*label_map.shape, args.classes))
    header = ["smoothing", "forward ms", "ratio", "value+grad ms", "ratio", "temporaries", "error"]
    print(machine() + f"; one map {height}×{width}, {args.classes} classes, float32; ratio to the convolution\n")
    print(table(header, measure(logits, label_map, args.repeat)))


if __name__ == "__main__":
    main()
