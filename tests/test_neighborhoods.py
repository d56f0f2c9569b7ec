"""Neighbours in sequences and images: ends, masks, volumes, what is held, and what meshes do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_priors as ref
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_ls import Sparse, cross_entropy, priors, smoothed_cross_entropy

RNG = np.random.default_rng(0)


def test_a_sequence_at_its_ends():
    u = priors.neighbors(jnp.array([0, 1, 2, 3])).probs(4)
    np.testing.assert_allclose(u[0], [0, 5 / 7, 2 / 7, 0], rtol=1e-6)
    np.testing.assert_allclose(u[1], [5 / 12, 0, 5 / 12, 2 / 12], rtol=1e-6)


@pytest.mark.parametrize("labels", [np.array([3]), np.zeros((2, 1), int)])
def test_a_step_without_neighbours_votes_for_itself(labels):
    np.testing.assert_array_equal(priors.neighbors(labels).probs(4), np.eye(4)[labels])


def test_padding_neither_votes_nor_is_looked_at():
    """Padding is often a label that is no class."""
    labels, kept = np.array([[0, 1, -100, -100], [2, -100, 1, 1]]), np.array([[1, 1, 0, 0], [1, 0, 1, 1]], bool)
    z = jnp.asarray(RNG.normal(size=(2, 4, 3)), "float32")
    u = priors.neighbors(labels, offsets=(-1, 1), weights=(1.0, 1.0), where=kept)
    expected = np.array([[1, 0, 0, 0], [2, 0, 1, 1]])
    np.testing.assert_array_equal(u.probs(3)[kept], np.eye(3)[expected[kept]])
    loss, pull = jax.vjp(lambda z: smoothed_cross_entropy(z, labels, 0.3, prior=u, where=kept), z)
    assert np.isfinite(loss).all()
    assert np.isfinite(pull(jnp.ones((2, 4)))[0]).all()
    np.testing.assert_array_equal(loss[~kept], 0)


def test_weights_of_zero_leave_a_step_alone():
    u = priors.neighbors(jnp.array([0, 1, 2]), offsets=(-1, 1), weights=(0.0, 1.0))
    np.testing.assert_array_equal(u.probs(3), np.eye(3)[[1, 2, 2]])
    slope = jax.grad(lambda w: priors.neighbors(jnp.array([0, 1, 2]), offsets=(-1, 1), weights=w).weights.sum())
    assert np.isfinite(slope(jnp.zeros(2))).all()


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_the_inside_of_a_region_is_one_hot(kernel_size):
    """And its border is not."""
    label_map = np.repeat(np.repeat(RNG.permutation(6).reshape(2, 3), 8, axis=0), 8, axis=1)
    q = np.asarray(priors.spatial(label_map, kernel_size=kernel_size).probs(6))
    reach = kernel_size // 2
    inside = np.zeros(label_map.shape, bool)
    for i, j in np.ndindex(label_map.shape):
        window = label_map[max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1]
        inside[i, j] = (window == label_map[i, j]).all()
    assert inside.any()
    np.testing.assert_allclose(q[inside], np.eye(6)[label_map[inside]], atol=1e-6)
    assert (q[~inside].max(axis=-1) < 0.999).all()


def test_volumes_and_batches():
    volume = RNG.integers(0, 4, (2, 3, 4, 2))
    q = priors.spatial(volume, ndim=3, sigma=0.9)
    assert q.indices.shape == (2, 3, 4, 2, 27)
    expected = np.stack([ref.spatial(one, 3, 0.9, 4) for one in volume])
    np.testing.assert_allclose(q.probs(4), expected, atol=1e-6)
    line = priors.spatial(volume[0, 0], ndim=1).probs(4)
    np.testing.assert_allclose(line[1], ref.spatial(volume[0, 0, 1], 3, 1.0, 4), atol=1e-6)


@pytest.mark.parametrize("sigma", [0.01, 1e4])
def test_any_width_is_a_distribution(sigma):
    label_map = RNG.integers(0, 4, (5, 6))
    q = np.asarray(priors.spatial(label_map, sigma=sigma).probs(4))
    np.testing.assert_allclose(q.sum(axis=-1), 1, rtol=1e-5)
    nearest = np.asarray(priors.spatial(label_map, sigma=0.05).probs(4))
    if sigma < 1:
        np.testing.assert_allclose(q, nearest, atol=1e-5)


def test_void_pixels_have_no_vote():
    label_map = np.full((6, 6), 255)
    label_map[1:4, 1:4], label_map[5, 5] = 1, 0
    q = np.asarray(priors.spatial(label_map, where=label_map != 255).probs(3))
    np.testing.assert_allclose(q[1:4, 1:4], np.broadcast_to([0, 1, 0], (3, 3, 3)), atol=1e-6)
    np.testing.assert_allclose(q[5, 5], [1, 0, 0], atol=1e-6)


@pytest.mark.memory
def test_nothing_of_the_size_of_the_logits_is_held():
    """Nine entries a pixel, whatever K is."""
    shape, classes = (64, 64), 400
    label_map, logits = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct((*shape, classes), jnp.float32)
    target = jax.eval_shape(priors.spatial, label_map)
    assert isinstance(target, Sparse)
    assert target.indices.shape == target.weights.shape == (*shape, 9)

    def loss(z, y):
        return cross_entropy(z, priors.spatial(y)).mean()

    memory = jax.jit(loss).lower(logits, label_map).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 0.25 * 4 * 64 * 64 * classes


@pytest.mark.parametrize("make", [priors.neighbors, priors.spatial])
def test_labels_split_over_an_explicit_mesh(make):
    labels = RNG.integers(0, 5, (8, 4, 6))
    z = jnp.asarray(RNG.normal(size=(8, 4, 6, 5)), "float32")
    expected = jax.jit(lambda z, y: cross_entropy(z, make(y)))(z, labels)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        over = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))
        loss = jax.jit(lambda z, y: cross_entropy(z, make(y)))(over(z), over(jnp.asarray(labels)))
        assert jax.typeof(loss).sharding.spec[0] == "data"
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


Y, MAP = np.zeros(4, int), np.zeros((4, 4), int)
MISTAKES = [
    (lambda: priors.neighbors(np.ones(4)), r"labels: expected integers .*float32 \(4,\)"),
    (lambda: priors.neighbors(np.array(1)), r"labels: expected integers \(\*batch, T\), got int32 \(\)"),
    (lambda: priors.neighbors(Y, offsets=(0.5,), weights=(1.0,)), r"offsets: expected an integer, got 0.5"),
    (lambda: priors.neighbors(Y, offsets=(1,)), r"weights: expected \(1,\), one number an offset, got float32 \(4,\)"),
    (lambda: priors.neighbors(Y, weights=(1, 1, -1, 1)), r"weights: .*got -1"),
    (lambda: priors.neighbors(Y, where=np.ones(5, bool)), r"where: .*got bool \(5,\)"),
    (lambda: priors.spatial(np.ones((4, 4))), r"label_map: expected integers .*float32 \(4, 4\)"),
    (lambda: priors.spatial(Y), r"label_map: expected integers with 2 axes of space, got int32 \(4,\)"),
    (lambda: priors.spatial(MAP, ndim=3), r"label_map: expected integers with 3 axes"),
    (lambda: priors.spatial(MAP, ndim=0), r"ndim: .*got 0"),
    (lambda: priors.spatial(MAP, kernel_size=4), r"kernel_size: expected an odd number, 3 or more, got 4"),
    (lambda: priors.spatial(MAP, kernel_size=1), r"kernel_size: .*got 1"),
    (lambda: priors.spatial(MAP, sigma=0), r"sigma: .*got 0"),
    (lambda: priors.spatial(MAP, where=np.ones((4, 4))), r"where: expected booleans \(4, 4\), got float32"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_bad_input_raises_at_once(mistake, message):
    with pytest.raises((AssertionError, TypeError, ValueError), match=message):
        mistake()
