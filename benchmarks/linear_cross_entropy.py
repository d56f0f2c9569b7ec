"""Time and memory of the smoothed loss of an output layer against what people use today, on the same arrays.

    python benchmarks/linear_cross_entropy.py             # the table of benchmarks/README.md, about five minutes
    python benchmarks/linear_cross_entropy.py --shapes 512x64x4096 --repeat 5
    python benchmarks/linear_cross_entropy.py --compile-for h100 v5p h100:8 v5p:2x2x2     # no device is needed

Value and gradients in hidden and kernel. Every ratio is within one run; `temporaries` is what the compiled program
allocates beside arguments and results. Torch joins in if it is installed; on a GPU so do torch.compile, Liger's fused
loss and Apple's cut-cross-entropy (which does not smooth), where installed, and a column tells the share of the rate
of a large matrix product that the three products reached.

With --compile-for nothing runs: the programs are compiled for the devices named, and for meshes of them with the
kernel split over the tokens' devices (FSDP) and over the classes' too. Cycles are the TPU compiler's estimate. `sent`
counts an all-gather by its result and a reduce-scatter by its operand. tokamax joins in if it is installed.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from measure import interleaved_times, machine, table, temporary_bytes

import jax_ls

SMOOTHING = 0.1
Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


class Case(NamedTuple):
    """One set of arrays, the same for all peers."""

    hidden: jax.Array
    kernel: jax.Array
    labels: jax.Array

    @classmethod
    def make(cls, tokens: int, features: int, classes: int, dtype: str) -> Case:
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


def smoothed(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, **options: Any) -> jax.Array:
    return jax_ls.linear_cross_entropy(hidden, kernel, labels, smoothing=SMOOTHING, **options)


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
    "jax_ls, class blocks": functools.partial(smoothed, plan="classes"),
}


def torch_losses(case: Case) -> dict[str, Callable[[], Any]]:
    """Value and gradients of torch's losses, as far as they are installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
    torch = importlib.import_module("torch")
    device = "cuda" if on_gpu() and torch.cuda.is_available() else "cpu"

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


COMPILED_SHAPES = [(8192, 4096, 128256), (8192, 2304, 256000), (32768, 4096, 128256)]
COMPILED_LOSSES = {
    "optax one-hot, smoothed": one_hot,
    "optax integer, not smoothed": integer,
    "checkpoint + lax.map, smoothed": recomputed,
    "jax_ls": smoothed,
    "jax_ls, ε = 0": jax_ls.linear_cross_entropy,
    "jax_ls, prior (K,)": with_prior,
    "jax_ls, token chunks": functools.partial(smoothed, plan="tokens"),
    "jax_ls, class blocks": functools.partial(smoothed, plan="classes"),
}
# Mesh axes, their sizes of eight devices, and the spec of the kernel (D, K); tokens lie over "data".
MESHES = {
    "FSDP along D": (("data",), (8,), PartitionSpec("data", None)),
    "FSDP along K": (("data",), (8,), PartitionSpec(None, "data")),
    "FSDP and tensor parallel": (("data", "model"), (4, 2), PartitionSpec("data", "model")),
}


def tokamax_loss() -> dict[str, Loss]:
    """tokamax's loss, which does not smooth, where it is installed."""
    if importlib.util.find_spec("tokamax") is None:
        return {}
    fused = importlib.import_module("tokamax").linear_softmax_cross_entropy_loss
    return {"tokamax, not smoothed": lambda hidden, kernel, labels: fused(hidden, labels, kernel, reduction="mean")}


def cost(device: str, loss: Loss, shape: tuple[int, int, int], dtype: str) -> Any:
    """Figures of value and gradients in hidden and kernel, for one device."""
    compile_for = importlib.import_module("compile_for")
    place, (tokens, features, classes) = compile_for.devices(device)[0], shape
    shapes = ((tokens, features), dtype), ((features, classes), dtype), ((tokens,), "int32")
    return compile_for.figures(jax.value_and_grad(loss, (0, 1)), *(compile_for.array(*x, place) for x in shapes))


def cost_on_mesh(topology: str, program: str, layout: str, shape: tuple[int, int, int], dtype: str) -> tuple[Any, int]:
    """Figures of the same for eight devices, each with the tokens of `shape`, and the bytes that a device sends."""
    compile_for = importlib.import_module("compile_for")
    devices, (tokens, features, classes) = np.array(compile_for.devices(topology)), shape
    names, sizes, spec = MESHES[layout]
    axis_type = AxisType.Explicit if "Explicit" in program else AxisType.Auto
    mesh = Mesh(devices.reshape(sizes), names, axis_types=(axis_type,) * len(names))
    by_token, laid = NamedSharding(mesh, PartitionSpec("data", None)), NamedSharding(mesh, spec)
    arguments = [
        compile_for.array((len(devices) * tokens, features), dtype, by_token),
        compile_for.array((features, classes), dtype, laid),
        compile_for.array((len(devices) * tokens,), "int32", NamedSharding(mesh, PartitionSpec("data"))),
    ]
    loss: Loss = one_hot
    if program != "plain":
        named = {"hidden_spec": by_token.spec, "kernel_spec": spec} if program == "Auto" else {}
        plan = "tokens" if "chunks" in program else "auto"
        loss = functools.partial(smoothed, plan=plan, **named)
    whole = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(whole, (by_token, laid)))
    with jax.set_mesh(mesh):
        found = compile_for.figures(step, *arguments)
    sent = sum(x.bytes * (sizes[0] if kind == "reduce-scatter" else 1) for kind, x in found.collectives.items())
    return found, sent


def compiled_rows(device: str, shapes: list[tuple[int, int, int]], dtype: str, only: list[str]) -> list[list[str]]:
    """Programs for one device: temporaries and cycles, and their ratios to optax's one-hot route."""
    rows = []
    for shape in shapes:
        base = None
        for name, loss in (COMPILED_LOSSES | tokamax_loss()).items():
            if only and not any(word in name for word in [*only, "one-hot"]):
                continue
            row = [device, "×".join(map(str, shape)), name]
            try:
                found = cost(device, loss, shape, dtype)
            except Exception as error:  # a peer that a compiler refuses
                rows.append([*row, str(error).splitlines()[0][:60], "", "", ""])
                continue
            base = base or found
            row += [f"{found.temporaries / 2**20:.0f}", f"{found.temporaries / base.temporaries:.3f}"]
            row += [f"{found.cycles / 1e6:.1f}", f"{found.cycles / base.cycles:.2f}"] if found.cycles else ["", ""]
            rows.append(row)
            print("| " + " | ".join(row) + " |", file=sys.stderr, flush=True)
    return rows


def mesh_rows(topology: str, shape: tuple[int, int, int], dtype: str) -> list[list[str]]:
    """Programs for eight devices: temporaries, bytes sent and cycles, and their ratios to the plain route."""
    rows = []
    for layout in MESHES:
        base = None
        for program in ("plain", "Auto", "Explicit", "Explicit, token chunks"):
            found, sent = cost_on_mesh(topology, program, layout, shape, dtype)
            base = base or (found, sent)
            row = [topology, layout, program, f"{found.temporaries / 2**20:.0f}"]
            row += [f"{found.temporaries / base[0].temporaries:.3f}", f"{sent / 2**20:.0f}", f"{sent / base[1]:.2f}"]
            row += [f"{found.cycles / 1e6:.1f}", f"{found.cycles / base[0].cycles:.2f}"] if found.cycles else ["", ""]
            rows.append(row)
            print("| " + " | ".join(row) + " |", file=sys.stderr, flush=True)
    return rows


def print_compiled(devices: list[str], shapes: list[tuple[int, int, int]], dtype: str, only: list[str]) -> None:
    header = ["device", "tokens×D×K", "loss", "temporaries MiB", "of one-hot", "cycles M", "of one-hot"]
    if rows := [row for device in devices if ":" not in device for row in compiled_rows(device, shapes, dtype, only)]:
        print(table(header, rows) + "\n")
    header = [
        "devices",
        "kernel",
        "program",
        "temporaries MiB",
        "of plain",
        "sent MiB",
        "of plain",
        "cycles M",
        "of plain",
    ]
    if rows := [row for device in devices if ":" in device for row in mesh_rows(device, shapes[0], dtype)]:
        print(table(header, rows) + "\n")
    print(f"{dtype}; jax {jax.__version__}, optax {optax.__version__}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="TOKENSxFEATURESxCLASSES")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=5, help="how often each function is timed; the median counts")
    parser.add_argument("--compile-for", nargs="+", metavar="DEVICE", help="h100, v5p, a mesh: h100:8, v5p:2x2x2")
    parser.add_argument("--losses", nargs="+", default=[], metavar="WORD", help="of the compiled ones, those so named")
    args = parser.parse_args()

    if args.compile_for:
        shapes = args.shapes or COMPILED_SHAPES
        print_compiled(args.compile_for, shapes, args.dtype or "bfloat16", args.losses)
        return
    gpu = on_gpu()
    shapes = [(8192, 2304, 256000), (8192, 4096, 128256)] if gpu else [(4096, 512, 32000), (2048, 256, 128000)]
    dtype = args.dtype or ("bfloat16" if gpu else "float32")
    rate = product_rate(dtype) if gpu else None
    header = ["tokens×D×K", "dtype", "loss", "value+grad s", "ratio", "temporaries MiB", "of one-hot"]
    header += ["of product rate"] if gpu else []
    rows = [
        row
        for shape in args.shapes or shapes
        for row in measure_case(Case.make(*shape, dtype=dtype), args.repeat, rate)
    ]
    print(machine() + f"; optax {optax.__version__}; ratio to optax one-hot\n")
    print(table(header, rows))


if __name__ == "__main__":
    main()
