"""Preferences and whole sequences: the definition, the laws of noisy comparisons, and what bad input gets."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import reference_values as ref
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_ls.preferences import (
    bradley_terry,
    dpo,
    exo_pair,
    ipo,
    robust_dpo,
    robust_smoothing,
    sequence_log_probability,
)

RNG = np.random.default_rng(0)
N = 6
PAIRS = RNG.normal(scale=30, size=(4, N)).astype(np.float32) - 100
EPSILON = np.array([0.0, 0.05, 0.1, 0.2, 0.3, 0.45], np.float32)


def robust(*pairs, smoothing, **options):
    return robust_dpo(*pairs, flip_rate=smoothing, **options)


METHODS = {"dpo": (dpo, ref.preference), "robust": (robust, ref.robust)}

run = jax.jit(
    lambda pairs, beta, smoothing, method: METHODS[method][0](*pairs, beta=beta, smoothing=smoothing),
    static_argnames="method",
)


def margins(pairs, beta):
    chosen, rejected, chosen_before, rejected_before = pairs
    return beta * ((chosen - chosen_before) - (rejected - rejected_before))


def total(pairs, beta, epsilon, loss):
    return sum(loss(h, e) for h, e in zip(margins(pairs, beta), epsilon + 0 * pairs[0], strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("epsilon", [0.0, 0.2, EPSILON], ids=["0", "0.2", "each"])
def test_losses_and_slopes_are_the_definition(method, epsilon):
    beta, loss = 0.1, METHODS[method][1]
    exact = PAIRS.astype(float)
    out = run(PAIRS, beta, epsilon, method)
    h = margins(exact, beta)
    cases.assert_close(out.loss, np.array([loss(x, e) for x, e in zip(h, epsilon + 0 * h, strict=True)]), size=20)
    cases.assert_close(out.chosen_reward, beta * (exact[0] - exact[2]), size=20)
    cases.assert_close(out.rejected_reward, beta * (exact[1] - exact[3]), size=20)
    assert out.accuracy.tolist() == (h > 0).tolist()
    slopes = jax.grad(lambda *args: run(*args, method).loss.sum(), argnums=(0, 1))(PAIRS, beta, epsilon)
    cases.assert_close(slopes[0], reference.gradient(lambda x: total(x, beta, epsilon, loss), exact), size=1)
    by_beta = reference.gradient(lambda b: total(exact, b, epsilon, loss), np.array(beta))
    np.testing.assert_allclose(slopes[1], by_beta, rtol=1e-5)


def test_slopes_in_epsilon():
    slopes = jax.grad(lambda e: run(PAIRS, 0.1, e, "robust").loss.sum())(EPSILON)
    exact = reference.gradient(lambda e: total(PAIRS.astype(float), 0.1, e, ref.robust), EPSILON)
    np.testing.assert_allclose(slopes, exact, rtol=2e-5, atol=1e-4)


@settings(max_examples=25)
@given(st.floats(-300, 300, width=32), st.floats(0, 0.484375, width=32))
def test_robust_is_conservative_at_a_negative_smoothing(shift, epsilon):
    pairs = PAIRS + np.array([[shift], [0], [0], [0]], np.float32)
    robust, conservative = (
        run(pairs, 0.1, e, m).loss for e, m in ((epsilon, "robust"), (-epsilon / (1 - 2 * epsilon), "dpo"))
    )
    np.testing.assert_allclose(robust, conservative, rtol=1e-6, atol=1e-6 * (1 + 0.1 * abs(shift)))
    plain = run(pairs, 0.1, 0.0, "dpo").loss
    # The mean over flipped and other pairs is the loss without flips.
    flipped = run(pairs[np.array([1, 0, 3, 2])], 0.1, epsilon, "robust").loss
    np.testing.assert_allclose(
        (1 - epsilon) * robust + epsilon * flipped, plain, rtol=1e-4, atol=1e-4 / (0.5 - epsilon)
    )


def test_conservative_without_smoothing_is_dpo():
    plain = [-ref.log_sigmoid(h) for h in margins(PAIRS.astype(float), 0.1)]
    cases.assert_close(run(PAIRS, 0.1, 0.0, "dpo").loss, np.array(plain), size=20)
    np.testing.assert_allclose(run(PAIRS, 0.1, 0.0, "robust").loss, plain, rtol=1e-6)


def test_gradient_descent_finds_the_optimum_of_conservative():
    """β h* = log((1−ε)/ε), where plain DPO has no optimum."""
    epsilon, beta = jnp.array([0.05, 0.1, 0.3]), 0.5

    def loss(h):
        zeros = jnp.zeros_like(h)
        return dpo(h, zeros, zeros, zeros, beta=beta, smoothing=epsilon).loss.sum()

    h = jax.lax.fori_loop(0, 2000, lambda _, h: h - 4 * jax.grad(loss)(h), jnp.zeros(3))
    np.testing.assert_allclose(beta * h, np.log((1 - epsilon) / epsilon), rtol=1e-4)


def test_bradley_terry_is_dpo_of_rewards():
    chosen, rejected = PAIRS[:2]
    zeros = np.zeros(N, np.float32)
    same = dpo(chosen, rejected, zeros, zeros, beta=1.0, smoothing=EPSILON).loss
    np.testing.assert_allclose(bradley_terry(chosen, rejected, EPSILON), same, rtol=1e-6)
    np.testing.assert_allclose(bradley_terry(chosen + 1e4, rejected + 1e4), bradley_terry(chosen, rejected), atol=1e-2)


def test_parameters_may_be_mapped_over():
    betas, epsilon = jnp.array([0.05, 0.1]), jnp.array([0.0, 0.2])
    mapped = jax.vmap(lambda b, e: run(PAIRS, b, e, "robust"))(betas, epsilon)
    for i in range(2):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6),
            jax.tree.map(lambda x, i=i: x[i], mapped),
            run(PAIRS, betas[i], epsilon[i], "robust"),
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_log_probabilities_are_widened_before_they_are_subtracted(method, dtype):
    ours, exact = cases.rounded({"pairs": PAIRS}, dtype)
    out = run(ours["pairs"], 0.1, 0.1, method)
    assert {x.dtype for x in out} == {jnp.dtype("float32")}
    expected = np.array([METHODS[method][1](h, 0.1) for h in margins(exact["pairs"], 0.1)])
    cases.assert_close(out.loss, expected, size=20)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_sequences_are_float32_or_wider_whatever_else_is_wide(dtype, promotion):
    with jax.enable_x64(True), jax.numpy_dtype_promotion(promotion):
        hidden, kernel = jnp.asarray(HIDDEN, dtype), jnp.asarray(KERNEL, dtype)
        exact = exact_sequences(np.asarray(hidden, float) @ np.asarray(kernel, float))
        of_layer = sequence_log_probability(hidden, LABELS, kernel=kernel, where=WHERE)
        assert of_layer.dtype == jnp.float32
        np.testing.assert_allclose(of_layer, exact, rtol=1e-5)
        assert sequence_log_probability(hidden @ kernel, LABELS, where=WHERE).dtype == jnp.float32
        pair = jnp.ones(2, jnp.float32), jnp.zeros(2, jnp.float64)
        assert bradley_terry(*pair).dtype == dpo(*pair, *pair).loss.dtype == jnp.float64


def test_where_leaves_no_trace():
    where = np.arange(N) % 2 > 0
    poisoned = np.where(where, PAIRS, np.nan).astype(np.float32)
    out = dpo(*poisoned, smoothing=0.1, where=where)
    full = dpo(*PAIRS, smoothing=0.1)
    for actual, expected in zip(out, full, strict=True):
        np.testing.assert_array_equal(actual, np.where(where, expected, 0))

    def total(p, beta, epsilon):
        return dpo(*p, beta=beta, smoothing=epsilon, where=where).loss.sum()

    slopes, by_beta, by_epsilon = jax.grad(total, (0, 1, 2))(poisoned, 0.1, 0.1)
    assert (slopes[:, ~where] == 0).all()
    assert np.isfinite(slopes).all()
    np.testing.assert_array_equal([by_beta, by_epsilon], jax.grad(total, (1, 2))(PAIRS, 0.1, 0.1))
    losses = bradley_terry(poisoned[0], poisoned[1], where=where)
    assert (losses[~where] == 0).all()


def test_a_nan_pair_poisons_itself_alone():
    pairs = PAIRS.copy()
    pairs[1, 2] = np.nan
    assert np.isnan(dpo(*pairs).loss).tolist() == [i == 2 for i in range(N)]


@pytest.mark.parametrize("method", [exo_pair, ipo])
def test_exo_and_ipo_are_their_definitions(method):
    beta, epsilon = 0.1, np.clip(EPSILON, 0.01, None)
    row = {exo_pair: ref.exo_pair, ipo: ref.ipo}[method]
    exact, where = PAIRS.astype(float), np.arange(N) % 2 > 0

    def loss(pairs, epsilon, **options):
        return method(*pairs, beta=beta, smoothing=epsilon, **options).loss

    expected = np.array([row(h, e) for h, e in zip(margins(exact, beta), epsilon.astype(float), strict=True)])
    np.testing.assert_allclose(loss(PAIRS, epsilon), expected, rtol=2e-5, atol=1e-5)
    slopes = jax.grad(lambda p, e: loss(p, e).sum(), (0, 1))(PAIRS, epsilon)
    by_pair = reference.gradient(lambda p: total(p, beta, epsilon.astype(float), row), exact)
    np.testing.assert_allclose(slopes[0], by_pair, rtol=2e-5, atol=1e-5 * np.abs(by_pair).max())
    by_epsilon = reference.gradient(lambda e: total(exact, beta, e, row), epsilon)
    np.testing.assert_allclose(slopes[1], by_epsilon, rtol=2e-5, atol=1e-4)
    poisoned = np.where(where, PAIRS, np.nan).astype(np.float32)
    out = method(*poisoned, beta=beta, smoothing=epsilon, where=where)
    np.testing.assert_array_equal(out.loss, np.where(where, loss(PAIRS, epsilon), 0))
    masked = jax.grad(lambda p: loss(p, epsilon, where=where).sum())(poisoned)
    np.testing.assert_allclose(masked[:, where], slopes[0][:, where], rtol=1e-6)
    assert not masked[:, ~where].any()
    assert out.accuracy.tolist() == ((margins(PAIRS, beta) > 0) & where).tolist()


def test_the_least_of_exo_is_that_of_dpo_and_ipo_shrinks():
    def slope(method, h, epsilon):
        zero = jnp.zeros(())
        return jax.grad(lambda h: method(h, zero, zero, zero, beta=1.0, smoothing=epsilon).loss)(h)

    for epsilon in (0.01, 0.3):
        best = np.float32(np.log((1 - epsilon) / epsilon))
        assert abs(slope(exo_pair, best, epsilon)) < 1e-6
        assert abs(slope(dpo, best, epsilon)) < 1e-6
        assert abs(slope(ipo, np.float32((1 - 2 * epsilon) / 2), epsilon)) < 1e-6


B, T, D, K = 2, 5, 4, 13
HIDDEN = RNG.normal(size=(B, T, D)).astype(np.float32)
KERNEL = RNG.normal(size=(D, K)).astype(np.float32)
LABELS = RNG.integers(0, K, (B, T)).astype(np.int32)
WHERE = np.arange(T)[None] >= np.array([[2], [0]])


def exact_sequences(logits):
    return np.array([ref.sequence_log_probability(*row) for row in zip(logits, LABELS, WHERE, strict=True)])


def test_sequences_of_logits_and_of_hidden_states():
    masked = np.where(WHERE, LABELS, -100)
    logits = HIDDEN @ KERNEL
    exact = exact_sequences(HIDDEN.astype(float) @ KERNEL.astype(float))

    def from_hidden(hidden, kernel):
        return sequence_log_probability(hidden, masked, kernel=kernel, where=WHERE, chunk_size=3)

    np.testing.assert_allclose(sequence_log_probability(logits, masked, where=WHERE), exact, rtol=1e-5)
    value, pull = jax.vjp(jax.jit(from_hidden), HIDDEN, KERNEL)
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    weights = np.array([1.0, -2.0], np.float32)

    def definition(x):
        return weights @ exact_sequences(x)

    by_logits = reference.gradient(definition, HIDDEN.astype(float) @ KERNEL.astype(float))
    d_hidden, d_kernel = pull(jnp.asarray(weights))
    np.testing.assert_allclose(d_hidden, by_logits @ KERNEL.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_kernel, np.einsum("btd,btk->dk", HIDDEN, by_logits), rtol=1e-4, atol=1e-5)
    tied = sequence_log_probability(HIDDEN, masked, kernel=KERNEL.T, where=WHERE, transposed=True)
    np.testing.assert_allclose(tied, exact, rtol=1e-5)


def test_a_label_that_names_no_class_poisons_its_sequence_alone():
    wrong = LABELS.copy()
    wrong[1, 0] = K
    for outputs, kernel in ((HIDDEN @ KERNEL, None), (HIDDEN, KERNEL)):
        values = sequence_log_probability(outputs, wrong, kernel=kernel)
        assert np.isnan(values).tolist() == [False, True]


def test_dpo_of_a_layer_never_holds_the_logits():
    tokens, features, classes = 512, 64, 16_000
    shapes = [((2, 4, tokens, features), "float32"), ((features, classes), "float32"), ((2, 4, tokens), "int32")]

    def loss(log_prob):
        def of(hidden, kernel, labels):
            reference_kernel = jax.lax.stop_gradient(kernel) / 2
            policy, before = (log_prob(hidden, k, labels) for k in (kernel, reference_kernel))
            return dpo(policy[0], policy[1], before[0], before[1]).loss.mean()

        return of

    def temporaries(log_prob):
        step = jax.jit(jax.value_and_grad(loss(log_prob), argnums=(0, 1)))
        arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 8 * tokens * classes
    ours = temporaries(lambda h, k, y: sequence_log_probability(h, y, kernel=k, chunk_size=128))
    assert ours < 0.2 * logits
    assert temporaries(lambda h, k, y: sequence_log_probability(h @ k, y)) > logits


def test_what_cannot_be_checked_is_nan():
    epsilon = np.array([0.1, 0.5, 0.7, 0.2, 0.3, 0.49], np.float32)
    assert np.isnan(run(PAIRS, 0.1, epsilon, "robust").loss).tolist() == [False, True, True, False, False, False]
    assert np.isnan(run(PAIRS, -0.1, 0.0, "dpo").loss).all()


ONES = jnp.ones(3)
BAD = [
    ("flip_rate", lambda: robust_dpo(ONES, ONES, ONES, ONES, flip_rate=0.5), "0.5"),
    ("flip_rate", lambda: robust_smoothing(jnp.array([0.1, 0.75])), "0.75"),
    ("smoothing", lambda: exo_pair(ONES, ONES, ONES, ONES, smoothing=0.0), "0.0"),
    ("beta", lambda: ipo(ONES, ONES, ONES, ONES, beta=-1.0), "-1.0"),
    ("flip_rate", lambda: robust_smoothing(0.5 - 1e-10), "0.4999"),
    ("smoothing", lambda: bradley_terry(ONES, ONES, jnp.ones(2)), r"float32 \(2,\)"),
    ("beta", lambda: dpo(ONES, ONES, ONES, ONES, beta=0.0), "0.0"),
    ("beta", lambda: dpo(ONES, ONES, ONES, ONES, beta=jnp.ones(2)), r"float32 \(2,\)"),
    ("rejected_reward", lambda: bradley_terry(ONES, jnp.ones(2)), r"float32 \(2,\)"),
    ("policy_rejected", lambda: dpo(ONES, jnp.ones((3, 1)), ONES, ONES), r"float32 \(3, 1\)"),
    ("reference_rejected", lambda: dpo(ONES, ONES, ONES, jnp.ones(())), r"float32 \(\)"),
    ("where", lambda: dpo(ONES, ONES, ONES, ONES, where=ONES), r"float32 \(3,\)"),
    ("labels", lambda: sequence_log_probability(jnp.ones((3, 4)), ONES), r"float32 \(3,\)"),
    ("labels", lambda: sequence_log_probability(jnp.ones(4), jnp.array(1)), r"int32 \(\)"),
    ("labels", lambda: sequence_log_probability(HIDDEN @ KERNEL, LABELS[0]), r"int32 \(5,\)"),
    ("labels", lambda: sequence_log_probability(HIDDEN, LABELS[0], kernel=KERNEL), r"int32 \(5,\)"),
    ("labels", lambda: sequence_log_probability(HIDDEN, None), "None"),
    ("outputs", lambda: sequence_log_probability(LABELS, LABELS[0]), r"int32 \(2, 5\)"),
    ("softcap", lambda: sequence_log_probability(HIDDEN, LABELS, kernel=KERNEL, softcap=0.0), "0.0"),
    ("where", lambda: sequence_log_probability(jnp.ones((1, 4)), jnp.ones(1, int), where=jnp.ones(2, bool)), r"\(2,\)"),
    ("chunk_size", lambda: sequence_log_probability(jnp.ones((1, 4)), jnp.ones(1, int), chunk_size=2), "2"),
    ("transposed", lambda: sequence_log_probability(jnp.ones((1, 4)), jnp.ones(1, int), transposed=True), "True"),
]


@pytest.mark.parametrize(("name", "call", "came"), BAD, ids=range(len(BAD)))
def test_bad_input_is_told_by_name(name, call, came):
    with pytest.raises((AssertionError, TypeError, ValueError), match=rf"(?s){name}: expected.*{came}"):
        call()
