"""Prints the tables of large-vocabularies.md: programs are compiled for an H100 and for eight of them, and never run.

python docs/large_vocabularies.py          # pip install what `compile_for.missing("h100")` names first
"""

import functools
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import compile_for
import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ls

# D and K.
MODELS = {
    "Llama 3 8B": (4096, 128256),
    "Llama 3 70B": (8192, 128256),
    "Gemma 2 2B": (2304, 256000),
    "Qwen 2.5 7B": (3584, 152064),
}
# Tokens of a device: 256 devices of 4,096 make a million tokens a step.
TOKENS = (4096, 32768)
MESHES = {
    "FSDP along D": (("data",), (8,), P("data", None)),
    "FSDP along K": (("data",), (8,), P(None, "data")),
    "FSDP + TP": (("data", "model"), (4, 2), P("data", "model")),
}


def one_hot(hidden, kernel, labels):
    logits = hidden @ kernel
    hard = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(hard, 0.1)).mean()


def linear(hidden, kernel, labels, **options):
    return jax_ls.linear_cross_entropy(hidden, kernel, labels, smoothing=0.1, **options)


PROGRAMS = {
    "one-hot": one_hot,
    "token chunks": functools.partial(linear, plan="tokens"),
    "class blocks": functools.partial(linear, plan="classes"),
}


def arguments(tokens, features, classes, at):
    shapes = ((tokens, features), "bfloat16"), ((features, classes), "bfloat16"), ((tokens,), "int32")
    return [compile_for.array(*shape, place) for shape, place in zip(shapes, at, strict=True)]


def on_one_device():
    (device,) = compile_for.devices("h100")
    print("| model | tokens of a device | " + " | ".join(PROGRAMS) + " |")
    print("|---|---|" + "---|" * len(PROGRAMS))
    for model, (features, classes) in MODELS.items():
        for tokens in TOKENS:
            given = arguments(tokens, features, classes, [device] * 3)
            found = [compile_for.figures(jax.value_and_grad(f, (0, 1)), *given) for f in PROGRAMS.values()]
            print(f"| {model} | {tokens:,} | " + " | ".join(f"{x.temporaries / 2**30:.2f}" for x in found) + " |")


def on_meshes():
    devices = np.array(compile_for.devices("h100:8"))
    print("| model | mesh | " + " | ".join(f"{name}: GiB held, sent" for name in PROGRAMS) + " |")
    print("|---|---|" + "---|" * len(PROGRAMS))
    for model, (features, classes) in MODELS.items():
        for layout, (names, sizes, spec) in MESHES.items():
            cells = []
            for name, f in PROGRAMS.items():
                kind = AxisType.Auto if name == "one-hot" else AxisType.Explicit
                mesh = Mesh(devices.reshape(sizes), names, axis_types=(kind,) * len(names))
                at = [NamedSharding(mesh, s) for s in (P("data", None), spec, P("data"))]
                step = jax.jit(jax.value_and_grad(f, (0, 1)), out_shardings=(NamedSharding(mesh, P()), tuple(at[:2])))
                with jax.set_mesh(mesh):
                    found = compile_for.figures(step, *arguments(8 * 8192, features, classes, at))
                weight = {"reduce-scatter": sizes[0]}  # an all-gather by its result, a reduce-scatter by its operand
                sent = sum(x.bytes * weight.get(kind, 1) for kind, x in found.collectives.items())
                cells.append(f"{found.temporaries / 2**30:.2f}, {sent / 2**30:.2f}")
            print(f"| {model} | {layout} | " + " | ".join(cells) + " |")


on_one_device()
print()
on_meshes()
