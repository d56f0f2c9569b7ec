"""labels -> q: the smoothed labels written out, against the definition and against the figures of papers."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jax_ls import Rows, Sparse, Uniform, smooth, smooth_binary_labels, smooth_labels

WORDS = [
    *["", "others", "prior", "prior others", "prior_each others", "each", "each prior others"],
    *["class_where", "class_where others", "class_where prior others", "class_where_each prior"],
    *["dense", "each dense others", "dense class_where_each prior others"],
]
CASES = [
    *[cases.Case(words) for words in WORDS],
    *[cases.Case(words, axis=axis) for words in ("prior", "each dense") for axis in (0, 1)],
    *[cases.Case(words, batch) for words in ("others", "dense") for batch in cases.BATCHES],
    *[cases.Case(words, (3,), size) for words in ("", "prior others") for size in cases.NUM_CLASSES],
    *[cases.Case("dense others", (3,), dtype=dtype) for dtype in cases.DTYPES],
]


@functools.partial(jax.jit, static_argnames=("num_classes", "axis", "spread"))
def written_out(floats, fixed, **static):
    """q, and its derivative in ε in the direction of 1."""

    def labels(epsilon):
        rest = {name: x for name, x in floats.items() if name != "epsilon"}
        return smooth_labels(smoothing=epsilon, **rest, **fixed, **static)

    return jax.jvp(labels, (floats["epsilon"],), (jnp.ones_like(floats["epsilon"]),))


def by_definition(case, floats, fixed, static, epsilon):
    def row(i):
        labels = floats["labels"] if "labels" in floats else fixed["labels"]
        prior, exists = reference.pick(floats.get("prior"), i, 1), reference.pick(fixed.get("class_where"), i, 1)
        options = {"prior": prior, "spread": static.get("spread", "all"), "exists": exists}
        return reference.smooth(labels[i], reference.pick(epsilon, i), case.num_classes, **options)

    rows = [row(i) for i in np.ndindex(case.batch)]
    return np.moveaxis(np.reshape(rows, (*case.batch, case.num_classes)), -1, case.axis)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_smooth_labels_and_their_derivative(case):
    with cases.precision(case.dtype):
        for _, epsilon in case.points:
            floats, fixed, static = cases.draw(case, smoothing=epsilon)
            del floats["logits"]
            ours, exact = cases.rounded(floats, case.dtype)
            ready = jax.tree.map(jnp.asarray, fixed)
            if "labels" in ours:
                ours["labels"] = jnp.moveaxis(ours["labels"], -1, case.axis)
            if "labels" not in ours or not case.batch:
                static["num_classes"] = case.num_classes
            values, slopes = written_out(ours, ready, **static)
            assert values.dtype == (case.dtype if "labels" in ours else jnp.float32)
            q = by_definition(case, exact, fixed, static, exact["epsilon"])
            slope = by_definition(case, exact, fixed, static, exact["epsilon"] + 1e-30j).imag / 1e-30
            cases.assert_close(values, q)
            cases.assert_close(slopes, slope)
            np.testing.assert_allclose(q.sum(axis=case.axis), 1, rtol=1e-2)


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        ([[0.00025, 0.99925, 0.00025, 0.00025]], {"labels": [1], "smoothing": 0.001, "num_classes": 4}),
        ([[0.05, 0.95]], {"labels": [1], "smoothing": 0.1, "num_classes": 2}),
        # fairseq and T5X: ε/(K−1) to each of the others.
        ([[0.9, 0.025, 0.025, 0.025, 0.025]], {"labels": [0], "smoothing": 0.1, "num_classes": 5, "spread": "others"}),
        # The Annotated Transformer: ε/(K−2), class 0 being padding.
        (
            [[0, 1 / 6, 0.5, 1 / 6, 1 / 6], [0, 0.5, 1 / 6, 1 / 6, 1 / 6]],
            {"labels": [2, 1], "smoothing": 0.5, "num_classes": 5, "spread": "others", "class_where": [0, 1, 1, 1, 1]},
        ),
        # Where the label has all of the prior, the others share ε equally.
        (
            [[0.25, 0.5, 0.25]],
            {"labels": [1], "smoothing": 0.5, "num_classes": 3, "spread": "others", "prior": [0.0, 1, 0]},
        ),
    ],
)
def test_figures_that_others_printed(expected, arguments):
    arguments["labels"] = np.array(arguments["labels"])
    if "class_where" in arguments:
        arguments["class_where"] = np.array(arguments["class_where"], bool)
    if "prior" in arguments:
        arguments["prior"] = np.array(arguments["prior"], np.float32)
    np.testing.assert_allclose(smooth_labels(**arguments), expected, atol=1e-7)


@pytest.mark.parametrize("spread", ["all", "others"])
def test_a_label_of_no_class_makes_its_own_row_nan(spread):
    where = jnp.array([True, True, True, False])
    labels = jnp.array([0, -1, 4, 3, -100, 2])
    bad = np.isnan(smooth_labels(labels, 0.1, num_classes=4, spread=spread))
    np.testing.assert_array_equal(bad.all(axis=-1), [False, True, True, False, True, False])
    np.testing.assert_array_equal(bad.any(axis=-1), [False, True, True, False, True, False])
    bad = np.isnan(smooth_labels(labels, 0.1, num_classes=4, spread=spread, class_where=where))
    np.testing.assert_array_equal(bad.all(axis=-1), [False, True, True, True, True, False])
    np.testing.assert_array_equal(bad.any(axis=-1), [False, True, True, True, True, False])


@pytest.mark.parametrize("spread", ["all", "others"])
def test_soft_targets_of_any_kind_are_smoothed_as_mixtures_of_hard_ones(spread):
    indices, weights = np.array([[0, 2], [4, 4]]), np.array([[0.75, 0.25], [0.5, 0.5]])
    sparse = [reference.sparse(indices[i], weights[i], 5) for i in range(2)]
    table = np.random.default_rng(0).dirichlet(np.ones(5), 5)
    for target, rows in [
        (Sparse(jnp.asarray(indices), jnp.asarray(weights)), sparse),
        (Rows(jnp.asarray(table), jnp.array([3, 1])), table[[3, 1]]),
        (smooth(jnp.array([3, 1]), 0.2), [reference.smooth(3, 0.2, 5), reference.smooth(1, 0.2, 5)]),
    ]:
        expected = [reference.smooth(np.asarray(row), 0.3, 5, spread=spread) for row in rows]
        actual = jax.jit(lambda q: smooth(q, 0.3, spread=spread).probs(5))(target)
        cases.assert_close(actual, np.array(expected))


@pytest.mark.parametrize(
    "row", [[-0.25, -0.125, 0, -0.5], [0.5, 0.5, -0.75, 0.0], [1e-6, 0, 0, 1], [0.0, 0, 0, 0]], ids=str
)
def test_others_of_rows_with_numbers_of_any_sign(row):
    prior = np.array([0.4, 0.3, 0.2, 0.1])
    expected = reference.smooth(np.array(row), 0.3, 4, prior=prior, spread="others")
    actual = smooth_labels(jnp.array(row), 0.3, num_classes=4, prior=jnp.array(prior), spread="others")
    cases.assert_close(actual, expected)


def test_a_prior_may_be_any_target():
    table = np.random.default_rng(0).dirichlet(np.ones(5), 5)
    labels = jnp.array([3, 1])
    prior = 0.5 * Rows(jnp.asarray(table), labels) + 0.5 * Uniform()
    for spread in ("all", "others"):
        mixed = table / 2 + 0.1
        expected = [reference.smooth(y, 0.3, 5, prior=mixed[y], spread=spread) for y in (3, 1)]
        cases.assert_close(smooth_labels(labels, 0.3, num_classes=5, prior=prior, spread=spread), np.array(expected))


@pytest.mark.parametrize(
    ("labels", "smoothing", "prior", "expected"),
    [
        ([1, 0], 0.1, 0.5, [0.95, 0.05]),
        # GANs, one-sided: real ones become 1 − ε, fake ones stay.
        ([1, 0], 0.1, 0.0, [0.9, 0.0]),
        # timm's binary cross-entropy over K = 10 classes.
        ([1, 0], 0.1, 0.1, [0.91, 0.01]),
        ([True, False], 0.2, 0.5, [0.9, 0.1]),
        ([0.5, 0.25], 0.5, 1.0, [0.75, 0.625]),
        ([[1, 0], [0, 1]], [[0.0], [1.0]], [0.25, 0.75], [[1, 0], [0.25, 0.75]]),
        ([1, 0], -0.5, 0.5, [1.25, -0.25]),
        (1, 0.1, 0.5, 0.95),
    ],
)
def test_smooth_binary_labels(labels, smoothing, prior, expected):
    arrays = [np.asarray(x) if np.ndim(x) else x for x in (labels, smoothing, prior)]
    actual = smooth_binary_labels(arrays[0], arrays[1], prior=arrays[2])
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_smooth_binary_labels_keep_the_dtype_of_real_labels(dtype):
    with cases.precision(dtype):
        smoothed = smooth_binary_labels(jnp.array([0.0, 1.0], dtype), 0.1)
        assert smoothed.dtype == dtype
        cases.assert_close(smoothed, np.array([0.05, 0.95]))
