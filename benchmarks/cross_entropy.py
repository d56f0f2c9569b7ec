"""Time, memory and error of the smoothed cross-entropy against what people use today, on the same arrays.

    python benchmarks/cross_entropy.py                    # the table of benchmarks/README.md, about two minutes
    python benchmarks/cross_entropy.py --shapes 128x10 --dtypes float32 --repeat 50

Every ratio is within one run. `residuals` is what the forward pass keeps, `temporaries` what the compiled program
allocates beside its arguments and results, both in multiples of the logits. `error` is the largest relative error
of a row's loss against float64 on the same logits. Torch joins in if it is installed; on a GPU so do torch.compile
and Liger, and two columns tell which share of the measured copy bandwidth was reached.
"""

import argparse
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain_losses
from measure import interleaved_times, machine, residual_bytes, table, temporary_bytes

import jax_ls

SMOOTHING = 0.1
ON_GPU = jax.default_backend() == "gpu"


def optax_one_hot(logits: jax.Array, labels: jax.Array, smoothing: jax.Array) -> jax.Array:
    hard = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(hard, smoothing.astype(logits.dtype)))


def optax_integer(logits: jax.Array, labels: jax.Array, smoothing: jax.Array) -> jax.Array:
    del smoothing
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def closed_form(logits: jax.Array, labels: jax.Array, smoothing: jax.Array) -> jax.Array:
    return plain_losses.smoothed(logits, plain_losses.Batch(labels, smoothing))


def jax_ls_prior(logits: jax.Array, labels: jax.Array, smoothing: jax.Array) -> jax.Array:
    counts = jnp.arange(1.0, logits.shape[-1] + 1)
    return jax_ls.smoothed_cross_entropy(logits, labels, smoothing, prior=counts / counts.sum())


JAX_LOSSES: dict[str, Callable[..., jax.Array]] = {
    "optax one-hot, smoothed": optax_one_hot,
    "optax integer, not smoothed": optax_integer,
    "closed form": closed_form,
    "jax_ls": jax_ls.smoothed_cross_entropy,
    "jax_ls, prior (K,)": jax_ls_prior,
}


@dataclass
class Case:
    """One set of arrays, the same for all peers."""

    logits: jax.Array
    labels: jax.Array

    @classmethod
    def make(cls, shape: tuple[int, int], dtype: str) -> "Case":
        key_z, key_y = jax.random.split(jax.random.key(0))
        logits = (3 * jax.random.normal(key_z, shape)).astype(dtype)
        return cls(logits, jax.random.randint(key_y, shape[:1], 0, shape[1]))

    def reference(self, smoothing: float, prior: np.ndarray | None) -> np.ndarray:
        """−Σ q log p in float64, a block of rows at a time."""
        losses = []
        step = max(1, 2**24 // self.logits.shape[1])
        for start in range(0, self.logits.shape[0], step):
            z = np.asarray(self.logits[start : start + step], np.float64)
            y = np.asarray(self.labels[start : start + step])
            z -= z.max(-1, keepdims=True)
            log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
            soft = log_p.mean(-1) if prior is None else log_p @ prior
            losses.append(-(1 - smoothing) * log_p[np.arange(len(y)), y] - smoothing * soft)
        return np.concatenate(losses)


def torch_losses(case: Case) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Forward and value-and-grad of torch's own loss, if torch is installed; compiled ones too on a GPU."""
    if importlib.util.find_spec("torch") is None:
        return {}
    torch = importlib.import_module("torch")
    device = "cuda" if ON_GPU and torch.cuda.is_available() else "cpu"
    z = torch.from_numpy(np.array(case.logits.astype(jnp.float32))).to(device)
    z = z.to(getattr(torch, case.logits.dtype.name)).requires_grad_()
    y = torch.from_numpy(np.array(case.labels, np.int64)).to(device)
    eager = functools.partial(torch.nn.functional.cross_entropy, label_smoothing=SMOOTHING, reduction="sum")
    losses: dict[str, Callable[..., Any]] = {"torch": eager}
    if device == "cuda":
        losses["torch.compile"] = torch.compile(eager)
        if importlib.util.find_spec("liger_kernel") is not None:
            liger = importlib.import_module("liger_kernel.transformers")
            losses["Liger"] = liger.LigerCrossEntropyLoss(label_smoothing=SMOOTHING, reduction="sum")

    def forward(loss: Callable[..., Any]) -> None:
        with torch.no_grad():
            loss(z, y)
        if device == "cuda":
            torch.cuda.synchronize()

    def both(loss: Callable[..., Any]) -> None:
        # Liger's kernel writes its gradient over its input, so it is handed a copy to spoil.
        (gradient,) = torch.autograd.grad(loss(z.clone() if loss is losses.get("Liger") else z, y), z)
        del gradient
        if device == "cuda":
            torch.cuda.synchronize()

    return {name: (functools.partial(forward, loss), functools.partial(both, loss)) for name, loss in losses.items()}


def copy_seconds_per_byte() -> float:
    """Seconds to move a byte, from a copy of a gigabyte: one read and one write."""
    x = jnp.zeros(2**28, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return interleaved_times({"copy": lambda: copy(x)}, 20)["copy"] / (2 * x.nbytes)


def prepare(name: str, case: Case) -> tuple[Callable[[], Any], Callable[[], Any], list[str]]:
    """Forward and value-and-grad of a JAX loss, compiled, and its cells for memory and error."""
    loss, epsilon = JAX_LOSSES[name], jnp.float32(SMOOTHING)
    arguments = (case.logits, case.labels, epsilon)

    def mean(z: jax.Array, y: jax.Array, e: jax.Array) -> jax.Array:
        return loss(z, y, e).mean()

    forward = jax.jit(mean).lower(*arguments).compile()
    both = jax.jit(jax.value_and_grad(mean)).lower(*arguments).compile()
    kept = residual_bytes(lambda z: loss(z, case.labels, epsilon), case.logits)
    counts = np.arange(1.0, case.logits.shape[1] + 1)
    expected = case.reference(
        0.0 if loss is optax_integer else SMOOTHING, counts / counts.sum() if loss is jax_ls_prior else None
    )
    error = np.max(np.abs(np.asarray(jax.jit(loss)(*arguments), np.float64) - expected) / np.abs(expected))
    cells = [f"{part / case.logits.nbytes:.2f}×" for part in (temporary_bytes(both), kept)]
    return functools.partial(forward, *arguments), functools.partial(both, *arguments), [*cells, f"{error:.0e}"]


def measure_case(case: Case, repeat: int, per_byte: float | None) -> list[list[str]]:
    forward, both, cells = {}, {}, {}
    for name in JAX_LOSSES:
        forward[name], both[name], cells[name] = prepare(name, case)
    for name, functions in torch_losses(case).items():
        forward[name], both[name] = functions
    times = [interleaved_times(functions, repeat) for functions in (forward, both)]

    shape = f"{case.logits.shape[0]}×{case.logits.shape[1]}"
    rows = []
    for name in forward:
        row = [shape, case.logits.dtype.name, name]
        for seconds in times:
            row += [f"{1e3 * seconds[name]:.2f}", f"{seconds[name] / seconds['optax one-hot, smoothed']:.2f}×"]
        row += cells.get(name, ["", "", ""])
        if per_byte is not None:
            floor = case.logits.nbytes * per_byte
            row += [f"{floor / times[0][name]:.0%}", f"{3 * floor / times[1][name]:.0%}"]
        rows.append(row)
    return rows


def parse_shape(text: str) -> tuple[int, int]:
    try:
        rows, classes = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ROWSxCLASSES, 1024x32000 for one, got {text!r}") from None
    if rows < 1 or classes < 1:
        raise argparse.ArgumentTypeError(f"expected two positive numbers, got {text!r}")
    return rows, classes


def main() -> None:
    shapes = [(8192, 128256), (32768, 32000)] if ON_GPU else [(1024, 32000), (65536, 1000), (128, 10)]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=shapes, metavar="ROWSxCLASSES")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=15, help="how often each function is timed; the median counts")
    args = parser.parse_args()

    per_byte = copy_seconds_per_byte() if ON_GPU else None
    header = ["shape", "dtype", "loss", "forward ms", "ratio", "value+grad ms", "ratio", "temporaries", "residuals"]
    header += ["error"] + (["forward of copy rate", "value+grad of copy rate"] if ON_GPU else [])
    rows = []
    for shape in args.shapes:
        for dtype in args.dtypes:
            rows += measure_case(Case.make(shape, dtype), args.repeat, per_byte)
    print(machine() + f"; optax {optax.__version__}; ratio to optax one-hot\n")
    print(table(header, rows))


if __name__ == "__main__":
    main()
