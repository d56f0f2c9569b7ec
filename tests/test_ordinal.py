"""Ordinal rows: their shapes and limits. Values and gradients are in test_priors.py."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference_priors as ref

from jax_ls import priors

TABLES = {
    "sord": lambda size: priors.sord(size),
    "sord squared": lambda size: priors.sord(size, phi="squared", beta=0.1),
    "gaussian": lambda size: priors.gaussian(size, sigma=2.0),
    "binomial": lambda size: priors.binomial(size),
    "geometric": lambda size: priors.geometric(size, alpha=0.3),
    "geometric, left": lambda size: priors.geometric(size, alpha=0.3, left=0.5),
    "triangular": lambda size: priors.triangular(size, alpha=0.3),
    "beta": lambda size: priors.beta(size),
    "poisson": lambda size: priors.poisson(size),
}


@pytest.mark.parametrize("size", [1, 2, 101])
@pytest.mark.parametrize("name", TABLES)
def test_rows_sum_to_1_and_have_one_peak(name, size):
    table = np.asarray(TABLES[name](size), float)
    assert table.shape == (size, size)
    np.testing.assert_allclose(table.sum(axis=-1), 1, rtol=1e-5)
    for y, row in enumerate(table):
        peak = row.argmax()
        assert (np.diff(row[: peak + 1]) >= 0).all()
        assert (np.diff(row[peak:]) <= 0).all()
        # The binomial's p runs from 0.1 to 0.9, so its peaks keep away from the ends.
        assert peak == y or (name == "binomial" and abs(peak - y) <= 0.1 * size)


@pytest.mark.parametrize("name", [name for name in TABLES if name != "poisson"])
def test_the_scale_may_be_read_from_either_end(name):
    table = np.asarray(TABLES[name](9))
    np.testing.assert_allclose(table, table[::-1, ::-1], rtol=1e-5)


@pytest.mark.parametrize("size", [2, 40])
def test_a_binomial_of_many_classes_is_that_of_the_definition(size):
    np.testing.assert_allclose(priors.binomial(size, margin=0.3), ref.binomial(size, 0.3), rtol=1e-4, atol=1e-12)


def test_limits():
    np.testing.assert_array_equal(priors.geometric(4, alpha=0.0), np.eye(4))
    np.testing.assert_allclose(priors.sord(4, beta=0.0), np.full((4, 4), 0.25), rtol=1e-6)
    np.testing.assert_allclose(priors.gaussian(4, sigma=0.05), np.eye(4), atol=1e-6)
    half = priors.binomial(3, margin=0.5)
    np.testing.assert_allclose(half, [[0.25, 0.5, 0.25]] * 3, rtol=1e-6)


def test_a_gaussian_is_sord_of_squares_and_ranks_have_no_origin():
    np.testing.assert_allclose(priors.gaussian(5, sigma=1.5), priors.sord(5, phi="squared", beta=1 / 4.5), rtol=1e-5)
    ages = jnp.array([18.0, 25.0, 40.0, 65.0])
    np.testing.assert_allclose(priors.sord(ages, beta=0.1), priors.sord(ages + 1000, beta=0.1), rtol=1e-4)
    np.testing.assert_allclose(priors.sord(np.arange(5)), priors.sord(5), rtol=1e-6)


def test_beta_has_the_published_rows():
    """dlordinal's, whose shapes for five classes are these whole numbers."""
    shapes = np.array([[1, 8], [6, 14], [12, 12], [14, 6], [8, 1]])
    published = [
        [0.83222783, 0.150976, 0.0161408, 0.0006528, 2.56e-6],
        [0.16306231, 0.67401521, 0.15985465, 0.00306715, 6.796952e-7],
        [0.00059739, 0.16304605, 0.67271312, 0.16304605, 0.00059739],
    ]
    np.testing.assert_allclose(priors.beta(5, shapes=shapes)[:3], published, rtol=2e-5)
    np.testing.assert_allclose(priors.beta(5)[::2][:2], np.array(published)[::2], rtol=0.02)


def test_triangular_rows_inside_the_scale_are_the_published_ones():
    np.testing.assert_allclose(priors.triangular(5, alpha=0.01)[2], [0, 0.01, 0.98, 0.01, 0], atol=1e-6)
    np.testing.assert_allclose(priors.triangular(5, alpha=0.01)[0], [0.99, 0.01, 0, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(priors.triangular(4, alpha=0.0), np.eye(4))


MISTAKES = [
    (lambda: priors.sord(0), r"ranks: expected a positive integer, got 0"),
    (lambda: priors.sord(2.5), r"ranks: expected a positive integer, got 2.5"),
    (lambda: priors.sord(np.ones((2, 2))), r"ranks: expected K, or real numbers \(K,\), got float32 \(2, 2\)"),
    (lambda: priors.sord(3, beta=-1), r"beta: .*got -1"),
    (lambda: priors.sord(3, phi="cubed"), r"phi: .*got 'cubed'"),
    (lambda: priors.sord(3, phi=lambda y, k: y), r"phi: expected distances \(3, 3\), got float32 \(3, 1\)"),
    (lambda: priors.gaussian(3, sigma=0.0), r"sigma: .*got 0.0"),
    (lambda: priors.binomial(3, margin=0.6), r"margin: .*got 0.6"),
    (lambda: priors.binomial(True), r"num_classes: .*got True"),
    (lambda: priors.geometric(3, alpha=1.0), r"alpha: .*got 1.0"),
    (lambda: priors.geometric(3, alpha="half"), r"alpha: .*got 'half'"),
    (lambda: priors.geometric(3, alpha=jnp.full(2, 0.1)), r"alpha: .*got float32 \(2,\)"),
    (lambda: priors.geometric(3, left=1.5), r"left: .*got 1.5"),
    (lambda: priors.triangular(3, alpha=0.5), r"alpha: .*got 0.5"),
    (lambda: priors.beta(3, shapes=np.zeros((3, 2))), r"shapes: .*got 0.0"),
    (lambda: priors.beta(3, shapes=np.ones((2, 2))), r"shapes: .*got float32 \(2, 2\)"),
    (lambda: priors.poisson(3, rates=np.array([1.0, 0.0, 2.0])), r"rates: .*got 0.0"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[message[:30] for _, message in MISTAKES])
def test_bad_input_raises_at_once(mistake, message):
    with pytest.raises((AssertionError, TypeError, ValueError), match=message):
        mistake()
