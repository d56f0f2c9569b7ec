"""`sweep`: every ε and every seed in one compiled program."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
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
from jax_ls.sweeps.search import Values, as_points, as_seeds
from jax_ls.sweeps.storage import ResultsFile, fingerprint

__all__ = ["sweep"]

Train = Callable[[Array, Any], Any]


def sweep(
    train: Train,
    smoothing: Values | Mapping[str, Values],
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
    """Trains once for every ε and seed: one compiled program, `vmap` over ε inside `vmap` over seeds.

    metrics[i, j] = train(jax.random.key(seeds[j]), smoothing[i])

    What depends on the key alone, first weights and shuffles say, is computed once a seed. Each device trains runs of
    its own; on CPU, small networks want a device a core: jax.config.update("jax_num_cpu_devices", os.cpu_count()).
    Neither `batch` nor `devices` changes a run by more than the rounding of XLA.

    Args:
      train: pure (key, smoothing) -> metrics, a pytree of numbers or arrays. It may close over its data.
      smoothing: ε, (n,), see `log_uniform`; or several parameters by name, (n,) each, see `grid`: train gets a dict.
      seeds: distinct seeds, or how many: 0, 1, ... A seed gives the same key to every ε: their difference is paired.
      batch: most runs to train at a time, over all devices; None for all. It bounds the memory.
      metric, mode: the metric that `best` looks at, and whether the highest or the lowest is best.
      results: file of JSON lines, one a run, appended after each batch. Batches that are whole in it are not trained
        again. Several processes may share it.
      name: says that two functions are the same to `results`; None compares the programs that they lower to, and their
        constants.
      devices: None for all of this process.
      progress: show a bar on a terminal, if tqdm is installed.

    Returns:
      A `SweepResult`: print it for the table. Runs that diverge, and a best at the edge of the search, give warnings.

    Raises:
      TypeError, ValueError, AssertionError: bad input, by name; `results` is a file of another sweep or none at all.

    Example:
      >>> from jax_ls import sweeps
      >>> train = lambda key, eps: {"loss": (eps - 0.2) ** 2}
      >>> sweeps.sweep(train, [0.0, 0.1, 0.2, 0.3], metric="loss", mode="min").best
      {'smoothing': 0.2}
    """
    checks.check_option("mode", mode, ("max", "min"))
    points = as_points(smoothing)
    size = len(next(iter(points.values())))
    seed_array = as_seeds(seeds, size)
    if not callable(train):
        raise TypeError(f"train: expected a function (key, smoothing) -> metrics, got {train!r}")
    count, total = (len(seed_array), size), len(seed_array) * size
    limit = total if batch is None else min(checks.check_size("batch", batch), total)
    mesh = _mesh(jax.local_devices() if devices is None else devices, limit)
    # The mesh that the caller may have set is not the one that the runs are split over.
    with jax.set_mesh(Mesh(np.empty((), dtype=object), ())):
        traced = _Traced.of(train, points, bare=not isinstance(smoothing, Mapping))
        if metric is not None:
            checks.check_option("metric", metric, [key for key, x in traced.metrics.items() if not x.shape])
        settings = {"points": points, "seeds": seed_array, "metrics": traced.metrics}
        kept = ResultsFile.open(results, name or functools.partial(fingerprint, traced.program), **settings)
        with contextlib.closing(kept):
            run_group, split = _compiled(traced.program.jaxpr, mesh), NamedSharding(mesh, P("runs"))
            # Constants are arguments: XLA would fold what it can of them, and each program would hold the data again.
            constants = jax.device_put(traced.program.consts, NamedSharding(mesh, P()))
            most = total if batch is None else limit // mesh.size
            with _bar(total, len(kept.runs), progress) as advance:
                for rows, columns in _groups(count, most, mesh.size, kept.runs):
                    group = seed_array[rows], [points[key][columns] for key in sorted(points)]
                    out = jax.device_get(run_group(constants, *jax.device_put(group, split)))
                    advance(kept.add(dict(_runs(rows, columns, dict(zip(traced.metrics, out, strict=True))))))
    result = SweepResult(points, seed_array, kept.stacked(), metric, mode)
    result.warn()
    return result


@dataclass(frozen=True)
class _Traced:
    """`train` of one run: (constants, key, parameters in the order of their names) -> metrics, and their shapes."""

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
    """One axis, "runs", of no more devices than runs at a time."""
    given = np.array(devices, dtype=object)
    if given.ndim != 1 or not given.size or not all(isinstance(device, jax.Device) for device in given):
        raise ValueError(f"devices: expected a sequence of at least one device, got {devices!r}")
    return Mesh(given[:limit], ("runs",))


# The last program is kept: a search that goes on with the same function, around the best ε say, need not compile again.
@functools.lru_cache(maxsize=1)
def _compiled(program: Jaxpr, mesh: Mesh) -> Callable[..., list[Array]]:
    """(constants, seeds (D, s), parameters (D, p)) -> metrics (D, s, p, ...); a device trains its own s·p runs."""

    def run(constants: Any, seed: Array, point: Any) -> Any:
        return eval_jaxpr(program, constants, jax.random.key(seed), *point)

    def tile(constants: Any, seeds: Array, points: Any) -> Any:
        over_points = jax.vmap(run, (None, None, 0))
        over_seeds = jax.vmap(over_points, (None, 0, None))
        seeds, points = jax.tree.map(lambda x: x[0], (seeds, points))
        return jax.tree.map(lambda x: x[None], over_seeds(constants, seeds, points))

    # Nothing is sent between devices, so nothing needs to be known of what varies over them.
    specs = {"in_specs": (P(), P("runs"), P("runs")), "out_specs": P("runs"), "check_vma": False}
    return jax.jit(jax.shard_map(tile, mesh=mesh, **specs))


def _groups(
    count: tuple[int, int], limit: int, devices: int, done: Container[tuple[int, int]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of seeds (D, s) and of points (D, p) to train together, s·p at most `limit`, all groups of one shape.

    A run is a cell of the table seeds × points; each device takes a rectangle of it. The last ones are filled up with
    repetitions. Rectangles whose runs are all `done` are left out.
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
    """Seeds and points that a device trains at a time: fewest groups, then fewest repetitions, then most points.

    Points share what depends on the seed alone.
    """

    def cost(shape: tuple[int, int]) -> tuple[int, int, int]:
        tiles = -(-count[0] // shape[0]) * -(-count[1] // shape[1])
        return -(-tiles // devices), shape[0] * shape[1], -shape[1]

    rows = range(1, min(count[0], limit) + 1)
    return min(((s, p) for s in rows for p in range(1, min(count[1], limit // s) + 1)), key=cost)


def _runs(rows: np.ndarray, columns: np.ndarray, out: Metrics) -> Iterator[tuple[tuple[int, int], Metrics]]:
    """(point, seed) of each run of a group, and its metrics."""
    for device, (seeds, points) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        for i, seed in enumerate(seeds):
            for j, point in enumerate(points):
                yield (point, seed), {name: x[device, i, j] for name, x in out.items()}


@contextlib.contextmanager
def _bar(total: int, done: int, progress: bool) -> Iterator[Callable[[int], Any]]:
    """What to call with the number of runs that are finished."""
    if not progress or not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        yield lambda finished: None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=done, desc="sweep", unit="run") as bar:
        yield bar.update
