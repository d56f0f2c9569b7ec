"""ε by what the model believes: each rule by its definition, as a constant for the logits, at next to no cost."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import reference_adaptive
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ls import adaptive, chunked_loss, smoothed_cross_entropy

RULES = sorted(reference_adaptive.RULES)
N, K = 5, 7
RNG = np.random.default_rng(0)
Z = RNG.normal(size=(N, K)).astype(np.float32)
Y = np.argmax(Z, axis=-1).astype(np.int32)
Y[3] = (Y[3] + 1) % K  # one that the model gets wrong
EACH = np.array([0.1, -0.5, 1.0, 0.3, 0.2], np.float32)
EXISTS = np.isin(np.arange(K), Y) | (np.arange(K) % 2 == 0)
EXISTS_EACH = (RNG.random((N, K)) < 0.5) | (np.arange(K) == Y[:, None])
WHERE = np.array([True, False, True, True, False])
GAMMA = np.array([0.0, 0.5, 1.0, 2.0, 3.0], np.float32)


@functools.partial(jax.jit, static_argnames=("name", "axis", "class_axis_name"))
def rule(logits, labels, smoothing, *, name, axis=-1, **options):
    arguments = (logits, smoothing) if name == "entropy" else (logits, labels, smoothing)
    return getattr(adaptive, name)(*arguments, axis=axis, **options)


def by_definition(name, z, y, epsilon, **options):
    return reference_adaptive.each(reference_adaptive.RULES[name], z, y, epsilon, **options)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("name", RULES)
def test_values(name, scale):
    z = scale * Z
    for options in ({}, {"class_where": EXISTS}, {"class_where": EXISTS_EACH, "where": WHERE}):
        expected = by_definition(name, z.astype(float), Y, EACH, **options)
        cases.assert_close(rule(z, Y, EACH, name=name, **options), expected, size=scale)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", RULES)
def test_dtypes(name, dtype):
    with cases.precision(dtype):
        z = jnp.asarray(Z, dtype)
        actual = rule(z, Y, 0.1, name=name)
        assert actual.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        cases.assert_close(actual, by_definition(name, np.asarray(z).astype(float), Y, 0.1), size=2)


@pytest.mark.parametrize("name", RULES)
def test_shapes_and_axes(name):
    cases.assert_close(rule(Z[0], Y[0], 0.1, name=name), by_definition(name, Z[0].astype(float), Y[0], 0.1))
    z = np.stack([Z, 2 * Z])
    y = np.stack([Y, Y])
    expected = by_definition(name, z.astype(float), y, 0.1, class_where=np.stack([EXISTS_EACH, EXISTS_EACH]))
    exists = np.moveaxis(np.stack([EXISTS_EACH, EXISTS_EACH]), -1, 1)
    cases.assert_close(rule(np.moveaxis(z, -1, 1), y, 0.1, name=name, axis=1, class_where=exists), expected)
    one_class = rule(np.zeros((2, 1), np.float32), np.zeros(2, np.int32), 0.1, name=name)
    cases.assert_close(one_class, np.full(2, 0.0 if name == "uncertainty" else 0.1))
    assert rule(np.zeros((0, K), np.float32), np.zeros(0, np.int32), 0.1, name=name).shape == (0,)


@pytest.mark.parametrize("offset", [1e6, -1e6])
@pytest.mark.parametrize("name", RULES)
def test_a_common_offset_changes_nothing(name, offset):
    z = np.round(8 * Z) / 8
    np.testing.assert_array_equal(rule(z + np.float32(offset), Y, 0.1, name=name), rule(z, Y, 0.1, name=name))


@pytest.mark.parametrize("name", RULES)
def test_logits_that_are_minus_infinity_have_no_belief(name):
    z = np.where(EXISTS, Z, -np.inf).astype(np.float32)
    # A class without logits still counts in log K; class_where is how to leave it out.
    scale = np.log(EXISTS.sum()) / np.log(K) if name == "entropy" else 1.0
    expected = by_definition(name, Z.astype(float), Y, 1.0, class_where=EXISTS)
    expected = 1 - (1 - expected) * scale if name == "entropy" else expected
    cases.assert_close(rule(z, Y, 1.0, name=name), expected)


@pytest.mark.parametrize("name", RULES)
def test_predictions_are_constants_and_parameters_are_not(name):
    slope = jax.jit(jax.grad(lambda z: jnp.sum(rule(z, Y, EACH, name=name))))(Z)
    np.testing.assert_array_equal(slope, np.zeros_like(Z))
    slope = jax.jit(jax.grad(lambda e: jnp.sum(rule(Z, Y, e, name=name))))(EACH)
    cases.assert_close(slope, by_definition(name, Z.astype(float), Y, np.ones(N)))


def test_gamma():
    f = jax.jit(lambda g: adaptive.confidence(Z, Y, 0.5, gamma=g))
    expected = by_definition("confidence", Z.astype(float), Y, 0.5, gamma=GAMMA.astype(float))
    cases.assert_close(f(GAMMA), expected)
    slope = reference.gradient(lambda g: by_definition("confidence", Z.astype(float), Y, 0.5, gamma=g).sum(), GAMMA)
    cases.assert_close(jax.jit(jax.grad(lambda g: jnp.sum(f(g))))(GAMMA), slope, size=2)
    # p_y = 0 is still 1 to the power of 0.
    impossible = jax.jit(adaptive.confidence)(np.array([[0.0, -np.inf]], np.float32), [1], 0.5, gamma=0.0)
    np.testing.assert_array_equal(impossible, [0.5])


@pytest.mark.parametrize("name", RULES)
def test_vmap_over_parameters(name):
    epsilons = jnp.array([0.0, 0.1, -1.0])
    expected = [rule(Z, Y, e, name=name) for e in epsilons]
    np.testing.assert_allclose(jax.vmap(lambda e: rule(Z, Y, e, name=name))(epsilons), expected, rtol=1e-6)
    if name == "confidence":
        expected = [rule(Z, Y, 0.1, name=name, gamma=g) for g in GAMMA]
        swept = jax.vmap(lambda g: rule(Z, Y, 0.1, name=name, gamma=g))(jnp.asarray(GAMMA))
        np.testing.assert_allclose(swept, expected, rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_the_loss_sees_a_constant(name):
    """Value, gradient and Hessian are those of the loss at the ε that the rule gives."""

    def loss(z, epsilon):
        return jnp.sum(smoothed_cross_entropy(z, Y, epsilon) * jnp.arange(1.0, N + 1))

    epsilon = by_definition(name, Z.astype(float), Y, EACH)
    value, slope = jax.jit(jax.value_and_grad(lambda z: loss(z, rule(z, Y, EACH, name=name))))(Z)
    weight = np.arange(1.0, N + 1)
    cases.assert_close(value, np.sum(weight * reference.losses(Z.astype(float), Y, epsilon)), size=50)
    expected = reference.gradient(lambda z: np.sum(weight * reference.losses(z, Y, epsilon)), Z)
    cases.assert_close(slope, expected, size=8)
    bent = jax.jit(jax.hessian(lambda z: loss(z, rule(z, Y, EACH, name=name))))(Z)
    fixed = jnp.asarray(epsilon, jnp.float32)
    np.testing.assert_allclose(bent, jax.jit(jax.hessian(lambda z: loss(z, fixed)))(Z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_bad_values_stay_with_their_own_example(name):
    z = np.where(WHERE[:, None], Z, np.nan)
    actual = rule(z, np.where(WHERE, Y, -100), EACH, name=name, where=WHERE)
    np.testing.assert_array_equal(actual, np.where(WHERE, rule(Z, Y, EACH, name=name), 0))
    lost = rule(z, np.where(WHERE, Y, K), EACH, name=name)
    np.testing.assert_array_equal(np.isnan(lost), ~WHERE)
    if name != "entropy":
        lost = rule(Z, np.where(WHERE, Y, -1), EACH, name=name)
        np.testing.assert_array_equal(np.isnan(lost), ~WHERE)


@pytest.mark.parametrize("name", RULES)
def test_ignored_labels_need_no_second_mask(name):
    labels = np.where(WHERE, Y, -100)

    def loss(z, y, **options):
        return jnp.sum(smoothed_cross_entropy(z, y, rule(z, y, 0.3, name=name), **options))

    value, slope = jax.jit(jax.value_and_grad(lambda z: loss(z, labels, ignore_index=-100)))(Z)
    expected, kept = jax.jit(jax.value_and_grad(lambda z: loss(z, Y[WHERE])))(Z[WHERE])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(slope[WHERE], kept, rtol=1e-6)
    np.testing.assert_array_equal(slope[~WHERE], 0)


@settings(max_examples=25)
@given(st.integers(0, 2**16), st.sampled_from([0.01, 1.0, 30.0]))
def test_laws(seed, scale):
    rng = np.random.default_rng(seed)
    z = (scale * rng.normal(size=(N, K))).astype(np.float32)
    y = rng.integers(0, K, N).astype(np.int32)
    found = {name: np.asarray(rule(z, y, 1.0, name=name)) for name in RULES}
    np.testing.assert_allclose(found["confidence"] + found["uncertainty"], 1, rtol=1e-6)
    assert all(np.all((x >= 0) & (x <= 1 + 1e-6)) for x in found.values())
    assert np.all(found["margin"] <= found["confidence"])
    order = rng.permutation(K)
    for name in RULES:
        moved = rule(z[:, order], np.argsort(order)[y].astype(np.int32), 1.0, name=name)
        np.testing.assert_allclose(moved, found[name], rtol=1e-4, atol=1e-6)


def test_uniform_beliefs_are_not_smoothed_by_entropy():
    np.testing.assert_array_equal(rule(np.zeros((1, K), np.float32), [0], 1.0, name="entropy"), [0])


@pytest.mark.parametrize("name", RULES)
def test_inside_chunked_loss(name):
    hidden = RNG.normal(size=(8, 3)).astype(np.float32)
    kernel = RNG.normal(size=(3, K)).astype(np.float32)
    labels = np.arange(8, dtype=np.int32) % K

    def losses(z, y):
        return smoothed_cross_entropy(z, y, rule(z, y, 0.4, name=name))

    chunked = chunked_loss(losses, chunk_size=3)
    both = [lambda h, w: chunked(h, w, labels), lambda h, w: jnp.mean(losses(h @ w, labels))]
    (value, slopes), (expected, whole) = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, kernel) for f in both)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), slopes, whole)


@pytest.mark.parametrize("name", RULES)
def test_classes_split_over_devices(name):
    """Inside shard_map, and on meshes that the compiler or the types look after."""
    rng = np.random.default_rng(5)
    z, exists = rng.normal(size=(8, 16)).astype(np.float32), np.arange(16) % 5 != 4
    y = np.array([0, 1, 3, 5, 7, 10, 13, 15], np.int32)
    specs = P("data", "model"), P("data"), P("model")

    def on_mesh(z, y, exists, **options):
        return rule(z, y, 0.5, name=name, class_where=exists, **options)

    expected = by_definition(name, z.astype(float), y, 0.5, class_where=exists)
    for mode in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(mode,) * 2)
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip((z, y, exists), specs, strict=True)]
        with jax.set_mesh(mesh):
            cases.assert_close(jax.jit(on_mesh)(*placed), expected)
            inside = functools.partial(on_mesh, class_axis_name="model")
            mapped = jax.shard_map(inside, in_specs=specs, out_specs=P("data"))
            cases.assert_close(jax.jit(mapped)(*placed), expected)


def compiled(name, step, dtype="float32"):
    def loss(z, y):
        return smoothed_cross_entropy(z, y, 0.1 if name is None else rule(z, y, 0.1, name=name)).mean()

    shapes = jax.ShapeDtypeStruct((256, 8000), dtype), jax.ShapeDtypeStruct((256,), jnp.int32)
    return jax.jit(step(loss)).lower(*shapes).compile()


@pytest.mark.memory
@pytest.mark.parametrize("step", [jax.value_and_grad, lambda loss: loss])
@pytest.mark.parametrize("name", RULES)
def test_no_temporaries_of_the_size_of_the_logits(name, step):
    assert compiled(name, step).memory_analysis().temp_size_in_bytes <= 0.02 * 4 * 256 * 8000


@pytest.mark.parametrize("name", RULES)
def test_the_exponentials_are_those_of_the_loss(name):
    plain, ours = (compiled(x, jax.value_and_grad).cost_analysis()["transcendentals"] for x in (None, name))
    more = 256 * 8000 if name == "entropy" else 0  # Σ p log p is one sum more
    assert plain <= ours <= plain + more + 10 * 256


BAD = [
    ("logits", {"logits": np.zeros((N, K), np.int32)}, r"int32 \(5, 7\)"),
    ("labels", {"labels": np.zeros(3, np.int32)}, r"int32 \(3,\)"),
    ("labels", {"labels": np.zeros((N, K), np.float32)}, r"float32 \(5, 7\)"),
    ("smoothing", {"smoothing": np.zeros(3, np.float32)}, r"float32 \(3,\)"),
    ("smoothing", {"smoothing": "much"}, "'much'"),
    ("where", {"where": np.ones(3, bool)}, r"bool \(3,\)"),
    ("class_where", {"class_where": np.ones(3, bool)}, r"bool \(3,\)"),
    ("axis", {"axis": 2}, "2"),
    ("gamma", {"gamma": -1.0}, "-1.0"),
    ("gamma", {"gamma": np.ones(3, np.float32)}, r"float32 \(3,\)"),
]


@pytest.mark.parametrize(("name", "bad", "got"), BAD)
def test_bad_input(name, bad, got):
    arguments = {"logits": Z, "labels": Y, "smoothing": 0.1} | bad
    for f in (adaptive.confidence, adaptive.uncertainty, adaptive.margin, adaptive.entropy):
        if name in f.__code__.co_varnames[: f.__code__.co_argcount + f.__code__.co_kwonlyargcount]:
            own = {key: x for key, x in arguments.items() if key != "labels" or f is not adaptive.entropy}
            with pytest.raises((AssertionError, TypeError, ValueError), match=rf"(?s){name}: expected .*{got}"):
                f(**own)
