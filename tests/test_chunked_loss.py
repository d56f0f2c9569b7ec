"""Any loss by chunks: what it returns and closes over, transformations, weights, sums in float32, bad input."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ls import chunked_loss, linear_cross_entropy, mean, smooth, smoothed_cross_entropy

N, D, K = 7, 4, 5
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(D, K)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, K, N))
BIAS = jnp.asarray(RNG.normal(size=K), jnp.float32)
EPSILON = jnp.full(N, 0.1)
EPSILONS = jnp.array([-0.5, 0.0, 0.3, 1.0])


def written_out(hidden, kernel, epsilon):
    """The loss of each token with its logits: tested against the definition elsewhere."""
    return smoothed_cross_entropy(hidden @ kernel, LABELS, epsilon)


def of_each(hidden, kernel, epsilon):
    return linear_cross_entropy(hidden, kernel, LABELS, smoothing=epsilon, chunk_size=3, reduction="none")


def told(logits, labels):
    """A loss, and what one would like to know beside it."""
    parts = {"nll": smoothed_cross_entropy(logits, labels, 0.0), "correct": logits.argmax(-1) == labels}
    parts["z_loss"] = 0.01 * jax.nn.logsumexp(logits, axis=-1) ** 2
    return smoothed_cross_entropy(logits, labels, 0.1) + parts["z_loss"], parts


def close(actual, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), actual, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_auxiliary_values_of_each_token(reduction):
    f = chunked_loss(told, has_aux=True, reduction=reduction, chunk_size=3)
    total = lambda h: (lambda loss, aux: (loss.sum(), aux))(*f(h, KERNEL, LABELS))  # noqa: E731
    (value, aux), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(HIDDEN)
    losses, expected = told(HIDDEN @ KERNEL, LABELS)
    close(aux, expected)
    close(value, losses.mean() if reduction == "mean" else losses.sum())
    share = 1 / N if reduction == "mean" else 1.0
    close(slope, jax.grad(lambda h: share * told(h @ KERNEL, LABELS)[0].sum())(HIDDEN))


def test_auxiliary_values_of_a_reduced_loss_refuse_to_be_differentiated():
    f = chunked_loss(told, has_aux=True)
    with pytest.raises(TypeError, match="aux"):
        jax.grad(lambda h: f(h, KERNEL, LABELS)[1]["nll"].sum())(HIDDEN)
    of_each = chunked_loss(told, has_aux=True, reduction="none", chunk_size=3)
    slope = jax.grad(lambda h: of_each(h, KERNEL, LABELS)[1]["nll"].sum())(HIDDEN)
    close(slope, jax.grad(lambda h: written_out(h, KERNEL, 0.0).sum())(HIDDEN))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_a_loss_closes_over_is_differentiated(reduction):
    def ours(epsilon, prior):
        f = chunked_loss(
            lambda z, y: smoothed_cross_entropy(z, y, epsilon, prior=prior), reduction=reduction, chunk_size=2
        )
        return f(HIDDEN, KERNEL, LABELS).mean()

    def expected(epsilon, prior):
        return smoothed_cross_entropy(HIDDEN @ KERNEL, LABELS, epsilon, prior=prior).mean()

    given = jnp.float32(0.3), jax.nn.softmax(BIAS)
    close(jax.value_and_grad(ours, (0, 1))(*given), jax.value_and_grad(expected, (0, 1))(*given))


@pytest.mark.parametrize("argument", range(5))
def test_the_gradient_in_one_argument_alone(argument):
    """What is not asked for is not computed; what is, is right."""

    def ours(hidden, kernel, bias, epsilon, weights):
        options = {"bias": bias, "smoothing": epsilon, "weights": weights}
        return linear_cross_entropy(hidden, kernel, LABELS, chunk_size=3, **options)

    def expected(hidden, kernel, bias, epsilon, weights):
        return mean(smoothed_cross_entropy(hidden @ kernel + bias[None], LABELS, epsilon), weights)

    given = HIDDEN, KERNEL, BIAS, jnp.float32(0.3), jnp.linspace(0.5, 2, N)
    close(jax.grad(ours, argument)(*given), jax.grad(expected, argument)(*given))


@pytest.mark.parametrize("around", [lambda f: f, jax.checkpoint, jax.jit], ids=["plain", "checkpoint", "jit"])
def test_not_reduced_in_any_mode(around):
    given, tangents = (HIDDEN, KERNEL, jnp.float32(0.3)), (HIDDEN**2, KERNEL**2, jnp.float32(1))
    ours, expected = around(of_each), written_out
    close(jax.jvp(ours, given, tangents), jax.jvp(expected, given, tangents))
    weigh = cases.cotangent((N,)).astype(np.float32)
    hessians = [
        jax.jit(jax.hessian(lambda h, e, f=f: jnp.sum(weigh * f(h, KERNEL, e)), argnums=(0, 1)))(HIDDEN, given[2])
        for f in (ours, expected)
    ]
    close(*hessians)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_epsilons_at_once_and_steps_of_a_scan(reduction):
    def step(hidden, epsilon):
        options = {"smoothing": epsilon, "reduction": reduction, "chunk_size": 3}
        return linear_cross_entropy(hidden, KERNEL, LABELS, **options).mean()

    expected = [jax.value_and_grad(lambda h, e=e: written_out(h, KERNEL, e).mean())(HIDDEN) for e in EPSILONS]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *expected)
    gradient = jax.value_and_grad(step)
    close(jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(HIDDEN, EPSILONS), expected)
    scanned = jax.jit(lambda h: jax.lax.scan(lambda carry, e: (carry, gradient(h, e)), 0, EPSILONS)[1])
    close(scanned(HIDDEN), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "sum_by_nonzero_weights", "none"])
def test_a_token_of_weight_0_is_absent_whatever_it_holds(reduction):
    def ours(hidden, kernel, labels, weights):
        options = {"smoothing": 0.3, "weights": weights, "reduction": reduction, "chunk_size": 3}
        return linear_cross_entropy(hidden, kernel, labels, **options).sum()

    f = jax.jit(jax.value_and_grad(ours, (0, 1, 3)))
    weights = jnp.linspace(0.5, 2, N).at[jnp.array([1, 6])].set(0)
    value, slopes = f(HIDDEN, KERNEL, LABELS, weights)
    odd = HIDDEN.at[1].set(jnp.nan).at[6].set(jnp.inf), KERNEL, LABELS.at[1].set(-100).at[6].set(K)
    close(f(*odd, weights), (value, slopes))
    assert np.all(slopes[0][jnp.array([1, 6])] == 0)
    assert np.all(slopes[0][0] != 0)
    value, slopes = f(*odd, jnp.zeros(N))
    assert value == 0
    assert all(not np.any(slope) for slope in slopes[:2])
    value, slopes = f(HIDDEN, KERNEL, LABELS.at[0].set(K), weights)
    assert np.isnan(value)
    assert np.all(np.isnan(slopes[0][0]))
    assert np.all(np.isfinite(slopes[0][2]))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gradient_of_the_kernel_adds_up_in_float32(dtype, reduction):
    """4096 chunks that all pull the same way: sums in 16 bits would stop growing at 2048 of them or before."""
    tokens = 4096
    hidden, kernel = jnp.ones((tokens, D), dtype), jnp.zeros((D, K), dtype)
    labels = jnp.zeros(tokens, jnp.int32)

    def ours(kernel):
        options = {"chunk_size": 1, "reduction": reduction}
        return linear_cross_entropy(hidden, kernel, labels, **options).sum()

    slope = jax.jit(jax.grad(ours))(kernel)
    assert slope.dtype == dtype
    expected = np.broadcast_to(np.where(np.arange(K) == 0, 1 / K - 1, 1 / K) * tokens, (D, K))
    np.testing.assert_allclose(np.asarray(slope).astype(float), expected, rtol=2 * float(jnp.finfo(dtype).eps))


def test_a_loss_scale_saves_float16_gradients():
    """p / N of a sure model is less than float16 can hold; scaled it is not, so nothing is divided before."""
    tokens, scale = 2048, 2.0**15
    hidden, kernel = jnp.ones((tokens, 1), jnp.float16), jnp.zeros((1, 2), jnp.float16).at[0, 0].set(9)
    scaled = lambda h: scale * linear_cross_entropy(h, kernel, jnp.zeros(tokens, jnp.int32))  # noqa: E731
    expected = -9 / (1 + np.exp(9)) * scale / tokens
    np.testing.assert_allclose(np.asarray(jax.grad(scaled)(hidden)).astype(float), expected, rtol=2e-3)


BAD = {
    "hidden: integers": ({"hidden": jnp.ones((N, D), jnp.int32)}, "hidden"),
    "kernel: integers": ({"kernel": jnp.ones((D, K), jnp.int32)}, "kernel"),
    "kernel: rank": ({"kernel": jnp.ones((1, D, K))}, "kernel"),
    "kernel: D": ({"kernel": jnp.ones((D + 1, K))}, "kernel"),
    "kernel: not transposed": ({"transposed": True}, "kernel"),
    "target: tokens": ({"target": LABELS[:-1]}, "target"),
    "target: classes": ({"target": jnp.ones((N, K + 1))}, "target|probabilities"),
    "target: real labels": ({"target": LABELS.astype(jnp.float32)}, "target|probabilities"),
    "target: real labels, as many as classes": ({"target": jnp.ones(K), "hidden": HIDDEN[:K]}, "target"),
    "bias: K": ({"bias": jnp.ones(K + 1)}, "bias"),
    "weights: tokens": ({"weights": jnp.ones(N + 1)}, "weights"),
    "weights: words": ({"weights": "all"}, "weights"),
    "smoothing: tokens": ({"smoothing": jnp.ones(N + 1)}, "smoothing"),
    "prior: K": ({"smoothing": 0.1, "prior": jnp.ones(K + 1)}, "prior|probabilities"),
    "class_where: K": ({"class_where": jnp.ones(K + 1, bool)}, "class_where"),
    "class_where: real": ({"class_where": jnp.ones(K)}, "class_where"),
    "class_where: tokens": ({"class_where": jnp.ones((N, K), bool)}, "class_where"),
    "z_loss: tokens": ({"z_loss": jnp.ones(N)}, "z_loss"),
    "class_weights: K": ({"class_weights": jnp.ones(K + 1)}, "class_weights"),
    "chunk_size: 0": ({"chunk_size": 0}, "chunk_size"),
    "chunk_size: -1": ({"chunk_size": -1}, "chunk_size"),
    "chunk_size: real": ({"chunk_size": 2.0}, "chunk_size"),
    "reduction": ({"reduction": "avg"}, "reduction"),
    "denominator": ({"reduction": "sum", "denominator": 3.0}, "denominator"),
    "spread": ({"spread": "some", "smoothing": 0.1}, "spread"),
    "class_axis_name": ({"class_axis_name": "no such axis"}, "no such axis"),
    "batch_axis_name": ({"batch_axis_name": "no such axis"}, "batch_axis_name: expected a mesh axis .* 'no such axis'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_at_once_by_name(name):
    given, word = BAD[name]
    arguments = {"hidden": HIDDEN, "kernel": KERNEL, "target": LABELS} | given
    with pytest.raises((AssertionError, TypeError, ValueError, NameError), match=word):
        linear_cross_entropy(**arguments)


BAD_LOSSES = {
    "a mean": (lambda z, y: smoothed_cross_entropy(z, y).mean(), {}, "loss: expected losses"),
    "too many": (lambda z, y: smoothed_cross_entropy(z, y)[:, None], {}, "loss: expected losses"),
    "integers": (lambda z, y: y, {}, "loss: expected real numbers"),
    "no array": (lambda z, y: None, {}, "loss"),
    "auxiliary values that were not asked for": (told, {}, "has_aux"),
    "no auxiliary values": (lambda z, y: smoothed_cross_entropy(z, y), {"has_aux": True}, "has_aux"),
    "a scalar auxiliary value": (
        lambda z, y: (smoothed_cross_entropy(z, y), {"hits": (z.argmax(-1) == y).mean()}),
        {"has_aux": True},
        r"loss, auxiliary\['hits'\]",
    ),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", BAD_LOSSES)
def test_a_loss_that_does_not_return_one_number_per_token(name, reduction):
    loss, options, word = BAD_LOSSES[name]
    f = chunked_loss(loss, chunk_size=3, reduction=reduction, **options)
    with pytest.raises((AssertionError, TypeError), match=word):
        f(HIDDEN, KERNEL, LABELS)


def test_numbers_are_named_where_arrays_with_one_entry_per_token_must_be():
    f = chunked_loss(lambda z, y, t: smoothed_cross_entropy(z / t, y))
    with pytest.raises(AssertionError, match="argument"):
        f(HIDDEN, KERNEL, LABELS, 2.0)
    f = chunked_loss(lambda z, y, t: smoothed_cross_entropy(z / t[:, None], y))
    close(f(HIDDEN, KERNEL, LABELS, np.full(N, 2.0, np.float32)), written_out(HIDDEN, KERNEL / 2, 0.1).mean())


# In class blocks.


def sums_told(z, labels, epsilon):
    """The same loss, of the sums over classes that blocks can take."""
    q = smooth(labels, epsilon)
    parts = {"nll": -z.log_prob(labels), "z_loss": 0.01 * jnp.square(z.lse), "mean": z.mean() + z.shift}
    return z.mass(q) * z.log_total - z.dot(q) + parts["z_loss"], parts


def told_by_logits(logits, labels, epsilon):
    lse = jax.nn.logsumexp(logits, axis=-1)
    parts = {"nll": smoothed_cross_entropy(logits, labels, 0.0), "z_loss": 0.01 * lse**2, "mean": logits.mean(axis=-1)}
    return smoothed_cross_entropy(logits, labels, epsilon) + parts["z_loss"], parts


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("transposed", [False, True])
def test_class_blocks_of_a_loss_of_sums(reduction, transposed):
    blocks = chunked_loss(sums_told, has_aux=True, reduction=reduction, plan="classes", block_size=2)
    chunks = chunked_loss(told_by_logits, has_aux=True, reduction=reduction, chunk_size=3)
    weights = jnp.array([1.0, 2, 0, 1, 1, 0.5, 1])

    def total(f, hidden, kernel, bias):
        if f is chunks:
            hidden = jnp.nan_to_num(hidden)
        kernel = kernel.T if transposed else kernel
        loss, aux = f(hidden, kernel, LABELS, EPSILON, bias=bias, weights=weights, softcap=2.0, transposed=transposed)
        return loss.sum(), aux

    hidden = HIDDEN.at[2].set(jnp.nan)
    slopes = jax.jit(jax.value_and_grad(total, (1, 2, 3), has_aux=True), static_argnums=0)
    (value, aux), found = slopes(blocks, hidden, KERNEL, BIAS)
    (expected, expected_aux), expected_slopes = slopes(chunks, hidden, KERNEL, BIAS)
    close(value, expected)
    close(found, expected_slopes)
    kept = weights != 0
    close(jax.tree.map(lambda x: x[kept], aux), jax.tree.map(lambda x: x[kept], expected_aux))


def test_class_blocks_see_what_the_loss_closes_over():
    def of(plan, scale):
        loss = {
            "classes": lambda z, y: -scale * z.log_prob(y),
            "tokens": lambda z, y: scale * smoothed_cross_entropy(z, y, 0.0),
        }[plan]
        return chunked_loss(loss, plan=plan)(HIDDEN, KERNEL, LABELS)

    close(jax.grad(of, 1)("classes", 2.0), jax.grad(of, 1)("tokens", 2.0))


def test_an_argument_of_a_token_without_weight_is_absent_in_class_blocks():
    f = chunked_loss(lambda z, y, scale: -scale * z.log_prob(y), plan="classes", reduction="sum")
    weights, scale = jnp.ones(N).at[1].set(0), jnp.ones(N)
    slope = jax.grad(lambda h, scale: f(h, KERNEL, LABELS, scale, weights=weights), (0, 1))
    close(slope(HIDDEN, scale.at[1].set(jnp.nan)), slope(HIDDEN, scale))


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: smoothed_cross_entropy(z, y),
        lambda z, y: jax.nn.logsumexp(z, axis=-1),
        lambda z, y: z.entropy(),
        lambda z, y: z.top,
    ],
)
def test_a_loss_that_needs_all_classes_is_refused_in_class_blocks(loss):
    with pytest.raises(TypeError, match=r'plan: class blocks cannot take this loss .*plan="tokens"'):
        chunked_loss(loss, plan="classes")(HIDDEN, KERNEL, LABELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": "auto"}, "plan"),
        ({"plan": "classes", "block_size": 0}, "block_size"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_plans_and_sizes_that_do_not_exist_are_refused_before_the_loss_is_called(options, message):
    with pytest.raises((ValueError, AssertionError), match=message):
        chunked_loss(sums_told, **options)


def test_class_blocks_where_an_explicit_mesh_splits_tokens_and_classes():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    rng = np.random.default_rng(1)
    hidden, kernel = rng.normal(size=(8, 4)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float32)
    labels = jnp.arange(8) % 6
    f = chunked_loss(sums_told, has_aux=True, plan="classes", block_size=2)
    step = jax.jit(jax.value_and_grad(lambda h, k: f(h, k, labels, jnp.full(8, 0.1)), (0, 1), has_aux=True))
    expected = step(jnp.asarray(hidden), jnp.asarray(kernel))
    with jax.set_mesh(mesh):
        h, k = jax.device_put(hidden, jax.P("data")), jax.device_put(kernel, jax.P("data", "model"))
        close(step(h, k), expected)
