"""What the loss of an output layer holds, costs and sends on TPUs and GPUs, by their compilers; no device is needed.

See test_accelerators.py for what to install. Everywhere else this file is skipped.
"""

import functools
import importlib
import sys
from pathlib import Path

import jax
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
compile_for = importlib.import_module("compile_for")
if (ABSENT := compile_for.missing("v5p")) and compile_for.missing("h100"):
    pytest.skip(ABSENT, allow_module_level=True)
bench = importlib.import_module("linear_cross_entropy")

LLAMA, GEMMA, MANY = (8192, 4096, 128256), (8192, 2304, 256000), (32768, 4096, 128256)
# In multiples of optax's one-hot route on one device, of the plain route on a mesh.
TEMPORARIES = {("h100", LLAMA): 0.15, ("h100", GEMMA): 0.12, ("h100", MANY): 0.12}
TEMPORARIES |= {("v5p", shape): 0.12 for shape in (LLAMA, GEMMA, MANY)}
CYCLES = 1.25
TEMPORARIES_ON_MESH = 0.25
# A kernel that is split along D may be gathered block by block, in both sweeps.
SENT = {"by blocks": 2.0, "else": 1.5}


def on(device):
    return pytest.param(device, marks=pytest.mark.skipif(bool(compile_for.missing(device)), reason=f"no {device}"))


@functools.cache
def cost(device, name, shape):
    return bench.cost(device, bench.COMPILED_LOSSES[name], shape, "bfloat16")


@functools.cache
def cost_on_mesh(topology, program, layout):
    return bench.cost_on_mesh(topology, program, layout, LLAMA, "bfloat16")


@pytest.mark.parametrize("device", [on("h100"), on("v5p")])
@pytest.mark.parametrize("shape", [LLAMA, GEMMA, MANY], ids=str)
def test_a_small_part_of_the_plain_routes_memory(device, shape):
    ours, plain = cost(device, "jax_ls", shape), cost(device, "optax one-hot, smoothed", shape)
    assert ours.temporaries <= TEMPORARIES[device, shape] * plain.temporaries
    if plain.cycles:
        assert ours.cycles <= CYCLES * plain.cycles


@pytest.mark.parametrize("device", [on("v5p")])
def test_what_smoothing_and_a_prior_cost(device):
    ours, hard = cost(device, "jax_ls", LLAMA), cost(device, "jax_ls, ε = 0", LLAMA)
    assert ours.cycles <= 1.03 * hard.cycles
    assert cost(device, "jax_ls, prior (K,)", LLAMA).cycles <= 1.05 * ours.cycles


@pytest.mark.parametrize("device", [on("v5p")])
def test_large_chunks_of_many_tokens_cost_a_tenth_more_than_the_plain_route(device):
    loss = functools.partial(bench.smoothed, plan="tokens", chunk_size=8192)
    ours, plain = bench.cost(device, loss, MANY, "bfloat16"), cost(device, "optax one-hot, smoothed", MANY)
    assert ours.cycles <= 1.10 * plain.cycles
    assert ours.temporaries <= 0.65 * plain.temporaries


@pytest.mark.parametrize("program", ["Auto", "Explicit", "Explicit, token chunks"])
@pytest.mark.parametrize("layout", bench.MESHES)
@pytest.mark.parametrize("topology", [on("h100:8"), on("v5p:2x2x2")])
def test_what_a_mesh_holds_and_sends(topology, layout, program):
    (ours, sent), (plain, plain_sent) = cost_on_mesh(topology, program, layout), cost_on_mesh(topology, "plain", layout)
    bar = SENT["by blocks" if "along D" in layout and "chunks" not in program else "else"]
    assert sent <= bar * plain_sent
    if "chunks" not in program or "along K" in layout:
        assert ours.temporaries <= TEMPORARIES_ON_MESH * plain.temporaries


@pytest.mark.parametrize("device", [on("h100"), on("v5p")])
def test_a_kernel_of_sixteen_bits_has_no_gradient_of_thirty_two(device):
    """In class blocks, whichever way the kernel lies: no second copy of its gradient."""
    tokens, features, classes = shape = (2048, 2048, 65664)
    place = compile_for.devices(device)[0]
    for transposed in (False, True):
        loss = functools.partial(bench.smoothed, plan="classes", transposed=transposed)
        lies = (classes, features) if transposed else (features, classes)
        arguments = ((tokens, features), "bfloat16"), (lies, "bfloat16"), ((tokens,), "int32")
        found = compile_for.figures(
            jax.value_and_grad(loss, (0, 1)), *(compile_for.array(*x, place) for x in arguments)
        )
        assert found.temporaries < 2 * features * classes, (shape, transposed)
