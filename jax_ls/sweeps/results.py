"""The result of a sweep: the table, the best ε or method, and the runs that diverged."""

from __future__ import annotations

import csv
import html
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from jax_ls import checks

__all__ = ["SweepResult"]

Metrics = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class SweepResult:
    """The metrics of every run of a sweep. Print it for the table; a notebook shows it as one.

    Args:
      points: parameters by name, (n,) each; only "smoothing" unless `sweep` was given several, or "method".
      seeds: (s,).
      metrics: by name, (n, s), or (n, s, ...) if `train` returned an array.
      metric, mode: the metric that `best` compares, and "max" or "min".

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
        """Returns the mean over the seeds with a finite value, (n, ...); NaN where no seed has one."""
        return self._over_seeds(metric, lambda x: x.mean(axis=0) if len(x) else np.nan)

    def standard_error(self, metric: str) -> np.ndarray:
        """Returns the standard error of `mean`, (n, ...): sample deviation / √seeds; NaN for fewer than two seeds."""
        return self._over_seeds(metric, lambda x: x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else np.nan)

    @property
    def best(self) -> dict[str, Any] | None:
        """The parameters with the best mean of `metric`, among those of which no run diverged."""
        index = self.best_index
        return None if index is None else self.point(index)

    @property
    def best_index(self) -> int | None:
        """The index of `best` in `points`; None without a `metric`, or if every ε has a run that diverged."""
        if self.metric is None:
            return None
        all_finite = np.isfinite(self.metrics[self.metric].astype(np.float64)).all(axis=1)
        means = np.where(all_finite, self.mean(self.metric) * (1 if self.mode == "max" else -1), -np.inf)
        return int(means.argmax()) if all_finite.any() else None

    @property
    def diverged(self) -> list[tuple[dict[str, Any], int, list[str]]]:
        """The runs with a metric that is not finite: parameters, seed, and the names of those metrics."""
        bad = self._not_finite()
        cells = np.argwhere(np.any([*bad.values()], axis=0))
        return [(self.point(i), int(self.seeds[j]), [name for name in bad if bad[name][i, j]]) for i, j in cells]

    def point(self, index: int) -> dict[str, Any]:
        """Returns the parameters of one row of the table: numbers, or the name of a method."""
        return {name: _plain(values[index]) for name, values in self.points.items()}

    def write_csv(self, path: str | PathLike[str]) -> None:
        """Writes a line for each run: its parameters, its seed, and the metrics that are numbers.

        Args:
          path: the file, which is overwritten.
        """
        scalars = self._scalars()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*self.points, "seed", *scalars])
            for i in range(self._count()):
                for j, seed in enumerate(self.seeds.tolist()):
                    writer.writerow([*self.point(i).values(), seed, *(x[i, j] for x in scalars.values())])

    def remarks(self) -> Iterator[str]:
        """Yields warnings about the table: runs that diverged, and a best value at the edge of the search."""
        runs = [f"{_words(point)}, seed={seed} ({', '.join(names)})" for point, seed, names in self.diverged]
        if runs:
            more = f" and {len(runs) - 8} more" if len(runs) > 8 else ""
            yield f"diverged, and left out of the means: {'; '.join(runs[:8])}{more}"
        if self.metric is not None and self.best is None:
            yield f"no best {self.metric}: it diverged in some run of each row"
        for name, value in (self.best or {}).items():
            values = [] if isinstance(value, str) else sorted({shortest(x) for x in self.points[name]})
            if len(values) > 2 and value in (values[0], values[-1]):
                side = "lowest" if value == values[0] else "highest"
                yield f"the best {name}, {value:.4g}, is the {side} of the search: a better one may lie beyond"

    def warn(self) -> None:
        """Warns of each remark, at the line that called `sweep`."""
        for remark in self.remarks():
            warnings.warn(remark, stacklevel=3)

    def table(self) -> str:
        """Returns Markdown: a row for each ε, mean ± standard error of the scalar metrics, the best in bold."""
        return markdown(self._rows("**{}**"))

    def __str__(self) -> str:
        notes = "\n".join(self._notes())
        return self.table() + (f"\n\n{notes}" if notes else "")

    def _repr_markdown_(self) -> str:
        return "\n\n".join([self.table(), *self._notes()])

    def _repr_html_(self) -> str:
        head, *rows = self._rows("<b>{}</b>", html.escape)
        lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
        lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
        return "\n".join(["<table>", *lines, "</table>", *(f"<p>{html.escape(note)}</p>" for note in self._notes())])

    def _rows(self, bold: str, escape: Callable[[str], str] = str) -> list[list[str]]:
        """Returns the cells of the table, the head first."""
        scalars, best = self._scalars(), self.best_index
        rows = [[escape(name) for name in (*self.points, *scalars)]]
        for i in range(self._count()):
            cells = {name: _cell(x[i].astype(np.float64)) for name, x in scalars.items()}
            if i == best and self.metric is not None:
                cells[self.metric] = bold.format(cells[self.metric])
            rows.append([escape(_word(value)) for value in self.point(i).values()] + [*cells.values()])
        return rows

    def _notes(self) -> list[str]:
        best = [] if self.best is None else [f"best {self.metric}: {_words(self.best)}"]
        return best + [f"note: {remark}" for remark in self.remarks()]

    def _scalars(self) -> dict[str, np.ndarray]:
        """Returns the metrics that are one number for each run, (n, s) each."""
        return {name: x for name, x in self.metrics.items() if x.ndim == 2}

    def _count(self) -> int:
        return len(next(iter(self.points.values())))

    def _not_finite(self) -> dict[str, Any]:
        """Returns for each metric the runs (n, s) in which an entry of it is not finite."""
        finite = {name: np.isfinite(x.astype(np.float64)) for name, x in self.metrics.items()}
        return {name: ~x.all(axis=tuple(range(2, x.ndim))) for name, x in finite.items()}

    def _over_seeds(self, metric: str, statistic: Callable[[np.ndarray], Any]) -> np.ndarray:
        """Returns the statistic of the finite values over seeds, for each row and each entry of the metric."""
        checks.check_option("metric", metric, self.metrics)
        values = np.moveaxis(self.metrics[metric].astype(np.float64), 1, -1)
        rows = [statistic(row[np.isfinite(row)]) for row in values.reshape(-1, values.shape[-1])]
        return np.array(rows, dtype=np.float64).reshape(values.shape[:-1])


def markdown(rows: list[list[str]]) -> str:
    """Returns a Markdown table with aligned columns. The first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    cells = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def shortest(x: Any) -> float:
    """Returns the shortest decimal that rounds to `x` in its dtype: 0.1 for the float32 nearest 0.1."""
    return float(str(x))


def _plain(x: Any) -> float | str:
    return str(x) if isinstance(x, str) else shortest(x)


def _word(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _words(point: Mapping[str, float | str]) -> str:
    return ", ".join(f"{name}={_word(value)}" for name, value in point.items())


def _cell(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return "diverged"
    error = finite.std(ddof=1) / math.sqrt(finite.size) if finite.size > 1 else 0.0
    # Two digits of the error, and the mean to the same decimal.
    digits = min(max(1 - math.floor(math.log10(error)), 0), 6) if error else None
    text = f"{finite.mean():.4g}" if digits is None else f"{finite.mean():.{digits}f} ± {error:.{digits}f}"
    return text if finite.size == values.size else f"{text} ({finite.size} of {values.size})"
