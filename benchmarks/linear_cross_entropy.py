"""Time and memory of the smoothed loss of an output layer against what people use today, on the same arrays.

    python benchmarks/linear_cross_entropy.py             # the table of benchmarks/README.md, about five minutes
    python benchmarks/linear_cross_entropy.py --shapes 512x64x4096 --repeat 5

Value and gradients in hidden and kernel. Every ratio is within one run; `temporaries` is what the compiled program
allocates beside arguments and results. Torch joins in if it is installed; on a GPU so do torch.compile, Liger's fused
loss and Apple's cut-cross-entropy (which does not smooth), where installed, and a column tells the share of the rate
of a large matrix product that the three products reached.
"""

import argparse
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import interleaved_times, machine, table, temporary_bytes

import jax_ls

SMOOTHING = 0.1
ON_GPU = jax.default_backend() == "gpu"
Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Case(NamedTuple):
    """One set of arrays, the same for all peers."""

    hidden: jax.Array
    kernel: jax.Array
    labels: jax.Array

    @classmethod
    def make(cls, tokens: int, features: int, classes: int, dtype: str) -> "Case":
        keys = jax.random.split(jax.random.key(0), 3)
        hidden = jax.random.normal(keys[0], (tokens, features)).astype(dtype)
        kernel = (jax.random.normal(keys[1], (features, classes)) / features**0.5).astype(dtype)
        return cls(hidden, kernel, jax.random.randint(keys[2], (tokens,), 0, classes))


def one_hot(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    logits = hidden @ kernel
    hard = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(hard, SMOOTHING)).mean()


def integer(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels).mean()


def recomputed(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """What people write by hand: checkpointed chunks under lax.map, 256 tokens each."""

    @jax.checkpoint
    def chunk(operands: tuple[jax.Array, jax.Array]) -> jax.Array:
        return one_hot(operands[0], kernel, operands[1])

    size = min(256, len(labels))
    return jax.lax.map(chunk, (hidden.reshape(-1, size, hidden.shape[-1]), labels.reshape(-1, size))).mean()


def smoothed(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    return jax_ls.linear_cross_entropy(hidden, kernel, labels, smoothing=SMOOTHING)


def with_prior(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    counts = jnp.arange(1.0, kernel.shape[1] + 1)
    return jax_ls.linear_cross_entropy(hidden, kernel, labels, smoothing=SMOOTHING, prior=counts / counts.sum())


JAX_LOSSES: dict[str, Loss] = {
    "optax one-hot, smoothed": one_hot,
    "optax integer, not smoothed": integer,
    "checkpoint + lax.map, smoothed": recomputed,
    "jax_ls, ε = 0": jax_ls.linear_cross_entropy,
    "jax_ls": smoothed,
    "jax_ls, prior (K,)": with_prior,
}


def torch_losses(case: Case) -> dict[str, Callable[[], Any]]:
    """Value and gradients of torch's losses, as far as they are installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
    torch = importlib.import_module("torch")
    device = "cuda" if ON_GPU and torch.cuda.is_available() else "cpu"

    def tensor(x: jax.Array) -> Any:
        made = torch.from_numpy(np.array(x.astype(jnp.float32))).to(device)
        return made.to(getattr(torch, x.dtype.name)).requires_grad_()

    # Torch keeps output layers as (K, D).
    hidden, weight = tensor(case.hidden), tensor(case.kernel.T)
    labels = torch.from_numpy(np.array(case.labels, np.int64)).to(device)
    smooth = functools.partial(torch.nn.functional.cross_entropy, label_smoothing=SMOOTHING)

    def eager(hidden: Any, weight: Any) -> Any:
        return smooth(hidden @ weight.T, labels)

    losses = {"torch": eager}
    if device == "cuda":
        losses["torch.compile"] = torch.compile(eager)
        if importlib.util.find_spec("liger_kernel") is not None:
            liger = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
            fused = liger(label_smoothing=SMOOTHING)
            losses["Liger fused"] = lambda hidden, weight: fused(weight, hidden, labels)
        if importlib.util.find_spec("cut_cross_entropy") is not None:
            cut = importlib.import_module("cut_cross_entropy").linear_cross_entropy
            losses["cut-cross-entropy, not smoothed"] = lambda hidden, weight: cut(hidden, weight, labels)

    def both(loss: Callable[..., Any]) -> None:
        gradients = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
        del gradients
        if device == "cuda":
            torch.cuda.synchronize()

    return {name: functools.partial(both, loss) for name, loss in losses.items()}


def product_rate(dtype: str) -> float:
    """Floating-point operations a second that a large matrix product reaches."""
    x = jnp.ones((8192, 8192), dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * 8192**3 / interleaved_times({"product": lambda: product(x)}, 10)["product"]


def measure_case(case: Case, repeat: int, rate: float | None) -> list[list[str]]:
    functions: dict[str, Callable[[], Any]] = {}
    memory: dict[str, int] = {}
    for name, loss in JAX_LOSSES.items():
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*case).compile()
        functions[name], memory[name] = functools.partial(compiled, *case), temporary_bytes(compiled)
    seconds = interleaved_times(functions | torch_losses(case), repeat)

    base = "optax one-hot, smoothed"
    shape = (*case.hidden.shape, case.kernel.shape[1])
    rows = []
    for name, spent in seconds.items():
        row = ["×".join(map(str, shape)), case.hidden.dtype.name, name, f"{spent:.3f}", f"{spent / seconds[base]:.2f}×"]
        row += [f"{memory[name] / 2**20:.0f}", f"1/{memory[base] / memory[name]:.1f}"] if name in memory else ["", ""]
        rows.append(row + ([f"{6 * np.prod(shape, dtype=float) / spent / rate:.0%}"] if rate else []))
    return rows


def parse_shape(text: str) -> tuple[int, int, int]:
    try:
        tokens, features, classes = (int(part) for part in text.split("x"))
    except ValueError:
        message = f"expected TOKENSxFEATURESxCLASSES, 4096x512x32000 for one, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
    if min(tokens, features, classes) < 1 or tokens % min(256, tokens):
        raise argparse.ArgumentTypeError(f"expected positive numbers, tokens a multiple of 256 or fewer, got {text!r}")
    return tokens, features, classes


def main() -> None:
    on_gpu, on_cpu = [(8192, 2304, 256000), (8192, 4096, 128256)], [(4096, 512, 32000), (2048, 256, 128000)]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, default=on_gpu if ON_GPU else on_cpu, metavar="TOKENSxFEATURESxCLASSES"
    )
    parser.add_argument("--dtype", default="bfloat16" if ON_GPU else "float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=5, help="how often each function is timed; the median counts")
    args = parser.parse_args()

    rate = product_rate(args.dtype) if ON_GPU else None
    header = ["tokens×D×K", "dtype", "loss", "value+grad s", "ratio", "temporaries MiB", "of one-hot"]
    header += ["of product rate"] if ON_GPU else []
    rows = [
        row for shape in args.shapes for row in measure_case(Case.make(*shape, dtype=args.dtype), args.repeat, rate)
    ]
    print(machine() + f"; optax {optax.__version__}; ratio to optax one-hot\n")
    print(table(header, rows))


if __name__ == "__main__":
    main()
