"""Time and memory of every kind of smoothing, against plain uniform smoothing of the same logits.

    python benchmarks/methods.py                          # 1024×32000 and 8192×1000, some minutes
    python benchmarks/methods.py --shapes 512x8000 --repeat 5

Value and gradient, in turns within one run; the fastest of the turns counts, for a busy machine only slows. Penalties
are added to the plain loss. `temporaries` is what the compiled program allocates beside its arguments and results,
`residuals` what the forward pass keeps, both in multiples of the logits. Tables (K, K) are run up to K = 4000.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from cross_entropy import parse_shape
from measure import machine, residual_bytes, table, temporary_bytes

from jax_ls import Rows, adaptive, noise, penalties, smoothed_cross_entropy

Loss = Callable[[jax.Array], jax.Array]
PLAIN = "uniform"


def methods(labels: jax.Array, size: int) -> dict[str, Loss]:
    """Each a function of the logits alone."""
    counts = jnp.arange(1.0, size + 1)
    plain = functools.partial(smoothed_cross_entropy, labels=labels, smoothing=0.1)
    losses: dict[str, Loss] = {
        PLAIN: plain,
        "prior (K,)": functools.partial(plain, prior=counts / counts.sum()),
        "adaptive.confidence": lambda z: plain(z, smoothing=adaptive.confidence(z, labels, 0.1)),
        "adaptive.entropy": lambda z: plain(z, smoothing=adaptive.entropy(z, 0.1)),
        "forward_correction": lambda z: noise.forward_correction(z, labels, 0.2),
        "backward_correction": lambda z: noise.backward_correction(z, labels, 0.2),
        "label_relaxation": lambda z: noise.label_relaxation(z, labels, 0.1),
        "bootstrap, soft": lambda z: noise.bootstrap(z, labels, 0.95),
        "bootstrap, hard": lambda z: noise.bootstrap(z, labels, 0.8, kind="hard"),
        "+ confidence_penalty": lambda z: plain(z) + penalties.confidence_penalty(z, 0.1),
        "+ jensen": lambda z: plain(z) + 0.1 * penalties.jensen(z, 0.3),
        "+ max_suppression": lambda z: plain(z) + 0.1 * penalties.max_suppression(z),
        "+ margin": lambda z: plain(z) + 0.1 * penalties.margin(z),
        "+ conditional": lambda z: plain(z) + 0.1 * penalties.conditional(z),
        "+ logit_norm": lambda z: plain(z) + 1e-3 * penalties.logit_norm(z),
        "+ z_loss": lambda z: plain(z) + 1e-4 * penalties.z_loss(z),
    }
    if size <= 4000:
        rows = jnp.full((size, size), 0.1 / size) + 0.9 * jnp.eye(size)
        losses["prior Rows"] = functools.partial(plain, prior=Rows(rows, labels))
        losses["forward_correction, matrix"] = lambda z: noise.forward_correction(z, labels, matrix=rows)
    return losses


def measure_case(shape: tuple[int, int], dtype: str, repeat: int) -> list[list[str]]:
    key_z, key_y = jax.random.split(jax.random.key(0))
    logits = (3 * jax.random.normal(key_z, shape)).astype(dtype)
    labels = jax.random.randint(key_y, shape[:1], 0, shape[1])
    losses = methods(labels, shape[1])
    compiled = {
        name: jax.jit(jax.value_and_grad(lambda z, loss=loss: loss(z).mean())).lower(logits).compile()
        for name, loss in losses.items()
    }
    seconds = dict.fromkeys(compiled, float("inf"))
    for _ in range(repeat + 1):
        for name, step in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(step(logits))
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return [
        [
            f"{shape[0]}×{shape[1]}",
            dtype,
            name,
            f"{1e3 * spent:.1f}",
            f"{spent / seconds[PLAIN]:.2f}×",
            f"{temporary_bytes(compiled[name]) / logits.nbytes:.3f}×",
            f"{residual_bytes(losses[name], logits) / logits.nbytes:.2f}×",
        ]
        for name, spent in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    shapes = [(1024, 32000), (8192, 1000)]
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=shapes, metavar="ROWSxCLASSES")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=15, help="how often each function is timed; the fastest counts")
    args = parser.parse_args()

    rows = [row for shape in args.shapes for row in measure_case(shape, args.dtype, args.repeat)]
    header = ["shape", "dtype", "method", "value+grad ms", "ratio", "temporaries", "residuals"]
    print(machine() + "; ratio to uniform smoothing\n")
    print(table(header, rows))


if __name__ == "__main__":
    main()
