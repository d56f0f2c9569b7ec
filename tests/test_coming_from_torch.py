"""PyTorch's CrossEntropyLoss and the module copied before it could smooth: the same numbers, argument by argument."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ls

LOGITS = [[2.0, -1.0, 0.5, 1.0], [0.0, 3.0, -2.0, 1.5], [-0.5, 0.25, 4.0, -3.0]]
LABELS = [0, 3, 2]
WEIGHT = [1.0, 0.5, 2.0, 0.25]

RNG = np.random.default_rng(0)
BATCH = 3 * RNG.normal(size=(7, 5)).astype(np.float32)
HARD = np.array([4, 0, 2, 2, 1, 3, 0])
IGNORED = np.array([4, -100, 2, -100, 1, 3, 0])
PROBABILITIES = RNG.dirichlet(np.ones(5), size=7).astype(np.float32)
WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0, 0.25], np.float32)

COMBINATIONS = list(itertools.product([None, WEIGHTS], ["none", "sum", "mean"], [0.0, 0.1, 1.0]))


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def torch_on_indices(z, y, weight, ignore_index, reduction, smoothing):
    """Its documented formula: w_y (1 − ε) nll + ε/K Σ_k w_k nll_k; "mean" divides by Σ w_y of those kept."""
    log_p, num_classes = log_softmax(z), z.shape[-1]
    w = np.ones(num_classes) if weight is None else weight.astype(np.float64)
    kept = y != ignore_index
    label = np.where(kept, y, 0)
    nll = -np.take_along_axis(log_p, label[..., None], -1)[..., 0]
    losses = (1 - smoothing) * w[label] * nll - smoothing / num_classes * (w * log_p).sum(-1)
    losses = np.where(kept, losses, 0)
    if reduction == "none":
        return losses
    return losses.sum() / (w[label][kept].sum() if reduction == "mean" else 1)


def torch_on_probabilities(z, q, weight, reduction, smoothing):
    """−Σ_k w_k ((1 − ε) q_k + ε/K) log p_k; "mean" divides by the number of examples, weights or not."""
    log_p, num_classes = log_softmax(z), z.shape[-1]
    w = np.ones(num_classes) if weight is None else weight.astype(np.float64)
    losses = -(w * ((1 - smoothing) * q.astype(np.float64) + smoothing / num_classes) * log_p).sum(-1)
    return {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]


smoothed = jax.jit(jax_ls.smoothed_cross_entropy, static_argnames=("spread", "axis"))


@functools.partial(jax.jit, static_argnums=(3, 4))
def ours_on_indices(z, y, weight, ignore_index, reduction, smoothing):
    """The lines that docs/coming-from.md gives."""
    losses = jax_ls.smoothed_cross_entropy(z, y, smoothing, ignore_index=ignore_index, class_weights=weight)
    if reduction != "mean":
        return jax_ls.reduce(losses, reduction=reduction)
    kept = y != ignore_index
    if weight is None:
        return jax_ls.mean(losses, kept)
    return jax_ls.mean(losses, denominator=jnp.sum(weight[y], where=kept))


@functools.partial(jax.jit, static_argnums=3)
def ours_on_probabilities(z, q, weight, reduction, smoothing):
    losses = jax_ls.smoothed_cross_entropy(z, q, smoothing, class_weights=weight)
    return jax_ls.reduce(losses, reduction=reduction)


@functools.partial(jax.jit, static_argnums=(3, 4))
def gradient_on_indices(z, y, weight, ignore_index, reduction, smoothing):
    return jax.grad(lambda z: jnp.sum(ours_on_indices(z, y, weight, ignore_index, reduction, smoothing)))(z)


def as_jax(*arrays):
    return [None if x is None else jnp.asarray(x) for x in arrays]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("labels", [HARD, IGNORED], ids=["kept", "ignored"])
@pytest.mark.parametrize(("weight", "reduction", "smoothing"), COMBINATIONS)
def test_class_indices(weight, reduction, smoothing, labels):
    z, y, w = as_jax(BATCH, labels, weight)
    expected = torch_on_indices(BATCH, labels, weight, -100, reduction, smoothing)
    np.testing.assert_allclose(ours_on_indices(z, y, w, -100, reduction, smoothing), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("labels", [HARD, IGNORED], ids=["kept", "ignored"])
@pytest.mark.parametrize(("weight", "reduction", "smoothing"), COMBINATIONS)
def test_class_indices_against_torch_itself(torch, weight, reduction, smoothing, labels):
    z, y, w = as_jax(BATCH, labels, weight)
    z64 = torch.tensor(BATCH, dtype=torch.float64, requires_grad=True)
    w64 = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    loss = torch.nn.CrossEntropyLoss(weight=w64, reduction=reduction, label_smoothing=smoothing)
    theirs = loss(z64, torch.tensor(labels))
    theirs.sum().backward()
    expected = torch_on_indices(BATCH, labels, weight, -100, reduction, smoothing)
    np.testing.assert_allclose(theirs.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    gradient = gradient_on_indices(z, y, w, -100, reduction, smoothing)
    np.testing.assert_allclose(gradient, z64.grad.numpy(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("weight", "reduction", "smoothing"), COMBINATIONS)
def test_class_probabilities(weight, reduction, smoothing):
    z, q, w = as_jax(BATCH, PROBABILITIES, weight)
    expected = torch_on_probabilities(BATCH, PROBABILITIES, weight, reduction, smoothing)
    np.testing.assert_allclose(ours_on_probabilities(z, q, w, reduction, smoothing), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("weight", "reduction", "smoothing"), COMBINATIONS)
def test_class_probabilities_against_torch_itself(torch, weight, reduction, smoothing):
    z64, q64 = torch.tensor(BATCH, dtype=torch.float64), torch.tensor(PROBABILITIES, dtype=torch.float64)
    w64 = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    theirs = torch.nn.CrossEntropyLoss(weight=w64, reduction=reduction, label_smoothing=smoothing)(z64, q64)
    expected = torch_on_probabilities(BATCH, PROBABILITIES, weight, reduction, smoothing)
    np.testing.assert_allclose(theirs.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_ignore_index_may_name_a_class(reduction):
    z, y = as_jax(BATCH, HARD)
    expected = torch_on_indices(BATCH, HARD, None, 0, reduction, 0.1)
    np.testing.assert_allclose(ours_on_indices(z, y, None, 0, reduction, 0.1), expected, rtol=2e-6)


def test_images_have_their_classes_on_axis_1():
    images = RNG.normal(size=(2, 5, 3, 4)).astype(np.float32)
    labels = RNG.integers(5, size=(2, 3, 4))
    losses = smoothed(jnp.asarray(images), jnp.asarray(labels), 0.1, axis=1)
    expected = torch_on_indices(np.moveaxis(images, 1, -1), labels, None, -100, "none", 0.1)
    np.testing.assert_allclose(losses, expected, rtol=2e-6)


def test_the_numbers_of_the_documentation():
    z, y, w = jnp.array(LOGITS), jnp.array(LABELS), jnp.array(WEIGHT)
    ignored = y.at[1].set(-100)
    losses = smoothed(z, y, 0.1)
    np.testing.assert_allclose(losses, [0.6326818981, 1.8340906475, 0.4161717014], rtol=1e-6)
    others = smoothed(z, y, 0.1, spread="others")
    np.testing.assert_allclose(others, [0.6785152314, 1.8632573142, 0.5432550347], rtol=1e-6)
    np.testing.assert_allclose(ours_on_indices(z, y, w, -100, "mean", 0.1), 0.5017140776, rtol=1e-6)
    np.testing.assert_allclose(ours_on_indices(z, ignored, None, -100, "mean", 0.1), 0.5244267997, rtol=1e-6)
    np.testing.assert_allclose(ours_on_indices(z, ignored, w, -100, "mean", 0.1), 0.2933649944, rtol=1e-6)


def test_a_mean_over_nothing_is_0_where_torch_has_nan():
    z, y, w = as_jax(BATCH, np.full(7, -100), WEIGHTS)
    for weight in (None, w):
        assert ours_on_indices(z, y, weight, -100, "mean", 0.1) == 0


def test_minus_100_is_ignored_only_when_said():
    losses = smoothed(jnp.array(LOGITS), jnp.array([0, -100, 2]), 0.1)
    np.testing.assert_array_equal(jnp.isnan(losses), [False, True, False])


def copied_module(z, y, eps, reduction, ignore_index):
    """LabelSmoothingCrossEntropy: ε/K · Σ_k −log p_k + (1 − ε) · nll, its first term now ignoring too."""
    kept = y != ignore_index
    log_p = log_softmax(z)[kept]
    nll = -np.take_along_axis(log_p, y[kept][:, None], -1)[:, 0]
    both = -log_p.sum(-1) * eps / z.shape[-1] + (1 - eps) * nll
    losses = np.zeros(len(y))
    losses[kept] = both
    return {"none": losses, "sum": both.sum(), "mean": both.mean()}[reduction]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("labels", [HARD, IGNORED], ids=["kept", "ignored"])
def test_the_copied_module_without_its_bug(labels, reduction):
    z, y = as_jax(BATCH, labels)
    expected = copied_module(BATCH, labels, 0.1, reduction, -100)
    np.testing.assert_allclose(ours_on_indices(z, y, None, -100, reduction, 0.1), expected, rtol=2e-6, atol=2e-6)


def test_the_bug_was_that_ignored_examples_still_pull_the_gradient():
    def as_copied(z):
        return -0.1 / 5 * jnp.sum(jax.nn.log_softmax(z), axis=-1).mean()

    z, y = as_jax(BATCH, IGNORED)
    ignored = y == -100
    assert jnp.all(jnp.any(jax.grad(as_copied)(z)[ignored] != 0, axis=-1))
    gradient = gradient_on_indices(z, y, None, -100, "mean", 0.1)
    np.testing.assert_array_equal(gradient[ignored], 0)
