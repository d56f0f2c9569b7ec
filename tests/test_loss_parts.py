"""The reducing form of `smoothed_cross_entropy`, its parts, and the loss less the entropy of the target."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import PartitionSpec as P

import jax_ls
from jax_ls import LossParts, kl_divergence, smooth, smoothed_cross_entropy

RNG = np.random.default_rng(0)
N, K = 8, 6
LOGITS = 3 * RNG.normal(size=(N, K)).astype(np.float32)
LABELS = np.array([1, 0, 5, -100, 2, 3, -100, 4])
CLASS_WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0, 0.25, 3.0], np.float32)
DENSE = RNG.dirichlet(np.ones(K), N).astype(np.float32)
KEPT = LABELS != -100
Z, Y, W = jnp.asarray(LOGITS), jnp.asarray(LABELS), jnp.asarray(CLASS_WEIGHTS)

options = ("spread", "ignore_index", "relative", "reduction", "return_parts", "class_axis_name", "batch_axis_name")
loss_of = jax.jit(smoothed_cross_entropy, static_argnames=options)


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=3e-6, atol=3e-6)


def total_and_count(class_weights, where):
    """Σ of the losses that count, and Σ w_y over them: float64, one example at a time."""
    losses = reference.losses(
        LOGITS.astype(np.float64), LABELS, 0.1, where=where, ignore_index=-100, class_weights=class_weights
    )
    kept = KEPT if where is None else KEPT & where
    counts = np.ones(K) if class_weights is None else class_weights.astype(np.float64)
    return losses.sum(), counts[LABELS[kept]].sum(), np.count_nonzero(counts[LABELS[kept]])


@pytest.mark.parametrize("where", [None, RNG.random(N) < 0.6], ids=["all", "where"])
@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS], ids=["alike", "class weights"])
def test_a_mean_is_over_the_examples_that_count(class_weights, where):
    given = {"ignore_index": -100, "class_weights": class_weights, "where": where}
    total, count, not_zero = total_and_count(class_weights, where)
    given = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    close(loss_of(Z, Y, 0.1, reduction="mean", **given), total / count)
    close(loss_of(Z, Y, 0.1, reduction="sum", **given), total)
    close(loss_of(Z, Y, 0.1, reduction="sum_by_nonzero_weights", **given), total / not_zero)


def test_a_mean_over_probabilities_divides_by_their_number():
    rows = zip(LOGITS, 0.9 * DENSE + 0.1 / K, strict=True)
    losses = [reference.cross_entropy(z, q, class_weights=CLASS_WEIGHTS) for z, q in rows]
    close(loss_of(Z, jnp.asarray(DENSE), 0.1, class_weights=W, reduction="mean"), np.mean(losses))
    some = jnp.arange(N) < 3
    close(loss_of(Z, jnp.asarray(DENSE), 0.1, where=some, reduction="mean"), loss_of(Z[:3], DENSE[:3], 0.1).mean())


def test_examples_that_do_not_count_may_be_nan_and_nothing_has_the_mean_0():
    nan = Z.at[3].set(jnp.nan)
    mean = functools.partial(smoothed_cross_entropy, labels=Y, ignore_index=-100, reduction="mean", class_weights=W)
    value, slopes = jax.jit(jax.value_and_grad(mean))(nan)
    close(value, mean(Z))
    np.testing.assert_array_equal(slopes[~KEPT], 0)
    assert np.isfinite(slopes).all()
    for nothing in ({"where": jnp.zeros(N, bool)}, {"class_weights": jnp.zeros(K), "ignore_index": -100}):
        value, slopes = jax.value_and_grad(lambda z, given=nothing: loss_of(z, Y, reduction="mean", **given))(nan)
        assert value == 0
        np.testing.assert_array_equal(slopes, 0)


def test_a_label_that_names_no_class_makes_the_mean_nan():
    assert jnp.isnan(loss_of(Z, Y, 0.1, reduction="mean"))
    assert jnp.isnan(loss_of(Z, Y, 0.1, reduction="mean", class_weights=W))


RELATIVE = [
    {},
    {"spread": "others"},
    {"class_where": np.arange(K) != 2},
    {"class_where": np.arange(K) != 2, "spread": "others"},
    {"class_where": RNG.random((N, K)) < 0.5},
    {"prior": RNG.dirichlet(np.ones(K)).astype(np.float32)},
    {"prior": RNG.dirichlet(np.ones(K)).astype(np.float32), "spread": "others"},
    {"class_weights": np.abs(CLASS_WEIGHTS)},
]


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0, RNG.uniform(0, 1, N).astype(np.float32)])
@pytest.mark.parametrize("given", RELATIVE, ids=lambda given: "-".join(map(str, given)) or "uniform")
def test_relative_is_less_the_entropy_of_the_target(given, smoothing):
    labels = np.where(KEPT, LABELS, 0)
    given = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in given.items()}
    if "class_where" in given and given["class_where"].ndim == 2:
        given["class_where"] |= jax.nn.one_hot(labels, K, dtype=bool)
    else:
        labels = np.where(labels == 2, 1, labels)
    ours = loss_of(Z, jnp.asarray(labels), smoothing, relative=True, **given)
    expected = np.zeros(N)
    for i in range(N):
        exists = reference.pick(given.get("class_where"), i, 1)
        exists = None if exists is None else np.asarray(exists)
        epsilon = reference.pick(np.asarray(smoothing, np.float64), i)
        prior = None if "prior" not in given else np.asarray(given["prior"], np.float64)
        spread = given.get("spread", "all")
        q = reference.smooth(labels[i], epsilon, K, prior=prior, spread=spread, exists=exists)
        weights = None if "class_weights" not in given else np.asarray(given["class_weights"], np.float64)
        expected[i] = reference.cross_entropy(
            LOGITS[i].astype(np.float64), q, exists=exists, class_weights=weights, relative=True
        )
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_relative_has_the_gradient_of_the_loss_and_one_in_smoothing():
    labels = jnp.where(KEPT, Y, 0)

    def total(z, smoothing, relative):
        return loss_of(z, labels, smoothing, relative=relative, reduction="sum")

    np.testing.assert_allclose(jax.grad(total)(Z, 0.1, True), jax.grad(total)(Z, 0.1, False), rtol=1e-6)
    by_smoothing = jax.grad(total, argnums=1)
    expected = jax.grad(lambda e: kl_divergence(Z, smooth(labels, e)).sum())
    np.testing.assert_allclose(by_smoothing(Z, 0.1, True), expected(0.1), rtol=1e-5)
    assert jnp.isfinite(by_smoothing(Z, 0.0, True))


def test_one_class_has_no_entropy():
    for spread in ("all", "others"):
        one = loss_of(Z[:, :1], jnp.zeros(N, int), 0.3, spread=spread, relative=True)
        np.testing.assert_allclose(one, 0, atol=1e-6)


PARTS = [
    {},
    {"z_loss": 0.01, "ignore_index": -100},
    {"z_loss": 0.01, "ignore_index": -100, "class_weights": W, "relative": True},
    {"class_where": jnp.arange(K) != 2, "spread": "others", "relative": True},
]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("given", PARTS, ids=lambda given: "-".join(given) or "none")
def test_parts_are_what_the_loss_is_made_of(given, reduction):
    labels = Y if "ignore_index" in given else jnp.where(KEPT & (Y != 2), Y, 0)
    parts = loss_of(Z, labels, 0.1, return_parts=True, reduction=reduction, **given)
    assert isinstance(parts, LossParts)
    shared = {name: x for name, x in given.items() if name in ("ignore_index", "class_weights", "class_where")}
    close(parts.loss, loss_of(Z, labels, 0.1, reduction=reduction, **given))
    close(parts.unsmoothed, loss_of(Z, labels, 0.0, reduction=reduction, **shared))
    without = {name: x for name, x in given.items() if name != "z_loss"}
    close(parts.loss - parts.z_loss, loss_of(Z, labels, 0.1, reduction=reduction, **without))
    if reduction == "none":
        exists = given.get("class_where", jnp.ones(K, bool))
        lse = jax.nn.logsumexp(jnp.where(exists, Z, -jnp.inf), axis=-1)
        close(parts.lse, jnp.where(KEPT, lse, 0) if "ignore_index" in given else lse)
        close(parts.z_loss, given.get("z_loss", 0.0) * parts.lse**2)


def test_parts_have_derivatives_and_come_beside_them():
    def total(z):
        parts = loss_of(z, Y, 0.1, ignore_index=-100, reduction="mean", z_loss=0.01, return_parts=True)
        return parts.loss, parts

    (value, parts), slopes = jax.value_and_grad(total, has_aux=True)(Z)
    close(value, parts.loss)
    close(slopes, jax.grad(lambda z: total(z)[0])(Z))
    by_lse = jax.grad(lambda z: loss_of(z, Y, ignore_index=-100, return_parts=True).lse.sum())(Z)
    close(by_lse, np.where(KEPT[:, None], jax.nn.softmax(Z), 0))


@pytest.mark.parametrize(("rows", "classes"), [(4, 2), (8, 1), (2, 3)])
def test_split_over_devices(rows, classes):
    mesh = jax.make_mesh((rows, classes), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    given = {"ignore_index": -100, "z_loss": 0.01, "relative": True, "reduction": "mean", "return_parts": True}

    def local(z, y, w):
        return loss_of(z, y, 0.1, class_weights=w, class_axis_name="model", batch_axis_name="data", **given)

    split = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(P("data", "model"), P("data"), P("model")), out_specs=P())
    )
    jax.tree.map(close, split(Z, Y, W), loss_of(Z, Y, 0.1, class_weights=W, **given))


def test_words_of_reductions_are_checked():
    with pytest.raises(ValueError, match=r'reduction: expected "none" \| "sum" \| "mean"'):
        smoothed_cross_entropy(Z, Y, reduction="average")
    with pytest.raises(ValueError, match="batch_axis_name: expected a mesh axis"):
        smoothed_cross_entropy(Z, Y, reduction="mean", batch_axis_name="data")


def test_a_formula_of_the_same_options_is_compiled_once():
    jax.clear_caches()
    given = {"reduction": "mean", "return_parts": True}
    smoothed_cross_entropy(Z, Y, 0.1, **given)
    compiled = jax_ls.logits._evaluate._cache_size()
    smoothed_cross_entropy(Z, Y, 0.2, **given)
    assert jax_ls.logits._evaluate._cache_size() == compiled


@pytest.mark.parametrize("spread", ["all", "others"])
def test_the_slope_of_the_relative_loss_in_an_epsilon_of_0_is_that_of_kl_divergence(spread):
    """Minus infinity, for which −1e30 stands: it was finite where H(q) is taken from ε alone."""

    def relative(e):
        return smoothed_cross_entropy(Z[:1], Y[:1], e, spread=spread, relative=True).sum()

    def of_layer(e):
        return jax_ls.linear_cross_entropy(Z[:1], jnp.eye(K), Y[:1], smoothing=e, spread=spread, relative=True)

    expected = jax.grad(lambda e: kl_divergence(Z[:1], smooth(Y[:1], e, spread=spread)).sum())(0.0)
    assert expected < -1e29
    np.testing.assert_allclose([jax.grad(relative)(0.0), jax.grad(of_layer)(0.0)], expected, rtol=1e-5)
