"""What does not count leaves no trace: masked examples, ignored labels, classes that do not exist, empty batches."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ls
from jax_ls import (
    Dense,
    Rows,
    Sparse,
    cross_entropy,
    kl_divergence,
    sigmoid_cross_entropy,
    smooth,
    smoothed_cross_entropy,
)

NAN, INF = np.nan, np.inf
POISON = [NAN, INF, -INF]
COUNTS = np.array([True, False, True, False, True])
KEPT = np.array([0, 2, 4])
K = 7


def poisoned(x, poison):
    """`x`, and what should not count replaced by poison."""
    return jnp.asarray(np.where(COUNTS.reshape(-1, *[1] * (x.ndim - 1)), x, poison).astype(x.dtype))


def ingredients():
    floats, fixed = cases.ingredients((5,), K)
    floats["logits"] = np.random.default_rng(5).normal(size=(5, K))
    return {name: x.astype(np.float32) for name, x in floats.items()}, fixed


TARGETS = {
    "mixture": lambda a: smooth(a["labels"], a["epsilon"]),
    "prior": lambda a: smooth(a["labels"], a["each"], prior=a["prior"]),
    "others": lambda a: smooth(a["labels"], a["each"], prior=a["prior"], spread="others"),
    "dense": lambda a: smooth(a["dense"], a["epsilon"], prior=a["prior"]),
    "dense others": lambda a: smooth(a["dense"], a["epsilon"], prior=a["prior"], spread="others"),
    "rows": lambda a: smooth(a["labels"], a["epsilon"], prior=Rows(a["table"], a["labels"])),
    "sparse": lambda a: a["epsilon"] * Sparse(a["indices"], a["weights"]) + 0.5 * Dense(a["prior"]),
    "weighted": lambda a: smooth(a["labels"], a["each"], prior=a["prior"]).weighted(a["class_weights"]),
}


@functools.partial(jax.jit, static_argnames=("loss", "name"))
def value_and_gradients(loss, name, floats, fixed, where):
    def total(floats):
        losses = loss(floats["logits"], TARGETS[name](floats | fixed), where=where)
        return jnp.sum(losses), losses

    (_, losses), gradients = jax.value_and_grad(total, has_aux=True)(floats)
    return losses, gradients


OF_CROSS_ENTROPY = [(name, cross_entropy) for name in TARGETS]
OF_DIVERGENCE = [(name, kl_divergence) for name in ("prior", "dense others", "sparse")]


@pytest.mark.parametrize(("name", "loss"), OF_CROSS_ENTROPY + OF_DIVERGENCE)
def test_whatever_stands_in_masked_rows_loss_and_gradient_are_zero(name, loss):
    """And the gradients in what all examples share are those of the examples that count, alone."""
    floats, fixed = ingredients()
    if loss is kl_divergence:
        floats["each"] = abs(floats["each"])
    by_row = {"logits", "each", "dense", "weights"}
    alone = {key: x[KEPT] if key in by_row else x for key, x in floats.items()}
    counted = {key: x[KEPT] if key in ("labels", "indices") else x for key, x in fixed.items()}
    expected, slopes = value_and_gradients(loss, name, alone, counted, None)
    for poison in POISON:
        rows = {key: poisoned(x, poison) if key in by_row else x for key, x in floats.items()}
        marks = {key: poisoned(fixed[key], -100) for key in ("labels", "indices")}
        losses, gradients = value_and_gradients(loss, name, rows, fixed | marks, jnp.asarray(COUNTS))
        np.testing.assert_allclose(losses[KEPT], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(losses[~COUNTS], 0)
        for key, slope in slopes.items():
            ours = gradients[key]
            if key in by_row:
                np.testing.assert_array_equal(ours[~COUNTS], 0, err_msg=f"{key}, {poison}")
                ours = ours[KEPT]
            np.testing.assert_allclose(ours, slope, rtol=1e-5, atol=1e-6, err_msg=f"{key}, {poison}")


@pytest.mark.parametrize("poison", POISON)
def test_masked_elements_of_a_sigmoid_leave_no_trace(poison):
    rng = np.random.default_rng(7)
    arrays = {"z": rng.normal(size=(5, K)), "y": rng.uniform(size=(5, K)), "each": rng.uniform(size=(5, K))}
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    where = rng.random((5, K)) < 0.5

    @jax.jit
    def value_and_slopes(arrays, epsilon, prior, where):
        def total(arrays, epsilon, prior):
            by_smoothing = [
                sigmoid_cross_entropy(arrays["z"], arrays["y"], smoothing, prior=prior, where=where)
                for smoothing in (epsilon, arrays["each"])
            ]
            return sum(x.sum() for x in by_smoothing), by_smoothing[1]

        return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(arrays, epsilon, prior)

    clean = value_and_slopes({name: x[where] for name, x in arrays.items()}, 0.3, 0.6, None)
    spoiled = {name: np.where(where, x, np.float32(poison)) for name, x in arrays.items()}
    (_, losses), slopes = value_and_slopes(spoiled, 0.3, 0.6, where)
    np.testing.assert_allclose(losses[where], clean[0][1], rtol=1e-6)
    np.testing.assert_array_equal(losses[~where], 0)
    for name in arrays:
        np.testing.assert_array_equal(slopes[0][name][~where], 0)
        np.testing.assert_allclose(slopes[0][name][where], clean[1][0][name], rtol=1e-5)
    np.testing.assert_allclose(slopes[1:], clean[1][1:], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 255, 1000])
def test_ignored_labels_of_every_dtype(dtype, ignore_index):
    """A number that the labels' dtype cannot hold is the label of nobody."""
    labels = jnp.asarray([3, 1, -1 if dtype != "uint8" else 255, 156 if dtype != "int8" else 5], dtype)
    losses = smoothed_cross_entropy(jnp.zeros((4, 300)), labels, 0.1, ignore_index=ignore_index)
    values = np.asarray(labels).astype(np.int64)
    expected = np.where(values == ignore_index, 0, np.where(values < 0, NAN, np.log(300)))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


@jax.jit
def ignoring(logits, labels, where):
    def total(logits):
        losses = smoothed_cross_entropy(logits, labels, 0.1, ignore_index=-100, where=where, class_weights=jnp.ones(K))
        return jax_ls.mean(losses, labels != -100), losses

    return jax.value_and_grad(total, has_aux=True)(logits)


def test_everything_ignored_is_zero():
    for labels, where in [(jnp.full(3, -100), jnp.ones(3, bool)), (jnp.full(3, 2), jnp.zeros(3, bool))]:
        (mean, losses), slope = ignoring(jnp.full((3, K), NAN), labels, where)
        assert mean == 0
        np.testing.assert_array_equal(losses, 0)
        np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize(("spread", "each"), [("all", False), ("others", True)])
def test_classes_that_do_not_exist_have_no_effect(spread, each):
    """Whatever their logits: the loss is that of the classes that exist, written without the others."""
    rng = np.random.default_rng(6)
    exists = np.arange(K) % 3 != 1
    logits, prior = rng.normal(size=(4, K)).astype(np.float32), rng.dirichlet(np.ones(K)).astype(np.float32)
    labels = np.array([0, 2, 3, 6])
    where = jnp.broadcast_to(exists, (4, K)) if each else jnp.asarray(exists)

    @functools.partial(jax.jit, static_argnames="has_prior")
    def full(logits, has_prior):
        def total(z):
            options = {"prior": prior if has_prior else None, "spread": spread, "class_where": where, "z_loss": 0.1}
            losses = smoothed_cross_entropy(z, labels, 0.3, **options)
            return losses.sum(), losses

        return jax.value_and_grad(total, has_aux=True)(logits)

    for has_prior in (False, True):
        u = prior[exists] / prior[exists].sum() if has_prior else None

        def short(z, y, u=u):
            return smoothed_cross_entropy(z, y, 0.3, prior=u, spread=spread, z_loss=0.1)

        ready = jax.jit(jax.vmap(jax.value_and_grad(short)))
        expected, slope = ready(logits[:, exists], np.searchsorted(np.flatnonzero(exists), labels))
        for poison in (*POISON, 1e30):
            (_, losses), slopes = full(jnp.where(exists[None], logits, poison), has_prior)
            np.testing.assert_allclose(losses, expected, rtol=1e-6)
            np.testing.assert_allclose(slopes[:, exists], slope, rtol=1e-5, atol=1e-7)
            np.testing.assert_array_equal(slopes[:, ~exists], 0)


@pytest.mark.parametrize("spread", ["all", "others"])
@pytest.mark.parametrize(("batch", "size"), [((0,), 3), ((2, 0), 3), ((0,), 1), ((3,), 1), ((), 1)])
def test_empty_batches_and_a_single_class(batch, size, spread):
    logits, labels = jnp.full((*batch, size), 2.0), jnp.zeros(batch, int)

    @jax.jit
    def means(z, epsilon):
        def total(z, epsilon, prior):
            losses = smoothed_cross_entropy(z, labels, epsilon, prior=prior, spread=spread)
            return jax_ls.mean(losses), losses

        gradient = jax.value_and_grad(total, (0, 1), has_aux=True)
        return [gradient(z, epsilon, prior) for prior in (None, jnp.full(size, 1 / size))]

    for epsilon in (0.0, 1.0):
        for (mean, losses), slopes in means(logits, epsilon):
            assert mean == 0
            for x, shape in ((losses, batch), (slopes[0], logits.shape), (slopes[1], ())):
                np.testing.assert_array_equal(x, np.zeros(shape))
