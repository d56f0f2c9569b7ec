"""Priors u, which say where the smoothed mass goes, for the `prior` argument of `smooth` and of the losses.

`unigram` returns one vector (K,) for all labels. These return a table (K, K) whose row y is the u of label y; make it
once, and pass `prior=Rows(table, labels)`: `similarity`, `hierarchy`, `sord`, `gaussian`, `binomial`, `geometric`,
`triangular`, `beta`, `poisson`. `neighbors`, `spatial`, `teacher` and `mix` return a `Target`, a u for each example.
`logit_adjustment` is no u: it is added to the logits.
"""

from jax_ls.priors.classes import hierarchy, logit_adjustment, mix, similarity, teacher, tree_distances, unigram
from jax_ls.priors.neighborhoods import neighbors, spatial
from jax_ls.priors.ordinal import beta, binomial, gaussian, geometric, poisson, sord, triangular

__all__ = [
    "beta",
    "binomial",
    "gaussian",
    "geometric",
    "hierarchy",
    "logit_adjustment",
    "mix",
    "neighbors",
    "poisson",
    "similarity",
    "sord",
    "spatial",
    "teacher",
    "tree_distances",
    "triangular",
    "unigram",
]
