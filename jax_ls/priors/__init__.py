"""Priors u, which say where the smoothed mass goes, for the `prior` argument of `smooth` and of the losses.

`unigram` returns one vector (K,) for all labels. `similarity`, `hierarchy`, `sord`, `gaussian`, `binomial` and
`geometric` return a table (K, K) whose row y is the u of label y: make it once, and pass `prior=Rows(table, labels)`.
`neighbors`, `spatial`, `teacher` and `mix` return a `Target` with a u for each example.
"""

from jax_ls.priors.classes import hierarchy, mix, similarity, teacher, tree_distances, unigram
from jax_ls.priors.neighborhoods import neighbors, spatial
from jax_ls.priors.ordinal import binomial, gaussian, geometric, sord

__all__ = [
    "binomial",
    "gaussian",
    "geometric",
    "hierarchy",
    "mix",
    "neighbors",
    "similarity",
    "sord",
    "spatial",
    "teacher",
    "tree_distances",
    "unigram",
]
