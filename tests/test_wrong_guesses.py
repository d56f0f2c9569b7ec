"""What people write who come from another library is answered with what to write here."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ls
from jax_ls import calibration, linear_cross_entropy, smoothed_cross_entropy

Z, Y = jnp.zeros((2, 4)), jnp.array([1, 2])
IMAGES, MASKS = jnp.zeros((2, 4, 3, 5)), jnp.zeros((2, 3, 5), int)
BY_EXAMPLE = r"jax_ls\.mean\(losses, weights\)"

NAMES = [
    (smoothed_cross_entropy, {"label_smoothing": 0.1}, "the name smoothing=, got label_smoothing=0.1"),
    (smoothed_cross_entropy, {"weight": jnp.ones(4)}, f"class_weights= for weights of classes, or {BY_EXAMPLE}"),
    (smoothed_cross_entropy, {"weights": jnp.ones(2)}, BY_EXAMPLE),
    (smoothed_cross_entropy, {"mask": jnp.ones(2)}, "the name where="),
    (smoothed_cross_entropy, {"softness": 1}, r"one of logits \| labels \| smoothing .*, got softness=1"),
    (jax_ls.cross_entropy, {"smoothing": 0.1}, r"smoothed_cross_entropy, or smooth\(labels, ε\)"),
    (jax_ls.cross_entropy, {"reduction": "mean"}, r"one loss for each example, and then jax_ls\.reduce"),
    (jax_ls.kl_divergence, {"label_smoothing": 0.1}, r"smooth\(labels, ε\) as the target"),
    (jax_ls.sigmoid_cross_entropy, {"label_smoothing": 0.1}, "the name smoothing="),
    (jax_ls.sigmoid_cross_entropy, {"reduction": "mean"}, "one loss for each example"),
    (jax_ls.focal_loss, {"weight": jnp.ones(4)}, "class_weights="),
    (jax_ls.noise.generalized_cross_entropy, {"reduction": "sum"}, "one loss for each example"),
]


@pytest.mark.parametrize(("function", "wrong", "answer"), NAMES, ids=lambda x: getattr(x, "__name__", None))
def test_a_name_of_another_library_is_answered_with_ours(function, wrong, answer):
    with pytest.raises(TypeError, match=f"^{next(iter(wrong))}: expected {answer}"):
        function(Z, Y, **wrong)


def test_so_is_one_of_an_output_layer():
    with pytest.raises(TypeError, match="label_smoothing: expected the name smoothing="):
        linear_cross_entropy(Z, jnp.zeros((4, 6)), Y, label_smoothing=0.1)
    with pytest.raises(TypeError, match="weight: expected class_weights="):
        linear_cross_entropy(Z, jnp.zeros((4, 6)), Y, weight=jnp.ones(6))


def test_options_by_position_are_answered():
    with pytest.raises(TypeError, match=r"cross_entropy: expected options by name after \(logits, target\), got 3"):
        jax_ls.cross_entropy(Z, Y, 0.1)


def test_help_shows_the_signature_of_the_function_itself():
    assert list(inspect.signature(smoothed_cross_entropy).parameters)[:3] == ["logits", "labels", "smoothing"]


@pytest.mark.parametrize("axis", [1, -1, np.int64(2)])
def test_an_axis_in_the_place_of_smoothing_is_answered(axis):
    with pytest.raises(TypeError, match=rf"smoothing: expected a real number, got the integer {axis}: axis={axis}"):
        smoothed_cross_entropy(Z, Y, axis)


def test_no_smoothing_may_be_an_integer():
    np.testing.assert_allclose(smoothed_cross_entropy(Z, Y, 0), np.log(4), rtol=1e-6)


SHAPES = [
    (Z, Y[:, None], r"labels\[\.\.\., 0\]\?"),
    (Z, Y[:, None].astype(jnp.float32), r"labels\[\.\.\., 0\]\.astype\(int\)\?"),
    (Z, Y.astype(jnp.float32), r"labels\.astype\(int\)\?"),
    (Z, jax.nn.one_hot(Y, 4).astype(int), r"one-hot labels\? labels\.astype\(float\)"),
    (IMAGES, MASKS, r"classes on axis 1\? axis=1"),
    (Y, Z, "are these the labels\\? Logits come first"),
]


@pytest.mark.parametrize(("logits", "labels", "remedy"), SHAPES)
def test_labels_of_another_form_are_answered_with_the_cast(logits, labels, remedy):
    """Our sentence comes first."""
    with pytest.raises(AssertionError, match=rf"^(labels|logits): expected [^\n]*, got [^\n]*: {remedy}"):
        smoothed_cross_entropy(logits, labels, 0.1)


def test_a_mask_of_numbers_is_answered_with_the_cast():
    with pytest.raises(AssertionError, match=r"^where: expected booleans \(2,\), got float32 \(2,\): where\.astype"):
        smoothed_cross_entropy(Z, Y, 0.1, where=jnp.ones(2))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "score", [calibration.fit_temperature, calibration.expected_calibration_error, calibration.brier_score]
)
def test_probabilities_where_logits_belong_are_found(score, dtype):
    logits = jax.random.normal(jax.random.key(0), (5, 4), dtype)
    labels = jnp.arange(5) % 4
    with pytest.raises(ValueError, match=r"logits: expected logits, got probabilities, .*: jnp\.log\(p\)\?"):
        score(jax.nn.softmax(logits), labels)
    assert jnp.isfinite(score(jax.nn.log_softmax(logits), labels))
    # Traced numbers are not known, and one row may sum to 1 by chance.
    jax.eval_shape(score, jax.nn.softmax(logits), labels)
    score(jax.nn.softmax(logits)[:1], labels[:1])


def test_a_parameter_of_linen_is_unboxed():
    nn = pytest.importorskip("flax.linen")
    kernel = jax.random.normal(jax.random.key(0), (4, 6))
    boxed = nn.Partitioned(kernel, names=("features", "classes"))

    def loss(kernel):
        return linear_cross_entropy(jnp.ones((2, 4)), kernel, Y, smoothing=0.1)

    value, gradient = jax.value_and_grad(loss)(boxed)
    expected, plain = jax.value_and_grad(loss)(kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient.unbox(), plain, rtol=1e-6)
