"""Every loss, value and gradient in all that is real, against the definition over the table of cases."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jax_ls import Sparse, cross_entropy, kl_divergence, sigmoid_cross_entropy, smooth, smoothed_cross_entropy


@functools.partial(jax.jit, static_argnames=("spread", "ignore_index", "axis"))
def smoothed(floats, fixed, weight, **static):
    """Losses, and the gradient of their weighted sum in every real array."""

    def total(floats):
        losses = smoothed_cross_entropy(smoothing=floats["epsilon"], **without(floats, "epsilon"), **fixed, **static)
        return jnp.sum(losses * weight.astype(losses.dtype)), losses

    (_, losses), gradients = jax.value_and_grad(total, has_aux=True)(floats)
    return losses, gradients


def without(arrays, name):
    return {key: x for key, x in arrays.items() if key != name}


def expected(floats, fixed, static, weight):
    """The same by the definition, classes last."""
    options = fixed | without(static, "axis")

    def losses(name, x):
        arrays = floats | {name: x} | options
        return reference.losses(arrays["logits"], **without(arrays, "logits"))

    def gradient(name):
        # Each example sees its own logits and soft labels alone; all else is shared.
        if name in ("logits", "labels"):
            slope = reference.gradient_by_class(functools.partial(losses, name), floats[name])
            return weight[..., None] * slope
        return reference.gradient(lambda x: np.sum(weight * losses(name, x)), floats[name])

    return losses("logits", floats["logits"]), {name: gradient(name) for name in floats}


def moved(arrays, case):
    """Arrays in the shape of the logits, with their classes where the case wants them. A prior keeps its own last."""
    shape = (*case.batch, case.num_classes)
    full = {name for name, x in arrays.items() if x.shape == shape and x.ndim > 1 and name != "prior"}
    return {name: jnp.moveaxis(x, -1, case.axis) if name in full else x for name, x in arrays.items()}


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_smoothed_cross_entropy_and_its_gradients(case):
    with cases.precision(case.dtype):
        weight = cases.cotangent(case.batch)
        for scale, epsilon in case.points:
            floats, fixed, static = cases.draw(case, scale, epsilon)
            ours, exact = cases.rounded(floats, case.dtype)
            ready = moved(jax.tree.map(jnp.asarray, fixed), case)
            losses, gradients = smoothed(moved(ours, case), ready, jnp.asarray(weight), **static)
            values, slopes = expected(exact, fixed, static, weight)
            assert losses.dtype == (jnp.float64 if case.dtype == "float64" else jnp.float32)
            cases.assert_close(losses, values, size=4 * scale + 4)
            for name, slope in moved(slopes, case).items():
                assert gradients[name].dtype == case.dtype
                cases.assert_close(gradients[name], slope, size=24 * scale + 24)


@functools.partial(jax.jit, static_argnames=("name", "loss"))
def of_kind(loss, name, logits, floats, fixed, weight):
    def total(logits, floats):
        losses = loss(logits, cases.KINDS[name].target(floats | fixed))
        return jnp.sum(losses * weight), losses

    (_, losses), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(logits, floats)
    return losses, gradients


def of_kind_by_definition(name, logits, floats, fixed, weight, relative):
    def losses(logits, floats):
        q = cases.written_out(cases.KINDS[name], floats | fixed, weight.shape, logits.shape[-1])
        rows = [reference.cross_entropy(logits[i], q[i], relative=relative) for i in np.ndindex(weight.shape)]
        return np.array(rows).reshape(weight.shape)

    slopes = {
        name: reference.gradient(lambda x, name=name: np.sum(weight * losses(logits, floats | {name: x})), floats[name])
        for name in floats
    }
    slope = reference.gradient_by_class(lambda z: losses(z, floats), logits)
    return losses(logits, floats), (weight[..., None] * slope, slopes)


# H(q) knows no negative q.
POSITIVE = cases.KINDS.keys() - {"weights by example", "restricted rows", "others of dense", "mixup"}


@pytest.mark.parametrize(
    ("name", "loss"), [(k, cross_entropy) for k in cases.KINDS] + [(k, kl_divergence) for k in sorted(POSITIVE)]
)
def test_losses_of_every_kind_of_target_and_their_gradients(name, loss):
    batch, size = (2, 3), 7
    floats, fixed = cases.ingredients(batch, size)
    floats["logits"] = np.random.default_rng(3).normal(size=(*batch, size))
    ours, exact = cases.rounded(floats, "float32")
    weight = cases.cotangent(batch)
    ready = jax.tree.map(jnp.asarray, fixed)
    losses, gradients = of_kind(loss, name, ours.pop("logits"), ours, ready, jnp.asarray(weight))
    values, slopes = of_kind_by_definition(name, exact.pop("logits"), exact, fixed, weight, loss is kl_divergence)
    cases.assert_close(losses, values, size=4)
    cases.assert_close(gradients[0], slopes[0], size=4)
    for key, slope in slopes[1].items():
        cases.assert_close(gradients[1][key], slope, size=20)


@pytest.mark.parametrize("loss", [cross_entropy, kl_divergence])
@pytest.mark.parametrize("axis", [0, 1, -2, 2])
def test_classes_may_be_on_any_axis_of_logits_target_and_class_where(loss, axis):
    case = cases.Case("dense class_where_each class_weights where", axis=axis)
    floats, fixed, _ = cases.draw(case)
    ours, exact = cases.rounded(floats, "float32")
    arrays = moved({"z": ours["logits"], "q": ours["labels"], "class_where": jnp.asarray(fixed["class_where"])}, case)
    options = {"where": fixed["where"], "class_weights": ours["class_weights"], "z_loss": 0.1, "axis": axis}

    @jax.jit
    def of_dense(z, q, class_where):
        return loss(z, q, class_where=class_where, **options)

    expected = np.zeros(case.batch)
    for i in zip(*np.nonzero(fixed["where"]), strict=True):
        rest = {"class_weights": exact["class_weights"], "z_loss": 0.1, "relative": loss is kl_divergence}
        expected[i] = reference.cross_entropy(
            exact["logits"][i], exact["labels"][i], exists=fixed["class_where"][i], **rest
        )
    cases.assert_close(of_dense(**arrays), expected, size=4)
    labels = np.argmax(exact["labels"], axis=-1)
    hard = reference.losses(exact["logits"], labels, 0.0)
    cases.assert_close(jax.jit(functools.partial(loss, axis=axis))(arrays["z"], labels), hard, size=4)


def test_a_perfect_model_has_no_divergence_and_no_gradient():
    @jax.jit
    def perfect(labels):
        target = smooth(labels, 0.2, spread="others")
        loss, pull = jax.vjp(lambda z: kl_divergence(z, target), jnp.log(target.probs(5)))
        return loss, pull(jnp.ones(2))[0]

    for x in perfect(jnp.array([0, 3])):
        np.testing.assert_allclose(x, 0, atol=5e-7)


@pytest.mark.parametrize("spread", ["all", "others"])
def test_the_slope_of_a_divergence_in_an_epsilon_of_0_is_infinite(spread):
    """−1e30 stands for −∞. Classes that never get mass add nothing, at 0 and elsewhere."""
    z = np.array([1.0, 0.5, 0.0, 2.0], np.float32)
    zeros = np.array([0.25, 0.75, 0, 0], np.float32)

    @jax.jit
    def slopes(epsilon, prior):
        f = lambda e: kl_divergence(z, smooth(jnp.int32(0), e, prior=prior, spread=spread))  # noqa: E731
        return jax.grad(f)(epsilon), jax.jvp(f, (epsilon,), (jnp.float32(1),))[1]

    for prior in (None, zeros):
        assert max(slopes(jnp.float32(0), prior)) < -1e28
    # All of the prior on the label: no class gets mass from ε, or the others share it equally.
    sure = slopes(jnp.float32(0), np.eye(4, dtype=np.float32)[0])
    np.testing.assert_array_equal(np.array(sure) < -1e28, spread == "others")
    exact, z = zeros.astype(np.float64), z.astype(np.float64)
    step = 1e-6
    ends = [
        reference.cross_entropy(z, reference.smooth(0, 0.3 + d, 4, prior=exact, spread=spread), relative=True)
        for d in (step, -step)
    ]
    np.testing.assert_allclose(slopes(jnp.float32(0.3), zeros), (ends[0] - ends[1]).real / (2 * step), rtol=1e-5)


def test_a_divergence_counts_class_weights_and_classes_that_exist():
    floats, fixed, _ = cases.draw(cases.Case("class_where class_weights prior"))
    ours, exact = cases.rounded(floats, "float32")
    where, y = fixed["class_where"], fixed["labels"]

    @jax.jit
    def divergence(z, prior, weights):
        target = smooth(y, 0.3, prior=prior, class_where=where)
        return kl_divergence(z, target, class_where=where, class_weights=weights, z_loss=0.1)

    options = {"exists": where, "class_weights": exact["class_weights"], "z_loss": 0.1, "relative": True}
    rows = [
        reference.cross_entropy(
            exact["logits"][i], reference.smooth(y[i], 0.3, 13, prior=exact["prior"], exists=where), **options
        )
        for i in np.ndindex(y.shape)
    ]
    actual = divergence(ours["logits"], ours["prior"], ours["class_weights"])
    cases.assert_close(actual, np.reshape(rows, y.shape), size=4)


@jax.jit
def binary(floats, weight):
    def total(floats):
        losses = sigmoid_cross_entropy(floats["z"], floats["y"], floats["epsilon"], prior=floats["prior"])
        return jnp.sum(losses * weight.astype(losses.dtype)), losses

    (_, losses), gradients = jax.value_and_grad(total, has_aux=True)(floats)
    return losses, gradients


@pytest.mark.parametrize(
    ("batch", "dtype", "shared"),
    [(batch, "float32", shared) for batch in cases.BATCHES for shared in (True, False)]
    + [((6,), dtype, False) for dtype in cases.DTYPES if dtype != "float32"],
)
def test_sigmoid_cross_entropy_and_its_gradients(batch, dtype, shared):
    rng = np.random.default_rng(4)
    weight = cases.cotangent(batch)
    for scale in cases.SCALES:
        floats = {"z": scale * rng.normal(size=batch), "y": rng.uniform(size=batch)}
        floats["epsilon"] = rng.uniform(-0.5, 1, () if shared else batch)
        floats["prior"] = rng.uniform(size=() if shared else batch)
        with cases.precision(dtype):
            ours, exact = cases.rounded(floats, dtype)
            losses, gradients = binary(ours, jnp.asarray(weight))

            def by_definition(name, x, exact=exact):
                arrays = exact | {name: x}
                return reference.sigmoid_cross_entropy(*(arrays[n] for n in ("z", "y", "epsilon", "prior")))

            assert losses.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
            cases.assert_close(losses, by_definition("z", exact["z"]), 4 * scale)
            for name, x in exact.items():
                slope = reference.gradient(lambda x, name=name: np.sum(weight * by_definition(name, x)), x)
                cases.assert_close(gradients[name], slope, 24 * scale)


def test_integer_and_boolean_labels_are_zeros_and_ones():
    z = jnp.array([3.0, -2.0, 0.5])
    expected = reference.sigmoid_cross_entropy(np.asarray(z, np.float64), np.array([1, 0, 1]), 0.2, 0.5)
    for labels in (jnp.array([1, 0, 1]), jnp.array([1, 0, 1], jnp.uint8), jnp.array([True, False, True])):
        cases.assert_close(jax.jit(sigmoid_cross_entropy)(z, labels, 0.2), expected)


def test_confident_and_infinite_logits_of_a_sigmoid():
    both = jax.jit(jax.vmap(jax.value_and_grad(sigmoid_cross_entropy)))
    z = jnp.array([1e4, -1e4, jnp.inf, -jnp.inf])
    for x in both(z, jnp.array([1.0, 0.0, 1.0, 0.0])):
        np.testing.assert_array_equal(x, 0)
    loss, slope = both(z, jnp.array([0.0, 1.0, 0.0, 1.0]))
    np.testing.assert_array_equal(loss, [1e4, 1e4, jnp.inf, jnp.inf])
    np.testing.assert_array_equal(slope, [1, -1, 1, -1])


@pytest.mark.parametrize("spread", ["all", "others"])
@pytest.mark.parametrize("labels", ["hard", "dense", "sparse"])
def test_arrays_of_32_bits_keep_them_where_64_are_on(labels, spread):
    with jax.enable_x64(True):
        y, z = jnp.array([0, 2, 1], jnp.int32), jnp.eye(3, dtype=jnp.float32)
        q = {"hard": y, "dense": z, "sparse": Sparse(y[:, None], jnp.ones((3, 1), jnp.float32))}[labels]
        for epsilon in (0.1, jnp.full(3, 0.1, jnp.float32)):
            for prior in (None, jnp.full(3, 1 / 3, jnp.float32)):
                losses = smoothed_cross_entropy(z, q, epsilon, prior=prior, spread=spread)
                assert losses.dtype == jnp.float32
