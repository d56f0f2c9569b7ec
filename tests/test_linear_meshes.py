"""An output layer whose kernel is split over the tokens' devices (FSDP), the classes' (tensor parallel), or both."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_linear_sharding import D, K, N, assert_same, draw, loss, mesh_of, on_one_device, parted

from jax_ls import Dense, Rows, Sparse, chunked_loss, linear_cross_entropy, smooth, smoothed_cross_entropy

# Spec of the tokens, and of the kernel (D, K).
LAYOUTS = {
    "D over data": ("data", P("data", None)),
    "K over data": ("data", P(None, "data")),
    "D over data, K over model": ("data", P("data", "model")),
    "K over model, then data": ("data", P(None, ("model", "data"))),
    "K over model, tokens over both": (("data", "model"), P(None, "model")),
    "D over data, K over model, tokens over both": (("data", "model"), P("data", "model")),
}
PLANS = {"tokens": {"plan": "tokens", "chunk_size": 4}, "classes": {"plan": "classes", "block_size": 5}}


# More classes than tokens, even in a part of the kernel: then the tokens are gathered and not the kernel.
MANY = 384
LAID = [(layout, name, K) for layout in LAYOUTS for name in PLANS]
LAID += [(layout, "tokens", MANY) for layout in LAYOUTS if "K over" in layout and "data" in str(LAYOUTS[layout][1])]


@pytest.fixture(params=PLANS)
def plan(request):
    return PLANS[request.param]


def specs(layout, names):
    """Of each array: tokens as the layout says, arrays over classes whole on every device."""
    tokens, kernel = LAYOUTS[layout]
    given = dict.fromkeys(("hidden", "weights", "smoothing", "labels"), P(tokens)) | {"kernel": kernel}
    return {name: given.get(name, P()) for name in names}


def put(mesh, layout, arrays):
    where = specs(layout, arrays)
    return {name: jax.device_put(x, NamedSharding(mesh, where[name])) for name, x in arrays.items()}


@pytest.mark.parametrize(("layout", "plan", "size"), LAID)
def test_an_explicit_mesh(layout, plan, size):
    """Read off the arrays; those over classes come whole and are split as the kernel is."""
    mesh = mesh_of(AxisType.Explicit)
    f = jax.jit(jax.value_and_grad(functools.partial(loss, **PLANS[plan])))
    with jax.set_mesh(mesh):
        actual = f(*parted(put(mesh, layout, draw(size))))
    assert actual[1]["kernel"].sharding.spec == LAYOUTS[layout][1]
    assert_same(actual, on_one_device(size))


@pytest.mark.parametrize(("layout", "plan", "size"), LAID)
def test_an_auto_mesh_with_the_layout_named(layout, plan, size):
    """The mesh in context, the specs as arguments; gradients lie as their arrays do."""
    mesh = mesh_of(AxisType.Auto)
    tokens, kernel = LAYOUTS[layout]
    f = functools.partial(loss, **PLANS[plan], hidden_spec=P(tokens, None), kernel_spec=kernel)
    with jax.set_mesh(mesh):
        arrays = put(mesh, layout, draw(size))
        where = {name: x.sharding for name, x in parted(arrays)[0].items()}
        step = jax.jit(jax.value_and_grad(f), out_shardings=(NamedSharding(mesh, P()), where))
        assert_same(step(*parted(arrays)), on_one_device(size))


@pytest.mark.parametrize(("layout", "plan", "size"), [row for row in LAID if "both" not in row[0]])
def test_inside_shard_map(layout, plan, size):
    """`kernel_spec` says what the caller's specs say; arrays over classes come as the device's slice of them."""
    tokens, kernel = LAYOUTS[layout]
    classes = "model" if "model" in str(kernel) else None
    options = {"kernel_spec": kernel, "class_axis_name": classes, "batch_axis_name": tokens}
    local = functools.partial(loss, **PLANS[plan], **options)
    where = specs(layout, draw()) | dict.fromkeys(("prior", "bias", "class_weights", "class_where"), P(classes))
    f = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=parted(where), out_specs=P())
    assert_same(jax.jit(jax.value_and_grad(f))(*parted(draw(size))), on_one_device(size))


TARGETS = {
    "labels, others": (lambda y, q: y, {"spread": "others", "smoothing": 0.2}),
    "sparse, parts": (lambda y, q: Sparse(jnp.stack([y, y + 1], -1), q[:, :2]), {"return_parts": True, "z_loss": 0.01}),
    "a prior by token's ε": (lambda y, q: smooth(y, q[:, 0], class_where=np.arange(MANY) < MANY - 9), {"softcap": 3.0}),
    "rows, which are not sent": (lambda y, q: Dense(q), {}),
    "none": (lambda y, q: y, {"reduction": "none", "smoothing": 0.1, "z_loss": 0.01}),
    "relative": (lambda y, q: y, {"relative": True, "smoothing": 0.1}),
}


@pytest.mark.parametrize("name", TARGETS)
def test_tokens_that_are_gathered_for_any_target(name):
    """Fewer tokens than classes, of which the tokens' axis holds parts: value, parts and gradients are those of one."""
    target, options = TARGETS[name]
    arrays = draw(MANY)
    rows = np.random.default_rng(1).dirichlet(np.ones(MANY), N).astype(np.float32)

    def f(hidden, kernel, labels, rows):
        out = linear_cross_entropy(hidden, kernel, target(labels, rows), chunk_size=4, plan="tokens", **options)
        out = out if isinstance(out, tuple) else (out,)
        return jnp.sum(out[0] * jnp.linspace(0.5, 2, out[0].size)), out

    step = jax.jit(jax.value_and_grad(f, (0, 1, 3), has_aux=True))
    given = [arrays["hidden"], arrays["kernel"], arrays["labels"], rows]
    expected = step(*given)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        where = P("data"), P(None, ("model", "data")), P("data"), P("data")
        actual = step(*(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(given, where, strict=True)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), actual, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tied_embeddings(reduction, plan):
    """(K, D), split over both axes."""
    names = ("hidden", "kernel", "labels")
    hidden, kernel, labels = (draw()[name] for name in names)
    weigh = np.linspace(0.5, 1.5, N).astype(np.float32)

    def f(hidden, kernel, labels, weigh):
        options = {"smoothing": 0.1, "transposed": True, "reduction": reduction} | plan
        losses = linear_cross_entropy(hidden, kernel, labels, **options)
        return jnp.sum(losses * weigh) if reduction == "none" else losses

    step = jax.jit(jax.value_and_grad(f, (0, 1)))
    expected = step(hidden, kernel.T, labels, weigh)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        at = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
        given = at(hidden, "data"), at(kernel.T, "model", "data"), at(labels, "data"), at(weigh, "data")
        actual = step(*given)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), actual, expected)


def test_hidden_states_with_a_sequence_axis(plan):
    """(B, T, D) with both batch axes split, FSDP over the first."""
    hidden, kernel, labels = (draw()[name] for name in ("hidden", "kernel", "labels"))
    hidden, labels = hidden.reshape(4, 12, D), labels.reshape(4, 12)

    def f(hidden, kernel, labels):
        return linear_cross_entropy(hidden, kernel, labels, smoothing=0.1, **plan)

    step = jax.jit(jax.value_and_grad(f, (0, 1)))
    expected = step(hidden, kernel, labels)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        at = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
        actual = step(at(hidden, "data", "model"), at(kernel, "data"), at(labels, "data", "model"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), actual, expected)


@pytest.mark.parametrize("split", [(), ("hidden", "labels"), ("kernel",)])
def test_operands_that_are_not_split_as_they_must_be(split, plan):
    """Labels, weights, priors, tables, masks, ε: replicated or split, they are laid as the layer is."""
    arrays = draw()
    arrays["table"] = np.random.default_rng(1).dirichlet(np.ones(K), K).astype(np.float32)

    def f(hidden, kernel, labels, table, bias, weights, smoothing):
        options = {"bias": bias, "weights": weights, "smoothing": smoothing, "class_where": jnp.arange(K) < K - 3}
        return linear_cross_entropy(hidden, kernel, labels, prior=Rows(table, labels), z_loss=0.01, **options, **plan)

    names = ("hidden", "kernel", "labels", "table", "bias", "weights", "smoothing")
    step = jax.jit(jax.value_and_grad(f, (0, 1, 3, 4, 5, 6)))
    expected = step(*(arrays[name] for name in names))
    specs = {"hidden": P("data", None), "kernel": P(None, "model"), "labels": P("data")}
    where = {name: specs[name] if name in split else P() for name in names}
    where["hidden"] = P("data", None) if not split else where["hidden"]
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        actual = step(*(jax.device_put(arrays[name], NamedSharding(mesh, where[name])) for name in names))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), actual, expected)


@pytest.mark.parametrize("how", ["shard_map", "explicit"])
def test_derivatives_in_numbers_that_all_tokens_share_with_classes_split(how, plan):
    hidden, kernel, labels = (draw()[name] for name in ("hidden", "kernel", "labels"))

    def f(epsilon, z_loss, **options):
        return linear_cross_entropy(hidden, kernel, labels, smoothing=epsilon, z_loss=z_loss, **plan, **options)

    given = jnp.float32(0.3), jnp.float32(0.01)
    expected = jax.grad(f, (0, 1))(*given)
    mesh = mesh_of(AxisType.Auto if how == "shard_map" else AxisType.Explicit)

    def split(epsilon, z_loss):
        def local(hidden, kernel, labels, epsilon, z_loss):
            options = {"smoothing": epsilon, "z_loss": z_loss} | plan
            if how == "shard_map":
                options |= {"class_axis_name": "model", "batch_axis_name": "data"}
            return linear_cross_entropy(hidden, kernel, labels, **options)

        where = P("data"), P(None, "model"), P("data"), P(), P()
        if how == "shard_map":
            return jax.shard_map(local, mesh=mesh, in_specs=where, out_specs=P())(
                hidden, kernel, labels, epsilon, z_loss
            )
        laid = [
            jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((hidden, kernel, labels), where, strict=False)
        ]
        return local(*laid, epsilon, z_loss)

    with jax.set_mesh(mesh):
        actual = jax.grad(split, (0, 1))(*given)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), actual, expected)


def test_any_loss_on_an_explicit_mesh():
    """Tokens split, kernel split over the tokens' axis, labels and weights whole, an array closed over."""
    arrays = draw()
    temperatures = np.linspace(1, 2, N).astype(np.float32)

    def f(hidden, kernel, labels, weights, temperatures):
        g = chunked_loss(lambda z, y, t: smoothed_cross_entropy(z / t[:, None], y, 0.1), chunk_size=4)
        return g(hidden, kernel, labels, temperatures, weights=weights)

    given = [arrays[name] for name in ("hidden", "kernel", "labels", "weights")] + [temperatures]
    step = jax.jit(jax.value_and_grad(f, (0, 1, 3, 4)))
    expected = step(*given)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        where = P("data"), P("data"), P(), P(), P("data")
        actual = step(*(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(given, where, strict=True)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), actual, expected)


# On the wire.


def compiled(layout, plan, explicit, accumulate=None, tokens=64):
    mesh = mesh_of(AxisType.Explicit if explicit else AxisType.Auto)
    axis, kernel = LAYOUTS[layout]
    shapes = [
        ((tokens, 16), "bfloat16", P(axis, None)),
        ((16, 4096), "bfloat16", kernel),
        ((tokens,), "int32", P(axis)),
    ]
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, s)) for shape, dtype, s in shapes]
    options = {} if explicit else {"hidden_spec": P(axis, None), "kernel_spec": kernel}

    def f(hidden, kernel, labels):
        sizes = {"tokens": {"chunk_size": 4}, "classes": {"block_size": 512}, "auto": {}}[plan]
        options.update(sizes, plan=plan, smoothing=0.1, accumulate=accumulate)
        return linear_cross_entropy(hidden, kernel, labels, **options)

    out = (NamedSharding(mesh, P()), (given[0].sharding, given[1].sharding))
    with jax.set_mesh(mesh):
        return jax.jit(jax.value_and_grad(f, (0, 1)), out_shardings=out).lower(*given).as_text()


def gathers(text):
    """How many numbers each gather returns."""
    shapes = re.findall(r"stablehlo.all_gather.*?-> tensor<([\dx]+)x\w+>", text, re.S)
    return [np.prod([int(size) for size in shape.split("x")]) for shape in shapes]


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("layout", ["D over data", "K over data", "D over data, K over model"])
def test_a_kernel_is_gathered_and_its_gradient_scattered_once(layout, explicit):
    """Token chunks: one gather of the kernel before the loop, one scatter of its gradient after it. Nothing else."""
    text = compiled(layout, "tokens", explicit, tokens=8192)
    assert gathers(text) == [16 * 4096 // (4 if "model" in layout else 1)]
    assert len(re.findall("stablehlo.reduce_scatter", text)) == 1


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("layout", ["K over data", "K over model, then data"])
@pytest.mark.parametrize("plan", ["tokens", "auto"])
def test_tokens_are_gathered_where_they_are_fewer_than_the_classes(layout, explicit, plan):
    """A chunk's hidden states, labels and weights; their gradients are scattered, and the kernel stays where it is."""
    text = compiled(layout, plan, explicit, tokens=64)
    chunk = 4 if plan == "tokens" else 8  # D/2
    assert max(gathers(text)) == 16 * chunk
    assert len(re.findall("stablehlo.reduce_scatter", text)) == 1


@pytest.mark.parametrize("layout", ["D over data", "K over data", "D over data, K over model"])
def test_class_blocks_never_hold_the_kernel(layout):
    """Each block is gathered in both sweeps, and its gradient scattered when it is finished."""
    text = compiled(layout, "classes", True)
    # One of each for TPU and for other platforms, before XLA chooses.
    assert max(gathers(text)) <= 16 * 512
    assert re.findall(r"stablehlo.reduce_scatter", text)


@pytest.mark.parametrize(("accumulate", "wire"), [(None, "bf16"), ("float32", "f32"), ("bfloat16", "bf16")])
@pytest.mark.parametrize("plan", ["tokens", "classes"])
def test_the_dtype_that_devices_add_gradients_in(accumulate, wire, plan):
    text = compiled("D over data", plan, True, accumulate)
    found = re.findall(r"stablehlo.reduce_scatter.*?\(tensor<[\dx]+x(\w+)>\) ->", text, re.S)
    assert set(found) == {wire}


# Refusals.

SPECS = {
    "D over an axis that does not split the tokens": (P("data", None), P("model", None), r"reshard\(kernel, .*'model'"),
    "D of hidden": (P("data", "model"), P(None, None), r"reshard\(hidden, "),
    "classes over the tokens' axis first": (P("data", None), P(None, ("data", "model")), r"\('model', 'data'\)"),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_layout_that_no_plan_serves_is_refused_with_its_remedy(name):
    hidden_spec, kernel_spec, word = SPECS[name]
    arrays = draw()
    hidden, kernel, labels = np.zeros((N, 8), np.float32), np.zeros((8, K), np.float32), arrays["labels"]
    with jax.set_mesh(mesh_of(AxisType.Auto)), pytest.raises(ValueError, match=word):
        linear_cross_entropy(hidden, kernel, labels, hidden_spec=hidden_spec, kernel_spec=kernel_spec)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        laid = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in ((hidden, hidden_spec), (kernel, kernel_spec))]
        with pytest.raises(ValueError, match=word):
            linear_cross_entropy(*laid, labels)


def test_other_refusals_on_a_mesh():
    hidden, kernel, labels = (draw()[name] for name in ("hidden", "kernel", "labels"))
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        with pytest.raises(ValueError, match=r"kernel_spec: .*no such axis"):
            linear_cross_entropy(hidden, kernel, labels, kernel_spec=P("no such axis"))
        with pytest.raises(ValueError, match="class_where"):
            linear_cross_entropy(hidden, kernel[:, :23], labels % 23, kernel_spec=P(None, "model"))
        with pytest.raises(ValueError, match=r"hidden: .*divides"):
            linear_cross_entropy(hidden[:3], kernel, labels[:3], hidden_spec=P("data"), kernel_spec=P(None, None))
        with pytest.raises(ValueError, match="class_axis_name"):
            linear_cross_entropy(hidden, kernel, labels, kernel_spec=P(None, "model"), class_axis_name="model")
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        laid = jax.device_put(kernel, NamedSharding(mesh, P(None, "model")))
        with pytest.raises(ValueError, match=r"kernel: .*reshard"):
            chunked_loss(smoothed_cross_entropy)(hidden, laid, labels)
