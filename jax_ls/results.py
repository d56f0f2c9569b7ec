"""What a sweep found: the table, the best ε, the runs that diverged, and the file that keeps them."""

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from jax_ls import checks

Metrics = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class SweepResult:
    """Every run of a sweep. Print it for the table.

    Args:
      points: parameters by name, (n,) each; "smoothing" alone unless `sweep` was given several.
      seeds: (s,).
      metrics: by name, (n, s), or (n, s, ...) where `train` returned an array.
      metric, mode: what `best` looks at.

    Example:
      >>> from jax_ls import sweeps
      >>> loss = np.array([[0.5, 0.7], [0.2, 0.4], [0.9, 0.5]])
      >>> points = {"smoothing": np.array([0.0, 0.1, 0.2])}
      >>> result = sweeps.SweepResult(points, np.arange(2), {"loss": loss}, "loss", "min")
      >>> print(result.table())
      | smoothing | loss            |
      | --------- | --------------- |
      | 0         | 0.60 ± 0.10     |
      | 0.1       | **0.30 ± 0.10** |
      | 0.2       | 0.70 ± 0.20     |
    """

    points: Mapping[str, np.ndarray]
    seeds: np.ndarray
    metrics: Metrics
    metric: str | None = None
    mode: str = "max"

    def mean(self, metric: str) -> np.ndarray:
        """(n, ...): mean over the seeds whose value is finite; NaN where none is."""
        return self._over_seeds(metric, lambda x: x.mean(axis=0) if len(x) else np.nan)

    def standard_error(self, metric: str) -> np.ndarray:
        """(n, ...): of that mean, s/√n with the sample's s; NaN where fewer than two seeds are finite."""
        return self._over_seeds(metric, lambda x: x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else np.nan)

    @property
    def best(self) -> dict[str, float] | None:
        """The parameters with the best mean of `metric`; those with a run in which it diverged do not compete."""
        index = self.best_index
        return None if index is None else self.point(index)

    @property
    def best_index(self) -> int | None:
        """Where `best` stands in `points`; None without a `metric`, or if it diverged in some run of every ε."""
        if self.metric is None:
            return None
        whole = np.isfinite(self.metrics[self.metric].astype(np.float64)).all(axis=1)
        means = np.where(whole, self.mean(self.metric) * (1 if self.mode == "max" else -1), -np.inf)
        return int(means.argmax()) if whole.any() else None

    @property
    def diverged(self) -> list[tuple[dict[str, float], int, list[str]]]:
        """Parameters and seed of each run with numbers that are not finite, and the names of their metrics."""
        bad = self._not_finite()
        cells = np.argwhere(np.any([*bad.values()], axis=0))
        return [(self.point(i), int(self.seeds[j]), [name for name in bad if bad[name][i, j]]) for i, j in cells]

    def point(self, index: int) -> dict[str, float]:
        """The parameters of one row of the table."""
        return {name: _shortest(values[index]) for name, values in self.points.items()}

    def remarks(self) -> Iterator[str]:
        """What to know before believing the table."""
        runs = [f"{_words(point)}, seed={seed} ({', '.join(names)})" for point, seed, names in self.diverged]
        if runs:
            more = f" and {len(runs) - 8} more" if len(runs) > 8 else ""
            yield f"diverged, and left out of the means: {'; '.join(runs[:8])}{more}"
        if self.metric is not None and self.best is None:
            yield f"no best {self.metric}: it diverged in some run of each row"
        for name, value in (self.best or {}).items():
            values = sorted({_shortest(x) for x in self.points[name]})
            if len(values) > 2 and value in (values[0], values[-1]):
                side = "lowest" if value == values[0] else "highest"
                yield f"the best {name}, {value:.4g}, is the {side} of the search: a better one may lie beyond"

    def warn(self) -> None:
        """Each remark as a warning of the caller of `sweep`."""
        for remark in self.remarks():
            warnings.warn(remark, stacklevel=3)

    def table(self) -> str:
        """Markdown: mean ± standard error over the seeds of each scalar metric, a row for each ε; the best is bold."""
        scalars, best = {name: x for name, x in self.metrics.items() if x.ndim == 2}, self.best_index
        rows = [[*self.points, *scalars]]
        for i in range(len(next(iter(self.points.values())))):
            cells = {name: _cell(x[i].astype(np.float64)) for name, x in scalars.items()}
            if i == best and self.metric is not None:
                cells[self.metric] = f"**{cells[self.metric]}**"
            rows.append([f"{value:.4g}" for value in self.point(i).values()] + [*cells.values()])
        return markdown(rows)

    def __str__(self) -> str:
        best = [] if self.best is None else [f"best {self.metric}: {_words(self.best)}"]
        notes = "\n".join(best + [f"note: {remark}" for remark in self.remarks()])
        return self.table() + (f"\n\n{notes}" if notes else "")

    def _not_finite(self) -> dict[str, Any]:
        """(n, s) by metric: the runs in which it, or an entry of it, is not finite."""
        finite = {name: np.isfinite(x.astype(np.float64)) for name, x in self.metrics.items()}
        return {name: ~x.all(axis=tuple(range(2, x.ndim))) for name, x in finite.items()}

    def _over_seeds(self, metric: str, statistic: Callable[[np.ndarray], Any]) -> np.ndarray:
        """The statistic of the finite values of each row, and of each entry of a metric that is an array."""
        checks.check_option("metric", metric, self.metrics)
        values = np.moveaxis(self.metrics[metric].astype(np.float64), 1, -1)
        rows = [statistic(row[np.isfinite(row)]) for row in values.reshape(-1, values.shape[-1])]
        return np.array(rows, dtype=np.float64).reshape(values.shape[:-1])


def markdown(rows: list[list[str]]) -> str:
    """A table with aligned columns; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    cells = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


@dataclass
class ResultsFile:
    """The runs that are done, (point, seed) -> metrics; on disk too if it has a path.

    JSON lines: the settings, then a line for each run. Written whole under another name and moved into place.
    """

    path: Path | None
    settings: dict[str, Any]
    points: Metrics
    seeds: np.ndarray
    metrics: Mapping[str, jax.ShapeDtypeStruct]
    runs: dict[tuple[int, int], Metrics] = field(default_factory=dict)

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
        """Reads the runs of a file that was begun with the same settings; a new file is written at once."""
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
        kept = cls(Path(path), settings, points, seeds, metrics)
        if kept.path is not None and kept.path.exists():
            kept.read(kept.path)
        kept.write()
        return kept

    def add(self, runs: Mapping[tuple[int, int], Metrics]) -> int:
        """How many of them are new. One that is there already stays as it was."""
        new = {index: run for index, run in runs.items() if index not in self.runs}
        self.runs.update(new)
        self.write()
        return len(new)

    def stacked(self) -> dict[str, np.ndarray]:
        """Metrics (n, s, ...) of all runs."""
        count = (len(next(iter(self.points.values()))), len(self.seeds))
        stacked = {name: np.empty((*count, *x.shape), x.dtype) for name, x in self.metrics.items()}
        for index, run in self.runs.items():
            for name, value in run.items():
                stacked[name][index] = value
        return stacked

    def read(self, path: Path) -> None:
        """The runs in the file, if they belong to this sweep."""
        damaged = f"{path} holds something else"
        try:
            head, *lines = path.read_text(encoding="utf-8").splitlines()
            found = {key: json.loads(head)["sweep"][key] for key in self.settings}
            other = [_difference(key, mine, found[key]) for key, mine in self.settings.items() if mine != found[key]]
            for number, line in enumerate([] if other else lines, start=2):
                damaged = f"line {number} of {path} holds something else; without that line the sweep resumes"
                run = json.loads(line)
                values = {name: _array(run["metrics"][name], x) for name, x in self.metrics.items()}
                self.runs[tuple(run["run"])] = values
        except (ValueError, KeyError, TypeError, OverflowError, IsADirectoryError) as error:
            raise ValueError(f"results: expected the JSON lines of a sweep, {damaged}") from error
        if other:
            raise ValueError("results: {} holds a sweep of other {}: expected {}, got {}".format(path, *other[0]))

    def write(self) -> None:
        """Replaces the file."""
        if self.path is None:
            return
        lines: list[dict[str, Any]] = [{"sweep": self.settings}]
        for (i, j), run in sorted(self.runs.items()):
            point = {name: _plain(values[i]) for name, values in self.points.items()}
            values = {name: _plain(x) for name, x in run.items()}
            lines.append({"run": [i, j], **point, "seed": int(self.seeds[j]), "metrics": values})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            temporary.write_text("".join(f"{json.dumps(line, allow_nan=False)}\n" for line in lines), encoding="utf-8")
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)


def fingerprint(program: ClosedJaxpr) -> str:
    """Tells two functions apart by their operations and constants; another version of JAX may tell it otherwise."""
    text = re.sub(r"0x[0-9a-f]+", "", str(program.jaxpr))
    # Sets are printed in the order of their hashes, which is another one in each process.
    text = re.sub(r"(?<=frozenset\(\{).*?(?=\}\))", lambda found: ", ".join(sorted(found[0].split(", "))), text)
    digest = hashlib.sha256(text.encode())

    def visit(value: Any) -> None:
        # Newer versions of JAX have one class for both.
        if isinstance(value, ClosedJaxpr | Jaxpr):
            for constant in getattr(value, "consts", ()):
                digest.update(np.ascontiguousarray(jax.device_get(constant)).tobytes())
            for equation in value.eqns:
                visit(list(equation.params.values()))
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(program)
    return digest.hexdigest()[:16]


def _plain(x: Any) -> Any:
    """Numbers as JSON has them, to the last bit of their own dtype; NaN and infinities as words."""
    if np.ndim(x):
        return [_plain(item) for item in x]
    if np.issubdtype(x.dtype, np.integer) or x.dtype == bool:
        return x.item()
    value = _shortest(x)
    return value if math.isfinite(value) else str(value)


def _array(value: Any, like: jax.ShapeDtypeStruct) -> np.ndarray:
    # float64 reads "nan", but it does not hold every integer.
    wide = np.dtype(object if np.issubdtype(like.dtype, np.integer) else np.float64)
    return np.asarray(value, dtype=object).astype(wide).astype(like.dtype).reshape(like.shape)


def _difference(where: str, mine: Any, theirs: Any) -> tuple[str, Any, Any]:
    """Where it is, and both sides of it; of long ones, the first entry that differs."""
    if isinstance(mine, str) or len(f"{mine}{theirs}") < 160:
        return where, mine, theirs
    mine, theirs = (x if isinstance(x, dict) else dict(enumerate(x)) for x in (mine, theirs))
    key = next(key for key in mine | theirs if mine.get(key) != theirs.get(key))
    return _difference(f"{where}[{key!r}]", mine.get(key, "nothing"), theirs.get(key, "nothing"))


def _shortest(x: Any) -> float:
    """The float32 nearest 0.1 as 0.1."""
    return float(str(x))


def _words(point: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:.4g}" for name, value in point.items())


def _cell(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return "diverged"
    error = finite.std(ddof=1) / math.sqrt(finite.size) if finite.size > 1 else 0.0
    # Two digits of the error, as many of the mean.
    digits = min(max(1 - math.floor(math.log10(error)), 0), 6) if error else None
    text = f"{finite.mean():.4g}" if digits is None else f"{finite.mean():.{digits}f} ± {error:.{digits}f}"
    return text if finite.size == values.size else f"{text} ({finite.size} of {values.size})"
