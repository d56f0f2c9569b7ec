"""Compiles for TPUs and NVIDIA GPUs that are not here, and reads in the program what their compilers decided.

    tpu = compile_for.devices("v5e")[0]
    logits = compile_for.array((8192, 32000), "bfloat16", tpu)
    print(compile_for.figures(jax.value_and_grad(loss), logits))

JAX can compile for a device that it only has a description of: it takes libtpu or the CUDA plugin, and no device.
Nothing runs, so values are tested on the CPU. Import this module before any JAX backend starts. It keeps JAX on the
CPU: otherwise JAX looks for the devices whose compilers are installed.

How far to trust the figures. Temporaries and collectives are what the program allocates and sends. Passes count each
operand and each result of an instruction once. Of an array that is gathered from they count the part that is taken, and
of an array that is updated in place nothing. They do not see what a kernel reads twice. Cycles are the estimate of the
TPU's compiler, good for ratios. For a GPU no kernel is tuned by trial.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # the CUDA plugin reports that there is no GPU

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Sharding, SingleDeviceSharding
from measure import temporary_bytes

jax.config.update("jax_platforms", "cpu")

# One name for each kind of device; a mesh of several is named by its topology, "v5e:2x4" or "h100:8".
SINGLE = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "h100": "h100:1"}

# libtpu asks Google's metadata server where it runs, unless it is told.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# An H100 SXM as XLA describes it (openxla/xla, xla/backends/gpu/target_config/specs).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation" driver_version: "13.0.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# No kernel can be tried where no device is; and the flags of a test run on the CPU are not those of users.
GPU_OPTIONS: dict[str, str | bool] = {"xla_gpu_autotune_level": "0", "xla_backend_optimization_level": "3"}


@dataclass(frozen=True)
class Collective:
    """All messages of one kind in one call: how many, and the bytes of their results on one device."""

    count: int
    bytes: int


@dataclass(frozen=True)
class Transfer:
    """What an instruction reads and writes of large arrays, in bytes."""

    instruction: str
    read: int
    written: int


@dataclass(frozen=True)
class Figures:
    """What a compiled program takes.

    Args:
      temporaries: bytes that it allocates beside arguments and results, on one device.
      passes: bytes of large arrays that it reads and writes, in multiples of the array that was asked about.
      cycles: the compiler's estimate; None on a GPU.
      collectives: what it sends, by kind.
      transfers: the instructions that make the passes.
    """

    temporaries: int
    passes: float
    cycles: int | None
    collectives: Mapping[str, Collective]
    transfers: tuple[Transfer, ...]


def missing(device: str) -> str | None:
    """Returns what must be installed before `device` can be compiled for, in one line; None if all is there."""
    if device.startswith("h100"):
        wanted = {"jax_cuda12_plugin": "jax-cuda12-plugin", "jax_plugins.xla_cuda12": "jax-cuda12-pjrt"}
        wanted |= {"nvidia.cuda_nvcc": "nvidia-cuda-nvcc-cu12"}
        how = f"pip install --no-deps jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
        how += " nvidia-cuda-nvcc-cu12"
    else:
        wanted, how = {"libtpu": "libtpu"}, f'pip install "jax[tpu]=={jax.__version__}"'
    absent = [package for module, package in wanted.items() if not _is_installed(module)]
    return f"{device} needs {', '.join(absent)}: {how}" if absent else None


@functools.cache
def devices(device: str) -> tuple[Any, ...]:
    """Returns devices to compile for: "v5e", "v5p", "v6e" or "h100", or a mesh of them, "v5e:2x4" or "h100:8".

    Raises:
      ModuleNotFoundError: the compiler is not installed.
    """
    if (absent := missing(device)) is not None:
        raise ModuleNotFoundError(absent)
    jax.devices()  # the CPU's backend starts first, and stays the default
    topology = SINGLE.get(device, device)
    if topology.startswith("h100"):
        options = {"target_config": H100, "topology": f"1x1x{topology.partition(':')[2]}"}
        return tuple(topologies.get_topology_desc("h100", platform="cuda", **options).devices)
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return tuple(topologies.get_topology_desc(topology, platform="tpu").devices)


def array(shape: tuple[int, ...], dtype: str, place: Any) -> jax.ShapeDtypeStruct:
    """Returns an argument to compile with, which lies on a device or as a sharding says."""
    sharding = place if isinstance(place, Sharding) else SingleDeviceSharding(place)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)


def figures(function: Callable[..., Any], *arguments: Any, unit: jax.ShapeDtypeStruct | None = None) -> Figures:
    """Returns the figures of `function`, compiled for the devices on which its arguments lie.

    Args:
      function: a function of arrays, jitted or not.
      *arguments: pytrees of `array`.
      unit: the argument that passes are counted in, the largest if None. Arrays of half its elements or more count.
    """
    leaves = [leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.ShapeDtypeStruct)]
    unit = unit or max(leaves, key=lambda leaf: _local_size(leaf) * leaf.dtype.itemsize)
    sharding = unit.sharding
    assert sharding is not None, "arguments are made by `array`"
    lower = getattr(function, "lower", None) or jax.jit(function).lower
    on_gpu = next(iter(sharding.device_set)).platform == "gpu"
    with _left_out_of_the_cache():
        compiled = lower(*arguments).compile(compiler_options=GPU_OPTIONS if on_gpu else None)
    program = _Program(compiled.as_text() or "")
    transfers = tuple(program.transfers(_local_size(unit) / 2))
    moved = sum(transfer.read + transfer.written for transfer in transfers)
    return Figures(
        temporaries=temporary_bytes(compiled),
        passes=moved / (_local_size(unit) * unit.dtype.itemsize),
        cycles=program.cycles() or None,
        collectives=program.collectives(),
        transfers=transfers,
    )


@contextlib.contextmanager
def _left_out_of_the_cache() -> Iterator[None]:
    """Keeps programs out of JAX's persistent cache, which cannot load one for a device that is not here."""
    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, float("inf"))
    try:
        yield
    finally:
        jax.config.update(option, before)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _local_size(x: jax.ShapeDtypeStruct) -> int:
    """Elements of `x` on one device."""
    return math.prod(x.shape if x.sharding is None else x.sharding.shard_shape(x.shape))


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}
_SHAPE = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", re.S | re.M)
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
_COLLECTIVE = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-done)?")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Instructions that name arrays or call others, and move nothing themselves.
_MOVES_NOTHING = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "copy-start", "copy-done"}
_MOVES_NOTHING |= {"while", "call", "conditional", "async-start", "async-update", "async-done"}
_TAKES_PART = {"gather", "dynamic-slice", "slice"}


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    line: str
    is_root: bool

    def called(self, *attributes: str) -> list[str]:
        """The computations that the attributes name."""
        found = re.findall(rf"\b(?:{'|'.join(attributes)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.line)
        return [name for group in found for name in re.findall(r"[\w.\-]+", group)]


class _Program:
    """The optimised program as text, read instruction by instruction."""

    def __init__(self, text: str):
        self.bodies: dict[str, list[_Instruction]] = {}
        for is_entry, name, body in _COMPUTATION.findall(text):
            self.bodies["ENTRY" if is_entry else name] = [*map(_parse, filter(_INSTRUCTION.match, body.splitlines()))]

    def executed(self, name: str = "ENTRY", times: int = 1) -> Iterator[tuple[_Instruction, dict[str, str], int]]:
        """Each instruction that runs, the shapes that its operands have, and how often it runs."""
        shapes = {instruction.name: instruction.shape for instruction in self.bodies.get(name, [])}
        for instruction in self.bodies.get(name, []):
            yield instruction, shapes, times
            if instruction.op == "while":
                for body in instruction.called("body"):
                    yield from self.executed(body, times * self._trips(instruction))
            elif instruction.op in ("call", "conditional", "async-start"):
                names = ("to_apply", "calls", "branch_computations", "true_computation", "false_computation")
                for body in instruction.called(*names):
                    yield from self.executed(body, times)

    def cycles(self) -> int:
        found = ((_CYCLES.search(instruction.line), times) for instruction, _, times in self.executed())
        return sum(int(match[1]) * times for match, times in found if match)

    def collectives(self) -> dict[str, Collective]:
        sums: dict[str, Collective] = {}
        for instruction, _, times in self.executed():
            # A TPU may send from within a fusion.
            fused = instruction.called("calls") if instruction.op == "fusion" else []
            for sender in [instruction, *(x for name in fused for x in self.bodies.get(name, []))]:
                if match := _COLLECTIVE.fullmatch(sender.op):
                    size = sum(size for _, size in _arrays(sender.shape))
                    before = sums.get(match[1], Collective(0, 0))
                    sums[match[1]] = Collective(before.count + times, before.bytes + size * times)
        return sums

    def transfers(self, least: float) -> Iterator[Transfer]:
        """What each instruction reads and writes of arrays of `least` elements or more."""

        def large(shape: str) -> int:
            return sum(size for count, size in _arrays(shape) if count >= least)

        for instruction, shapes, times in self.executed():
            op = instruction.op
            if op in _MOVES_NOTHING:
                continue
            part: dict[int, int] = {}
            in_place = 0 if op == "scatter" else None
            if op in _TAKES_PART:
                part = {0: large(instruction.shape)}
            if op == "fusion":
                part, in_place = self._touched_in_part(instruction.called("calls")[0], large)
            read = sum(
                part.get(i, large(shapes.get(operand, "")))
                for i, operand in enumerate(instruction.operands)
                if i != in_place
            )
            written = large(instruction.shape) if in_place is None else 0
            # An asynchronous instruction reads when it starts and has written when it is done.
            read, written = (0 if op.endswith("-done") else read), (0 if op.endswith("-start") else written)
            if read + written:
                yield Transfer(instruction.name, read * times, written * times)

    def _touched_in_part(self, fusion: str, large: Callable[[str], int]) -> tuple[dict[int, int], int | None]:
        """Bytes taken of each parameter that a fusion only gathers from; and the parameter that it updates in place."""
        body = {instruction.name: instruction for instruction in self.bodies.get(fusion, [])}
        numbers = {
            x.name: int(x.line.split("parameter(")[1].split(")")[0]) for x in body.values() if x.op == "parameter"
        }

        def taken(name: str) -> int | None:
            """None if all of the array is read."""
            if body[name].is_root:
                return None
            total = 0
            for user in (user for user in body.values() if name in user.operands):
                if user.op in _TAKES_PART and name == user.operands[0] and name not in user.operands[1:]:
                    size = large(user.shape)
                else:
                    size = taken(user.name) if user.op in ("convert", "bitcast") else None
                    if size is not None:
                        # In the bytes of what lies in memory, not of what it is converted to.
                        size = size * _item_bytes(body[name].shape) // _item_bytes(user.shape)
                if size is None:
                    return None
                total += size
            return total

        in_place = None
        for root in body.values():
            if root.is_root and root.op in ("scatter", "dynamic-update-slice"):
                operand = root.operands[0]
                while operand in body and body[operand].op == "bitcast":
                    operand = body[operand].operands[0]
                in_place = numbers.get(operand)
        parts = {number: taken(name) for name, number in numbers.items()}
        return {number: size for number, size in parts.items() if size is not None}, in_place

    def _trips(self, loop: _Instruction) -> int:
        """How often a loop runs: as the compiler says, else up to the largest bound in its condition, else once."""
        if known := re.search(r'trip_count":\{"n":"(\d+)"', loop.line):
            return int(known[1])
        lines = [x.line for name in loop.called("condition") for x in self.bodies.get(name, [])]
        return max((int(n) for line in lines for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", line)), default=1)


def _parse(line: str) -> _Instruction:
    match = _INSTRUCTION.match(line)
    assert match is not None
    is_root, name, shape, op, rest = match.groups()
    return _Instruction(name, shape, op, tuple(re.findall(r"%([\w.\-]+)", rest.split("), ")[0])), line, bool(is_root))


def _item_bytes(shape: str) -> int:
    """Bytes of one element of an array."""
    count, size = next(_arrays(shape))
    return size // count


def _arrays(shape: str) -> Iterator[tuple[int, int]]:
    """The elements and bytes of each array in a shape."""
    for dtype, sizes in _SHAPE.findall(shape):
        count = math.prod(int(size) for size in filter(None, sizes.split(",")))
        yield count, count * _BYTES[dtype]
