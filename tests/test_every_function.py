"""One table: every public function × what every function promises. The rows are in `every_function.py`.

A new public name has no row, and the first test says so. A row leaves a cell out for a reason that it states, or for
want of anything to try: no mask, no real numbers.
"""

import contextlib
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from every_function import ALIASES, ELSEWHERE, ROWS, K, N
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_package import PUBLIC, named

import jax_ls

mpl.use("Agg")

CELLS = ("jit", "vmap", "grad", "mask", "bfloat16", "x64", "auto mesh", "explicit mesh", "compilations", "wrong")


def is_real(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


@functools.cache
def draw(name, seed=0, real="float32", whole="int32"):
    """The arrays of a row."""
    rng, arrays = np.random.default_rng(seed), {}
    for word, make in ROWS[name].make.items():
        x = make(rng)
        if not is_key(x):
            x = jnp.asarray(x, {"f": real, "i": whole, "b": "bool"}[np.asarray(x).dtype.kind])
        arrays[word] = x
    return arrays


def reals(name, cell):
    """The arguments of real numbers that a cell does not leave out."""
    row = ROWS[name]
    return [word for word, x in draw(name).items() if is_real(x) and f"{cell}:{word}" not in row.holes]


def nothing_to_try(name, cell):
    if cell == "mask":
        return "where" not in ROWS[name].make
    if cell == "grad":
        out = jax.eval_shape(ROWS[name], draw(name))
        return not reals(name, cell) or not any(is_real(x) for x in jax.tree.leaves(out))
    if cell == "bfloat16":
        return not reals(name, cell)
    return False


def each(cell):
    """The rows that do not leave a cell out."""
    names = [name for name, row in ROWS.items() if not {cell, ""} & set(row.holes) or cell == "compilations"]
    return pytest.mark.parametrize("name", names)


def numbers(out):
    return [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(out)]


def assert_same(actual, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(numbers(actual), numbers(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@functools.cache
def compiled(name):
    return jax.jit(ROWS[name])


@functools.cache
def result(name, seed=0):
    return compiled(name)(draw(name, seed))


def total(name, real, rest):
    """A number that every real number of the result is in, with a weight of its own; and the result."""
    out = ROWS[name](real | rest)
    leaves = [x for x in jax.tree.leaves(out) if is_real(x)]
    weights = [jnp.linspace(0.5, 1.5, x.size, dtype=x.dtype).reshape(x.shape) for x in leaves]
    return sum(jnp.sum(x * w) for x, w in zip(leaves, weights, strict=True)), out


def parted(name, cell, arrays):
    words = reals(name, cell)
    return {word: arrays[word] for word in words}, {word: x for word, x in arrays.items() if word not in words}


@functools.cache
def slopes(name, cell):
    """(real arrays, others) -> ((the number, the result), its gradients)."""
    return jax.jit(jax.value_and_grad(functools.partial(total, name), has_aux=True))


# The table.


def test_every_public_name_has_a_row():
    rows = {row.public for row in ROWS.values()} | set(ALIASES)
    assert not set(PUBLIC) - rows, "add a row to tests/every_function.py"
    assert not rows - set(PUBLIC)
    assert set(ALIASES.values()) <= set(ROWS)


@pytest.mark.parametrize("public", sorted({row.public for row in ROWS.values() if row.call is named(row.public)}))
def test_every_parameter_is_given(public):
    rows = [row for row in ROWS.values() if row.public == public]
    given = {word for row in rows for word in (*row.make, *row.options)}
    assert set(inspect.signature(named(public)).parameters) - set(ELSEWHERE) <= given


def test_a_hole_is_a_cell_or_an_argument_of_it_and_has_a_reason():
    for row in ROWS.values():
        for hole, reason in row.holes.items():
            cell, _, word = hole.partition(":")
            assert cell in (*CELLS, ""), f"{row.name}: {hole}"
            assert word in (*row.make, "", "zero", "dtype", "forward"), f"{row.name}: {hole}"
            assert len(reason) > 10, f"{row.name}: {hole}"


@each("jit")
def test_jit(name):
    assert_same(compiled(name)(draw(name)), ROWS[name](draw(name)))


@each("vmap")
def test_vmap(name):
    stacked = {word: jnp.stack([x, draw(name, 1)[word]]) for word, x in draw(name).items()}
    out = jax.jit(jax.vmap(ROWS[name]))(stacked)
    for seed in (0, 1):
        assert_same(jax.tree.map(lambda x: x[seed], out), result(name, seed))  # noqa: B023


@each("grad")
def test_grad(name):
    """Forward mode, reverse mode and a difference quotient agree; what is a constant by contract has no derivative."""
    if nothing_to_try(name, "grad"):
        return
    constant = ROWS[name].constant
    with jax.enable_x64(True):
        real, rest = parted(name, "grad", draw(name, 0, "float64"))
        rng = np.random.default_rng(9)
        v = {
            word: jnp.asarray(0.0 if word in constant else rng.normal(size=x.shape)) + 0 * x for word, x in real.items()
        }

        @jax.jit
        def derivatives(real, rest, v):
            f = lambda real: total(name, real, rest)[0]  # noqa: E731
            slopes = jax.grad(f)(real)
            pulled = sum(jnp.sum(slopes[word] * v[word]) for word in real)
            step = 1e-6
            ends = [f({word: x + sign * step * v[word] for word, x in real.items()}) for sign in (1, -1)]
            forward = jax.jvp(f, (real,), (v,))[1] if "grad:forward" not in ROWS[name].holes else pulled
            return slopes, forward, pulled, (ends[0] - ends[1]) / (2 * step)

        gradients, forward, reverse, quotient = derivatives(real, rest, v)
        np.testing.assert_allclose(forward, reverse, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(forward, quotient, rtol=1e-6, atol=1e-7)
        for word in constant & set(real):
            np.testing.assert_array_equal(gradients[word], 0, err_msg=word)


@each("mask")
def test_masked_rows_with_nan_in_every_argument(name):
    if nothing_to_try(name, "mask"):
        return
    arrays = draw(name)
    where = np.asarray(arrays["where"])

    def masked(x):
        """Which entries of an argument or result are of examples that do not count."""
        if x.shape[: where.ndim] == where.shape:
            return np.broadcast_to(~where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), x.shape)
        if x.ndim and x.shape[0] == N:
            return np.broadcast_to(~where.reshape(N, -1).any(-1).reshape(-1, *[1] * (x.ndim - 1)), x.shape)
        return np.zeros(x.shape, bool)

    def poisoned(word, x):
        if word == "where" or is_key(x) or x.dtype == bool:
            return x
        return jnp.where(masked(x), jnp.asarray(np.nan if is_real(x) else -100, x.dtype), x)

    f = slopes(name, "mask")
    (_, expected), clean = f(*parted(name, "mask", arrays))
    (_, actual), spoiled = f(*parted(name, "mask", {word: poisoned(word, x) for word, x in arrays.items()}))
    zero = "mask:zero" not in ROWS[name].holes
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        rows = masked(a)
        np.testing.assert_allclose(np.asarray(a)[~rows], np.asarray(b)[~rows], rtol=1e-5, atol=1e-6)
        assert not zero or not np.asarray(a)[rows].any()
    for word, slope in spoiled.items():
        np.testing.assert_allclose(slope, clean[word], rtol=1e-5, atol=1e-6, err_msg=word)
        assert not zero or not np.asarray(slope)[masked(slope)].any(), word


@each("bfloat16")
def test_bfloat16(name):
    """The digits of arguments in bfloat16 are lost, and no others: sums are in float32."""
    if nothing_to_try(name, "bfloat16"):
        return
    row = ROWS[name]
    words = reals(name, "bfloat16")
    narrow = {word: x.astype(jnp.bfloat16) if word in words else x for word, x in draw(name).items()}
    wide = {word: x.astype(jnp.float32) if word in words else x for word, x in narrow.items()}
    actual = compiled(name)(narrow)
    assert_same(actual, compiled(name)(wide), rtol=row.digits, atol=row.digits)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(actual) if is_real(x))


@each("x64")
def test_x64(name):
    with jax.enable_x64(True):
        out = jax.jit(ROWS[name])(draw(name, 0, "float64", "int64"))
        if "x64:dtype" not in ROWS[name].holes:
            assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(out) if is_real(x))
        # Labels of NumPy are int64, logits float32.
        jax.eval_shape(ROWS[name], draw(name, 0, "float32", "int64"))
        jax.eval_shape(ROWS[name], draw(name, 0, "float64", "int32"))
    assert_same(out, result(name), rtol=1e-4, atol=1e-5)


def mesh_of(kind):
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"), axis_types=(kind,) * 2)


def spec(x):
    """Examples and classes are split; of a table, the columns are the classes."""
    names = {N: "data", K: "model"}
    return P(None, "model") if x.shape == (K, K) else P(*(names.get(size) for size in x.shape))


def laid(mesh, arrays, split):
    """The arrays on a mesh, those in `split` split over it."""
    where = {word: NamedSharding(mesh, spec(x) if word in split else P()) for word, x in arrays.items()}
    return {word: x if is_key(x) else jax.device_put(x, where[word]) for word, x in arrays.items()}


@each("auto mesh")
def test_auto_mesh(name):
    # Arrays that are made under a mesh belong to it: what tests share is made before.
    mesh, arrays, expected = mesh_of(AxisType.Auto), draw(name), result(name)
    with jax.set_mesh(mesh):
        assert_same(compiled(name)(laid(mesh, arrays, arrays)), expected)


@each("explicit mesh")
def test_explicit_mesh(name):
    """All operands split, value and gradient. Then each one alone is split, and each one alone is whole."""
    arrays = draw(name)
    split = [word for word, x in arrays.items() if not is_key(x) and any(spec(x))]
    real = "grad" not in ROWS[name].holes and not nothing_to_try(name, "grad")
    mesh, plain_result = mesh_of(AxisType.Explicit), None if real else result(name)
    with jax.set_mesh(mesh):
        given = laid(mesh, arrays, split)
        if real:
            (_, actual), gradients = slopes(name, "grad")(*parted(name, "grad", given))
            (_, expected), plain = slopes(name, "grad")(*parted(name, "grad", arrays))
            assert_same(gradients, plain)
        else:
            actual, expected = compiled(name)(given), plain_result
        assert_same(actual, expected)
        for word in split if len(split) > 1 else ():
            for others in ({word}, set(split) - {word}):
                jax.eval_shape(ROWS[name], laid(mesh, arrays, others))
        # Gradients where half of the operands are split, and where the other half is.
        for others in (split[::2], split[1::2]) if real and len(split) > 1 else ():
            jax.eval_shape(slopes(name, "grad"), *parted(name, "grad", laid(mesh, arrays, others)))


# Compilations.

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations():
    """A list that gets an entry for each program that is compiled, or read from the persistent cache."""
    found = []

    def listen(event, duration, **_):
        if event == COMPILED:
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def assert_free(call):
    for seed in (0, 1):
        call(seed)
    with compilations() as found:
        call(2)
    plt.close("all")
    assert not found, f"{len(found)} programs were compiled at the third call"


def test_compilations_are_counted():
    with compilations() as found:
        jax.jit(lambda x: x + len(found))(jnp.zeros(3))
    assert found


@each("compilations")
def test_without_an_outer_jit_nothing_is_compiled_twice(name):
    for seed in (0, 1, 2):
        draw(name, seed)
    assert_free(lambda seed: ROWS[name](draw(name, seed)))


def test_a_gradient_is_compiled_once():
    f = jax.grad(lambda logits, arrays: jax_ls.mean(ROWS["smoothed_cross_entropy"](arrays | {"logits": logits})))
    for seed in (0, 1, 2):
        draw("smoothed_cross_entropy", seed)
    assert_free(lambda seed: f(draw("smoothed_cross_entropy", seed)["logits"], draw("smoothed_cross_entropy", seed)))


# Wrong shapes.


def wrong_shapes(name):
    """(argument, shape) that do not fit the others. The first argument says what fits: it can only lack its axes."""
    for place, (word, x) in enumerate(draw(name).items()):
        if is_key(x) or f"wrong:{word}" in ROWS[name].holes:
            continue
        if not x.ndim:
            yield word, (11,)
        elif place == 0:
            yield word, ()
        else:
            yield word, (*x.shape[:-1], 11)
            yield word, (*x.shape, 11)


@each("wrong")
def test_a_wrong_shape_is_named(name):
    told = []
    for word, shape in wrong_shapes(name):
        arrays = draw(name) | {word: jax.ShapeDtypeStruct(shape, draw(name)[word].dtype)}
        try:
            jax.eval_shape(ROWS[name], arrays)
        except (AssertionError, ValueError, TypeError) as error:
            if not re.match(rf"{word}: expected .*got", str(error).splitlines()[0]):
                told.append(f"{word} {shape}: {str(error).splitlines()[0]}")
        else:
            told.append(f"{word} {shape}: accepted")
    assert not told, "\n".join(told)
