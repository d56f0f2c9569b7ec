"""`sweep`: trains with every ε, or by every method, and with every seed, in one compiled program."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr  # pyright: ignore[reportPrivateImportUsage] - so in jax 0.12
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ls import checks
from jax_ls.sweeps.results import Metrics, SweepResult
from jax_ls.sweeps.search import Values, as_methods, as_points, as_seeds
from jax_ls.sweeps.storage import ResultsFile, fingerprint

__all__ = ["sweep"]

Train = Callable[[Array, Any], Any]


def sweep(
    train: Train,
    smoothing: Values | Mapping[str, Values] | Mapping[str, Callable[..., Any]],
    seeds: int | Sequence[int] = 1,
    *,
    batch: int | None = None,
    metric: str | None = None,
    mode: Literal["max", "min"] = "max",
    results: str | PathLike[str] | None = None,
    name: str | None = None,
    devices: Sequence[Any] | None = None,
    progress: bool = True,
) -> SweepResult:
    """Returns the metrics of one training for every ε and seed, from one compiled program.

    metrics[i, j] = train(jax.random.key(seeds[j]), smoothing[i])

    The program is `vmap` over ε inside `vmap` over seeds. What depends only on the key, such as first weights and
    shuffles, is computed once per seed. Each device trains its own runs. On CPU, small networks run fastest with one
    device per core: jax.config.update("jax_num_cpu_devices", os.cpu_count()). `batch` and `devices` change a run by no
    more than XLA's rounding.

    Args:
      train: pure (key, smoothing) -> metrics, a pytree of numbers or arrays. It may close over its data.
      smoothing: ε, (n,), see `log_uniform`; or a dict of parameters, (n,) each, see `grid`: `train` then gets a dict.
        Or methods by name, functions: `train` gets each of them, in a program of its own.
      seeds: distinct seeds, or how many: 0, 1, ... A seed gives all ε the same key, so runs can be compared in pairs.
      batch: the most runs to train at a time, over all devices; None for all. It limits the memory.
      metric, mode: the metric that `best` compares, and whether its highest or lowest value is best.
      results: a file of JSON lines, one per run, appended after each batch. A batch whose runs are all in the file is
        not trained again. Several processes may share the file. Each method has a file: runs.jsonl, runs-margin.jsonl.
      name: identifies `train` in `results`; None identifies it by its lowered program and constants.
      devices: the devices to use; None for all of this process.
      progress: shows a bar on a terminal, if tqdm is installed.

    Returns:
      A `SweepResult`; print it for the table. It warns of runs that diverged and of a best value at the search's edge.

    Raises:
      TypeError: `train` is no function, or returns a metric that is no real number.
      ValueError: an unknown `metric`, seeds that repeat, or `results` is a file of another sweep or no results file.

    Example:
      >>> from jax_ls import sweeps
      >>> train = lambda key, eps: {"loss": (eps - 0.2) ** 2}
      >>> sweeps.sweep(train, [0.0, 0.1, 0.2, 0.3], metric="loss", mode="min").best
      {'smoothing': 0.2}
    """
    checks.check_option("mode", mode, ("max", "min"))
    given: dict[str, Any] = {"batch": batch, "metric": metric, "mode": mode, "devices": devices, "progress": progress}
    if methods := as_methods(smoothing):
        result = _sweep_methods(train, methods, seeds, results, name, given)
    else:
        result = _sweep(train, smoothing, seeds, results, name, **given)
    result.warn()
    return result


def _sweep_methods(
    train: Callable[[Array, Any], Any],
    methods: Mapping[str, Callable[..., Any]],
    seeds: Any,
    results: str | PathLike[str] | None,
    name: str | None,
    given: Mapping[str, Any],
) -> SweepResult:
    """Returns the metrics of each method, in the order in which they are given."""
    found: list[SweepResult] = []
    for method_name, method in methods.items():
        path = results
        if results is not None:
            path = Path(results).with_stem(f"{Path(results).stem}-{method_name}")

        def train_with(key: Array, _: Any, method: Callable[..., Any] = method) -> Any:
            return train(key, method)

        label = None if name is None else f"{name}, {method_name}"
        found.append(_sweep(train_with, {"method": [0.0]}, seeds, path, label, **given))
        if [*found[-1].metrics] != [*found[0].metrics]:
            raise ValueError(
                f"train: expected metrics {[*found[0].metrics]} of {method_name!r} too, got {[*found[-1].metrics]}"
            )
    metrics = {key: np.concatenate([result.metrics[key] for result in found]) for key in found[0].metrics}
    return SweepResult({"method": np.array([*methods])}, found[0].seeds, metrics, given["metric"], given["mode"])


def _sweep(
    train: Train,
    smoothing: Any,
    seeds: int | Sequence[int],
    results: str | PathLike[str] | None,
    name: str | None,
    *,
    batch: int | None,
    metric: str | None,
    mode: str,
    devices: Sequence[Any] | None,
    progress: bool,
) -> SweepResult:
    points = as_points(smoothing)
    size = len(next(iter(points.values())))
    seed_array = as_seeds(seeds, size)
    if not callable(train):
        raise TypeError(f"train: expected a function (key, smoothing) -> metrics, got {train!r}")
    count, total = (len(seed_array), size), len(seed_array) * size
    limit = total if batch is None else min(checks.check_size("batch", batch), total)
    mesh = _mesh(jax.local_devices() if devices is None else devices, limit)
    # Without the mesh that the caller may have set: the runs are split over another.
    with jax.set_mesh(Mesh(np.empty((), dtype=object), ())):
        traced = _Traced.of(train, points, bare=not isinstance(smoothing, Mapping))
        if metric is not None:
            checks.check_option("metric", metric, [key for key, x in traced.metrics.items() if not x.shape])
        settings = {"points": points, "seeds": seed_array, "metrics": traced.metrics}
        kept = ResultsFile.open(results, name or functools.partial(fingerprint, traced.program), **settings)
        with contextlib.closing(kept):
            run_group, split = _compiled(traced.program.jaxpr, mesh), NamedSharding(mesh, P("runs"))
            # Constants become arguments: else XLA would fold them, and each program would hold the data again.
            constants = jax.device_put(traced.program.consts, NamedSharding(mesh, P()))
            most = total if batch is None else limit // mesh.size
            with _bar(total, len(kept.runs), progress) as advance:
                for rows, columns in _groups(count, most, mesh.size, kept.runs):
                    group = seed_array[rows], [points[key][columns] for key in sorted(points)]
                    out = jax.device_get(run_group(constants, *jax.device_put(group, split)))
                    advance(kept.add(dict(_runs(rows, columns, dict(zip(traced.metrics, out, strict=True))))))
    return SweepResult(points, seed_array, kept.stacked(), metric, mode)


@dataclass(frozen=True)
class _Traced:
    """The traced `train` of one run, (constants, key, parameters by name) -> metrics, and the metrics' shapes."""

    program: ClosedJaxpr
    metrics: dict[str, jax.ShapeDtypeStruct]

    @classmethod
    def of(cls, train: Train, points: Mapping[str, np.ndarray], *, bare: bool) -> Self:
        key = jax.eval_shape(lambda: jax.random.key(0))
        point = {name: jax.ShapeDtypeStruct((), values.dtype) for name, values in points.items()}
        program, shapes = jax.make_jaxpr(train, return_shape=True)(key, point["smoothing"] if bare else point)
        leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
        metrics = {jax.tree_util.keystr(path, simple=True, separator=".") or "value": x for path, x in leaves}
        if not leaves or len(metrics) < len(leaves):
            raise ValueError(f"train: expected metrics of different names, got {[*metrics] or 'none'}")
        for name, x in metrics.items():
            if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool):
                raise TypeError(f"train: expected real numbers as metric {name!r}, got {checks.describe(x)}")
        return cls(program, metrics)


def _mesh(devices: Any, limit: int) -> Mesh:
    """Returns a mesh with one axis, "runs", of at most `limit` devices."""
    given = np.array(devices, dtype=object)
    if given.ndim != 1 or not given.size or not all(isinstance(device, jax.Device) for device in given):
        raise ValueError(f"devices: expected a sequence of at least one device, got {devices!r}")
    return Mesh(given[:limit], ("runs",))


# Keeps the last program: a search that goes on with the same function, say around the best ε, does not compile again.
@functools.lru_cache(maxsize=1)
def _compiled(program: Jaxpr, mesh: Mesh) -> Callable[..., list[Array]]:
    """Returns (constants, seeds (D, s), parameters (D, p)) -> metrics (D, s, p, ...). Each device trains s·p runs."""

    def run(constants: Any, seed: Array, point: Any) -> Any:
        return eval_jaxpr(program, constants, jax.random.key(seed), *point)

    def tile(constants: Any, seeds: Array, points: Any) -> Any:
        over_points = jax.vmap(run, (None, None, 0))
        over_seeds = jax.vmap(over_points, (None, 0, None))
        seeds, points = jax.tree.map(lambda x: x[0], (seeds, points))
        return jax.tree.map(lambda x: x[None], over_seeds(constants, seeds, points))

    # Devices exchange nothing, so `shard_map` need not track which values vary over them.
    specs = {"in_specs": (P(), P("runs"), P("runs")), "out_specs": P("runs"), "check_vma": False}
    return jax.jit(jax.shard_map(tile, mesh=mesh, **specs))


def _groups(
    count: tuple[int, int], limit: int, devices: int, done: Container[tuple[int, int]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields groups: indices of seeds (D, s) and of points (D, p), with s·p at most `limit`; all have one shape.

    A run is a cell of the table seeds × points, and each device trains a rectangle of it. Groups at the end repeat runs
    to keep the shape. Rectangles whose runs are all `done` are left out.
    """
    shape = _rectangle(count, limit, devices)
    starts = itertools.product(*(range(0, total, size) for total, size in zip(count, shape, strict=True)))
    tiles = []
    for start in starts:
        rows, columns = (np.minimum(s + np.arange(n), c - 1) for s, n, c in zip(start, shape, count, strict=True))
        if not all((column, row) in done for row in rows.tolist() for column in columns.tolist()):
            tiles.append((rows, columns))
    for first in range(0, len(tiles), devices):
        group = tiles[first : first + devices]
        group += [group[-1]] * (devices - len(group))
        rows, columns = (np.stack(indices) for indices in zip(*group, strict=True))
        yield rows, columns


def _rectangle(count: tuple[int, int], limit: int, devices: int) -> tuple[int, int]:
    """Returns how many seeds and points a device trains at a time.

    Prefers few groups, then few repetitions, then many points, because points share what depends only on the seed.
    """

    def cost(shape: tuple[int, int]) -> tuple[int, int, int]:
        tiles = -(-count[0] // shape[0]) * -(-count[1] // shape[1])
        return -(-tiles // devices), shape[0] * shape[1], -shape[1]

    rows = range(1, min(count[0], limit) + 1)
    return min(((s, p) for s in rows for p in range(1, min(count[1], limit // s) + 1)), key=cost)


def _runs(rows: np.ndarray, columns: np.ndarray, out: Metrics) -> Iterator[tuple[tuple[int, int], Metrics]]:
    """Yields (point, seed) and the metrics of each run of a group."""
    for device, (seeds, points) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        for i, seed in enumerate(seeds):
            for j, point in enumerate(points):
                yield (point, seed), {name: x[device, i, j] for name, x in out.items()}


@contextlib.contextmanager
def _bar(total: int, done: int, progress: bool) -> Iterator[Callable[[int], Any]]:
    """Gives a function to call with the number of runs that have just finished."""
    if not progress or not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        yield lambda finished: None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=done, desc="sweep", unit="run") as bar:
        yield bar.update
