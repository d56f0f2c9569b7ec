"""What a target is: q written out, its mass and its dot products, the algebra, and its life as a pytree."""

import dataclasses
import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ls import Dense, OneHot, Rows, Sparse, Target, Uniform, cross_entropy, smooth
from jax_ls.targets import as_target

SHAPES = [((), 2), ((2, 3), 13), ((0,), 5), ((3,), 1)]
HALVES_STAY_INSIDE = ["uniform", "dense", "restricted rows", "others of sparse", "others of dense", "weighted twice"]


@functools.partial(jax.jit, static_argnums=0)
def probs_mass_dot(name, arrays, values):
    target = cases.KINDS[name].target(arrays)
    return target.probs(values.shape[-1]), target.mass(), target.dot(values)


def made(name, batch, size, dtype="float32"):
    """The arrays that a target of this kind is made of, and q by the definition."""
    floats, fixed = cases.ingredients(batch, size)
    ours, exact = cases.rounded(floats, dtype)
    return ours | jax.tree.map(jnp.asarray, fixed), cases.written_out(cases.KINDS[name], exact | fixed, batch, size)


@pytest.mark.parametrize("name", cases.KINDS)
@pytest.mark.parametrize(("batch", "size"), SHAPES)
def test_probs_mass_and_dot_are_those_of_the_definition(name, batch, size):
    arrays, q = made(name, batch, size)
    values = np.random.default_rng(2).normal(size=q.shape).astype(np.float32)
    expected = q, q.sum(axis=-1), (q * values).sum(axis=-1)
    for x, y in zip(probs_mass_dot(name, arrays, values), expected, strict=True):
        assert x.dtype == jnp.float32
        cases.assert_close(jnp.broadcast_to(x, y.shape), y, size=4)


@pytest.mark.parametrize("name", cases.KINDS)
def test_dot_ignores_infinities_without_mass(name):
    arrays, q = made(name, (4,), 13)
    values = np.where(q == 0, -np.inf, np.arange(13.0)).astype(np.float32)
    expected = np.sum(np.where(q == 0, 0, q * np.arange(13.0)), axis=-1)
    cases.assert_close(probs_mass_dot(name, arrays, values)[2], expected, size=30)


@pytest.mark.parametrize("name", ["one-hot", "uniform over some", "dense", "rows", "sparse", "mixture"])
def test_dot_sees_an_infinity_with_mass(name):
    arrays, q = made(name, (4,), 13)
    values = np.where(q == q.max(axis=-1, keepdims=True), -np.inf, 1.0).astype(np.float32)
    np.testing.assert_array_equal(probs_mass_dot(name, arrays, values)[2], [-np.inf] * 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", HALVES_STAY_INSIDE)
def test_every_real_dtype_is_taken_and_kept_in_float32_or_wider(name, dtype):
    with cases.precision(dtype):
        arrays, q = made(name, (3,), 13, dtype)
        probs, _, _ = probs_mass_dot(name, arrays, jnp.zeros((3, 13)))
        assert probs.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
        cases.assert_close(jnp.broadcast_to(probs, q.shape), q, size=4)


@pytest.mark.parametrize("name", cases.KINDS)
def test_arrays_of_32_bits_in_64_bit_mode(name):
    """Numbers without a dtype are float64 there, and meet what is not."""
    with jax.enable_x64(True):
        arrays, q = made(name, (3,), 13, "float32")
        values = np.random.default_rng(2).normal(size=q.shape).astype(np.float32)
        for x, y in zip(probs_mass_dot(name, arrays, values), (q, q.sum(-1), (q * values).sum(-1)), strict=True):
            cases.assert_close(jnp.broadcast_to(x.astype(jnp.float32), y.shape), y, size=4)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64"])
def test_labels_of_any_integer_dtype(dtype):
    with cases.precision("float64" if dtype == "int64" else "float32"):
        labels = jnp.asarray([0, 100], dtype)
        values = jnp.arange(600.0).reshape(2, 300)
        for target in (OneHot(labels), Sparse(labels[:, None], jnp.ones((2, 1))), Rows(jnp.eye(300), labels)):
            dot, probs = jax.jit(lambda target: (target.dot(values), target.probs(300)))(target)
            np.testing.assert_array_equal(dot, [0, 400])
            np.testing.assert_array_equal(probs, np.eye(300)[[0, 100]])


@pytest.mark.parametrize(
    "build",
    [
        OneHot,
        lambda y: Rows(jnp.eye(5), y),
        lambda y: Sparse(y[:, None], jnp.ones((5, 1))),
        lambda y: smooth(y, 0.1),
        lambda y: smooth(y, 1.0, spread="others"),
        lambda y: 0.0 * OneHot(y) + Uniform(),
        lambda y: OneHot(y).weighted(jnp.ones(5)),
    ],
)
def test_a_label_of_no_class_is_nan_for_its_example_alone(build):
    def measures(labels):
        loss, pull = jax.vjp(lambda z: cross_entropy(z, build(labels)), jnp.zeros((5, 5)))
        return build(labels).probs(5), loss[:, None], pull(jnp.ones(5))[0]

    for x in jax.jit(measures)(jnp.array([0, -1, 5, 2**31 - 1, 4])):
        np.testing.assert_array_equal(np.isnan(x), np.broadcast_to([[False], [True], [True], [True], [False]], x.shape))


def test_an_index_of_no_class_is_harmless_without_weight():
    target = Sparse(jnp.array([[1, -1], [1, 7]]), jnp.array([[0.5, 0.0], [0.5, 0.1]]))
    np.testing.assert_array_equal(target.dot(jnp.ones((2, 5))), [0.5, np.nan])
    np.testing.assert_array_equal(target.probs(5)[:, 1], [0.5, np.nan])


@pytest.mark.parametrize("weight", [2, 0.5, np.float32(0.5), np.float64(2.0), np.array([1.0, 2.0]), True])
def test_weights_from_either_side(weight):
    target = OneHot(jnp.array([0, 2]))
    expected = np.asarray(weight, np.float32)[..., None] * np.eye(3)[[0, 2]]
    np.testing.assert_array_equal((weight * target).probs(3), expected)
    np.testing.assert_array_equal((target * weight).probs(3), expected)


@pytest.mark.parametrize(
    "mistake", [lambda q: q * q, lambda q: q + 1, lambda q: 1 + q, lambda q: q * "half", lambda q: q * (1 + 2j)]
)
def test_what_is_no_algebra_of_targets_raises(mistake):
    with pytest.raises(TypeError):
        mistake(OneHot(jnp.array([0])))


@pytest.mark.parametrize("name", cases.KINDS)
def test_targets_are_frozen_pytrees(name):
    arrays, q = made(name, (4,), 13)
    target = cases.KINDS[name].target(arrays)
    leaves, tree = jax.tree.flatten(target)
    again = jax.tree.unflatten(tree, [np.asarray(leaf) for leaf in leaves])
    cases.assert_close(jnp.broadcast_to(again.probs(13), q.shape), q, size=4)
    # Transformations put other things in place of arrays for a while: no constructor may look at them.
    assert jax.tree.structure(jax.eval_shape(lambda t: t, target)) == tree
    assert jax.tree.leaves(jax.tree.unflatten(tree, ["anything"] * len(leaves))) == ["anything"] * len(leaves)
    assert [path for path, _ in jax.tree.leaves_with_path(target)] == [p for p, _ in jax.tree.leaves_with_path(again)]
    for field in dataclasses.fields(target):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(target, field.name, None)


def test_as_target_takes_targets_integers_and_probabilities():
    target = Uniform()
    assert as_target(target) is target
    assert isinstance(as_target(jnp.array([1, 2], jnp.uint8)), OneHot)
    assert isinstance(as_target(np.array([0.5, 0.5], np.float16)), Dense)
    assert isinstance(as_target(3), OneHot)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Triangle(Target):
    """A target of a user's own: mass falls off linearly from the label."""

    labels: jax.Array

    def contract(self, values, axis):
        return axis.dot(self.probs_on(axis), values)

    def probs_on(self, axis):
        return jnp.maximum(3 - abs(jnp.arange(axis.size)[None] - self.labels[:, None]), 0) / 9


def test_a_target_of_a_users_own_goes_through_the_losses():
    labels, logits = jnp.array([2, 4]), jnp.arange(14.0).reshape(2, 7)
    q = np.maximum(3.0 - abs(np.arange(7) - np.array([[2], [4]])), 0) / 9
    mixed = 0.5 * Triangle(labels) + 0.5 * OneHot(labels)
    expected = -np.sum((q + np.eye(7)[[2, 4]]) / 2 * np.log(jax.nn.softmax(logits)), axis=-1)
    np.testing.assert_allclose(jax.jit(cross_entropy)(logits, mixed), expected, rtol=1e-5)
    masked = jax.jit(cross_entropy)(logits.at[1].set(jnp.nan), mixed, where=np.array([True, False]))
    np.testing.assert_allclose(masked, expected * [1, 0], rtol=1e-5)


def test_a_target_that_defines_nothing_says_what_is_missing():
    class Nothing(Target):
        pass

    with pytest.raises(TypeError, match=r"Nothing does not define contract"):
        Nothing().mass()
    with pytest.raises(TypeError, match=r"Nothing does not define probs_on"):
        Nothing().probs(3)
    with pytest.raises(TypeError, match=r"Nothing does not define probs_on"):
        smooth(jnp.array([0]), 0.1, prior=Nothing(), spread="others").probs(3)


def subclasses(cls):
    return {cls, *(sub for direct in cls.__subclasses__() for sub in subclasses(direct))}


@pytest.mark.parametrize("name", cases.KINDS)
def test_every_target_is_linear(name):
    """A target never looks at the values that it meets: q.dot(a v + b w) = a q.dot(v) + b q.dot(w)."""
    floats, fixed = cases.ingredients((4,), 9)
    arrays = {key: jnp.asarray(x, jnp.float32) for key, x in floats.items()}
    q = cases.KINDS[name].target(arrays | {key: jnp.asarray(x) for key, x in fixed.items()})
    v, w = np.random.default_rng(2).normal(size=(2, 4, 9)).astype(np.float32)
    np.testing.assert_allclose(q.dot(3 * v - 2 * w), 3 * q.dot(v) - 2 * q.dot(w), rtol=1e-5, atol=1e-5)


def test_the_table_of_targets_has_every_kind():
    def kinds(q):
        children = [x for x in vars(q).values() if isinstance(x, Target)]
        return {type(q), *(kind for child in children for kind in kinds(child))}

    floats, fixed = cases.ingredients((4,), 9)
    arrays = {key: jnp.asarray(x, jnp.float32) for key, x in floats.items()} | {
        key: jnp.asarray(x) for key, x in fixed.items()
    }
    seen = set().union(*(kinds(kind.target(arrays)) for kind in cases.KINDS.values()))
    ours = {kind for kind in subclasses(Target) if kind.__module__.startswith("jax_ls") and kind is not Target}
    assert ours <= seen, f"no case has {ours - seen}"


def test_differences_quotients_and_sums_of_targets():
    q, r = OneHot(jnp.array([1])), Uniform()
    written = np.array([[0, 1, 0]], np.float32), np.full((1, 3), 1 / 3, np.float32)
    np.testing.assert_allclose((q - r).probs(3), written[0] - written[1], rtol=1e-6)
    np.testing.assert_allclose((-q).probs(3), -written[0])
    np.testing.assert_allclose((q / 4).probs(3), written[0] / 4)
    np.testing.assert_allclose(sum([q, r]).probs(3), written[0] + written[1], rtol=1e-6)
