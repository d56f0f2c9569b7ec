"""The loss of a layer on eight devices: the numbers of one device in every layout, and little on the wire."""

import functools
import re
from collections import Counter

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ls import chunked_loss, linear_cross_entropy, smoothed_cross_entropy

N, D, K = 48, 6, 24
REAL = ("hidden", "kernel", "weights", "prior", "bias", "class_weights", "smoothing")
# Mesh axes that tokens and classes are split over.
LAYOUTS = {
    "tokens": ("data", None),
    "tokens over both": (("data", "model"), None),
    "classes": (None, "model"),
    "classes over both": (None, ("data", "model")),
    "tokens and classes": ("data", "model"),
}


def draw(size=K):
    """The last classes are padding, the weights of one device's tokens differ from those of another."""
    rng = np.random.default_rng(0)
    floats = {
        "hidden": rng.normal(size=(N, D)),
        "kernel": rng.normal(size=(D, size)),
        "weights": rng.integers(0, 3, N) * np.linspace(0.1, 3, N),
        "prior": rng.dirichlet(np.ones(size)),
        "bias": rng.normal(size=size),
        "class_weights": rng.uniform(0.5, 2, size),
        "smoothing": rng.uniform(-0.5, 1, N),
    }
    fixed = {"labels": rng.integers(0, size - 3, N), "class_where": np.arange(size) < size - 3}
    return {name: x.astype(np.float32) for name, x in floats.items()} | fixed


def specs(layout):
    tokens, classes = LAYOUTS[layout]
    of_tokens = dict.fromkeys(("hidden", "weights", "smoothing", "labels"), P(tokens))
    return (
        of_tokens
        | dict.fromkeys(("prior", "bias", "class_weights", "class_where"), P(classes))
        | {"kernel": P(None, classes)}
    )


def loss(real, fixed, **options):
    arrays = real | fixed
    hidden, kernel, labels = (arrays.pop(name) for name in ("hidden", "kernel", "labels"))
    return linear_cross_entropy(hidden, kernel, labels, **({"chunk_size": 4} | arrays | options))


def parted(arrays):
    """What is differentiated, and what is not."""
    return {name: x for name, x in arrays.items() if name in REAL}, {
        name: x for name, x in arrays.items() if name not in REAL
    }


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


@functools.cache
def on_one_device(size=K):
    return jax.jit(jax.value_and_grad(loss))(*parted(draw(size)))


def assert_same(actual, expected):
    value, slopes = actual
    np.testing.assert_allclose(value, expected[0], rtol=1e-5, atol=1e-6)
    for name, slope in expected[1].items():
        np.testing.assert_allclose(slopes[name], slope, rtol=1e-4, atol=1e-5, err_msg=name)


def test_one_device_by_the_definition():
    """What the layouts below are compared with is right."""
    exact = {name: x.astype(np.float64) if name in REAL else x for name, x in draw().items()}
    real, fixed = parted(exact)
    weights = real["weights"]

    def mean(**moved):
        arrays = exact | moved
        z = exact["hidden"] @ exact["kernel"] + arrays["bias"]
        options = {name: arrays[name] for name in ("prior", "class_where", "class_weights")}
        losses = reference.losses(z, fixed["labels"], arrays["smoothing"], where=weights != 0, **options)
        return np.sum(arrays["weights"] * losses) / np.sum(arrays["weights"])

    value, slopes = on_one_device()
    np.testing.assert_allclose(value, mean(), rtol=1e-5)
    for name in ("prior", "bias", "class_weights"):
        slope = reference.gradient(lambda x, name=name: mean(**{name: x}), exact[name])
        np.testing.assert_allclose(slopes[name], slope, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_jit(layout, kind):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        arrays = {name: jax.device_put(x, NamedSharding(mesh, specs(layout)[name])) for name, x in draw().items()}
        assert_same(jax.jit(jax.value_and_grad(loss))(*parted(arrays)), on_one_device())


@pytest.mark.parametrize("inside", [True, False], ids=["gradient inside", "gradient outside"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shard_map(layout, inside):
    tokens, classes = LAYOUTS[layout]
    where = parted(specs(layout))
    local = functools.partial(loss, class_axis_name=classes, batch_axis_name=tokens)
    if inside:
        f = jax.shard_map(
            jax.value_and_grad(local), mesh=mesh_of(AxisType.Auto), in_specs=where, out_specs=(P(), where[0])
        )
    else:
        f = jax.value_and_grad(jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=where, out_specs=P()))
    assert_same(jax.jit(f)(*parted(draw())), on_one_device())


def test_an_explicit_mesh_without_jit():
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        names = specs("tokens and classes")
        arrays = {name: jax.device_put(x, NamedSharding(mesh, names[name])) for name, x in draw().items()}
        assert_same(jax.value_and_grad(loss)(*parted(arrays)), on_one_device())


@pytest.mark.parametrize("layout", ["tokens", "tokens and classes"])
def test_loss_of_each_token(layout):
    """Not reduced on an explicit mesh: the losses lie as the tokens do."""
    mesh = mesh_of(AxisType.Explicit)
    weigh = cases.cotangent((N,)).astype(np.float32)

    def total(real, fixed, weigh):
        losses = loss(real, fixed, reduction="none")
        return jnp.sum(losses * weigh), losses

    f = jax.jit(jax.value_and_grad(total, has_aux=True))
    (value, losses), slopes = f(*parted(draw()), weigh)
    with jax.set_mesh(mesh):
        put = {name: jax.device_put(x, NamedSharding(mesh, specs(layout)[name])) for name, x in draw().items()}
        (split_value, split_losses), split = f(*parted(put), jax.device_put(weigh, NamedSharding(mesh, P("data"))))
    assert split_losses.sharding.spec == P("data")
    np.testing.assert_allclose(split_losses, losses, rtol=1e-5, atol=1e-5)
    assert_same((split_value, split), (value, slopes))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shard_map_without_options(layout):
    """Weights of 1 that are made here, and arrays that no one split."""
    tokens, classes = LAYOUTS[layout]
    names = ("hidden", "kernel", "labels")
    given = [draw()[name] for name in names]

    def plain(hidden, kernel, labels, **options):
        return linear_cross_entropy(hidden, kernel, labels, smoothing=0.1, **options)

    local = functools.partial(plain, class_axis_name=classes, batch_axis_name=tokens)
    where = tuple(specs(layout)[name] for name in names)
    f = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=where, out_specs=P())
    actual, expected = (jax.jit(jax.value_and_grad(g, (0, 1)))(*given) for g in (f, plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), actual, expected)


def test_what_a_loss_closes_over_is_differentiated_once_marked():
    """Else each chunk would sum its gradient over devices: that is refused, not done."""
    arrays = draw()
    given = arrays["hidden"], arrays["kernel"], arrays["labels"].astype(np.int32)

    def total(prior, marked):
        def local(hidden, kernel, labels, prior):
            prior = jax.lax.pcast(prior, ("data", "model"), to="varying") if marked else prior
            f = chunked_loss(
                lambda z, y: smoothed_cross_entropy(z, y, 0.1, prior=prior), batch_axis_name=("data", "model")
            )
            return f(hidden, kernel, labels)

        specs = P(("data", "model")), P(), P(("data", "model")), P()
        return jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=specs, out_specs=P())(*given, prior)

    def expected(prior):
        return linear_cross_entropy(*given, smoothing=0.1, prior=prior)

    slope = jax.jit(jax.grad(total), static_argnums=1)(arrays["prior"], True)
    np.testing.assert_allclose(slope, jax.grad(expected)(arrays["prior"]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(total(arrays["prior"], False), expected(arrays["prior"]), rtol=1e-5)
    with pytest.raises(TypeError, match=r"loss: .*pcast"):
        jax.grad(total)(arrays["prior"], False)


# On the wire.


def compiled(layout, how, classes=K, tokens=N):
    """The text of value and gradients, compiled for shapes and never run."""
    mesh = mesh_of(AxisType.Explicit if how == "explicit" else AxisType.Auto)
    sizes = {N: tokens, D: D, K: classes}
    shapes = {
        name: jax.ShapeDtypeStruct(
            [sizes[size] for size in x.shape],
            jax.dtypes.canonicalize_dtype(x.dtype),
            sharding=NamedSharding(mesh, specs(layout)[name]),
        )
        for name, x in draw().items()
    }
    f = loss
    if how == "shard_map":
        token_axis, class_axis = LAYOUTS[layout]
        local = functools.partial(loss, class_axis_name=class_axis, batch_axis_name=token_axis)
        f = jax.shard_map(local, mesh=mesh, in_specs=parted(specs(layout)), out_specs=P())
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(f)).lower(*parted(shapes)).compile().as_text()


def computations(text):
    """Of each computation of a program, its lines."""
    out, name = {}, None
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[1]
        out.setdefault(name, []).append(line)
    return out


def in_loops(parts):
    """Names of the computations that loops run, those that their bodies call included."""
    called = {name: set(re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", "\n".join(parts[name]))) for name in parts}
    todo = {name for lines in parts.values() for name in re.findall(r"body=%?([\w.\-]+)", "\n".join(lines))}
    seen = set()
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= called.get(name, set()) - seen
    return seen


def collectives(text):
    """(shapes on the wire in loops, shapes on the wire outside), counted."""
    parts = computations(text)
    loops = in_loops(parts)
    out = Counter(), Counter()
    words = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    for name, lines in parts.items():
        for line in lines:
            if found := re.search(rf"= (.*?) (?:{words})(?:-start)?\(", line):
                shapes = [
                    tuple(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\[([\d,]*)\]", found[1])
                ]
                out[name not in loops].update(shapes)
    return out


@pytest.mark.parametrize("how", ["auto", "explicit", "shard_map"])
def test_split_classes_put_tokens_on_the_wire_alone(how):
    """With four times the classes exactly the same shapes."""
    small, large = (collectives(compiled("classes", how, classes)) for classes in (K, 4 * K))
    assert small == large
    assert small[0]
    assert all(np.prod(shape) <= N * D for where in small for shape in where)


@pytest.mark.parametrize("how", ["explicit", "shard_map"])
@pytest.mark.parametrize("layout", ["tokens", "tokens over both", "tokens and classes"])
def test_split_tokens_sum_the_gradient_of_the_kernel_once(layout, how):
    """Outside the loop over chunks; in it nothing has the length of the classes."""
    local = K // 4 if LAYOUTS[layout][1] else K
    inside, outside = collectives(compiled(layout, how))
    assert all(local not in shape and K not in shape for shape in inside)
    assert sum(count for shape, count in outside.items() if sorted(shape) == sorted((D, local))) == 1
    assert all(np.prod(shape) <= D * max(N, local) for shape in outside)
