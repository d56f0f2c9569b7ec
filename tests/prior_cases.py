"""The one table of priors: how each is made, and what it is by the definition."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import reference_priors as ref

from jax_ls import Rows, priors

K = 7
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, K, (4, 5))
KEPT = RNG.random((4, 5)) < 0.7
LOGITS = RNG.normal(size=(4, 5, K))
COUNTS, EXISTS = RNG.uniform(0, 50, K), np.arange(K) != 2
EMBEDDINGS, CONFUSION = RNG.normal(size=(K, 3)), RNG.uniform(0, 9, (K, K))
PARENTS = [7, 7, 8, 8, 8, 9, 10, 9, 9, 10, -1]
DISTANCES = ref.lowest_common_ancestor_heights(PARENTS, range(K)).astype(float)
RANKS = np.arange(float(K))
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A prior of real parameters, and its definition: u of all labels (K,), a table (K, K), or u of each (4, 5, K)."""

    floats: Arrays
    ours: Callable[[Arrays], Any]
    exact: Callable[[Arrays], np.ndarray]
    table: bool = True

    def prior(self, a: Arrays) -> Any:
        return Rows(self.ours(a), LABELS) if self.table else self.ours(a)

    def probs(self, a: Arrays) -> np.ndarray:
        u = self.exact(a)
        return np.broadcast_to(u[LABELS] if self.table else u, (*LABELS.shape, K))


def absolute(y, k):
    return np.sqrt((y - k) ** 2)  # analytic, as |·| is not; ranks are apart, and 0 is 0


def each_line(f):
    return np.stack([f(labels, kept) for labels, kept in zip(LABELS, KEPT, strict=True)])


KINDS = {
    "unigram": Kind(
        {"counts": COUNTS, "pseudo": 0.5, "temperature": 2.0},
        lambda a: priors.unigram(a["counts"], pseudo_count=a["pseudo"], temperature=a["temperature"]),
        lambda a: ref.unigram(a["counts"], a["pseudo"], a["temperature"]),
        table=False,
    ),
    "unigram over some": Kind(
        {"counts": COUNTS, "temperature": 0.5},
        lambda a: priors.unigram(a["counts"], temperature=a["temperature"], class_where=EXISTS),
        lambda a: ref.unigram(a["counts"], 1, a["temperature"], EXISTS),
        table=False,
    ),
    "similarity": Kind(
        {"embeddings": EMBEDDINGS, "temperature": 0.7},
        lambda a: priors.similarity(a["embeddings"], temperature=a["temperature"]),
        lambda a: ref.similarity(ref.cosine(a["embeddings"]), a["temperature"]),
    ),
    "similarity of dots": Kind(
        {"embeddings": EMBEDDINGS, "temperature": 0.7},
        lambda a: priors.similarity(a["embeddings"], temperature=a["temperature"], metric="dot"),
        lambda a: ref.similarity(a["embeddings"] @ a["embeddings"].T, a["temperature"]),
    ),
    "confusion": Kind(
        {"confusion": CONFUSION, "temperature": 0.2},
        lambda a: priors.similarity(confusion=a["confusion"], temperature=a["temperature"]),
        lambda a: ref.similarity(ref.rates(a["confusion"]), a["temperature"]),
    ),
    "hierarchy": Kind(
        {"beta": 4.0},
        lambda a: priors.hierarchy(DISTANCES.astype(a["beta"].dtype), beta=a["beta"]),
        lambda a: ref.hierarchy(DISTANCES, a["beta"]),
    ),
    "sord": Kind(
        {"beta": 0.8}, lambda a: priors.sord(K, beta=a["beta"]), lambda a: ref.sord(RANKS, absolute, a["beta"])
    ),
    "sord of ranks": Kind(
        {"ranks": np.array([0.0, 1, 3, 3.5, 5, 8, 9]), "beta": 0.3},
        lambda a: priors.sord(a["ranks"], phi="squared", beta=a["beta"]),
        lambda a: ref.sord(a["ranks"], lambda y, k: (y - k) ** 2, a["beta"]),
    ),
    "sord of a metric": Kind(
        {"ranks": np.arange(1.0, K + 1)},
        lambda a: priors.sord(a["ranks"], phi=lambda y, k: jnp.square(jnp.log(y) - jnp.log(k))),
        lambda a: ref.sord(a["ranks"], lambda y, k: (np.log(y) - np.log(k)) ** 2),
    ),
    "gaussian": Kind(
        {"sigma": 1.5}, lambda a: priors.gaussian(K, sigma=a["sigma"]), lambda a: ref.gaussian(RANKS, a["sigma"])
    ),
    "binomial": Kind(
        {"margin": 0.1}, lambda a: priors.binomial(K, margin=a["margin"]), lambda a: ref.binomial(K, a["margin"])
    ),
    "geometric": Kind(
        {"alpha": 0.4}, lambda a: priors.geometric(K, alpha=a["alpha"]), lambda a: ref.geometric(K, a["alpha"])
    ),
    "geometric by label, to either side": Kind(
        {"alpha": RNG.uniform(0.1, 0.6, K), "left": RNG.uniform(0.1, 0.9, K)},
        lambda a: priors.geometric(K, alpha=a["alpha"], left=a["left"]),
        lambda a: ref.geometric(K, a["alpha"], a["left"]),
    ),
    "triangular": Kind(
        {"alpha": 0.1}, lambda a: priors.triangular(K, alpha=a["alpha"]), lambda a: ref.triangular(K, a["alpha"])
    ),
    "triangular, wide": Kind(
        {"alpha": 0.35}, lambda a: priors.triangular(K, alpha=a["alpha"]), lambda a: ref.triangular(K, a["alpha"])
    ),
    "poisson": Kind(
        {"rates": RNG.uniform(0.5, 6, K)},
        lambda a: priors.poisson(K, rates=a["rates"]),
        lambda a: ref.poisson(a["rates"]),
    ),
    "neighbors": Kind(
        {"weights": np.array([2.0, 5, 5, 2])},
        lambda a: priors.neighbors(LABELS, weights=a["weights"]),
        lambda a: each_line(lambda y, _: ref.neighbors(y, (-2, -1, 1, 2), a["weights"], K)),
        table=False,
    ),
    "neighbors where": Kind(
        {"weights": np.array([3.0, 1.0])},
        lambda a: priors.neighbors(LABELS, offsets=(-1, 2), weights=a["weights"], where=KEPT),
        lambda a: each_line(lambda y, kept: ref.neighbors(y, (-1, 2), a["weights"], K, kept)),
        table=False,
    ),
    "spatial": Kind(
        {"sigma": 1.2},
        lambda a: priors.spatial(LABELS, sigma=a["sigma"]),
        lambda a: ref.spatial(LABELS, 3, a["sigma"], K),
        table=False,
    ),
    "spatial where": Kind(
        {"sigma": 0.8},
        lambda a: priors.spatial(LABELS, sigma=a["sigma"], kernel_size=5, where=KEPT),
        lambda a: ref.spatial(LABELS, 5, a["sigma"], K, KEPT),
        table=False,
    ),
    "teacher": Kind(
        {"temperature": 3.0},
        lambda a: priors.teacher(3 * LOGITS[::-1], temperature=a["temperature"]),
        lambda a: np.apply_along_axis(ref.teacher, -1, 3 * LOGITS[::-1] + 0j, a["temperature"]),
        table=False,
    ),
    "mix": Kind(
        {"lam": RNG.random((4, 5))},
        lambda a: priors.mix(LABELS, jnp.eye(K)[LABELS[::-1]], a["lam"]),
        lambda a: a["lam"][..., None] * np.eye(K)[LABELS] + (1 - a["lam"][..., None]) * np.eye(K)[LABELS[::-1]],
        table=False,
    ),
}
