"""What the loss of a layer holds beside its arguments and gradients, read off programs that never run."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from jax_ls import linear_cross_entropy


def one_hot_route(hidden, kernel, labels):
    """The usual way: logits of all tokens, smoothed targets of all tokens."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, kernel.shape[1]), 0.1)
    return optax.softmax_cross_entropy(hidden @ kernel, targets).mean()


def chunked(hidden, kernel, labels, **options):
    return linear_cross_entropy(hidden, kernel, labels, smoothing=0.1, **options)


@functools.cache
def temporaries(loss, tokens, features, classes, dtype="float32", transposed=False):
    """Bytes of loss and gradients that are neither argument nor result."""
    kernel = (classes, features) if transposed else (features, classes)
    shapes = [((tokens, features), dtype), (kernel, dtype), ((tokens,), "int32")]
    arguments = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in shapes]
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.memory
@pytest.mark.parametrize(("tokens", "features", "classes", "share"), [(4096, 512, 32000, 12), (2048, 256, 128000, 16)])
def test_temporaries_are_a_small_part_of_those_of_written_out_logits(tokens, features, classes, share):
    ours = temporaries(chunked, tokens, features, classes)
    assert ours <= temporaries(one_hot_route, tokens, features, classes) / share


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("classes", [32000, 32003])
def test_class_blocks_hold_no_second_kernel(classes, transposed):
    """Not in float32, not transposed, not padded where no block divides the classes."""

    def blocks(hidden, kernel, labels):
        return chunked(hidden, kernel, labels, plan="classes", transposed=transposed)

    ours = temporaries(blocks, 1024, 512, classes, transposed=transposed)
    assert ours <= 512 * classes * jnp.dtype("float32").itemsize / 4


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_more_tokens_add_no_more_than_their_hidden_states(tokens):
    features, classes = 512, 32000
    more = temporaries(chunked, 2 * tokens, features, classes) - temporaries(chunked, tokens, features, classes)
    assert more <= tokens * features * jnp.dtype("float32").itemsize


def test_a_prior_and_tied_embeddings_cost_no_copy():
    """Neither the transposed kernel nor a prior of each token is written out."""

    def tied(hidden, kernel, labels):
        prior = jnp.full(kernel.shape[0], 1 / kernel.shape[0])
        weights = (labels > 0).astype(jnp.float32)
        return chunked(hidden, kernel, labels, prior=prior, weights=weights, transposed=True)

    tokens, features, classes = 4096, 512, 32000
    plain = temporaries(chunked, tokens, features, classes)
    copy = features * classes * jnp.dtype("float32").itemsize
    assert temporaries(tied, tokens, features, classes, transposed=True) <= plain + copy / 2
