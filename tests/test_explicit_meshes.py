"""Explicit meshes: functions outside the losses, with each operand split over the devices, and under `jax.vmap`."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ls import calibration, cross_entropy, noise, online, priors
from jax_ls.values import Support, categorical_projection, expected_value, hl_gauss, symlog, two_hot

N, K, B = 16, 6, 5
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
Y = (np.arange(N) % 5).astype(np.int32)
Z = RNG.normal(size=(N, K)).astype(np.float32)
T = np.linspace(-3, 3, N).astype(np.float32)
RATES = np.linspace(0, 0.9, N).astype(np.float32)
PROBS = RNG.dirichlet(np.ones(B), N).astype(np.float32)
BELLMAN = (0.9 * np.linspace(-2, 2, B) + RNG.normal(size=(N, 1))).astype(np.float32)
MATRIX = np.full((K, K), 1 / K, np.float32)


def support():
    return Support(-2, 2, B)


MEASURES = {
    name: getattr(calibration, name)
    for name in (
        "fit_temperature",
        "classwise_calibration_error",
        "expected_calibration_error",
        "area_under_risk_coverage",
        "brier_score",
        "negative_log_likelihood",
        "overconfidence",
    )
}
MEASURES |= {f"{name}, mass": functools.partial(MEASURES[name], binning="mass") for name in list(MEASURES)[1:3]}
CALLS = {
    "disturb_labels": (lambda y: noise.disturb_labels(KEY, y, 0.3, num_classes=K), Y),
    "disturb_labels, a rate each": (lambda y, r: noise.disturb_labels(KEY, y, r, num_classes=K), Y, RATES),
    "flip_labels": (lambda y, r: noise.flip_labels(KEY, y, r, num_classes=K), Y, RATES),
    "flip_labels, matrix": (lambda y: noise.flip_labels(KEY, y, matrix=MATRIX, num_classes=K), Y),
    "two_hot": (lambda t: two_hot(t, support()).probs(B), T),
    "two_hot, loss": (lambda t, z: cross_entropy(z[:, :B], two_hot(t, support())), T, Z),
    "categorical_projection": (lambda t, p: categorical_projection(t, p, support()).probs(B), BELLMAN, PROBS),
    "categorical_projection, atoms": (lambda p: categorical_projection(support().atoms, p, support()).probs(B), PROBS),
    "hl_gauss": (lambda t: hl_gauss(t, support()).probs(B), T),
    "hl_gauss, a width each": (lambda t, r: hl_gauss(t, support(), sigma_ratio=r + 0.1).probs(B), T, RATES),
    "expected_value": (lambda z: expected_value(z[:, :B], support()), Z),
    "symlog": (symlog, T),
    "spatial": (lambda y: priors.spatial(y.reshape(1, N)).probs(K), Y),
    "online": (lambda z, y: online.update(online.init(K), z, y).sums, Z, Y),
    **{name: (f, Z, Y) for name, f in MEASURES.items()},
    **{f"vmap of {name}": (jax.vmap(f), np.stack([Z, 2 * Z] * 2), np.stack([Y] * 4)) for name, f in MEASURES.items()},
}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"))


@pytest.mark.parametrize("name", CALLS)
def test_split_operands_give_the_same(name, mesh, request):
    """All split, and each one alone, compiled and not."""
    if name == "vmap of fit_temperature" and jax.__version_info__ < (0, 10, 2):
        request.applymarker(pytest.mark.xfail(reason="vmap of a while_loop over a split axis raises before jax 0.10.2"))
    f, *arrays = CALLS[name]
    expected = np.asarray(jax.jit(f)(*arrays))
    ways = [(True,) * len(arrays)]
    if len(arrays) > 1 and "vmap" not in name:
        ways += [tuple(i == j for j in range(len(arrays))) for i in range(len(arrays))]
    with jax.set_mesh(mesh):
        for way in ways:
            given = [
                jax.device_put(x, NamedSharding(mesh, P("data") if split else P()))
                for x, split in zip(arrays, way, strict=True)
            ]
            np.testing.assert_allclose(jax.jit(f)(*given), expected, rtol=1e-5, atol=1e-6, err_msg=str(way))
        np.testing.assert_allclose(f(*given), expected, rtol=1e-5, atol=1e-6)
