"""Time of HL-Gauss histograms against the plain formula with erf, on the same returns.

    python benchmarks/values.py                   # the table of benchmarks/README.md, half a minute
    python benchmarks/values.py --returns 1000000 --bins 51

Both make (returns, bins) probabilities in float32. Ratios are within one run, to the plain formula. `temporaries` is
what the compiled program allocates beside its result, in multiples of that; `lost` counts rows that are not finite
where a fifth of the returns lies outside the range; `error` is the largest relative error of a probability above
1e-30, against float64, for the others.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from measure import interleaved_times, machine, table, temporary_bytes
from scipy.special import ndtr

from jax_ls.values import Support, hl_gauss

LOW, HIGH, RATIO = -10.0, 10.0, 0.75


def plain(returns: jax.Array, support: Support) -> jax.Array:
    """The formula with a distribution function: differences of numbers near 1, and returns as they are."""
    sigma = RATIO * (HIGH - LOW) / support.num_bins
    cdf = jax.scipy.special.erf((support.edges - returns[:, None]) / (jnp.sqrt(2.0) * sigma))
    return (cdf[:, 1:] - cdf[:, :-1]) / (cdf[:, -1:] - cdf[:, :1])


def ours(returns: jax.Array, support: Support) -> jax.Array:
    return hl_gauss(returns, support, sigma_ratio=RATIO).probs(support.num_bins)


def exact(returns: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """In float64, from the tail that holds both ends of a bin."""
    x = (edges - returns[:, None]) / (RATIO * (edges[-1] - edges[0]) / (len(edges) - 1))
    right = x[:, :-1] > 0
    p = np.where(right, ndtr(-x[:, :-1]) - ndtr(-x[:, 1:]), ndtr(x[:, 1:]) - ndtr(x[:, :-1]))
    return p / p.sum(axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--returns", type=int, default=100_000)
    parser.add_argument("--bins", type=int, default=101)
    parser.add_argument("--repeat", type=int, default=40, help="how often each is timed; the median counts")
    args = parser.parse_args()

    support = Support.from_edges(jnp.linspace(LOW, HIGH, args.bins + 1))
    rng = np.random.default_rng(0)
    inside = jnp.asarray(rng.uniform(LOW, HIGH, args.returns), jnp.float32)
    wide = jnp.asarray(rng.uniform(1.25 * LOW, 1.25 * HIGH, args.returns), jnp.float32)
    low, high = (float(support.atoms[i]) for i in (0, -1))
    sample = np.clip(np.asarray(inside[:2000], float), low, high)
    truth = exact(sample, np.asarray(support.edges, float))

    compiled = {f.__name__: jax.jit(f).lower(inside, support).compile() for f in (plain, ours)}
    seconds = interleaved_times({name: lambda f=f: f(inside, support) for name, f in compiled.items()}, args.repeat)
    rows = []
    for name, function in compiled.items():
        memory = temporary_bytes(function) / (4 * args.returns * args.bins)
        lost = int((~jnp.isfinite(function(wide, support)).all(axis=1)).sum())
        clipped = jnp.resize(jnp.asarray(sample, jnp.float32), (args.returns,))
        found = np.asarray(function(clipped, support), float)[: len(sample)]
        error = np.abs(found - truth)[truth > 1e-30] / truth[truth > 1e-30]
        time = [f"{1e3 * seconds[name]:.1f}", f"{seconds[name] / seconds['plain']:.2f}×"]
        rows.append([name, *time, f"{memory:.2f}×", f"{lost:,}", f"{error.max():.0e}"])
    print(machine() + f"; {args.returns:,} returns, {args.bins} bins, float32; ratio to the plain formula\n")
    print(table(["histogram", "ms", "ratio", "temporaries", "lost", "error"], rows))


if __name__ == "__main__":
    main()
