"""How the benchmarks measure: time as a ratio within one run, memory exactly."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


def interleaved_times(functions: Mapping[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Median seconds of each function, called in turns so that a busy machine slows all of them alike.

    A function returns what must be waited for, or has waited itself.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeat):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def residual_bytes(loss: Callable[[jax.Array], jax.Array], logits: jax.Array) -> int:
    """Bytes that the forward pass keeps for the backward pass, the logits included; nothing is run."""
    residuals = jax.eval_shape(lambda z: jax.vjp(loss, z)[1], logits)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that a compiled program allocates beside its arguments and results."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise SystemExit("this backend does not tell what memory a program takes")
    return analysis.temp_size_in_bytes


def machine() -> str:
    """One line that says where the figures come from."""
    device = jax.devices()[0]
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpus = [line for line in lines if line.startswith("model name")]
    cpu = cpus[0].split(":")[1].strip() if cpus else platform.machine()
    where = f"{cpu}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return f"{where}; jax {jax.__version__}, Python {platform.python_version()}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown with aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
