"""Labels made wrong, and the ε that undoes it; and what bad input gets, here and in the losses."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ls import noise, smooth

RNG = np.random.default_rng(0)


def test_disturbed_labels_average_to_smoothed_ones():
    n, size = 40_000, 5
    labels = jnp.arange(n) % size
    drawn = noise.disturb_labels(jax.random.key(0), labels, 0.3, num_classes=size)
    seen = np.array([jnp.bincount(drawn[labels == k], length=size) for k in range(size)]) / (n / size)
    np.testing.assert_allclose(seen, smooth(jnp.arange(size), 0.3).probs(size), atol=0.02)


def test_flipped_labels_follow_their_matrix():
    n, size = 40_000, 5
    labels = jnp.arange(n, dtype=jnp.int16) % size
    matrix = RNG.dirichlet(np.ones(size), size)
    others = smooth(jnp.arange(size), 0.3, spread="others").probs(size)
    for given, expected in (({"matrix": matrix}, matrix), ({"flip_rate": 0.3}, others)):
        flip = functools.partial(noise.flip_labels, jax.random.key(1), num_classes=size, **given)
        drawn = jax.jit(flip)(labels)
        assert drawn.dtype == labels.dtype
        seen = np.array([jnp.bincount(drawn[labels == k], length=size) for k in range(size)]) / (n / size)
        np.testing.assert_allclose(seen, expected, atol=0.02)


def test_labels_that_name_no_class_stay():
    labels, key = jnp.array([-1, 255, -100], jnp.int32), jax.random.key(0)
    for given in ({"flip_rate": 0.99}, {"matrix": jnp.full((4, 4), 0.25)}):
        assert noise.flip_labels(key, labels, **given, num_classes=4).tolist() == labels.tolist()
    assert noise.disturb_labels(key, labels, 0.99, num_classes=4).tolist() == labels.tolist()
    full = jnp.full(100, 127, jnp.int8)
    assert 0 <= noise.flip_labels(key, full, 0.9, num_classes=128).min() < 127


@hypothesis.given(st.sampled_from([2, 7]), st.floats(0, 0.49), st.floats(-1, 0.9))
def test_optimal_smoothing_undoes_symmetric_noise(size, rate, clean):
    r = noise.optimal_smoothing(rate, size, clean=clean)
    if size == 2:
        np.testing.assert_allclose(r, (clean - 2 * rate) / (1 - 2 * rate), rtol=1e-3, atol=1e-3)
    flips = np.asarray(smooth(jnp.arange(size), rate, spread="others").probs(size), float)
    smoothed = np.asarray(smooth(jnp.arange(size), r).probs(size), float)
    np.testing.assert_allclose(flips @ smoothed, smooth(jnp.arange(size), clean).probs(size), atol=1e-4)


Z, ONES, KEY = jnp.zeros((3, 4)), jnp.ones(3, int), jax.random.key(0)
BAD = {
    "resample_rate: expected rates in": lambda: noise.forward_correction(Z, ONES, 1.0),
    "resample_rate: expected rates in .*-0.1": lambda: noise.backward_correction(Z, ONES, -0.1),
    "relaxation: expected rates in": lambda: noise.label_relaxation(Z, ONES, 1.5),
    r"relaxation: expected \(\) or \(3,\)": lambda: noise.label_relaxation(Z, ONES, jnp.full(4, 0.1)),
    r"matrix: expected \(4, 4\)": lambda: noise.forward_correction(Z, ONES, matrix=jnp.eye(5)),
    r"matrix: expected .*got float32 \(4, 3\)": lambda: noise.backward_correction(Z, ONES, matrix=jnp.ones((4, 3))),
    "matrix: expected rows that are": lambda: noise.forward_correction(Z, ONES, matrix=jnp.eye(4) + 0.1),
    r"resample_rate: expected \(\) or \(3,\)": lambda: noise.forward_correction(Z, ONES, jnp.eye(4)),
    "resample_rate, matrix: expected one of the two, got neither": lambda: noise.forward_correction(Z, ONES),
    "resample_rate, matrix: .*got both": lambda: noise.backward_correction(Z, ONES, 0.1, matrix=jnp.eye(4)),
    "flip_rate, matrix: .*got neither": lambda: noise.flip_labels(KEY, ONES, num_classes=4),
    r"labels: expected integers \(3,\)": lambda: noise.forward_correction(Z, jnp.ones(4, int), 0.1),
    r"labels: expected integers \(\*batch,\)": lambda: noise.bootstrap(Z, Z, 0.1),
    'kind: expected "soft" | "hard"': lambda: noise.bootstrap(Z, ONES, 0.1, kind="firm"),
    "matrix: expected rows .*distributions": lambda: noise.flip_labels(KEY, ONES, matrix=2 * jnp.eye(4), num_classes=4),
    "labels: expected integers .*got float32": lambda: noise.disturb_labels(KEY, Z, 0.1, num_classes=4),
    "^resample_rate: expected rates": lambda: noise.disturb_labels(KEY, ONES, 1.0, num_classes=4),
    r"resample_rate: expected \(\) or \(3,\), .* \(2,\)": lambda: noise.disturb_labels(
        KEY, ONES, jnp.full(2, 0.1), num_classes=4
    ),
    "num_classes: expected another class": lambda: noise.flip_labels(KEY, ONES, 0.1, num_classes=1),
    r"flip_rate: expected rates in \[0, 0.5\)": lambda: noise.optimal_smoothing(0.5, 2),
    "num_classes: expected at least 2": lambda: noise.optimal_smoothing(0.1, 1),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((AssertionError, ValueError, TypeError), match=message.replace("|", r"\|")):
        BAD[message]()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_labels_that_cannot_hold_all_classes_are_refused(dtype):
    """300 classes in int8 wrap to negative numbers."""
    size = {"int8": 300, "uint8": 300, "int16": 40_000}[dtype]
    labels = jnp.zeros(100, dtype)
    for call in (
        lambda: noise.flip_labels(jax.random.key(0), labels, 0.5, num_classes=size),
        lambda: noise.disturb_labels(jax.random.key(0), labels, 0.5, num_classes=size),
    ):
        with pytest.raises(ValueError, match=rf"labels: expected integers that hold {size} classes, got {dtype}: "):
            call()
    most = int(np.iinfo(dtype).max) + 1
    found = noise.flip_labels(jax.random.key(0), labels, 0.9, num_classes=most)
    assert found.dtype == dtype
    assert found.min() >= 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", [3, 10, 100])
def test_a_matrix_in_half_precision_is_taken(dtype, size):
    matrix = jnp.full((size, size), 1 / size, dtype)
    labels = noise.flip_labels(jax.random.key(0), jnp.zeros(5000, int), matrix=matrix, num_classes=size)
    assert abs(float((labels == 0).mean()) - 1 / size) < 0.03
    with pytest.raises(ValueError, match="matrix: expected rows that are distributions"):
        noise.flip_labels(jax.random.key(0), labels, matrix=1.1 * matrix, num_classes=size)


@pytest.mark.parametrize("clean", [2.0, jnp.nan, jnp.zeros(2), "none"])
def test_what_is_best_on_clean_labels_is_named(clean):
    with pytest.raises((AssertionError, TypeError, ValueError), match="clean: expected"):
        noise.optimal_smoothing(jnp.array([0.1, 0.2, 0.3]), 10, clean=clean)
