"""Laws that hold whatever the numbers."""

import functools
import operator

import cases
import jax
import jax.numpy as jnp
import numpy as np
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import jax_ls
from jax_ls import Dense, OneHot, cross_entropy, kl_divergence, smooth, smooth_labels, smoothed_cross_entropy

N, K = 4, 7


def real(low, high, shape=()):
    """Multiples of 1/64, which sums and shifts keep exact."""
    return arrays.arrays(np.float32, shape, elements=st.integers(low * 64, high * 64).map(lambda i: i / 64))


LOGITS = real(-30, 30, (N, K))
LABELS = arrays.arrays(np.int32, N, elements=st.integers(0, K - 1))
EPSILON = real(-1, 2)
SHARES = arrays.arrays(np.float32, K, elements=st.integers(1, 64).map(float)).map(lambda x: x / x.sum())
SPREAD = st.sampled_from(["all", "others"])
# Class 0 always exists.
EXISTS = arrays.arrays(np.bool_, K).map(lambda x: x | (np.arange(K) == 0))


@functools.partial(jax.jit, static_argnames="spread")
def losses_and_slopes(logits, labels, epsilon, spread="all", **options):
    def total(z):
        losses = smoothed_cross_entropy(z, labels, epsilon, spread=spread, **options)
        return losses.sum(), losses

    (_, losses), slopes = jax.value_and_grad(total, has_aux=True)(logits)
    return losses, slopes


def close(actual, expected, size=100.0):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-6 * size)


@given(LOGITS, LABELS, EPSILON, SHARES, SPREAD, st.integers(-100_000, 100_000))
def test_a_shift_of_all_logits_changes_nothing(logits, labels, epsilon, prior, spread, shift):
    before = losses_and_slopes(logits, labels, epsilon, spread, prior=prior)
    after = losses_and_slopes(logits + np.float32(shift), labels, epsilon, spread, prior=prior)
    jax.tree.map(close, after, before)
    # The same law for the gradient: no part of it moves all logits together.
    close(before[1].sum(axis=-1), 0, size=1)


@given(LOGITS, LABELS, EPSILON, SHARES, EXISTS, SPREAD, st.permutations(range(K)))
def test_classes_may_be_renamed(logits, labels, epsilon, prior, exists, spread, order):
    order, labels = np.array(order), np.where(exists[labels], labels, 0)
    named = {"prior": prior, "class_where": exists, "class_weights": 1 + prior}
    losses, slopes = losses_and_slopes(logits, labels, epsilon, spread, **named)
    renamed = {name: x[order] for name, x in named.items()}
    new_labels = np.argsort(order).astype(np.int32)[labels]
    new_losses, new_slopes = losses_and_slopes(logits[:, order], new_labels, epsilon, spread, **renamed)
    size = 100 / (1 - prior[labels].max())
    close(new_losses, losses, size)
    close(new_slopes, slopes[:, order], size)


@given(LOGITS, LABELS, EPSILON, SHARES, SPREAD)
def test_the_loss_is_affine_in_epsilon(logits, labels, epsilon, prior, spread):
    """So that any ε is known from two, and the best ε on training data is an end of the interval."""
    at = {e: losses_and_slopes(logits, labels, np.float32(e), spread, prior=prior) for e in (0, 1)}
    between = jax.tree.map(lambda x, y: (1 - epsilon) * x + epsilon * y, at[0], at[1])
    size = 100 / (1 - prior[labels].max())
    jax.tree.map(
        functools.partial(close, size=size), losses_and_slopes(logits, labels, epsilon, spread, prior=prior), between
    )


@given(LOGITS, LABELS, EPSILON, SPREAD, st.permutations([True, True, False, False]).map(np.array))
def test_to_mask_is_to_leave_out(logits, labels, epsilon, spread, where):
    losses, slopes = losses_and_slopes(logits, labels, epsilon, spread, where=where)
    kept, kept_slopes = losses_and_slopes(logits[where], labels[where], epsilon, spread)
    close(losses[where], kept)
    close(slopes[where], kept_slopes)
    close(jax_ls.mean(losses, where), jax_ls.mean(kept))
    np.testing.assert_array_equal(losses[~where], 0)
    np.testing.assert_array_equal(slopes[~where], 0)


@jax.jit
def mixed(logits, first, second, share, epsilon, prior):
    inside = smooth(share * OneHot(first) + (1 - share) * OneHot(second), epsilon, prior=prior)
    outside = share * smooth(first, epsilon, prior=prior) + (1 - share) * smooth(second, epsilon, prior=prior)
    of_losses = [smoothed_cross_entropy(logits, y, epsilon, prior=prior) for y in (first, second)]
    both = cross_entropy(logits, inside), cross_entropy(logits, outside)
    return both, share * of_losses[0] + (1 - share) * of_losses[1], inside.probs(K), outside.probs(K)


@given(LOGITS, LABELS, LABELS, real(0, 1, N), EPSILON, SHARES)
def test_smoothing_and_mixup_commute(logits, first, second, share, epsilon, prior):
    (inside, outside), of_losses, q, q_outside = mixed(logits, first, second, share, epsilon, prior)
    close(inside, outside)
    close(inside, of_losses)
    close(q, q_outside, size=1)


@functools.partial(jax.jit, static_argnames="spread")
def written_out(labels, epsilon, prior, exists, spread):
    return smooth_labels(labels, epsilon, num_classes=K, prior=prior, class_where=exists, spread=spread)


@given(LABELS, real(-1, 2, N), st.one_of(st.none(), SHARES), st.one_of(st.none(), EXISTS), SPREAD)
def test_a_smoothed_label_sums_to_one(labels, epsilon, prior, exists, spread):
    labels = labels if exists is None else np.where(exists[labels], labels, 0)
    q = np.asarray(written_out(labels, epsilon, prior, exists, spread))
    close(q.sum(axis=-1), 1, size=5)
    if exists is not None:
        np.testing.assert_array_equal(q[:, ~exists], 0)
    if spread == "others" and (exists is None or exists.sum() > 1):
        close(q[np.arange(N), labels], 1 - epsilon, size=5)


@given(LABELS, EPSILON, SHARES)
def test_others_is_all_at_a_larger_epsilon(labels, epsilon, prior):
    q = written_out(labels, epsilon, prior, None, "others")
    for i, y in enumerate(labels):
        u = prior.astype(np.float64)
        expected = reference.smooth(y, epsilon / (1 - u[y]), K, prior=u)
        close(q[i], expected, size=5)


@functools.partial(jax.jit, static_argnames="loss")
def loss_of(loss, logits, labels, epsilon, prior):
    return loss(logits, smooth(labels, epsilon, prior=prior))


@given(LOGITS, LABELS, real(0, 1), SHARES)
def test_no_divergence_is_negative_and_no_loss_below_the_entropy(logits, labels, epsilon, prior):
    q = np.array([reference.smooth(y, float(epsilon), K, prior=prior.astype(np.float64)) for y in labels])
    entropy = -np.sum(np.where(q > 0, q * np.log(np.where(q > 0, q, 1)), 0), axis=-1)
    divergence = loss_of(kl_divergence, logits, labels, epsilon, prior)
    assert (divergence >= -2e-5).all()
    close(loss_of(cross_entropy, logits, labels, epsilon, prior) - divergence, entropy)


FLOATS, FIXED = cases.ingredients((N,), K)
OURS = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), FLOATS) | jax.tree.map(jnp.asarray, FIXED)
# Pairs of a target and its q by the definition.
LEAVES = st.sampled_from(sorted(cases.KINDS)).map(
    lambda name: (cases.KINDS[name].target(OURS), cases.written_out(cases.KINDS[name], FLOATS | FIXED, (N,), K))
)


def combined(pairs):
    weight = st.one_of(real(-2, 2), real(-2, 2, N))
    return st.one_of(
        st.tuples(pairs, pairs).map(lambda two: tuple(map(operator.add, *two))),
        st.tuples(weight, pairs).map(lambda x: (x[0] * x[1][0], x[0][..., None] * x[1][1])),
        st.tuples(SHARES, pairs).map(lambda x: (x[1][0].weighted(x[0]), x[0] * x[1][1])),
        st.tuples(real(0, 1, N), pairs).map(
            lambda x: (smooth(x[1][0], x[0]), (1 - x[0])[:, None] * x[1][1] + x[0][:, None] / K)
        ),
    )


@settings(max_examples=20)
@given(st.recursive(LEAVES, combined, max_leaves=4), LOGITS)
def test_any_expression_of_targets_is_the_expression_of_their_probabilities(pair, logits):
    target, q = pair
    size = max(1, abs(q).sum())
    close(jnp.broadcast_to(target.probs(K), q.shape), q, size)
    close(jnp.broadcast_to(target.mass(), (N,)), q.sum(axis=-1), size)
    close(target.dot(logits), np.sum(q * logits, axis=-1), 60 * size)
    expected = [reference.cross_entropy(z, row) for z, row in zip(logits.astype(np.float64), q, strict=True)]
    close(cross_entropy(logits, target), expected, 60 * size)
    leaves, tree = jax.tree.flatten(target)
    close(jax.tree.unflatten(tree, leaves).dot(logits), target.dot(logits), 0)
    close(cross_entropy(logits, Dense(target.probs(K))), expected, 60 * size)
