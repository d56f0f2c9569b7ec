"""The results file of a sweep, from which the next call continues, and the hash that identifies a sweep."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage] - so in jax 0.12

from jax_ls import checks
from jax_ls.sweeps.results import Metrics, shortest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["ResultsFile", "fingerprint"]


@dataclass
class ResultsFile:
    """The finished runs, (point, seed) -> metrics, in memory and, if there is a path, in a file.

    The file holds JSON lines: the settings, then a line for each run in the order in which they finished. Several
    processes may share the file. It is written under another name before it gets its own, and lines are appended under
    a lock, so that no process reads part of a line. A process that is killed while it writes leaves a last line without
    an end. The next process cuts that line off.
    """

    path: Path | None
    settings: dict[str, Any]
    points: Metrics
    seeds: np.ndarray
    metrics: Mapping[str, jax.ShapeDtypeStruct]
    runs: dict[tuple[int, int], Metrics] = field(default_factory=dict)
    # The path as the caller wrote it, for messages.
    title: str = ""
    # How many lines and bytes of the file are read, the runs that it holds, and its descriptor. The file is held open,
    # so that a new file in its place is recognised as another.
    seen: tuple[int, int] = (0, 0)
    written: set[tuple[int, int]] = field(default_factory=set)
    held: int | None = None

    @classmethod
    def open(
        cls,
        path: str | PathLike[str] | None,
        train: str | Callable[[], str],
        *,
        points: Metrics,
        seeds: np.ndarray,
        metrics: Mapping[str, jax.ShapeDtypeStruct],
    ) -> Self:
        """Returns the runs of a file with the same settings. If there is no file, it is created at once.

        A file that holds all runs is only read. An unfinished file is opened for writing before anything is trained, so
        that a file which cannot be written raises first.
        """
        if path is None:
            return cls(None, {}, points, seeds, metrics)
        if not isinstance(path, str | PathLike):
            raise TypeError(f"results: expected the path of a file, got {path!r}")
        settings = {
            "train": train if isinstance(train, str) else train(),
            "points": {name: _plain(values) for name, values in points.items()},
            "seeds": seeds.tolist(),
            "metrics": {name: checks.describe(x) for name, x in metrics.items()},
        }
        # A symbolic link stands for the file that it names.
        real = Path(os.path.realpath(path))
        kept = cls(real, settings, points, seeds, metrics, title=os.fspath(path))
        try:
            with contextlib.suppress(FileNotFoundError), _locked(real, writable=False) as file:
                kept.read(file)
            if len(kept.runs) < len(next(iter(points.values()))) * len(seeds):
                kept.append({})
        except BaseException:
            kept.close()
            raise
        return kept

    def close(self) -> None:
        """Closes the file."""
        if self.held is not None:
            os.close(self.held)
        self.held = None

    def add(self, runs: Mapping[tuple[int, int], Metrics]) -> int:
        """Adds runs, and returns how many of them are new. Runs that are there already stay as they are."""
        if self.path is not None:
            return self.append(runs)
        new = {index: run for index, run in runs.items() if index not in self.runs}
        self.runs.update(new)
        return len(new)

    def stacked(self) -> dict[str, np.ndarray]:
        """Returns the metrics of all runs, (n, s, ...) each."""
        count = (len(next(iter(self.points.values()))), len(self.seeds))
        stacked = {name: np.empty((*count, *x.shape), x.dtype) for name, x in self.metrics.items()}
        for index, run in self.runs.items():
            for name, value in run.items():
                stacked[name][index] = value
        return stacked

    def read(self, file: int) -> bool:
        """Reads the lines that were appended since the last call, and returns whether the last of them has no end."""
        if self.held is None or not os.path.sameopenfile(self.held, file):
            self.close()
            self.seen, self.written, self.held = (0, 0), set(), os.dup(file)
        number, start = self.seen
        damaged = f"{self.title} holds something else"
        other: list[tuple[str, Any, Any]] = []
        try:
            *lines, last = _bytes(file, start).split(b"\n")
            if number == 0:
                found = json.loads(lines[0])["sweep"]
                other = [_difference(key, x, found[key]) for key, x in self.settings.items() if x != found[key]]
            for line in [] if other else lines:
                number, start = number + 1, start + len(line) + 1
                if number > 1:
                    damaged = f"line {number} of {self.title} holds something else; without that line the sweep resumes"
                    index, values = self._run(json.loads(line))
                    self.runs.setdefault(index, values)
                    self.written.add(index)
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError, IsADirectoryError) as error:
            raise ValueError(f"results: expected the JSON lines of a sweep, {damaged}") from error
        if other:
            raise ValueError("results: {} holds a sweep of other {}: expected {}, got {}".format(self.title, *other[0]))
        self.seen = number, start
        return bool(last)

    def append(self, runs: Mapping[tuple[int, int], Metrics]) -> int:
        """Appends the runs that are new to the file, creating it if needed, and returns how many they are."""
        path = self.path
        if path is None:
            return 0
        while True:
            try:
                with _locked(path, writable=True) as file:
                    if self.read(file):
                        os.truncate(file, self.seen[1])
                    new = {index: run for index, run in runs.items() if index not in self.runs}
                    # Runs that were written to a file which has been removed since are written again.
                    lines = {index: run for index, run in (self.runs | new).items() if index not in self.written}
                    _append(file, "".join(map(self._line, lines.items())))
                    self.read(file)
                    return len(new)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                _create(path, _json({"sweep": self.settings}))

    def _line(self, run: tuple[tuple[int, int], Metrics]) -> str:
        (i, j), metrics = run
        values = {name: _plain(x) for name, x in metrics.items()}
        # "run" is the first key, and holds the index even if a parameter is called "run".
        return _json({"run": [i, j]} | self._point(i, j) | {"run": [i, j], "metrics": values})

    def _point(self, i: int, j: int) -> dict[str, Any]:
        return {name: _plain(values[i]) for name, values in self.points.items()} | {"seed": int(self.seeds[j])}

    def _run(self, line: Any) -> tuple[tuple[int, int], Metrics]:
        """Returns the index and metrics of a line. ValueError if its parameters and seed are not those of its index."""
        i, j = line["run"]
        count = len(next(iter(self.points.values()))), len(self.seeds)
        if not all(type(x) is int and 0 <= x < n for x, n in zip((i, j), count, strict=True)):
            raise ValueError(f"expected the index of a run, got {line['run']}")
        for name, value in self._point(i, j).items():
            if name not in ("run", "metrics") and not (type(line[name]) in (int, float, str) and line[name] == value):
                raise ValueError(f"expected {name} {value}, got {line[name]!r}")
        return (i, j), {name: _array(line["metrics"][name], x) for name, x in self.metrics.items()}


@contextlib.contextmanager
def _locked(path: Path, *, writable: bool) -> Iterator[int]:
    """Opens the file for one writer or for many readers at a time."""
    file = os.open(path, (os.O_RDWR | os.O_APPEND) if writable else os.O_RDONLY)
    try:
        # Some systems and network drives have no locks. Lines are then appended without a lock.
        _lock(file, "LOCK_EX" if writable else "LOCK_SH")
        # The file may have been replaced while this process waited for the lock.
        if writable and os.fstat(file).st_ino != os.stat(path).st_ino:
            raise FileNotFoundError(path)
        yield file
    finally:
        # Unlocked explicitly, because a copy of `file` that is still open would keep the lock.
        _lock(file, "LOCK_UN")
        os.close(file)


def _lock(file: int, how: str) -> None:
    with contextlib.suppress(OSError):
        if fcntl is not None:
            fcntl.flock(file, getattr(fcntl, how))


def _bytes(file: int, start: int) -> bytes:
    with os.fdopen(os.dup(file), "rb") as reader:
        reader.seek(start)
        return reader.read()


def _append(file: int, text: str) -> None:
    """Appends the text. If that fails, the file is left as it was."""
    before, data = os.fstat(file).st_size, memoryview(text.encode())
    try:
        while data:
            data = data[os.write(file, data) :]
    except BaseException:
        os.truncate(file, before)
        raise


def _create(path: Path, text: str) -> None:
    """Creates a file that holds the text from the start; if another process has created it first, does nothing."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except (OSError, AttributeError):
            # Some drives have no hard links.
            if not path.exists():
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _json(line: Any) -> str:
    return f"{json.dumps(line, allow_nan=False)}\n"


def fingerprint(program: ClosedJaxpr) -> str:
    """Returns a hash of the lowered program and its constants. It differs between JAX versions and platforms."""
    # Constants are arguments here, as in the sweep: the text would write each of them out.
    run = jax.jit(functools.partial(eval_jaxpr, program.jaxpr))
    digest = hashlib.sha256(run.lower(program.consts, *program.in_avals).as_text().encode())
    for x in program.consts:
        is_key = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
        digest.update(np.asarray(jax.random.key_data(x) if is_key else x).tobytes())
    return digest.hexdigest()[:16]


def _plain(x: Any) -> Any:
    """Returns numbers for JSON that read back to the same bits in their dtype; NaN and infinities become words."""
    if np.ndim(x):
        return [_plain(item) for item in x]
    if np.issubdtype(x.dtype, np.integer) or x.dtype == bool:
        return x.item()
    value = shortest(x)
    return value if math.isfinite(value) else str(value)


def _array(value: Any, like: jax.ShapeDtypeStruct) -> np.ndarray:
    """Returns the metric that `_plain` wrote as `value`. ValueError if `_plain` cannot have written it."""
    given = np.asarray(value, dtype=object)
    integers = np.issubdtype(like.dtype, np.integer)
    kinds = (bool,) if like.dtype == bool else (int,) if integers else (int, float)
    if given.shape != like.shape and (given.size or math.prod(like.shape)):
        raise ValueError(f"expected the shape {like.shape}, got {given.shape}")
    for x in given.flat:
        if type(x) not in kinds and (integers or like.dtype == bool or x not in ("nan", "inf", "-inf")):
            raise ValueError(f"expected {like.dtype}, got {x!r}")
    # float64 reads "nan", but cannot hold every integer.
    wide = given.astype(object if integers else np.float64)
    with np.errstate(over="ignore"):
        array = wide.astype(like.dtype).reshape(like.shape)
    if not integers and np.isinf(array).sum() != np.isinf(wide).sum():
        raise ValueError(f"expected {like.dtype}, got {value}")
    return array


def _difference(where: str, mine: Any, theirs: Any) -> tuple[str, Any, Any]:
    """Returns the place of a difference and both values; in long values, those of the first entry that differs."""
    if isinstance(mine, str) or len(f"{mine}{theirs}") < 160:
        return where, mine, theirs
    mine, theirs = (x if isinstance(x, dict) else dict(enumerate(x)) for x in (mine, theirs))
    key = next(key for key in mine | theirs if mine.get(key) != theirs.get(key))
    return _difference(f"{where}[{key!r}]", mine.get(key, "nothing"), theirs.get(key, "nothing"))
