"""u: where the smoothed mass goes. Each function gives what the `prior` argument of `smooth` and the losses takes.

One vector (K,) for all labels: `unigram`. A table (K, K), made once, whose row y is the u of label y, for
`prior=Rows(table, labels)`: `similarity`, `hierarchy`, `sord`, `gaussian`, `binomial`, `geometric`, `triangular`,
`beta`, `poisson`. A `Target` of its own for each example: `neighbors`, `spatial`, `teacher`, `mix`. `logit_adjustment`
is no u: it goes on the logits.
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
