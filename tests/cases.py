"""The one table of cases: shapes, numbers of classes, scales of logits, ε, dtypes, options, and kinds of target."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference

from jax_ls import Dense, OneHot, Rows, Sparse, Target, Uniform, smooth

BATCHES = [(), (6,), (2, 3), (0,)]
NUM_CLASSES = [1, 2, 1000]
SCALES = [0.01, 1.0, 30.0]
SMOOTHING = [-0.5, 0.0, 0.1, 1.0]
DTYPES = ["float32", "bfloat16", "float16", "float64"]

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row of the table: words for the options of a loss, separated by spaces."""

    options: str = ""
    batch: tuple[int, ...] = (2, 3)
    num_classes: int = 13
    dtype: str = "float32"
    axis: int = -1

    @property
    def points(self) -> list[tuple[float, float]]:
        """Scales of logits and ε: all pairs for the plain cases, each of both for others, one pair for a large K."""
        if self.num_classes == 1000:
            return [(1.0, 0.1)]
        every = list(itertools.product(SCALES, SMOOTHING))
        return every if self in (Case(), Case("others")) else list(zip(itertools.cycle(SCALES), SMOOTHING))

    def __str__(self) -> str:
        return f"{self.options or 'uniform'}-{self.batch}-{self.num_classes}-{self.dtype}-{self.axis}".replace(" ", "+")


OPTIONS = [
    *["", "others", "prior", "prior others", "prior_each", "prior_each others"],
    *["each", "each others", "each prior others", "each where class_where", "each dense", "each dense others"],
    *["class_where", "class_where others", "class_where prior", "class_where prior others"],
    *["class_where_each", "class_where_each prior others", "where", "ignore_index", "ignore_index where"],
    *["class_weights", "class_weights others class_where", "z_loss", "z_loss class_where where"],
    *["dense", "dense others", "dense prior others", "dense class_weights class_where"],
    *["dense others class_weights", "dense where z_loss"],
]
CASES = [Case(words) for words in OPTIONS]
CASES += [Case(words, axis=axis) for axis in (0, 1) for words in ("others", "dense class_where_each prior z_loss")]
CASES += [Case(words, batch) for batch in BATCHES for words in ("", "prior others where class_weights")]
CASES += [Case(words, (3,), size) for size in NUM_CLASSES for words in ("", "others", "class_where prior")]
CASES += [Case(words, (5,), 13, dtype) for dtype in DTYPES[1:] for words in ("", "prior others", "dense class_weights")]


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """64-bit mode for float64 alone."""
    with jax.enable_x64(dtype == "float64"):
        yield


def draw(case: Case, scale: float = 1.0, smoothing: float = 0.1) -> tuple[Arrays, Arrays, Arrays]:
    """Arguments of `smoothed_cross_entropy`: (real arrays, ε too, other arrays, static ones), classes last."""
    rng = np.random.default_rng(0)
    size, batch, words = case.num_classes, case.batch, case.options.split()
    shape = (*batch, size)
    floats: Arrays = {"logits": scale * rng.normal(size=shape), "epsilon": np.array(smoothing)}
    if "each" in words:
        floats["epsilon"] = rng.uniform(-0.5, 1, batch)
    fixed: Arrays = {}
    static: Arrays = {"axis": case.axis}
    exists = np.ones(shape, bool)
    if "class_where" in words:
        fixed["class_where"] = np.arange(size) % 4 != 3
        exists &= fixed["class_where"]
    if "class_where_each" in words:
        fixed["class_where"] = exists = (np.arange(np.prod(batch, dtype=int))[:, None] + np.arange(size)) % 4 != 3
        fixed["class_where"] = exists = exists.reshape(shape)
    if "dense" in words:
        dense = rng.dirichlet(np.ones(size), batch) * exists
        floats["labels"] = dense / dense.sum(axis=-1, keepdims=True)
    else:
        fixed["labels"] = np.array([rng.choice(np.flatnonzero(exists[i])) for i in np.ndindex(batch)], int).reshape(
            batch
        )
    if "prior" in words:
        floats["prior"] = rng.dirichlet(np.ones(size))
    if "prior_each" in words:
        floats["prior"] = rng.dirichlet(np.ones(size), batch)
    if "class_weights" in words:
        floats["class_weights"] = rng.uniform(0.1, 2, size)
    if "z_loss" in words:
        floats["z_loss"] = np.array(0.01)
    if "others" in words:
        static["spread"] = "others"
    if "where" in words:
        fixed["where"] = np.arange(np.prod(batch, dtype=int)).reshape(batch) % 3 != 1
    if "ignore_index" in words:
        static["ignore_index"] = int(fixed["labels"].flat[0])
    return floats, fixed, static


def cotangent(batch: tuple[int, ...]) -> np.ndarray:
    """A weight for each example, so that a gradient that mixes examples up is seen."""
    return np.linspace(0.5, 1.5, np.prod(batch, dtype=int)).reshape(batch)


def rounded(arrays: Arrays, dtype: str) -> tuple[Arrays, Arrays]:
    """The arrays in `dtype`, and in float64 what that rounding made of them."""
    ours = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    return ours, {name: np.asarray(x).astype(np.float64) for name, x in ours.items()}


def assert_close(actual: jax.Array, expected: np.ndarray, size: float = 1.0) -> None:
    """Within the rounding of sums in float32 or wider, over numbers of this size, and of the result's own dtype."""
    assert actual.shape == expected.shape
    dtype = jnp.finfo(actual.dtype)
    wide = jnp.finfo(jnp.float64 if dtype.bits == 64 else jnp.float32)
    tolerance = 16 * float(wide.eps) + (float(dtype.eps) if dtype.bits == 16 else 0)
    np.testing.assert_allclose(
        np.asarray(actual).astype(np.float64), expected, rtol=tolerance, atol=16 * float(wide.eps) * max(size, 1)
    )


@dataclass(frozen=True)
class Kind:
    """A kind of target, and its row of one example by the definition."""

    target: Callable[[Arrays], Target]
    row: Callable[[Arrays, Any, int], np.ndarray]


def ingredients(batch: tuple[int, ...], size: int) -> tuple[Arrays, Arrays]:
    """What targets are made of: (real arrays, other arrays)."""
    rng = np.random.default_rng(1)
    floats = {
        "epsilon": np.array(0.3),
        "each": rng.uniform(-0.5, 1, batch),
        "prior": rng.dirichlet(np.ones(size)),
        "dense": rng.dirichlet(np.ones(size), batch),
        "table": rng.dirichlet(np.ones(size), size),
        "weights": rng.permuted(np.broadcast_to([0.5, 0.25, 0.25], (*batch, 3)), axis=-1),
        "class_weights": rng.uniform(0.1, 2, size),
    }
    exists = np.arange(size) % 4 != 3
    labels = rng.choice(np.flatnonzero(exists), (2, *batch))
    fixed = {
        "labels": labels[0],
        "partner": labels[1],
        "indices": rng.integers(0, size, (*batch, 3)),
        "exists": exists,
        "exists_each": (rng.random((*batch, size)) < 0.5) | np.eye(size, dtype=bool)[labels[0]],
    }
    return floats, fixed


def _mixup(a: Arrays) -> Target:
    first, second = smooth(a["labels"], 0.2), smooth(a["partner"], 0.2, prior=a["prior"], spread="others")
    return a["each"] * first + (1 - a["each"]) * second


def _mixup_row(a: Arrays, i: Any, n: int) -> np.ndarray:
    second = reference.smooth(a["partner"][i], 0.2, n, prior=a["prior"], spread="others")
    return a["each"][i] * reference.smooth(a["labels"][i], 0.2, n) + (1 - a["each"][i]) * second


def _sparse(a: Arrays, i: Any, n: int) -> np.ndarray:
    return reference.sparse(a["indices"][i], a["weights"][i], n)


KINDS = {
    "one-hot": Kind(lambda a: OneHot(a["labels"]), lambda a, i, n: reference.one_hot(a["labels"][i], n)),
    "uniform": Kind(lambda a: Uniform(), lambda a, i, n: reference.uniform(n)),
    "uniform over some": Kind(lambda a: Uniform(a["exists"]), lambda a, i, n: reference.uniform(n, a["exists"])),
    "uniform over some of each": Kind(
        lambda a: Uniform(a["exists_each"]), lambda a, i, n: reference.uniform(n, a["exists_each"][i])
    ),
    "dense for all": Kind(lambda a: Dense(a["prior"]), lambda a, i, n: a["prior"]),
    "dense": Kind(lambda a: Dense(a["dense"]), lambda a, i, n: a["dense"][i]),
    "rows": Kind(lambda a: Rows(a["table"], a["labels"]), lambda a, i, n: a["table"][a["labels"][i]]),
    "sparse": Kind(lambda a: Sparse(a["indices"], a["weights"]), _sparse),
    "mixture": Kind(
        lambda a: (1 - a["epsilon"]) * OneHot(a["labels"]) + a["epsilon"] * Uniform(),
        lambda a, i, n: reference.smooth(a["labels"][i], a["epsilon"], n),
    ),
    "weights by example": Kind(
        lambda a: OneHot(a["labels"]) * a["each"] + 2 * Rows(a["table"], a["partner"]) + -0.5 * Dense(a["prior"]),
        lambda a, i, n: (
            a["each"][i] * reference.one_hot(a["labels"][i], n) + 2 * a["table"][a["partner"][i]] - 0.5 * a["prior"]
        ),
    ),
    "weighted twice": Kind(
        lambda a: (
            (0.5 * Sparse(a["indices"], a["weights"]) + Uniform()).weighted(a["class_weights"]).weighted(a["dense"])
        ),
        lambda a, i, n: (0.5 * _sparse(a, i, n) + 1 / n) * a["class_weights"] * a["dense"][i],
    ),
    "restricted rows": Kind(
        lambda a: smooth(a["labels"], a["each"], prior=Rows(a["table"], a["labels"]), class_where=a["exists"]),
        lambda a, i, n: reference.smooth(
            a["labels"][i], a["each"][i], n, prior=a["table"][a["labels"][i]], exists=a["exists"]
        ),
    ),
    "others of sparse": Kind(
        lambda a: smooth(
            a["labels"], a["epsilon"], prior=0.5 * Sparse(a["indices"], a["weights"]) + 0.5 * Uniform(), spread="others"
        ),
        lambda a, i, n: reference.smooth(
            a["labels"][i], a["epsilon"], n, prior=0.5 * _sparse(a, i, n) + 0.5 / n, spread="others"
        ),
    ),
    "others of dense": Kind(
        lambda a: smooth(a["dense"], a["each"], spread="others"),
        lambda a, i, n: reference.smooth(a["dense"][i], a["each"][i], n, spread="others"),
    ),
    "mixup": Kind(_mixup, _mixup_row),
}


def written_out(kind: Kind, arrays: Arrays, batch: tuple[int, ...], size: int) -> np.ndarray:
    """q of every example, (*batch, K), by the definition."""
    rows = [kind.row(arrays, i, size) for i in np.ndindex(batch)]
    return np.array(rows).reshape(*batch, size)
