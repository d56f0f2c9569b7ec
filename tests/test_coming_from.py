"""TensorFlow, Keras, optax, translation models and binary conventions: their formulas in NumPy, beside our calls.

PyTorch is in test_coming_from_torch.py. The lines tested here are those of docs/coming-from.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_ls

RNG = np.random.default_rng(1)
LOGITS = 3 * RNG.normal(size=(6, 5)).astype(np.float32)
LABELS = np.array([1, 0, 4, 2, 0, 3])
EPSILONS = [0.0, 0.1, 0.5]


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=3e-6, atol=3e-6)


smoothed = jax.jit(jax_ls.smoothed_cross_entropy, static_argnames=("spread", "ignore_index"))

# tf.losses.softmax_cross_entropy

TF_REDUCTIONS = {
    "NONE": lambda losses, w: jax_ls.reduce(losses, w, reduction="none"),
    "SUM": lambda losses, w: jax_ls.reduce(losses, w, reduction="sum"),
    "MEAN": jax_ls.mean,
    "SUM_OVER_BATCH_SIZE": lambda losses, w: jax_ls.mean(losses, w, denominator=losses.size),
    "SUM_OVER_NONZERO_WEIGHTS": lambda losses, w: jax_ls.reduce(losses, w, reduction="sum_by_nonzero_weights"),
    "SUM_BY_NONZERO_WEIGHTS": lambda losses, w: jax_ls.reduce(losses, w, reduction="sum_by_nonzero_weights"),
}


def tf_losses(z, onehot, weights, smoothing, reduction):
    """Labels onehot (1 − ε) + ε/K, then compute_weighted_loss, whose quotients are 0 where they divide by 0."""
    q = onehot * (1 - smoothing) + smoothing / z.shape[-1]
    losses = -(q * log_softmax(z)).sum(-1)
    w = np.broadcast_to(weights, losses.shape).astype(np.float64)
    total = (w * losses).sum()
    if reduction in ("NONE", "SUM"):
        return w * losses if reduction == "NONE" else total
    counts = {"MEAN": w.sum(), "SUM_OVER_BATCH_SIZE": losses.size}
    count = counts.get(reduction, np.count_nonzero(w))
    return total / count if count else 0.0


@pytest.mark.parametrize(
    "weights", [1.0, 2.5, [1.0, 0.0, 0.5, 3.0, 0.0, 2.0], 0.0], ids=["1", "scalar", "rows", "nothing"]
)
@pytest.mark.parametrize("smoothing", EPSILONS)
@pytest.mark.parametrize("reduction", TF_REDUCTIONS)
def test_tf_losses_softmax_cross_entropy(reduction, smoothing, weights):
    z, onehot = LOGITS, np.eye(5, dtype=np.float32)[LABELS]
    expected = tf_losses(z, onehot, weights, smoothing, reduction)
    for labels in (onehot, LABELS):
        losses = smoothed(jnp.asarray(z), jnp.asarray(labels), smoothing)
        close(TF_REDUCTIONS[reduction](losses, jnp.asarray(weights)), expected)


# Keras


def test_keras_categorical():
    logits, onehot = jnp.array([[100.0, -100.0, -100.0]]), jnp.array([[1.0, 0.0, 0.0]])
    expected = -(np.array([0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]) * log_softmax(logits)).sum(-1)
    np.testing.assert_allclose(expected, 13.33333, rtol=1e-6)
    close(smoothed(logits, onehot, 0.1), expected)
    close(smoothed(logits, jnp.array([0]), 0.1), expected)


def test_keras_takes_probabilities_unless_told_otherwise():
    p = np.array([[0.1, 1.8, 0.1], [0.1, 0.8, 0.1]])  # it divides them by their sum
    q = 0.9 * np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) + 0.1 / 3
    expected = -(q * np.log(p / p.sum(-1, keepdims=True))).sum(-1)
    close(smoothed(jnp.log(jnp.asarray(p)), jnp.array([1, 2]), 0.1), expected)


def test_keras_binary():
    logits, labels = np.array([[10.0, -10.0, -10.0]]), np.array([[1.0, 0.0, 1.0]])
    q = labels * 0.9 + 0.5 * 0.1
    expected = (q * np.log1p(np.exp(-logits)) + (1 - q) * np.log1p(np.exp(logits))).mean(-1)
    np.testing.assert_allclose(expected, 3.5, rtol=2e-5)
    losses = jax.jit(jax_ls.sigmoid_cross_entropy)(jnp.asarray(logits), jnp.asarray(labels), 0.1)
    close(losses.mean(-1), expected)
    p, tag = jnp.array([0.2, 0.7]), jnp.array([1, 0])
    from_probabilities = jax.jit(jax_ls.sigmoid_cross_entropy)(jnp.log(p) - jnp.log1p(-p), tag, 0.1)
    close(from_probabilities, [-0.95 * np.log(0.2) - 0.05 * np.log(0.8), -0.05 * np.log(0.7) - 0.95 * np.log(0.3)])


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
def test_keras_sample_weight(reduction):
    weights = np.array([1.0, 0.0, 0.5, 3.0, 0.0, 2.0], np.float32)
    losses = smoothed(jnp.asarray(LOGITS), jnp.asarray(LABELS), 0.1)
    total = (weights.astype(np.float64) * np.asarray(losses)).sum()
    over_batch = reduction == "sum_over_batch_size"
    ours = jax_ls.mean(losses, jnp.asarray(weights), denominator=losses.size if over_batch else None)
    close(ours, total / (6 if over_batch else 6.5))


# The Annotated Transformer and JoeyNMT: neither the label of padding nor its column has mass


def padded_rows(labels, num_classes, padding, smoothing):
    """ε/(K−2) everywhere, 1 − ε on the label, 0 in the padding column and in rows whose label is padding."""
    rows = np.full((*labels.shape, num_classes), smoothing / (num_classes - 2))
    np.put_along_axis(rows, labels[..., None], 1 - smoothing, -1)
    rows[..., padding] = 0
    rows[labels == padding] = 0
    return rows


def kl_sum(log_p, q):
    """KLDivLoss(reduction="sum"): Σ q (log q − log p), 0 where q is 0."""
    log_q = np.log(np.where(q > 0, q, 1))
    return np.where(q > 0, q * (log_q - log_p), 0).sum()


@jax.jit
def ours_with_padding(logits, labels, smoothing):
    words = jnp.arange(logits.shape[-1]) != 0
    q = jax_ls.smooth(labels, smoothing, spread="others", class_where=words)
    return jnp.sum(jax_ls.kl_divergence(logits, q, where=labels != 0))


def test_annotated_transformer_rows():
    labels, words = jnp.array([2, 1, 0]), jnp.arange(5) != 0
    rows = jax_ls.smooth_labels(labels, 0.5, num_classes=5, spread="others", class_where=words)
    rows = jnp.where((labels == 0)[:, None], 0, rows)
    sixth = 1 / 6
    close(rows, [[0, sixth, 0.5, sixth, sixth], [0, 0.5, sixth, sixth, sixth], [0, 0, 0, 0, 0]])
    close(rows, padded_rows(np.array([2, 1, 0]), 5, 0, 0.5))


@pytest.mark.parametrize("smoothing", EPSILONS)
def test_annotated_transformer_loss(smoothing):
    expected = kl_sum(log_softmax(LOGITS), padded_rows(LABELS, 5, 0, smoothing))
    close(ours_with_padding(jnp.asarray(LOGITS), jnp.asarray(LABELS), smoothing), expected)


def test_annotated_transformer_survives_a_probability_of_0_on_padding():
    log_p = jnp.log(jnp.array([[0.0, 0.4, 0.2, 0.2, 0.2]]))
    expected = 0.9 * np.log(0.9 / 0.4) + 0.1 * np.log(0.1 / 3 / 0.2)
    close(ours_with_padding(log_p, jnp.array([1]), 0.1), expected)


@pytest.mark.parametrize(("smoothing", "expected"), [(0.4, 2.1326), (0.0, 5.6268)])
def test_joeynmt(smoothing, expected):
    log_p = jnp.log(jnp.broadcast_to(jnp.array([0.1, 0.1, 0.6, 0.1, 0.1]), (3, 2, 5)))
    labels = np.array([[2, 1], [2, 0], [1, 0]])
    assert abs(kl_sum(log_p, padded_rows(labels, 5, 0, smoothing)) - expected) < 5e-5
    assert abs(ours_with_padding(log_p, jnp.asarray(labels), smoothing) - expected) < 5e-5


# optax


@pytest.mark.parametrize("smoothing", EPSILONS)
def test_optax_smooth_labels_and_softmax_cross_entropy(smoothing):
    z, y = jnp.asarray(LOGITS), jnp.asarray(LABELS)
    q = optax.smooth_labels(jax.nn.one_hot(y, 5), smoothing)
    close(jax_ls.smooth_labels(y, smoothing, num_classes=5), q)
    theirs = optax.softmax_cross_entropy(z, q)
    close(smoothed(z, y, smoothing), theirs)
    close(jax_ls.with_label_smoothing(optax.softmax_cross_entropy, smoothing)(z, y), theirs)


def test_with_label_smoothing_around_other_losses():
    z, y = jnp.asarray(LOGITS), jnp.asarray(LABELS)
    poly = jax_ls.with_label_smoothing(optax.losses.poly_loss_cross_entropy, 0.1)(z, y, epsilon=2.0)
    close(poly, optax.losses.poly_loss_cross_entropy(z, optax.smooth_labels(jax.nn.one_hot(y, 5), 0.1), epsilon=2.0))
    tags = jnp.asarray(RNG.integers(2, size=z.shape))
    focal = jax_ls.with_label_smoothing(optax.sigmoid_focal_loss, 0.1, binary=True)(z, tags)
    close(focal, optax.sigmoid_focal_loss(z, tags.astype(jnp.float32) * 0.9 + 0.05))


def test_minus_1_is_no_class():
    z = jnp.asarray(LOGITS)
    losses = smoothed(z, jnp.array([-1, 0, 1, 2, 3, 4]), 0.1)
    np.testing.assert_array_equal(jnp.isnan(losses), [True] + 5 * [False])


# fairseq, T5X, timm


@pytest.mark.parametrize("smoothing", EPSILONS)
def test_fairseq(smoothing):
    log_p, num_classes, padding = log_softmax(LOGITS), LOGITS.shape[-1], 1
    nll = -np.take_along_axis(log_p, LABELS[..., None], -1)[..., 0]
    eps_i = smoothing / (num_classes - 1)
    losses = (1 - smoothing - eps_i) * nll - eps_i * log_p.sum(-1)
    expected = np.where(padding == LABELS, 0, losses).sum()
    ours = smoothed(jnp.asarray(LOGITS), jnp.asarray(LABELS), smoothing, spread="others", ignore_index=padding)
    np.testing.assert_allclose(jax_ls.reduce(ours, reduction="sum"), expected, rtol=3e-6)


@jax.jit
def t5x_losses(logits, labels, smoothing, z_loss):
    return jax_ls.kl_divergence(logits, jax_ls.smooth(labels, smoothing, spread="others"), z_loss=z_loss)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("smoothing", EPSILONS)
def test_t5x(smoothing, z_loss):
    num_classes, weights = LOGITS.shape[-1], (LABELS > 0).astype(np.float32)
    on, off = 1 - smoothing, smoothing / (num_classes - 1)
    q = np.where(np.eye(num_classes)[LABELS] == 1, on, off)
    entropy = -(on * np.log(on) + (num_classes - 1) * off * np.log(off + 1e-20))
    lse = np.log(np.exp(LOGITS.astype(np.float64)).sum(-1))
    losses = -(q * log_softmax(LOGITS)).sum(-1) + z_loss * lse**2 - entropy
    ours = t5x_losses(jnp.asarray(LOGITS), jnp.asarray(LABELS), smoothing, z_loss)
    close(jax_ls.reduce(ours, jnp.asarray(weights), reduction="sum"), (losses * weights).sum())


@pytest.mark.parametrize("smoothing", EPSILONS)
def test_timm_label_smoothing_cross_entropy(smoothing):
    log_p = log_softmax(LOGITS)
    nll = -np.take_along_axis(log_p, LABELS[:, None], -1)[:, 0]
    expected = ((1 - smoothing) * nll - smoothing * log_p.mean(-1)).mean()
    close(jax_ls.mean(smoothed(jnp.asarray(LOGITS), jnp.asarray(LABELS), smoothing)), expected)


# Binary conventions: (what a 1 becomes, what a 0 becomes) are values of `prior`

BINARY = {
    "keras": (0.5, lambda eps: (1 - eps + 0.5 * eps, 0.5 * eps)),
    "yolo": (0.5, lambda eps: (1 - 0.5 * eps, 0.5 * eps)),
    "timm": (1 / 5, lambda eps: (1 - eps + eps / 5, eps / 5)),
    "gan": (0.0, lambda eps: (1 - eps, 0.0)),
}


@pytest.mark.parametrize("convention", BINARY)
@pytest.mark.parametrize("smoothing", EPSILONS)
def test_binary_conventions(smoothing, convention):
    prior, values = BINARY[convention]
    on, off = values(smoothing)
    z, y = LOGITS, np.eye(5)[LABELS]
    q = np.where(y == 1, on, off)
    close(jax_ls.smooth_binary_labels(jnp.asarray(y), smoothing, prior=prior), q)
    z64 = z.astype(np.float64)
    expected = q * np.log1p(np.exp(-z64)) + (1 - q) * np.log1p(np.exp(z64))
    close(jax.jit(jax_ls.sigmoid_cross_entropy)(jnp.asarray(z), jnp.asarray(y), smoothing, prior=prior), expected)


# By hand


def test_four_classes_and_two():
    row = jax_ls.smooth_labels(jnp.array(1), 0.001, num_classes=4)
    np.testing.assert_allclose(row, [0.00025, 0.99925, 0.00025, 0.00025], rtol=1e-6)
    two = jax_ls.smooth_labels(jnp.array([0, 1]), 0.1, num_classes=2)
    np.testing.assert_allclose(two, [[0.95, 0.05], [0.05, 0.95]], rtol=1e-6)
    np.testing.assert_allclose(jax_ls.smooth_binary_labels(jnp.array([0, 1]), 0.1), [0.05, 0.95], rtol=1e-6)


@pytest.mark.parametrize("num_classes", [2, 5, 31])
def test_others_is_all_at_a_larger_smoothing(num_classes):
    labels = jnp.arange(2)
    others = jax_ls.smooth_labels(labels, 0.1, num_classes=num_classes, spread="others")
    close(others, jax_ls.smooth_labels(labels, 0.1 * num_classes / (num_classes - 1), num_classes=num_classes))
