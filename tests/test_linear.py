"""The loss of an output layer, value and gradient in all that is real, against the definition of the logits' loss."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import Case

from jax_ls import Rows, Sparse, linear_cross_entropy

D, SOFTCAP = 4, 3.0
# (words, batch, K, dtype, size of a chunk or block, reduction). 11 tokens and 13 classes, which no size divides, leave
# a ragged chunk or block; 13 tokens are as many as classes.
LAYERS = [
    *[("bias weights prior", (11,), 13, "float32", size, "mean") for size in (None, 1, 3, 10, 11, 100)],
    *[("bias weights prior each", (11,), 13, "float32", 3, reduction) for reduction in ("sum", "none")],
    ("bias weights prior each", (11,), 13, "float32", 3, "sum_by_nonzero_weights"),
    *[
        (f"weights {options}", (2, 3), 13, "float32", 4, "mean")
        for options in [
            *["prior others bias", "each prior others", "prior_each", "z_loss softcap bias", "transposed class_where"],
            *["class_where bias z_loss", "class_where others", "class_where prior", "class_weights class_where"],
            *["class_where prior others each transposed", "dense class_weights", "dense others each", "rows each"],
        ]
    ],
    *[
        (f"weights {options}", (2, 3), 13, "float32", 4, "none")
        for options in [
            "others class_where transposed",
            "class_weights softcap bias prior",
            "rows each",
            "sparse z_loss",
        ]
    ],
    ("weights sparse", (2, 3), 13, "float32", 4, "mean"),
    *[("prior bias each", (13,), 13, "float32", size, "mean") for size in (1, 13)],
    ("rows weights", (13,), 13, "float32", 2, "mean"),
    *[("prior weights", batch, 13, "float32", 2, "mean") for batch in [(), (0,), (2, 2, 3)]],
    ("weights prior others class_weights z_loss", (0,), 13, "float32", 2, "mean"),
    *[("bias each", (5,), size, "float32", 2, "sum") for size in (1, 2, 257)],
    *[
        ("bias weights prior softcap", (11,), 13, dtype, 3, reduction)
        for dtype in ("bfloat16", "float16", "float64")
        for reduction in ("mean", "none")
    ],
]


def draw(words, batch, size, dtype, scale, epsilon):
    """The table of cases, with its logits made a product: (real arrays, other arrays)."""
    floats, fixed, _ = cases.draw(Case(words, batch, size, dtype), smoothing=epsilon)
    rng, words = np.random.default_rng(2), words.split()
    del floats["logits"]
    floats["hidden"] = scale * rng.normal(size=(*batch, D))
    floats["kernel"] = rng.normal(size=(size, D) if "transposed" in words else (D, size))
    if "bias" in words:
        floats["bias"] = scale * rng.normal(size=size)
    if "weights" in words:
        nothing = np.arange(np.prod(batch, dtype=int)).reshape(batch) % 4 == 1
        floats["weights"] = rng.uniform(0.5, 2, batch) * ~nothing
    if "sparse" in words:
        floats["shares"], fixed["indices"] = rng.uniform(0, 1, (*batch, 3)), rng.integers(0, size, (*batch, 3))
    if "rows" in words:
        floats["table"] = rng.dirichlet(np.ones(size), size)
    return floats, fixed


@functools.partial(jax.jit, static_argnames=("words", "plan", "chunk_size", "block_size", "reduction"))
def ours(floats, fixed, weigh, words, **options):
    """The loss, and the gradient of its sum in every real array; tokens weighed where they are not reduced."""
    words = words.split()

    def total(floats):
        arrays = floats | fixed
        hidden, kernel, epsilon = (arrays.pop(name) for name in ("hidden", "kernel", "epsilon"))
        labels = arrays.pop("labels")
        if "table" in arrays:
            arrays["prior"] = Rows(arrays.pop("table"), labels)
        if "shares" in arrays:
            labels = Sparse(arrays.pop("indices"), arrays.pop("shares"))
        loss = linear_cross_entropy(
            *(hidden, kernel, labels),
            smoothing=epsilon,
            spread="others" if "others" in words else "all",
            softcap=SOFTCAP if "softcap" in words else None,
            transposed="transposed" in words,
            **arrays,
            **options,
        )
        return jnp.sum(loss * weigh.astype(loss.dtype)) if options["reduction"] == "none" else loss, loss

    (_, loss), gradients = jax.value_and_grad(total, has_aux=True)(floats)
    return loss, gradients


def of_each(arrays, words, counted):
    """The loss of each token by the definition, from the logits before bias and softcap."""
    z, labels, prior = arrays["logits"] + arrays.get("bias", 0), arrays["labels"], arrays.get("prior")
    z = SOFTCAP * np.tanh(z / SOFTCAP) if "softcap" in words else z
    if "table" in arrays:
        prior = arrays["table"][labels]
    if "shares" in arrays:
        pairs = ((arrays["indices"][i], arrays["shares"][i]) for i in np.ndindex(counted.shape))
        labels = np.array([reference.sparse(*pair, z.shape[-1]) for pair in pairs]).reshape(z.shape)
    options = {name: arrays[name] for name in ("class_where", "class_weights", "z_loss") if name in arrays}
    spread = "others" if "others" in words else "all"
    return reference.losses(z, labels, arrays["epsilon"], prior=prior, spread=spread, where=counted, **options)


def reduced(losses, weights, counted, reduction):
    """What is not counted has no loss, for the derivative in its weight neither."""
    divisor = {"mean": np.sum(weights), "sum_by_nonzero_weights": np.sum(counted)}.get(reduction, 1)
    return weights * losses if reduction == "none" else np.sum(weights * losses) / (divisor or 1)


def expected(floats, fixed, words, reduction, weigh):
    """Loss and gradients by the definition: differentiated in the logits, and through their product by hand."""
    words, hidden, kernel = words.split(), floats["hidden"], floats["kernel"]
    kernel = kernel.T if "transposed" in words else kernel
    weights = floats.get("weights", np.ones(hidden.shape[:-1]))
    counted = weights != 0
    arrays = floats | fixed | {"logits": hidden @ kernel}

    def losses(name, x):
        return of_each(arrays | {name: x}, words, counted)

    plain = losses("logits", arrays["logits"])
    share = weigh * weights
    if reduction != "none":
        share = reference.gradient(lambda x: reduced(x, weights, counted, reduction), plain)
    slopes = {
        name: reference.gradient(lambda x, name=name: np.sum(share * losses(name, x)), floats[name])
        for name in floats
        if name not in ("hidden", "kernel", "weights")
    }
    if "weights" in floats:
        slopes["weights"] = reference.gradient(lambda w: np.sum(weigh * reduced(plain, w, counted, reduction)), weights)
    by_logit = share[..., None] * reference.gradient_by_class(functools.partial(losses, "logits"), arrays["logits"])
    slopes["hidden"] = by_logit @ kernel.T
    slopes["kernel"] = hidden.reshape(-1, hidden.shape[-1]).T @ by_logit.reshape(-1, kernel.shape[1])
    if "transposed" in words:
        slopes["kernel"] = slopes["kernel"].T
    return reduced(plain, weights, counted, reduction), slopes


def assert_near(actual, exact, dtype, size):
    """Within the rounding of the dtype that products are taken in, over numbers of this size."""
    assert actual.shape == exact.shape
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(actual).astype(np.float64), exact, rtol=16 * eps, atol=16 * eps * size)


@pytest.mark.parametrize("plan", ["tokens", "classes"])
@pytest.mark.parametrize(("words", "batch", "size", "dtype", "held", "reduction"), LAYERS)
def test_value_and_gradients(words, batch, size, dtype, held, reduction, plan):
    with cases.precision(dtype):
        weigh = cases.cotangent(batch) if reduction == "none" else np.ones(())
        # Near-uniform logits show what large ones hide: mass on classes that should have none.
        for scale, epsilon in [(0.01, 0.1), (1.0, -0.5), (10.0, 0.3)]:
            floats, fixed = draw(words, batch, size, dtype, scale, epsilon)
            rounded, exact = cases.rounded(floats, dtype)
            options = {"words": words, "plan": plan, "reduction": reduction}
            # A chunk may be larger than all tokens, a block not larger than all classes.
            held = held if plan == "tokens" or held is None else min(held, size)
            options["chunk_size" if plan == "tokens" else "block_size"] = held
            loss, gradients = ours(rounded, jax.tree.map(jnp.asarray, fixed), jnp.asarray(weigh), **options)
            value, slopes = expected(exact, fixed, words, reduction, weigh)
            wide = "float64" if dtype == "float64" else "float32"
            assert loss.dtype == wide
            assert_near(loss, np.asarray(value), wide, 24 * scale + 24)
            for name, slope in slopes.items():
                assert gradients[name].dtype == dtype
                assert_near(gradients[name], slope, dtype, 24 * scale + 24)
