"""The runs of a sweep on disk, for the next call to continue from, and what tells one sweep from another."""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
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

__all__ = ["ResultsFile", "fingerprint"]


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
    """A hash of the program as it is lowered, and of its constants. JAX's version and the platform are part of it."""
    # Constants are arguments, as in the sweep itself: in the text, each would be written out.
    run = jax.jit(functools.partial(eval_jaxpr, program.jaxpr))
    digest = hashlib.sha256(run.lower(program.consts, *program.in_avals).as_text().encode())
    for x in program.consts:
        is_key = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
        digest.update(np.asarray(jax.random.key_data(x) if is_key else x).tobytes())
    return digest.hexdigest()[:16]


def _plain(x: Any) -> Any:
    """Numbers as JSON has them, to the last bit of their own dtype; NaN and infinities as words."""
    if np.ndim(x):
        return [_plain(item) for item in x]
    if np.issubdtype(x.dtype, np.integer) or x.dtype == bool:
        return x.item()
    value = shortest(x)
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
