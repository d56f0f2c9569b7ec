"""`with_label_smoothing` around losses of optax: the same loss of smoothed labels, by the definition of the labels."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from jax_ls import smoothed_cross_entropy, with_label_smoothing

N, K = 6, 7
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(N, K)).astype(np.float32)
LABELS = RNG.integers(0, K, N)
PRIOR = RNG.dirichlet(np.ones(K)).astype(np.float32)
BINARY = RNG.integers(0, 2, (N, K))

CLASSES = {
    "softmax_cross_entropy": optax.softmax_cross_entropy,
    "safe_softmax_cross_entropy": optax.safe_softmax_cross_entropy,
    "poly_loss_cross_entropy": optax.losses.poly_loss_cross_entropy,
    "kl_divergence": lambda z, q: optax.kl_divergence(jax.nn.log_softmax(z), q),
    "sigmoid_binary_cross_entropy": optax.sigmoid_binary_cross_entropy,
    "sigmoid_focal_loss": optax.sigmoid_focal_loss,
}
OPTIONS = {
    "all": {},
    "others": {"spread": "others"},
    "prior": {"prior": PRIOR},
    "class_where": {"class_where": np.arange(K) != 6, "spread": "others"},
}


def smoothed_rows(labels, epsilon, prior=None, spread="all", class_where=None):
    rows = [reference.smooth(y, epsilon, K, prior=prior, spread=spread, exists=class_where) for y in labels]
    return jnp.asarray(np.array(rows), jnp.float32)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_wrapped_loss_is_the_loss_of_smoothed_labels(name, options):
    labels = LABELS % 6
    loss = with_label_smoothing(CLASSES[name], 0.2, **OPTIONS[options])
    expected = CLASSES[name](LOGITS, smoothed_rows(labels, 0.2, **OPTIONS[options]))
    np.testing.assert_allclose(jax.jit(loss)(LOGITS, labels), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid_binary_cross_entropy", "sigmoid_focal_loss"])
@pytest.mark.parametrize("prior", [0.5, 0.0, PRIOR])
@pytest.mark.parametrize("labels", [BINARY, BINARY.astype(bool), BINARY.astype(np.float32)], ids=str)
def test_binary_losses_of_smoothed_labels(name, prior, labels):
    loss = with_label_smoothing(CLASSES[name], 0.2, binary=True, prior=prior)
    smoothed = jnp.asarray(0.8 * BINARY + 0.2 * np.broadcast_to(prior, (N, K)), jnp.float32)
    np.testing.assert_allclose(jax.jit(loss)(LOGITS, labels), CLASSES[name](LOGITS, smoothed), rtol=1e-5, atol=1e-6)


def test_the_wrapped_softmax_cross_entropy_is_the_definition():
    loss = with_label_smoothing(optax.softmax_cross_entropy, 0.2, spread="others")
    cases.assert_close(
        jax.jit(loss)(LOGITS, LABELS), reference.losses(LOGITS.astype(float), LABELS, 0.2, spread="others"), 4
    )


def test_gradients_go_through_the_wrapper_into_logits_and_epsilon():
    def ours(z, epsilon):
        return with_label_smoothing(optax.softmax_cross_entropy, epsilon)(z, LABELS).sum()

    z = LOGITS.astype(np.float64)
    slopes = jax.jit(jax.grad(ours, argnums=(0, 1)))(LOGITS, 0.2)
    cases.assert_close(slopes[0], reference.gradient_by_class(lambda z: reference.losses(z, LABELS, 0.2), z), 4)
    slope = reference.gradient(lambda e: np.sum(reference.losses(z, LABELS, e)), 0.2)
    cases.assert_close(slopes[1], slope, 40)


def test_dense_labels_and_epsilon_by_example():
    dense, each = RNG.dirichlet(np.ones(K), N).astype(np.float32), np.linspace(0, 1, N).astype(np.float32)
    loss = with_label_smoothing(optax.softmax_cross_entropy, each)
    expected = reference.losses(LOGITS.astype(float), dense.astype(float), each.astype(float))
    cases.assert_close(jax.jit(loss)(LOGITS, dense), expected, 4)


def test_the_axis_keyword_names_the_classes_of_both():
    loss = with_label_smoothing(optax.softmax_cross_entropy, 0.2)
    expected = reference.losses(LOGITS.astype(float), LABELS, 0.2)
    cases.assert_close(loss(LOGITS.T, LABELS, axis=0), expected, 4)


def test_other_arguments_reach_the_loss():
    where = np.broadcast_to(np.arange(K) < 5, (N, K))
    loss = with_label_smoothing(optax.softmax_cross_entropy, 0.2, class_where=where[0])
    expected = reference.losses(LOGITS.astype(float), LABELS % 5, 0.2, class_where=where[0])
    cases.assert_close(loss(LOGITS, LABELS % 5, where=jnp.asarray(where)), expected, 4)
    poly = with_label_smoothing(optax.losses.poly_loss_cross_entropy, 0.2)
    expected = optax.losses.poly_loss_cross_entropy(LOGITS, smoothed_rows(LABELS, 0.2), epsilon=3.0)
    np.testing.assert_allclose(poly(LOGITS, LABELS, epsilon=3.0), expected, rtol=1e-5)
    by_position = with_label_smoothing(lambda z, q, factor: factor * optax.softmax_cross_entropy(z, q), 0.2)
    cases.assert_close(by_position(LOGITS, LABELS, 2.0), 2 * reference.losses(LOGITS.astype(float), LABELS, 0.2), 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_labels_come_in_the_dtype_of_the_logits(dtype):
    seen = []
    with_label_smoothing(lambda z, q: seen.append((z, q)), 0.2)(jnp.zeros((2, 4), dtype), jnp.array([1, 2]))
    assert seen[0][0].dtype == seen[0][1].dtype == dtype
    with_label_smoothing(lambda z, q: seen.append((z, q)), 0.2, binary=True)(jnp.zeros(2, dtype), jnp.array([1, 0]))
    assert seen[1][0].dtype == seen[1][1].dtype == dtype


SCHEDULES = {
    "constant": (optax.constant_schedule(0.2), lambda t: 0.2),
    "linear": (optax.linear_schedule(0.2, 0.0, 10), lambda t: 0.2 * (1 - t / 10)),
    "cosine": (optax.cosine_decay_schedule(0.2, 10), lambda t: 0.1 * (1 + np.cos(np.pi * t / 10))),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_read_at_the_step(name):
    schedule, epsilon = SCHEDULES[name]
    loss = jax.jit(with_label_smoothing(optax.softmax_cross_entropy, schedule, spread="others"))
    for step in (0, 3, 10):
        expected = reference.losses(LOGITS.astype(float), LABELS, epsilon(step), spread="others")
        cases.assert_close(loss(LOGITS, LABELS, step=step), expected, 4)


@pytest.mark.parametrize("binary", [False, True])
def test_a_schedule_without_a_step_raises(binary):
    loss = with_label_smoothing(optax.softmax_cross_entropy, optax.constant_schedule(0.1), binary=binary)
    with pytest.raises(TypeError, match=r"step: expected the training step"):
        loss(LOGITS, BINARY if binary else LABELS)


def test_a_number_needs_no_step_and_may_be_given_one():
    loss = with_label_smoothing(optax.softmax_cross_entropy, 0.1)
    np.testing.assert_array_equal(loss(LOGITS, LABELS, step=3), loss(LOGITS, LABELS))


def test_the_wrapped_loss_keeps_its_name():
    wrapped = with_label_smoothing(optax.softmax_cross_entropy, 0.1)
    assert wrapped.__name__ == "softmax_cross_entropy"


def test_a_loss_of_ours_may_be_wrapped_too():
    loss = with_label_smoothing(lambda z, q: smoothed_cross_entropy(z, q, 0.0), 0.2)
    cases.assert_close(loss(LOGITS, LABELS), reference.losses(LOGITS.astype(float), LABELS, 0.2), 4)


@pytest.mark.parametrize("axis", [2, -3])
def test_an_axis_the_logits_lack_raises(axis):
    with pytest.raises(ValueError, match="axis"):
        with_label_smoothing(optax.softmax_cross_entropy, 0.1)(LOGITS, LABELS, axis=axis)
