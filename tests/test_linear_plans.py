"""The two plans of an output layer: what both serve, which one is chosen, narrow dtypes, compilations, bad input."""

import functools
from dataclasses import dataclass

import cases
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ls import Dense, OneHot, Rows, Target, chunked_loss, linear_cross_entropy, mean, smoothed_cross_entropy
from jax_ls.linear.plan import chosen

N, D, K = 7, 4, 13
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(D, K)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, K, N))
BIAS = jnp.asarray(RNG.normal(size=K), jnp.float32)
PLANS = {"tokens": {"plan": "tokens", "chunk_size": 3}, "classes": {"plan": "classes", "block_size": 5}}


@pytest.fixture(params=PLANS)
def plan(request):
    return PLANS[request.param]


def close(actual, expected, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), actual, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_tokens_that_do_not_count(plan, reduction):
    """As weights of 0, whatever stands in them: a mean divides by the tokens that are left."""
    kept = jnp.asarray([True, True, False, True, False, True, True])
    odd = HIDDEN.at[2].set(jnp.nan), KERNEL, LABELS.at[2].set(-100).at[4].set(-100)
    weigh = cases.cotangent((N,)).astype(np.float32)

    def ours(hidden, kernel, labels, **options):
        options |= plan | {"smoothing": 0.1, "reduction": reduction}
        losses = linear_cross_entropy(hidden, kernel, labels, **options)
        return jnp.sum(losses * weigh) if reduction == "none" else losses

    def expected(hidden, kernel, weights=1.0):
        losses = smoothed_cross_entropy(jnp.where(kept[:, None], hidden, 0) @ kernel, LABELS, 0.1)
        weights = kept.astype(jnp.float32) * weights
        return {"mean": mean(losses, weights), "sum": jnp.sum(losses * weights)}.get(
            reduction, jnp.sum(losses * weights * weigh)
        )

    want = jax.value_and_grad(expected, (0, 1))(HIDDEN, KERNEL)
    gradient = jax.value_and_grad(ours, (0, 1))
    close(gradient(*odd, where=kept), want)
    close(gradient(*odd, ignore_index=-100, where=kept | (jnp.arange(N) == 4)), want)
    weights = jnp.linspace(0.5, 2, N)
    want = jax.value_and_grad(expected, (0, 1))(HIDDEN, KERNEL, weights)
    close(gradient(*odd, where=kept, weights=weights), want)
    value, slopes = gradient(*odd, where=jnp.zeros(N, bool))
    assert value == 0
    assert not any(np.any(slope) for slope in slopes)


def test_a_common_offset_of_a_million_changes_nothing(plan):
    def loss(offset):
        kernel = jnp.round(4 * KERNEL) / 4  # exact sums
        return linear_cross_entropy(
            *(jnp.round(4 * HIDDEN) / 4, kernel, LABELS), smoothing=0.3, bias=jnp.full(K, offset), **plan
        )

    close(loss(1e6), loss(0.0), rtol=1e-6)


def test_a_label_that_names_no_class(plan):
    """NaN for its own token, in the loss and the gradient of its hidden state."""
    labels = LABELS.at[0].set(K).at[3].set(-1)
    losses = linear_cross_entropy(HIDDEN, KERNEL, labels, smoothing=0.1, reduction="none", **plan)
    np.testing.assert_array_equal(np.isnan(losses), np.isin(np.arange(N), [0, 3]))
    slope = jax.grad(lambda h: linear_cross_entropy(h, KERNEL, labels, smoothing=0.1, **plan))(HIDDEN)
    np.testing.assert_array_equal(np.isnan(slope).all(1), np.isin(np.arange(N), [0, 3]))


@pytest.mark.parametrize("around", [lambda f: f, jax.checkpoint, jax.jit], ids=["plain", "checkpoint", "jit"])
def test_class_blocks_not_reduced_in_any_mode(around):
    options = PLANS["classes"] | {"reduction": "none", "softcap": 3.0}
    weigh = cases.cotangent((N,)).astype(np.float32)

    def ours(hidden, kernel, bias, epsilon):
        return linear_cross_entropy(hidden, kernel, LABELS, smoothing=epsilon, bias=bias, **options)

    def expected(hidden, kernel, bias, epsilon):
        return smoothed_cross_entropy(3 * jnp.tanh((hidden @ kernel + bias[None]) / 3), LABELS, epsilon)

    given = HIDDEN, KERNEL, BIAS, jnp.float32(0.3)
    tangents = HIDDEN**2, KERNEL**2, BIAS**2, jnp.float32(1)
    close(jax.jvp(around(ours), given, tangents), jax.jvp(expected, given, tangents), atol=1e-5)
    hessians = [
        jax.jit(jax.hessian(lambda h, e, f=f: jnp.sum(weigh * f(h, KERNEL, BIAS, e)), argnums=(0, 1)))(HIDDEN, given[3])
        for f in (around(ours), expected)
    ]
    close(*hessians, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_epsilons_at_once_in_class_blocks(reduction):
    epsilons = jnp.array([-0.5, 0.0, 0.3, 1.0])

    def step(hidden, epsilon):
        options = PLANS["classes"] | {"smoothing": epsilon, "reduction": reduction}
        return linear_cross_entropy(hidden, KERNEL, LABELS, **options).mean()

    def expected(hidden, epsilon):
        return smoothed_cross_entropy(hidden @ KERNEL, LABELS, epsilon).mean()

    pairs = [jax.vmap(jax.value_and_grad(f), in_axes=(None, 0))(HIDDEN, epsilons) for f in (step, expected)]
    close(*pairs)


@pytest.mark.parametrize("argument", range(5))
def test_the_gradient_of_class_blocks_in_one_argument_alone(argument):
    def ours(hidden, kernel, bias, epsilon, prior):
        options = PLANS["classes"] | {"bias": bias, "smoothing": epsilon, "prior": prior}
        return linear_cross_entropy(hidden, kernel, LABELS, **options)

    def expected(hidden, kernel, bias, epsilon, prior):
        return smoothed_cross_entropy(hidden @ kernel + bias[None], LABELS, epsilon, prior=prior).mean()

    given = HIDDEN, KERNEL, BIAS, jnp.float32(0.3), jax.nn.softmax(BIAS)
    close(jax.grad(ours, argument)(*given), jax.grad(expected, argument)(*given))


def test_a_target_that_class_blocks_cannot_take():
    @jax.tree_util.register_dataclass
    @dataclass(frozen=True)
    class Squared(Target):
        def contract(self, values, axis):
            return jnp.sum(jnp.square(values), axis=-1) if values is not None else jnp.ones(())

    with pytest.raises(TypeError, match='plan="tokens"'):
        linear_cross_entropy(HIDDEN, KERNEL, Squared(), plan="classes")


# The rule.


@pytest.mark.parametrize(
    ("tokens", "classes", "kernel", "expected"),
    [
        (8192, 128256, "bfloat16", "classes"),
        (32768, 128256, "bfloat16", "classes"),
        (131072, 128256, "bfloat16", "tokens"),
        (8192, 128256, "float32", "tokens"),
        (4096, 131071, "float32", "tokens"),
        (4096, 131072, "float32", "classes"),
        (4096, 8191, "bfloat16", "tokens"),
        (4096, 8192, "bfloat16", "classes"),
    ],
)
def test_the_rule(tokens, classes, kernel, expected):
    assert chosen("auto", tokens, classes, kernel, "float32", written_out=False) == expected


@pytest.mark.parametrize("target", [Dense(jnp.ones((2, 64)) / 64), Rows(jnp.eye(64), jnp.zeros(2, int))])
def test_auto_takes_token_chunks_for_targets_written_out_for_each_token(target):
    def primitives(target, plan):
        hidden, kernel = jnp.ones((2, D), jnp.bfloat16), jnp.ones((D, 64), jnp.bfloat16)
        return str(jax.make_jaxpr(lambda h: linear_cross_entropy(h, kernel, target, plan=plan))(hidden))

    assert primitives(target, "auto") == primitives(target, "tokens")
    labels = OneHot(jnp.zeros(2, int))
    assert primitives(labels, "auto") == primitives(labels, "classes")


# Narrow dtypes.


def slopes_of(dtype, hidden, kernel, labels, scale, **options):
    """The kernel's and hidden's gradients under a loss scale, which is then divided out."""

    def loss(h, k):
        return scale * linear_cross_entropy(h, k, labels, **options)

    slopes = jax.jit(jax.grad(loss, (0, 1)))(hidden.astype(dtype), kernel.astype(jnp.float32))
    return [np.asarray(x).astype(np.float64) / scale for x in slopes]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"])
def test_slopes_of_classes_that_are_no_label_keep_their_digits(dtype, plan):
    """The slope p/N of one of 262,144 classes, 2⁻²⁰, is less than float16 or float8 can hold."""
    tokens, classes = 4, 2**18
    hidden, kernel = jnp.ones((tokens, 1)), jnp.zeros((1, classes))
    sizes = {"chunk_size": 2} if plan["plan"] == "tokens" else {"block_size": 2**16}
    _, slope = slopes_of(dtype, hidden, kernel, jnp.zeros(tokens, int), 1.0, **(plan | sizes))
    np.testing.assert_allclose(slope[0, 1:], 1 / classes, rtol=2e-2 if dtype != "float16" else 1e-3)


def test_hidden_slopes_of_a_sure_model_survive_in_float16(plan):
    """Half a millionth, a subnormal number of float16: with a loss scale all its digits are there."""
    hidden, kernel = jnp.ones((2048, 1)), jnp.zeros((1, 2)).at[0, 0].set(9)
    labels = jnp.zeros(2048, int)
    slope, _ = slopes_of("float16", hidden, kernel, labels, 2.0**15, plan=plan["plan"])
    np.testing.assert_allclose(slope, -9 / (1 + np.exp(9)) / 2048, rtol=2e-3)


@pytest.mark.parametrize("accumulate", [None, "float32", "bfloat16"])
def test_the_dtype_that_gradients_add_up_in(accumulate, plan):
    """Ones of which bfloat16 takes no more than 256 before they round away."""
    tokens, classes = 512, 512
    sizes = {"chunk_size": 1} if plan["plan"] == "tokens" else {"block_size": 1}
    hidden, kernel = jnp.ones((tokens, 1), jnp.bfloat16), jnp.ones((1, classes), jnp.bfloat16)

    def loss(h, k):
        # Each class pulls a token by 1, less what the others pull it back; each token pulls a class alike.
        target = Dense(jnp.ones(classes))
        return linear_cross_entropy(h, k, target, reduction="sum", accumulate=accumulate, **(plan | sizes))

    jaxpr = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel).as_text()
    shape = "1x512" if plan["plan"] == "tokens" else "512x1"
    added = [line for line in jaxpr.splitlines() if "stablehlo.add" in line and f"<{shape}x" in line]
    dtype = {None: "f32", "float32": "f32", "bfloat16": "bf16"}[accumulate]
    assert any(f"<{shape}x{dtype}>" in line for line in added)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("spread", ["all", "others"])
def test_a_prior_has_slopes_beside_classes_that_do_not_exist(spread, reduction):
    """However large the cotangent is: what stands for −inf in their place takes no part."""
    rng = np.random.default_rng(0)
    hidden, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 1), (1, 7)))
    table, labels = rng.dirichlet(np.ones(7), 7).astype(np.float32), np.array([3, 5], np.int32)
    exists = np.array([1, 1, 0, 1, 0, 1, 1], bool)

    def slope(plan):
        def total(table):
            given = {"prior": Rows(table, labels), "class_where": exists, "spread": spread, "reduction": reduction}
            return 2.0**15 * jnp.sum(linear_cross_entropy(hidden, kernel, labels, smoothing=0.9, **given, **plan))

        return jax.jit(jax.grad(total))(table) / 2.0**15

    expected = slope({"plan": "tokens"})
    np.testing.assert_allclose(slope({"plan": "classes", "block_size": 4}), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_fills_a_chunk_is_harmless_where_there_is_no_class_0(plan, smoothing, reduction):
    """Five tokens in chunks of four, and the padding class masked out."""
    rng = np.random.default_rng(0)
    hidden, kernel, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 2), (2, 3), (3,)))
    labels, exists, weigh = np.array([1, 1, 2, 2, 1], np.int32), np.arange(3) > 0, np.linspace(0.5, 1.5, 5, dtype="f")
    prior = rng.dirichlet(np.ones(3)).astype(np.float32)
    sizes = {"chunk_size": 4} if plan["plan"] == "tokens" else {"block_size": 2}

    def total(hidden, kernel, bias):
        options = {"smoothing": smoothing, "prior": prior, "class_where": exists, "reduction": reduction, "bias": bias}
        losses = linear_cross_entropy(hidden, kernel, labels, **options, **plan | sizes)
        return jnp.sum(losses * weigh) if reduction == "none" else losses

    def plain(hidden, kernel, bias):
        z = hidden @ kernel + bias[None]
        losses = smoothed_cross_entropy(z, labels, smoothing, prior=prior, class_where=exists)
        return mean(losses) if reduction == "mean" else jnp.sum(losses * weigh)

    actual, expected = (jax.jit(jax.grad(f, (0, 1, 2)))(hidden, kernel, bias) for f in (total, plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), actual, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("counted", [[False, True, False], [False, False, False]])
def test_tokens_that_do_not_count_where_there_is_no_class_0(plan, counted, reduction):
    """Class 0 stands in for their labels, and its logit is −inf."""
    rng, labels = np.random.default_rng(0), np.array([1, 4, 2], np.int32)
    hidden, kernel, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 2), (2, 5), (5,)))
    options = {"class_where": np.arange(5) > 0, "class_weights": rng.uniform(0.5, 2, 5).astype(np.float32)}

    def total(bias, epsilon):
        given = {"bias": bias, "smoothing": epsilon, "where": np.array(counted), "reduction": reduction}
        return jnp.sum(linear_cross_entropy(hidden, kernel, labels, **options, **given, **plan))

    def plain(bias, epsilon):
        losses = smoothed_cross_entropy(
            hidden @ kernel + bias[None], labels, epsilon, where=np.array(counted), **options
        )
        return mean(losses, np.array(counted)) if reduction == "mean" else jnp.sum(losses)

    close(*(jax.jit(jax.grad(f, (0, 1)))(bias, jnp.float32(0.1)) for f in (total, plain)))


# Compilations.

LOWERED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: LOWERED.append(name) if name.endswith("jaxpr_to_mlir_module_duration") else None
)


def told(logits, labels):
    return smoothed_cross_entropy(logits, labels, 0.1), {"correct": logits.argmax(-1) == labels}


CHUNKED = chunked_loss(told, has_aux=True, chunk_size=3)
CALLS = {
    "chunked_loss": lambda: CHUNKED(HIDDEN, KERNEL, LABELS),
    "chunked_loss anew": lambda: chunked_loss(told, has_aux=True, chunk_size=3)(HIDDEN, KERNEL, LABELS),
    "gradient of chunked_loss": lambda: jax.grad(lambda h: CHUNKED(h, KERNEL, LABELS)[0])(HIDDEN),
} | {
    f"{name} {plan} {reduction}": functools.partial(call, PLANS[plan] | {"reduction": reduction})
    for plan in PLANS
    for reduction in ("mean", "none")
    for name, call in {
        "value": lambda options: linear_cross_entropy(HIDDEN, KERNEL, LABELS, smoothing=0.1, **options),
        "gradient": lambda options: jax.grad(
            lambda h: linear_cross_entropy(h, KERNEL, LABELS, smoothing=0.1, z_loss=1e-4, **options).sum()
        )(HIDDEN),
    }.items()
}


@pytest.mark.parametrize("name", CALLS)
def test_without_an_outer_jit_nothing_compiles_twice(name):
    CALLS[name]()
    before = len(LOWERED)
    assert before > 0
    CALLS[name]()
    assert len(LOWERED) == before


# Bad input.

BAD = {
    "plan": ({"plan": "rows"}, "plan"),
    "plan: None": ({"plan": None}, "plan"),
    "block_size: 0": ({"block_size": 0}, "block_size"),
    "block_size: real": ({"block_size": 2.0}, "block_size"),
    "chunk_size: 0": ({"chunk_size": 0, "plan": "classes"}, "chunk_size"),
    "accumulate: integers": ({"accumulate": "int32"}, "accumulate"),
    "accumulate: 8 bits": ({"accumulate": "float8_e4m3fn"}, "accumulate"),
    "accumulate: words": ({"accumulate": "wide"}, "accumulate"),
    "softcap: array": ({"softcap": jnp.ones(2)}, "softcap"),
    "where: tokens": ({"where": jnp.ones(N + 1, bool)}, "where"),
    "where: real": ({"where": jnp.ones(N)}, "where"),
    "ignore_index: real": ({"ignore_index": 1.0}, "ignore_index"),
    "ignore_index: dense": ({"ignore_index": 1, "target": jnp.ones((N, K)) / K}, "ignore_index"),
    "kernel: no features": ({"kernel": jnp.ones((0, K)), "hidden": jnp.ones((N, 0))}, "kernel"),
    "kernel: no classes": ({"kernel": jnp.ones((D, 0)), "target": LABELS}, "kernel"),
    "smoothing: words": ({"smoothing": "much"}, "smoothing"),
    "smoothing: tokens": ({"smoothing": jnp.ones(N + 1)}, "smoothing"),
    "class_axis_name": ({"class_axis_name": "no such axis", "plan": "classes"}, "no such axis"),
    "batch_axis_name": ({"batch_axis_name": "no such axis", "plan": "classes"}, "no such axis"),
    "both": ({"batch_axis_name": "data", "class_axis_name": "data"}, "class_axis_name"),
    "kernel_spec: no mesh": ({"kernel_spec": jax.P("data", None)}, "set_mesh"),
    "hidden_spec: words": ({"hidden_spec": "data"}, "hidden_spec"),
    "kernel_spec: axes": ({"kernel_spec": jax.P(None, None, "data")}, "kernel_spec"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_at_once_by_name(name):
    given, word = BAD[name]
    arguments = {"hidden": HIDDEN, "kernel": KERNEL, "target": LABELS} | given
    with pytest.raises((AssertionError, TypeError, ValueError, NameError), match=word):
        linear_cross_entropy(**arguments)


def test_a_block_larger_than_all_classes_is_refused():
    classes = KERNEL.shape[1]
    with pytest.raises(ValueError, match=f"block_size: expected at most the {classes} classes of a device"):
        linear_cross_entropy(HIDDEN, KERNEL, LABELS, plan="classes", block_size=classes + 1)
    linear_cross_entropy(HIDDEN, KERNEL, LABELS, plan="classes", block_size=classes)
