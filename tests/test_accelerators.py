"""What each loss allocates, moves and sends on TPUs and GPUs, as their compilers say; no device is needed.

    pip install -e ".[test]"                    and what `compile_for.missing` names, then
    pytest tests/test_accelerators.py

`.ci/run` does so in an environment of its own. Everywhere else this file is skipped. Nothing is run here: values are
tested on the CPU.
"""

import argparse
import functools
import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ls import smoothed_cross_entropy

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
compile_for = importlib.import_module("compile_for")
if (ABSENT := compile_for.missing("v5e")) and compile_for.missing("h100"):
    pytest.skip(ABSENT, allow_module_level=True)
accelerators = importlib.import_module("accelerators")
plain = importlib.import_module("plain_losses")

# In multiples of the logits. No program reads them less than once for the value, and once more to write the gradient.
PASSES = {"value": 1.05, "both": 3.05}
TEMPORARIES = 0.02
TEMPORARIES_ON_MESH = 0.05
# Estimated cycles of value and gradient on a TPU, in multiples of a peer's.
CYCLES = {accelerators.ONE_HOT: 0.45, accelerators.INTEGER: 0.60}

# Bars that are not reached, by device, dtype and row: passes of value and gradient, of the value, temporaries. The
# figures are what was reached, so that none gets worse. The instructions that cause it:
# - squared_logits: `optimization_barrier`, with which `jax.checkpoint` parts the backward from the forward pass. The
#   plain formula reads the logits once for both.
# - T (K, K) on a TPU: `gather_fusion` writes the rows of T out, in float32, and once more in the backward pass. Beside
#   them lie the numbers that are kept for each row.
# - smoothed_ctc_loss: the `reduce` of KL(u ‖ p) is one more read than that of the plain formula, which takes lse from
#   `optax.ctc_loss`. In bfloat16 that function gets float32 logits: its fusions share the `convert`, which is written.
MISSED = {
    **{(d, t, "squared_logits"): (3, None, 0.02) for d in ("h100", "v5e") for t in ("float32", "bfloat16")},
    ("v5e", "float32", "forward_correction, T (K, K)"): (15, None, 2.06),
    ("v5e", "bfloat16", "forward_correction, T (K, K)"): (21, None, 3.1),
    ("v5e", "float32", "smoothed_ctc_loss"): (10, None, 0.02),
    ("v5e", "bfloat16", "smoothed_ctc_loss"): (19, None, 4.03),
    ("h100", "float32", "smoothed_ctc_loss"): (12, None, 0.05),
    ("h100", "bfloat16", "smoothed_ctc_loss"): (20, None, 4.05),
}
# The cycles of 65,536×1000 in bfloat16 on a v5e: 0.456 of optax's one-hot route.
MISSED_CYCLES = {("v5e", (65536, 1000), "bfloat16", accelerators.ONE_HOT): 0.46}


def reached(device, dtype, name, both, value, temporaries):
    """The bars of a row, or what was reached where that is more."""
    passes, passes_of_value, held = MISSED.get((device, dtype, name), (0, None, 0))
    return {
        "both": max(both, passes + 0.05),
        "value": None if value is None else max(value, (passes_of_value or 0) + 0.05),
        "temporaries": max(temporaries, held),
    }


WIDE, WIDEST, LONG = (8192, 32000), (8192, 128256), (65536, 1000)


def on(device, *values):
    """A row of a table, skipped where the compiler for `device` is not installed."""
    absent = compile_for.missing(device.split(":")[0])
    return pytest.param(device, *values, marks=pytest.mark.skipif(absent is not None, reason=str(absent)))


@functools.cache
def cost(device, loss, shape, dtype, axis=-1):
    return accelerators.cost_on(device, loss, shape, dtype, axis)


def excess(name, found, both, value=None, temporaries=TEMPORARIES):
    """What is above its bar, in words, and the instructions that move most."""
    figures = {
        "passes of value and gradient": (found.both.passes, both, found.both),
        "temporaries": (found.temporaries, temporaries, found.both),
    }
    if value is not None:
        figures["passes of the value"] = (found.value.passes, value, found.value)
    above = []
    for figure, (x, bar, figures_of) in figures.items():
        if x > bar:
            most = sorted(figures_of.transfers, key=lambda transfer: -transfer.read - transfer.written)[:4]
            above.append(f"{name}, {figure}: {x:.3f}, bar {bar:.3f}; {most}")
    return above


# optax divides by K in the logits' dtype: 128,256 is no number of float16.
LIMIT = [
    *[on(device, WIDE, dtype) for device in ("v5e", "h100") for dtype in ("float32", "bfloat16", "float16")],
    *[on(device, WIDEST, dtype) for device in ("v5e", "h100") for dtype in ("float32", "bfloat16")],
    *[on(device, LONG, dtype) for device in ("v5e", "h100") for dtype in ("float32", "bfloat16", "float16")],
    *[on(device, WIDE, dtype) for device in ("v5p", "v6e") for dtype in ("float32", "bfloat16")],
]


@pytest.mark.parametrize(("device", "shape", "dtype"), LIMIT)
def test_the_loss_reads_its_logits_once_and_once_more_for_their_gradient(device, shape, dtype):
    above = []
    for name, loss in accelerators.OURS.items():
        found = cost(device, loss, shape, dtype)
        above += excess(name, found, PASSES["both"], PASSES["value"])
        for peer, bar in CYCLES.items():
            if found.both.cycles is not None:
                ratio = found.both.cycles / cost(device, accelerators.PEERS[peer], shape, dtype).both.cycles
                bar = MISSED_CYCLES.get((device, shape, dtype, peer), bar)
                above += [f"{name}, cycles ÷ {peer}: {ratio:.3f}, bar {bar}"] if ratio > bar else []
    assert not above, "\n".join(above)


@pytest.mark.parametrize("method", accelerators.METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", [on("v5e"), on("h100")])
def test_no_loss_makes_more_passes_than_its_plain_formula(device, dtype, method):
    # A row of a table is gathered for each example, on a TPU into an array of its own.
    by_table = "(K, K)" in method.name
    ours, plainly = (cost(device, loss, LONG if by_table else WIDE, dtype) for loss in (method.loss, method.plain))
    temporaries = max(TEMPORARIES, plainly.temporaries) if by_table else TEMPORARIES
    above = excess(
        method.name, ours, **reached(device, dtype, method.name, plainly.both.passes + 0.05, None, temporaries)
    )
    assert not above, "\n".join(above)


@pytest.mark.parametrize("option", accelerators.OPTIONS, ids=lambda option: option.name)
@pytest.mark.parametrize("device", [on("v5e"), on("h100")])
def test_an_option_costs_no_pass_over_the_logits(device, option):
    dtype, temporaries = "bfloat16", TEMPORARIES
    found = cost(device, option.loss, WIDE, dtype, option.axis)
    value, both = accelerators.least_passes(option, dtype)
    if "table" in option.reads:
        plainly = cost(device, plain.prior_rows, WIDE, dtype)
        value, both, temporaries = None, plainly.both.passes, max(temporaries, plainly.temporaries)
    bars = reached(device, dtype, option.name, both + 0.05, value and value + 0.05, temporaries)
    above = excess(option.name, found, **bars)
    assert not above, "\n".join(above)


@pytest.mark.parametrize("device", [on("v5e"), on("h100")])
def test_the_parts_of_a_loss_come_from_its_one_pass(device):
    logits, batch = accelerators.arguments(WIDE, "bfloat16", compile_for.devices(device)[0])

    def parts(z, b):
        given = {"where": b.where, "class_weights": b.class_weights, "z_loss": 1e-4, "reduction": "mean"}
        found = smoothed_cross_entropy(z, b.labels, b.smoothing, return_parts=True, **given)
        return found.loss, found

    value = compile_for.figures(parts, logits, batch, unit=logits)
    both = compile_for.figures(jax.value_and_grad(parts, has_aux=True), logits, batch, unit=logits)
    assert value.passes <= PASSES["value"]
    assert both.passes <= PASSES["both"]
    assert both.temporaries <= TEMPORARIES * logits.size * logits.dtype.itemsize


@pytest.mark.parametrize("mode", accelerators.MODES)
@pytest.mark.parametrize("layout", accelerators.LAYOUTS)
@pytest.mark.parametrize("mesh", [on("v5e:2x4"), on("h100:8")])
def test_on_a_mesh_a_few_numbers_a_row_are_sent(mesh, layout, mode):
    shape, dtype = WIDE, "bfloat16"
    found = accelerators.cost_on_mesh(mesh, mode, layout, shape, dtype)
    rows = shape[0] // {"batch": 8, "classes": 1, "batch and classes": 2}[layout]
    for figures in (found.value, found.both):
        for kind, sent in figures.collectives.items():
            # At most eight numbers a row, of each of eight devices.
            assert sent.bytes / sent.count <= 8 * 8 * 4 * rows, (kind, sent)
    above = excess(f"{layout}, {mode}", found, PASSES["both"], PASSES["value"], TEMPORARIES_ON_MESH)
    assert not above, "\n".join(above)


@pytest.mark.parametrize("size", [19, 59, 1000])
@pytest.mark.parametrize("device", [on("h100")])
def test_columns_are_not_transposed_or_written_out(device, size):
    """Of maps (batch, K, pixels). The few classes that no part takes are one more read, as the counter sees it."""
    place = compile_for.devices(device)[0]
    logits = compile_for.array((8, size, 65536), "bfloat16", place)
    batch = plain.Batch(compile_for.array((8, 65536), "int32", place), compile_for.array((), "float32", place))
    found = accelerators.Cost(lambda z, b: smoothed_cross_entropy(z, b.labels, b.smoothing, axis=1), logits, (batch,))
    # Four sums of each part of the classes, and the loss of each pixel.
    above = excess("axis=1", found, 4.05, 2.05, 4 * 4 * 4 / (2 * size) + TEMPORARIES)
    assert not above, "\n".join(above)


@pytest.mark.parametrize("device", [on("v5e"), on("h100")])
def test_passes_are_counted(device):
    """Of programs whose passes are plain to see, or the bars above would hold for a counter that sees nothing."""
    x = compile_for.array((4096, 8192), "float32", compile_for.devices(device)[0])
    labels = compile_for.array((4096,), "int32", compile_for.devices(device)[0])

    def four_times(x):
        return jax.lax.scan(lambda carry, _: (carry * 2 + 1, None), x, length=4)[0]

    def picked(x, labels):
        return jnp.take_along_axis(x, labels[:, None], axis=-1)

    def rows(x, labels):
        return x[labels].sum(axis=-1)

    def narrow_rows(x, labels):
        return x.astype(jnp.bfloat16)[labels].astype(jnp.float32).sum(axis=-1)

    def softmax_of_sorted(x):
        return jax.nn.softmax(jnp.sort(x, axis=-1), axis=-1)

    assert compile_for.figures(jnp.sum, x).passes == pytest.approx(1, abs=0.01)
    assert compile_for.figures(lambda x: x + 1, x).passes == pytest.approx(2, abs=0.01)
    assert compile_for.figures(four_times, x).passes >= 8
    assert compile_for.figures(picked, x, labels).passes == pytest.approx(0, abs=0.01)
    assert compile_for.figures(rows, x, labels).passes >= 1
    assert compile_for.figures(narrow_rows, x, labels).passes >= 1
    held = compile_for.figures(softmax_of_sorted, x)
    assert held.passes >= 5
    assert held.temporaries >= x.size * 4
    assert (held.cycles is None) == (device == "h100")


@pytest.mark.parametrize("topology", [on("v5e:2x4"), on("h100:8")])
def test_collectives_are_seen(topology):
    mesh = Mesh(compile_for.devices(topology), ("model",), axis_types=(AxisType.Auto,))
    x = compile_for.array((1024, 4096), "float32", NamedSharding(mesh, P(None, "model")))
    gathered = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
    found = compile_for.figures(gathered, x).collectives
    assert sum(sent.bytes for sent in found.values()) >= 4 * x.size
    assert compile_for.figures(lambda x: x + 1, x).collectives == {}


def test_what_is_missing_is_said_in_one_line():
    lines = [compile_for.missing(device) for device in ("v5e", "h100", "v5e:2x4", "h100:8")]
    assert all(line is None or ("pip install" in line and "\n" not in line) for line in lines)


# The train steps of the examples compile unchanged for every device, one and eight.


def example(name):
    """A module of examples/, which must come before benchmarks/: both have a `methods`."""
    for package in ("flax", "orbax.checkpoint", "tqdm"):
        pytest.importorskip(package)
    sys.path.insert(0, str(ROOT / "examples"))
    return importlib.import_module(name)


def placed(tree, place):
    """The arrays of a tree as arguments to compile with; `place` is a sharding, or a tree of them."""
    places = place if jax.tree.structure(place) == jax.tree.structure(tree) else jax.tree.map(lambda _: place, tree)
    return jax.tree.map(lambda x, where: compile_for.array(x.shape, x.dtype, where), tree, places)


DEVICES = [on(device) for device in ("v5e", "v5e:2x4", "h100", "h100:8")]


@pytest.mark.parametrize("device", DEVICES)
def test_the_step_of_mnist_compiles(device):
    mnist = example("mnist")
    nnx = importlib.import_module("flax.nnx")
    mesh = Mesh(one_or_eight(device), ("batch",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
    model = mnist.Network(nnx.Rngs(0))
    optimizer, loss = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param), nnx.metrics.Average("loss")
    plan, state = nnx.split((model, optimizer, loss))

    def step(state, *batch):
        objects = nnx.merge(plan, state)
        mnist.train_step(*objects, *batch)
        return nnx.state(objects)

    batch = [compile_for.array((128, *shape), dtype, split) for shape, dtype in (((28, 28), "uint8"), ((), "int32"))]
    counted, smoothing = compile_for.array((128,), "bool", split), compile_for.array((), "float32", whole)
    found = compile_for.figures(step, placed(state, whole), smoothing, *batch, counted)
    if device.endswith(("2x4", ":8")):
        parameters = sum(4 * x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        # Gradients are summed over the devices once; the batch's images are not sent.
        assert parameters <= sum(sent.bytes for sent in found.collectives.values()) <= 1.1 * parameters
    else:
        assert found.collectives == {}


@pytest.mark.parametrize("device", DEVICES)
def test_the_step_of_the_language_model_compiles_and_holds_no_logits(device):
    script, network = example("language_model"), example("transformer")
    _, args = script.parse(["--small", "--batch-size", "128"])
    counts = np.ones(32_000, np.int64)
    text = argparse.Namespace(
        counts=counts, unigram=lambda: (counts / counts.sum()).astype(np.float32), exists=lambda: counts > 0
    )

    # A network is made on the CPU, and its step then compiled for devices that take no arrays.
    trainer = script.Trainer(args, text, network.Devices((1, 1, 1), jax.devices()[:1]))
    devices = one_or_eight(device)
    trainer.devices = there = network.Devices((2, 2, 2) if len(devices) == 8 else (1, 1, 1), devices)
    shardings = there.of_state(trainer.first_state, len(counts))
    state, words = (
        placed(trainer.first_state, shardings),
        placed(trainer.words, there.of_state(trainer.words, len(counts))),
    )
    tokens = compile_for.array((args.batch_size, args.seq_len), "int32", there.tokens)
    step = jax.jit(trainer._step, donate_argnums=0, out_shardings=(shardings, there.replicated))
    smoothing = compile_for.array((), "float32", there.replicated)
    with jax.set_mesh(there.mesh), jax.numpy_dtype_promotion("standard"):  # which optax asks for
        found = compile_for.figures(step, state, tokens, tokens, smoothing, words)
    logits = 4 * args.batch_size * args.seq_len * len(counts) // len(devices)
    assert found.temporaries < logits


def one_or_eight(device):
    """All devices of a mesh; of a kind that is named without one, the first."""
    devices = compile_for.devices(device)
    return devices if ":" in device else devices[:1]
