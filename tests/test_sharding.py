"""On eight devices, however batch and classes are split over them: the same numbers, and no logits are gathered."""

import functools
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ls import cross_entropy, kl_divergence, mean, smoothed_cross_entropy

N, K = 16, 64
WEIGHT = cases.cotangent((N,)).astype(np.float32)

# What the batch and the classes are split over, on a mesh of 2 × 4.
LAYOUTS = {
    "batch": ("data", None),
    "classes": (None, "model"),
    "batch and classes": ("data", "model"),
    "batch over both axes": (("data", "model"), None),
    "classes over both axes": (None, ("data", "model")),
}
WORDS = ["", "others", "prior others", "each", "class_where prior", "class_where_each others", "prior_each"]
WORDS += ["ignore_index where", "class_weights z_loss", "dense", "dense prior others"]
EVERYTHING = "each prior others class_where where class_weights z_loss"
KINDS = ["rows", "sparse", "weights by example", "weighted twice", "restricted rows", "others of sparse", "mixup"]


def mesh_of(mode):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(getattr(AxisType, mode),) * 2)


def spec(layout, x):
    """The batch axis has 16 entries and the class axis 64; of a table, the columns are the classes."""
    names = dict(zip((N, K), LAYOUTS[layout], strict=True))
    return P(None, names[K]) if x.shape == (K, K) else P(*(names.get(size) for size in x.shape))


def options_of(words):
    floats, fixed, static = cases.draw(cases.Case(words, (N,), K))
    floats, exact = cases.rounded(floats, "float32")

    def losses(floats, fixed, class_axis_name=None):
        arrays = floats | fixed
        return smoothed_cross_entropy(
            arrays["logits"],
            arrays["labels"],
            arrays["epsilon"],
            **{name: x for name, x in arrays.items() if name not in ("logits", "labels", "epsilon")},
            **static,
            class_axis_name=class_axis_name,
        )

    def by_definition(floats):
        arrays = floats | fixed | {name: x for name, x in static.items() if name != "axis"}
        return reference.losses(arrays.pop("logits"), **arrays)

    return losses, by_definition, floats, exact, fixed


def kind_of(name, loss=cross_entropy):
    floats, fixed = cases.ingredients((N,), K)
    floats["logits"] = np.random.default_rng(3).normal(size=(N, K))
    floats, exact = cases.rounded(floats, "float32")
    fixed = {key: x.astype(np.int32) if x.dtype == int else x for key, x in fixed.items()}

    def losses(floats, fixed, class_axis_name=None):
        return loss(floats["logits"], cases.KINDS[name].target(floats | fixed), class_axis_name=class_axis_name)

    def by_definition(floats):
        q = cases.written_out(cases.KINDS[name], floats | fixed, (N,), K)
        rows = zip(floats["logits"], q, strict=True)
        return np.array([reference.cross_entropy(z, row, relative=loss is kl_divergence) for z, row in rows])

    return losses, by_definition, floats, exact, fixed


@functools.cache
def problem(name):
    """A loss, its arrays, and its values and gradients by the definition."""
    if name == "kl_divergence":
        losses, by_definition, *arrays = kind_of("mixture", kl_divergence)
    else:
        losses, by_definition, *arrays = kind_of(name) if name in KINDS else options_of(name)
    floats, exact, fixed = arrays
    slopes = {
        "logits": WEIGHT[:, None]
        * reference.gradient_by_class(lambda z: by_definition(exact | {"logits": z}), exact["logits"])
    }
    for key in floats.keys() & {"epsilon", "prior", "class_weights"}:
        if np.size(exact[key]) <= K:
            slopes[key] = reference.gradient(
                lambda x, key=key: np.sum(WEIGHT * by_definition(exact | {key: x})), exact[key]
            )
    return losses, by_definition(exact), slopes, floats, jax.tree.map(jnp.asarray, fixed)


def check(values, gradients, name):
    _, expected, slopes, _, _ = problem(name)
    cases.assert_close(values, expected, size=8)
    for key, slope in slopes.items():
        cases.assert_close(gradients[key], slope, size=100)


# Auto lets the compiler choose and Explicit lets nothing pass unsaid; both meet every option, on one layout.
ON_MESHES = [("Auto", "batch and classes", name) for name in (*WORDS, "rows", "sparse", "kl_divergence")]
ON_MESHES += [("Explicit", "batch and classes", name) for name in (*WORDS, *KINDS, "kl_divergence")]
ON_MESHES += [(mode, layout, EVERYTHING) for mode in ("Auto", "Explicit") for layout in LAYOUTS]
ON_MESHES += [
    (mode, layout, "") for mode in ("Auto", "Explicit") for layout in LAYOUTS if layout != "batch and classes"
]


@pytest.mark.parametrize(("mode", "layout", "name"), ON_MESHES)
def test_meshes(mode, layout, name):
    losses, _, _, floats, fixed = problem(name)

    def total(floats, fixed, weight):
        values = losses(floats, fixed)
        return jnp.sum(values * weight), values

    mesh = mesh_of(mode)
    placed = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, spec(layout, x))), (floats, fixed, jnp.asarray(WEIGHT))
    )
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(total, has_aux=True)).lower(*placed).compile()
        (_, values), gradients = step(*placed)
    check(values, gradients, name)
    assert not re.findall(r"\S+ = \S+ all-gather", step.as_text())
    assert gradients["logits"].sharding.is_equivalent_to(placed[0]["logits"].sharding, 2)


def test_the_search_for_gathers_finds_them():
    mesh = mesh_of("Auto")
    x = jax.device_put(jnp.zeros((N, K)), NamedSharding(mesh, P("data", "model")))
    gathered = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P())).lower(x).compile()
    assert re.findall(r"\S+ = \S+ all-gather", gathered.as_text())


@pytest.mark.parametrize(
    ("layout", "name"),
    [("batch and classes", name) for name in (*WORDS, *KINDS, "kl_divergence", EVERYTHING)]
    + [("classes over both axes", name) for name in ("", EVERYTHING, "rows")],
)
def test_shard_map_with_the_gradient_inside_and_outside(layout, name):
    """Labels are global; priors, masks and weights over classes come as the local slice."""
    losses, _, _, floats, fixed = problem(name)
    batch, classes = LAYOUTS[layout]
    mesh = mesh_of("Auto")
    specs = jax.tree.map(functools.partial(spec, layout), (floats, fixed, WEIGHT))
    per_example = P(batch)

    def local_losses(floats, fixed, weight):
        values = losses(floats, fixed, class_axis_name=classes)
        return values, values * weight

    outside = jax.shard_map(local_losses, mesh=mesh, in_specs=specs, out_specs=(per_example,) * 2)

    def total(*arguments):
        values, weighted = outside(*arguments)
        return jnp.sum(weighted), values

    def local_gradient(floats, fixed, weight):
        def total(floats):
            values, weighted = local_losses(floats, fixed, weight)
            return N * mean(weighted, batch_axis_name=batch), values

        (_, values), gradients = jax.value_and_grad(total, has_aux=True)(floats)
        return values, gradients

    inside = jax.shard_map(local_gradient, mesh=mesh, in_specs=specs, out_specs=(per_example, specs[0]))

    @jax.jit
    def both(*arguments):
        (_, values), gradients = jax.value_and_grad(total, has_aux=True)(*arguments)
        return (values, gradients), inside(*arguments)

    placed = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), (floats, fixed, WEIGHT), specs)
    step = both.lower(*placed).compile()
    for values, gradients in step(*placed):
        check(values, gradients, name)
    assert not re.findall(r"\S+ = \S+ all-gather", step.as_text())


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_the_class_axis_may_be_first_and_the_logits_half_precision(mode):
    mesh = mesh_of(mode)
    floats, fixed, _ = cases.draw(cases.Case("", (N,), K))
    z = jnp.asarray(floats["logits"], jnp.bfloat16)
    exact = np.asarray(z).astype(float)
    z = jax.device_put(z.T, NamedSharding(mesh, P("model", "data")))
    labels = jax.device_put(fixed["labels"], NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        values = jax.jit(lambda z, y: smoothed_cross_entropy(z, y, 0.1, axis=0))(z, labels)
        slopes = jax.jit(jax.grad(lambda z, y: jnp.sum(smoothed_cross_entropy(z, y, 0.1, axis=0))))(z, labels)
    cases.assert_close(values, reference.losses(exact, fixed["labels"], 0.1), size=4)
    expected = reference.gradient_by_class(lambda z: reference.losses(z, fixed["labels"], 0.1), exact)
    cases.assert_close(slopes, expected.T, size=4)


@pytest.mark.parametrize("spread", ["all", "others"])
def test_labels_are_global_and_those_of_no_class_nan_on_every_device(spread):
    mesh = mesh_of("Auto")
    labels = jnp.array([0, K // 4, K - 1, K, -1, K + K // 4, 3, 3])
    over = jax.shard_map(
        lambda z, y: smoothed_cross_entropy(z, y, 0.1, spread=spread, class_axis_name="model"),
        mesh=mesh,
        in_specs=(P("data", "model"), P("data")),
        out_specs=P("data"),
    )
    expected = np.where((labels >= 0) & (labels < K), np.log(K), np.nan)
    np.testing.assert_allclose(jax.jit(over)(jnp.zeros((8, K)), labels), expected, rtol=1e-6)
