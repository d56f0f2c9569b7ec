"""Every prior against its definition, value and gradient, and the laws that they all keep."""

import functools

import cases
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import reference_priors as ref
from prior_cases import DISTANCES, KINDS, LABELS, LOGITS, PARENTS, K

from jax_ls import Dense, Rows, cross_entropy, linear_cross_entropy, priors, smooth, smoothed_cross_entropy
from jax_ls.targets import as_target

EPSILON = 0.3
every_kind = pytest.mark.parametrize("name", KINDS)


@functools.partial(jax.jit, static_argnums=0)
def written_out(name, arrays):
    return as_target(KINDS[name].prior(arrays)).probs(K)


@functools.partial(jax.jit, static_argnums=0)
def losses(name, logits, arrays):
    return smoothed_cross_entropy(logits, LABELS, EPSILON, prior=KINDS[name].prior(arrays))


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(name, logits, arrays):
    weights = jnp.asarray(cases.cotangent(LABELS.shape), "float32")
    return jax.value_and_grad(lambda z, a: jnp.sum(losses(name, z, a) * weights), argnums=(0, 1))(logits, arrays)


def exact_loss(kind, logits, arrays, weights):
    """Σ w · loss by the definition."""
    u, total = kind.probs(arrays), 0
    for i in np.ndindex(LABELS.shape):
        q = (1 - EPSILON) * reference.one_hot(LABELS[i], K) + EPSILON * u[i]
        total = total + weights[i] * reference.cross_entropy(logits[i], q)
    return total


@every_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_prior_is_that_of_the_definition_and_sums_to_1(name, dtype):
    with cases.precision(dtype):
        ours, exact = cases.rounded(KINDS[name].floats, dtype)
        u = jnp.broadcast_to(written_out(name, ours), (*LABELS.shape, K))
        cases.assert_close(u.astype("float32"), KINDS[name].probs(exact).real, size=4)
        np.testing.assert_allclose(np.sum(u, axis=-1), 1, rtol=2e-6)


@every_kind
def test_the_loss_and_its_gradients_are_those_of_the_definition(name):
    kind, weights = KINDS[name], cases.cotangent(LABELS.shape)
    ours, exact = cases.rounded(kind.floats, "float32")
    z, exact_z = jnp.asarray(LOGITS, "float32"), LOGITS.astype("float32").astype(float)
    value, (by_logits, by_floats) = value_and_gradients(name, z, ours)
    cases.assert_close(value, np.asarray(exact_loss(kind, exact_z, exact, weights).real), size=30)
    q = (1 - EPSILON) * np.eye(K)[LABELS] + EPSILON * kind.probs(exact).real
    p = np.exp(exact_z) / np.exp(exact_z).sum(-1, keepdims=True)
    cases.assert_close(by_logits, weights[..., None] * (p - q), size=4)
    for key, x in exact.items():
        expected = reference.gradient(lambda x, key=key: exact_loss(kind, exact_z, exact | {key: x}, weights), x)
        cases.assert_close(by_floats[key], expected, size=30)


@every_kind
def test_vmap_over_the_parameters_is_a_loop(name):
    z = jnp.asarray(LOGITS, "float32")
    grid = [{key: jnp.asarray(scale * x, "float32") for key, x in KINDS[name].floats.items()} for scale in (0.6, 1.1)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grid)
    together = jax.jit(jax.vmap(lambda a: losses(name, z, a)))(stacked)
    np.testing.assert_allclose(together, [losses(name, z, a) for a in grid], rtol=2e-5)


@every_kind
def test_others_is_all_at_a_larger_epsilon(name):
    a, _ = cases.rounded(KINDS[name].floats, "float32")
    u = np.broadcast_to(written_out(name, a), (*LABELS.shape, K))
    u_y = np.take_along_axis(u, LABELS[..., None], axis=-1)[..., 0]
    alone = u_y > 1 - 1e-6
    q = jax.jit(lambda a: smooth(LABELS, EPSILON, prior=KINDS[name].prior(a), spread="others").probs(K))(a)
    raised = np.where(alone, 0, EPSILON / np.where(alone, 1, 1 - u_y))[..., None]
    expected = (1 - raised) * np.eye(K)[LABELS] + raised * u
    # Where all of u is on the label, the others share ε equally.
    equally = np.where(np.eye(K, dtype=bool)[LABELS], 1 - EPSILON, EPSILON / (K - 1))
    np.testing.assert_allclose(q, np.where(alone[..., None], equally, expected), atol=1e-5)


@pytest.mark.parametrize("name", ["unigram", "sord", "neighbors"])
def test_priors_ride_on_the_linear_loss(name):
    hidden, kernel = (
        jnp.asarray(np.random.default_rng(1).normal(size=shape), "float32") for shape in ((4, 5, 3), (3, K))
    )
    prior = KINDS[name].prior(cases.rounded(KINDS[name].floats, "float32")[0])

    @jax.jit
    def both(h, k):
        def fused(h, k):
            return linear_cross_entropy(h, k, LABELS, smoothing=EPSILON, prior=prior, chunk_size=6)

        def plain(h, k):
            return smoothed_cross_entropy(h @ k, LABELS, EPSILON, prior=prior).mean()

        return [jax.tree.leaves(jax.value_and_grad(f, (0, 1))(h, k)) for f in (fused, plain)]

    for x, y in zip(*both(hidden, kernel), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.sampled_from([*KINDS]), st.floats(-0.5, 1), st.floats(0, 1))
def test_smoothing_commutes_with_mixup(name, epsilon, lam):
    """For a prior that both labels share."""
    u = Dense(written_out(name, cases.rounded(KINDS[name].floats, "float32")[0]))
    a, b = jnp.asarray(LABELS), jnp.asarray(LABELS[::-1])
    before = priors.mix(smooth(a, epsilon, prior=u), smooth(b, epsilon, prior=u), lam)
    after = smooth(priors.mix(a, b, lam), epsilon, prior=u)
    np.testing.assert_allclose(before.probs(K), after.probs(K), atol=1e-6)
    np.testing.assert_allclose(after.mass(), 1, rtol=1e-5)


def test_the_limits_of_a_unigram():
    counts = np.array([3, 1, 0, 2**40])
    np.testing.assert_allclose(priors.unigram(counts, pseudo_count=0), counts / counts.sum(), rtol=1e-6)
    np.testing.assert_allclose(priors.unigram(counts, temperature=1e6), [0.25] * 4, rtol=1e-4)
    np.testing.assert_allclose(priors.unigram(counts.tolist(), temperature=0.01), [0, 0, 0, 1], atol=1e-6)
    gradient = jax.grad(lambda c: priors.unigram(c, pseudo_count=0)[0])(jnp.array([1.0, 0.0, 3.0]))
    np.testing.assert_allclose(gradient, [3 / 16, -1 / 16, -1 / 16], rtol=1e-5)


def test_similarity_of_what_has_none():
    """A class without embedding, or never seen, is as like one as another."""
    np.testing.assert_allclose(priors.similarity(jnp.eye(3).at[0].set(0.0))[0], [0, 0.5, 0.5])
    np.testing.assert_allclose(
        priors.similarity(confusion=np.array([[0, 0, 0], [1, 8, 1], [4, 0, 4]]))[0], [0, 0.5, 0.5]
    )
    assert np.isfinite(jax.grad(lambda e: priors.similarity(e)[0, 1])(jnp.zeros((3, 2)))).all()


def test_tree_distances_by_the_definition():
    np.testing.assert_array_equal(priors.tree_distances(PARENTS), DISTANCES)
    np.testing.assert_array_equal(priors.tree_distances([-1]), [[0]])
    np.testing.assert_array_equal(priors.tree_distances([1, -1]), [[0]])
    rng = np.random.default_rng(1)
    for _ in range(5):
        parents = [-1, *(int(rng.integers(0, node)) for node in range(1, 30))]
        leaves = [node for node in range(30) if node not in parents]
        expected = ref.lowest_common_ancestor_heights(parents, leaves)
        np.testing.assert_array_equal(priors.tree_distances(parents), expected)


def test_the_hierarchy_goes_from_uniform_to_one_hot():
    np.testing.assert_allclose(priors.hierarchy(DISTANCES, beta=0.0), np.full((K, K), 1 / K), rtol=1e-6)
    np.testing.assert_allclose(priors.hierarchy(DISTANCES, beta=1e4), np.eye(K), atol=1e-6)
    np.testing.assert_allclose(priors.hierarchy(np.zeros((3, 3)), beta=5.0), np.full((3, 3), 1 / 3), rtol=1e-6)


def test_a_teacher_is_a_constant():
    z = jnp.asarray(LOGITS[0], "float32")
    gradient = jax.grad(lambda t: cross_entropy(z, priors.teacher(t, temperature=2.0)).sum())(z)
    np.testing.assert_array_equal(gradient, np.zeros_like(z))
    assert priors.teacher(z.astype(jnp.bfloat16)).probabilities.dtype == jnp.float32
    np.testing.assert_allclose(priors.teacher(z + 1e3).probs(K), priors.teacher(z).probs(K), rtol=1e-3)


ONES = np.ones((3, 3))
MISTAKES = [
    (lambda: priors.unigram([3, -1]), r"counts: expected finite numbers ≥ 0, got -1"),
    (lambda: priors.unigram([np.nan, 1.0]), r"counts: expected finite numbers ≥ 0, got nan"),
    (lambda: priors.unigram([0, 0], pseudo_count=0), r"counts: expected finite numbers > 0, got 0"),
    (lambda: priors.unigram(ONES), r"counts: expected \(K,\), one number a class, got float32 \(3, 3\)"),
    (lambda: priors.unigram([1, 2], pseudo_count=-1), r"pseudo_count: .*got -1"),
    (lambda: priors.unigram([1, 2], temperature=0.0), r"temperature: .*got 0.0"),
    (lambda: priors.unigram([1, 2], class_where=np.ones(3, bool)), r"class_where: .*got bool \(3,\)"),
    (lambda: priors.unigram("many"), r"counts: .*got 'many'"),
    (lambda: priors.similarity(), r"embeddings, confusion: expected one of the two"),
    (lambda: priors.similarity(ONES, confusion=ONES), r"embeddings, confusion"),
    (lambda: priors.similarity(np.ones(3)), r"embeddings: expected a matrix \(K, D\), got float32 \(3,\)"),
    (lambda: priors.similarity(np.ones((1, 3))), r"embeddings or confusion: expected two classes or more"),
    (lambda: priors.similarity(ONES, metric="nearness"), r"metric: .*got 'nearness'"),
    (lambda: priors.similarity(ONES, temperature=-1.0), r"temperature: .*got -1.0"),
    (lambda: priors.similarity(confusion=-ONES), r"confusion: .*got -1.0"),
    (lambda: priors.similarity(confusion=np.ones((3, 4))), r"confusion: expected a square matrix"),
    (lambda: priors.hierarchy(np.ones((3, 4)), beta=1.0), r"distances: expected a square matrix .*float32 \(3, 4\)"),
    (lambda: priors.hierarchy(np.ones(3), beta=1.0), r"distances: expected a matrix"),
    (lambda: priors.hierarchy(-ONES, beta=1.0), r"distances: .*got -1.0"),
    (lambda: priors.hierarchy(ONES, beta=-1.0), r"beta: .*got -1.0"),
    (lambda: priors.tree_distances([1, 2, 0, -1]), r"parents: expected a tree, got the cycle \[0, 1, 2, 0\]"),
    (lambda: priors.tree_distances([0, -1]), r"parents: expected a tree, got the cycle \[0, 0\]"),
    (lambda: priors.tree_distances([-1, -1]), r"parents: expected one root, -1, got 2"),
    (lambda: priors.tree_distances([1, 5, -1]), r"parents: expected nodes 0 to 2"),
    (lambda: priors.tree_distances([[-1]]), r"parents: expected \(n,\)"),
    (lambda: priors.tree_distances([-1.0]), r"parents: expected integers"),
    (lambda: jax.jit(priors.tree_distances)(jnp.array([1, -1])), r"parents: expected static integers"),
    (lambda: priors.teacher(np.ones(3, int)), r"logits: .*got int"),
    (lambda: priors.teacher(np.ones(3), temperature=0), r"temperature: .*got 0"),
    (lambda: priors.mix(0, 1, "half"), r"lam: .*got 'half'"),
    (lambda: cross_entropy(np.zeros((2, 4)), Rows(priors.sord(3), np.zeros(2, int))), r"table: expected 4 classes"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_bad_input_raises_at_once(mistake, message):
    with pytest.raises((AssertionError, TypeError, ValueError), match=message):
        mistake()


@pytest.mark.parametrize(
    "prior",
    [
        lambda x: priors.unigram(jnp.array([1.0, x])),
        lambda x: priors.unigram(jnp.ones(3), temperature=x),
        lambda x: priors.similarity(jnp.eye(3), temperature=x),
        lambda x: priors.hierarchy(ONES, beta=x),
        lambda x: priors.gaussian(3, sigma=x),
        lambda x: priors.binomial(3, margin=x),
        lambda x: priors.geometric(3, alpha=x),
        lambda x: priors.geometric(3, left=x),
        lambda x: priors.triangular(3, alpha=x),
        lambda x: priors.beta(3, shapes=jnp.stack([jnp.array([1.0, 2.0, x]), jnp.ones(3)], axis=-1)),
        lambda x: priors.poisson(3, rates=jnp.array([1.0, x, 2.0])),
        lambda x: priors.spatial(LABELS, sigma=x).weights[..., 1:],
        lambda x: priors.teacher(jnp.ones(3), temperature=x).probabilities,
    ],
)
def test_a_traced_parameter_out_of_range_is_nan(prior):
    both = jax.jit(jax.vmap(prior))(jnp.array([0.25, -1.0]))
    assert np.isfinite(both[0]).all()
    assert np.isnan(both[1]).any()
