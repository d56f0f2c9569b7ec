"""`jax_ls.compat` beside the originals, in value and gradient.

PyTorch's figures, and those of modules written in PyTorch, came out of PyTorch 2.13 in float64. The other originals are
written here from their definitions in float64 NumPy, and differentiated by the complex step.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jax_ls import compat


def wave(*shape, k=1.0):
    """Numbers between −3 and 3 that need no generator, for PyTorch to have the same."""
    n = np.arange(1, np.prod(shape, dtype=int) + 1)
    return (3 * np.sin(k * n**1.5)).reshape(shape)


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


Z = wave(5, 5)
IGNORED, HARD = np.array([4, 0, -100, 2, 1]), np.array([4, 0, 3, 2, 1])
W = np.array([0.5, 2.0, 0.0, 1.0, 0.25])
Q = softmax(wave(5, 5, k=0.3))
IMAGES, IMAGE_LABELS, IMAGE_Q = (
    wave(2, 5, 2, 3),
    np.arange(12).reshape(2, 2, 3) % 5,
    softmax(wave(2, 5, 2, 3, k=0.3), 1),
)
IMAGE_LABELS[0, 1, 2] = -100


def assert_figures(loss, logits, values, slope):
    """The values, and the gradient of their sum along a direction."""
    z = jnp.asarray(logits, jnp.float32)
    total, gradient = jax.jit(jax.value_and_grad(lambda z: jnp.sum(loss(z))))(z)
    np.testing.assert_allclose(np.ravel(loss(z)), values, rtol=5e-6, atol=1e-6)
    np.testing.assert_allclose(total, np.sum(values), rtol=5e-6)
    np.testing.assert_allclose(
        np.sum(np.asarray(gradient) * wave(*np.shape(logits), k=0.7)), slope, rtol=2e-5, atol=2e-6
    )


def assert_formula(ours, formula, logits):
    """The values, and the gradient of their sum, of a formula in NumPy."""
    z = jnp.asarray(logits, jnp.float32)
    np.testing.assert_allclose(ours(z), formula(logits.astype(complex)).real, rtol=5e-6, atol=2e-6)
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(ours(z))))(z)
    expected = reference.gradient(lambda z: np.sum(formula(z)), logits)
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=2e-6)


# PyTorch: (target, weight, reduction, ε) -> values, slope

TORCH = [
    (Z, IGNORED, None, "none", 0.0, [6.492228673, 0.9460811682, 0.0, 1.840705259, 1.609474539], -3.422728685),
    (Z, IGNORED, None, "none", 0.1, [6.181094619, 1.134800825, 0.0, 1.819425617, 1.781939315], -3.449700577),
    (Z, IGNORED, W, "none", 0.0, [1.623057168, 0.4730405841, 0.0, 0.0, 3.218949079], -4.638985852),
    (Z, IGNORED, W, "none", 0.1, [1.619668707, 0.6402731112, 0.0, 0.1270587595, 3.106724077], -4.482463121),
    (Z, IGNORED, None, "sum", 0.1, [10.91726038], -3.449700577),
    (Z, IGNORED, W, "sum", 0.1, [5.493724655], -4.482463121),
    (Z, IGNORED, None, "mean", 0.0, [2.72212241], -0.8556821713),
    (Z, IGNORED, None, "mean", 0.1, [2.729315094], -0.8624251443),
    (Z, IGNORED, W, "mean", 0.0, [1.932744302], -1.686903946),
    (Z, IGNORED, W, "mean", 0.1, [1.997718056], -1.629986589),
    (Z, Q, None, "mean", 0.1, [2.789270352], -1.368151237),
    (Z, Q, W, "mean", 0.1, [0.9270204131], 0.03697780369),
    (Z, Q, None, "sum", 0.1, [13.94635176], -6.840756183),
    (Z, Q, W, "sum", 0.1, [4.635102066], 0.1848890185),
    (IMAGES, IMAGE_LABELS, None, "mean", 0.1, [2.803940388], -0.2400648343),
    (IMAGES, IMAGE_LABELS, W, "mean", 0.1, [3.088885308], 0.01033648127),
    (IMAGES, IMAGE_Q, W, "mean", 0.1, [2.006148123], -0.02684669626),
    (Z[0], np.array(3), W, "mean", 0.1, [0.6766115755], 1.436498332),
]


@pytest.mark.parametrize(("logits", "target", "weight", "reduction", "smoothing", "values", "slope"), TORCH)
def test_torch_cross_entropy(logits, target, weight, reduction, smoothing, values, slope):
    target = target.astype(np.float32) if target.dtype.kind == "f" else target
    weight = None if weight is None else weight.astype(np.float32)

    def loss(z):
        return compat.torch_cross_entropy(z, target, weight, reduction=reduction, label_smoothing=smoothing)

    assert_figures(loss, logits, values, slope)


def test_torch_options():
    z = jnp.asarray(Z, jnp.float32)
    assert compat.torch_cross_entropy(z, jnp.full(5, -100)) == 0
    np.testing.assert_allclose(compat.torch_cross_entropy(z, HARD, None, 3), compat.torch_cross_entropy(z, IGNORED))
    np.testing.assert_allclose(
        compat.torch_cross_entropy(z, HARD, label_smoothing=1), -np.mean(jax.nn.log_softmax(z)), rtol=1e-6
    )
    with pytest.raises(ValueError, match="reduction: expected"):
        compat.torch_cross_entropy(z, HARD, reduction="batchmean")


@pytest.mark.parametrize(
    ("reduction", "values", "slope"),
    [
        ("none", [6.181094619, 1.134800825, 1.228928739, 1.819425617, 1.781939315], -1.610023894),
        ("sum", [12.14618911], -1.610023894),
        ("mean", [2.429237823], -0.3220047788),
    ],
)
def test_the_copied_module(reduction, values, slope):
    criterion = compat.LabelSmoothingCrossEntropy(eps=0.1, reduction=reduction)
    assert_figures(lambda z: criterion(z, HARD), Z, values, slope)
    gradient = jax.grad(lambda z: jnp.sum(criterion(z, IGNORED)))(jnp.asarray(Z, jnp.float32))
    np.testing.assert_array_equal(gradient[2], 0)


def test_the_annotated_transformer():
    criterion = compat.LabelSmoothing(size=5, padding_idx=0, smoothing=0.4)
    assert_figures(lambda z: criterion(jax.nn.log_softmax(z), HARD), Z, [7.168693176], -3.122343117)
    # Its input are log-probabilities, in which it is linear.
    log_p = jax.nn.log_softmax(jnp.asarray(Z, jnp.float32))
    rows = np.full((5, 5), 0.4 / 3)
    rows[np.arange(5), HARD] = 0.6
    rows[:, 0], rows[1] = 0, 0
    np.testing.assert_allclose(jax.grad(lambda x: criterion(x, HARD))(log_p), -rows, rtol=1e-6, atol=1e-7)
    assert compat.LabelSmoothing(5, 4)(log_p, jnp.full(5, 4)) == 0
    forbidden = log_p.at[:, 0].set(-jnp.inf)
    assert jnp.isfinite(criterion(forbidden, HARD))


@pytest.mark.parametrize(
    ("ignore_index", "reduce", "values", "slope"),
    [
        (None, True, [12.2099514], -1.680506581),
        (2, True, [10.39584569], -2.191377666),
        (2, False, [6.103311105, 1.181980739, 1.285498335, 0.0, 1.825055509], -2.191377666),
    ],
)
def test_fairseq(ignore_index, reduce, values, slope):
    def loss(z, target=HARD):
        return compat.fairseq_label_smoothed_nll_loss(jax.nn.log_softmax(z), target, 0.1, ignore_index, reduce)

    assert_figures(lambda z: loss(z)[0], Z, values, slope)
    z = jnp.asarray(Z, jnp.float32)
    np.testing.assert_array_equal(loss(z)[0], loss(z, HARD[:, None])[0])
    ignored = ignore_index == HARD
    nll = np.where(ignored, 0, -jax.nn.log_softmax(z)[np.arange(5), HARD])
    np.testing.assert_allclose(loss(z)[1], nll.sum() if reduce else nll, rtol=1e-6, atol=1e-6)


def test_timm():
    z = jnp.asarray(Z, jnp.float32)
    assert_figures(lambda z: compat.timm_label_smoothing_cross_entropy(z, HARD), Z, [2.429237823], -0.3220047788)
    soft = jnp.asarray(Q, jnp.float32)
    expected = -(soft * jax.nn.log_softmax(z)).sum(-1).mean()
    np.testing.assert_allclose(compat.timm_label_smoothing_cross_entropy(z, soft, 0.0), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "values", "slope"),
    [
        ({}, [1.359822101], 0.04182169345),
        ({"target_threshold": 0.5, "reduction": "sum", "weight": W}, [24.59988242], 0.05367241592),
        ({"sum_classes": True, "pos_weight": W + 1}, [7.091139858], 0.1180198777),
    ],
)
def test_timm_binary(given, values, slope):
    given = {name: x.astype(np.float32) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    assert_figures(lambda z: compat.timm_binary_cross_entropy(z, HARD, **given), Z, values, slope)


def test_timm_takes_dense_targets_as_they_are():
    z, q = jnp.asarray(Z, jnp.float32), jnp.asarray(Q, jnp.float32)
    ours = compat.timm_binary_cross_entropy(z, q, reduction="none")
    np.testing.assert_allclose(ours, jax.nn.softplus(z) - q * z, rtol=1e-5, atol=1e-6)


# TensorFlow and Keras


def log_softmax(z, axis=-1):
    z = z - z.real.max(axis, keepdims=True)
    return z - np.log(np.exp(z).sum(axis, keepdims=True))


WEIGHTS = np.array([2.0, 0.0, 0.5, 1.0, 0.0])


@pytest.mark.parametrize("weights", [np.array(1.0), WEIGHTS, np.zeros(5)], ids=["1", "rows", "nothing"])
@pytest.mark.parametrize("reduction", compat.TF_REDUCTIONS)
def test_tensorflow(reduction, weights):
    def formula(z):
        losses = -((0.9 * np.eye(5)[HARD] + 0.02) * log_softmax(z)).sum(-1)
        w = np.broadcast_to(weights, losses.shape)
        total = (w * losses).sum()
        counts = {"weighted_mean": w.sum(), "weighted_sum_over_batch_size": 5, "weighted_sum": 1}
        count = counts.get(reduction, np.count_nonzero(w))
        return w * losses if reduction == "none" else total / count if count else np.zeros((), complex)

    def ours(z):
        onehot, w = jnp.eye(5, dtype=jnp.int32)[HARD], jnp.asarray(weights, jnp.float32)
        return compat.tf_softmax_cross_entropy(onehot, z, w, label_smoothing=0.1, reduction=reduction)

    assert_formula(ours, formula, Z)


P = softmax(Z) * np.linspace(0.5, 2, 5)[:, None]  # Keras divides by the sum
P[0, 1] = 1e-12  # and clips


def keras_log(p, axis=-1):
    p = p / p.sum(axis, keepdims=True)
    return np.log(np.where(p.real < 1e-7, 1e-7, np.where(p.real > 1 - 1e-7, 1 - 1e-7, p)))


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("axis", [-1, 0])
def test_keras_categorical(axis, from_logits):
    onehot = np.moveaxis(np.eye(5)[HARD], -1, axis)
    given = np.moveaxis(Z if from_logits else P, -1, axis)
    log_p = log_softmax if from_logits else keras_log

    def ours(z):
        return compat.keras_categorical_crossentropy(onehot.astype(int), z, from_logits, 0.1, axis)

    assert_formula(ours, lambda z: -((0.9 * onehot + 0.02) * log_p(z, axis)).sum(axis), given)


@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("ignore_class", [None, 2])
def test_keras_sparse(ignore_class, from_logits):
    log_p = log_softmax if from_logits else keras_log
    kept = ignore_class != HARD

    as_keras = HARD.astype(np.float32)[:, None]

    def ours(z, labels=as_keras):
        return compat.keras_sparse_categorical_crossentropy(labels, z, from_logits, ignore_class)

    given = Z if from_logits else P
    assert_formula(ours, lambda z: np.where(kept, -(np.eye(5)[HARD] * log_p(z)).sum(-1), 0), given)
    np.testing.assert_array_equal(ours(jnp.asarray(given)), ours(jnp.asarray(given), HARD))


@pytest.mark.parametrize("from_logits", [True, False])
def test_keras_binary(from_logits):
    y = (wave(5, 5, k=0.3) > 0).astype(np.float64)
    q, given = 0.9 * y + 0.05, Z if from_logits else 1 / (1 + np.exp(-Z))

    def formula(z):
        if from_logits:
            return (np.log(1 + np.exp(z)) - q * z).mean(-1)
        return -(q * np.log(z) + (1 - q) * np.log(1 - z)).mean(-1)

    def ours(z):
        return compat.keras_binary_crossentropy(y.astype(int), z, from_logits, label_smoothing=0.1)

    assert_formula(ours, formula, given)
    ends = compat.keras_binary_crossentropy(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(ends, -np.log(1e-7), rtol=1e-2)


# T5X, Flax's examples, MaxText


def t5x_losses(z, targets, smoothing, z_loss):
    on, off = 1 - smoothing, smoothing / (z.shape[-1] - 1)
    q = np.where(np.eye(z.shape[-1])[targets] == 1, on, off)
    constant = -(on * np.log(on) + (z.shape[-1] - 1) * off * np.log(off + 1e-20))
    lse = np.log(np.exp(z).sum(-1))
    return -(q * log_softmax(z)).sum(-1) - constant + z_loss * lse**2, z_loss * lse**2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["1", "rows"])
@pytest.mark.parametrize(("z_loss", "factor"), [(0.0, None), (0.01, 3.5)])
def test_t5x(z_loss, factor, weights, smoothing):
    w = np.ones(5) if weights is None else weights

    def formula(z, part):
        return (w * t5x_losses(z, HARD, smoothing, z_loss)[part]).sum() / (factor or 1)

    def ours(z):
        given = None if weights is None else jnp.asarray(w, jnp.float32)
        return compat.t5x_compute_weighted_cross_entropy(z, HARD, given, smoothing, z_loss, factor)

    for part in (0, 1):
        assert_formula(lambda z, part=part: ours(z)[part], lambda z, part=part: formula(z, part), Z)
    assert ours(jnp.asarray(Z, jnp.float32))[2] == w.sum()


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["1", "rows"])
def test_examples_of_flax(weights):
    w = np.ones(5) if weights is None else weights
    given = None if weights is None else jnp.asarray(w, jnp.float32)

    def ours(z):
        return compat.flax_compute_weighted_cross_entropy(z, HARD, given, 0.1)

    assert_formula(lambda z: ours(z)[0], lambda z: (w * t5x_losses(z, HARD, 0.1, 0)[0]).sum(), Z)
    assert ours(jnp.asarray(Z, jnp.float32))[1] == w.sum()


@pytest.mark.parametrize("kind", ["one-hot integers", "smoothed", "labels"])
def test_maxtext(kind):
    q = 0.9 * np.eye(5)[HARD] + 0.02 if kind == "smoothed" else np.eye(5)[HARD]
    targets = {"smoothed": q.astype(np.float32), "labels": HARD}.get(kind, q.astype(int))

    def formula(z, part):
        lse = np.log(np.exp(z).sum(-1))
        return [-(q * log_softmax(z)).sum(-1) + 0.01 * lse**2, 0.01 * lse**2][part]

    for part in (0, 1):
        ours = lambda z, part=part: compat.maxtext_cross_entropy_with_logits(z, targets, 0.01)[part]  # noqa: E731
        assert_formula(ours, lambda z, part=part: formula(z, part), Z)
