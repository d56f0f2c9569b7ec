"""Prints the memory table of large-vocabularies.md: programs are compiled for each device's share, and never run."""

import jax
import optax

import jax_ls

FEATURES, CLASSES, TOKENS = 2304, 262_144, 2**20
MESHES = {"256 data": (256, 1), "64 data × 4 model": (64, 4), "32 data × 8 model": (32, 8)}


def one_hot(hidden, kernel, labels):
    logits = hidden @ kernel
    hard = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(hard, 0.1)).mean()


def from_logits(hidden, kernel, labels):
    return jax_ls.smoothed_cross_entropy(hidden @ kernel, labels, 0.1).mean()


def linear(hidden, kernel, labels):
    return jax_ls.linear_cross_entropy(hidden, kernel, labels, smoothing=0.1)


def small_chunks(hidden, kernel, labels):
    return jax_ls.linear_cross_entropy(hidden, kernel, labels, smoothing=0.1, chunk_size=256)


def temporaries(loss, tokens, classes, dtype):
    shapes = ((tokens, FEATURES), dtype), ((FEATURES, classes), dtype), ((tokens,), "int32")
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*(jax.ShapeDtypeStruct(*s) for s in shapes)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**30


print("| devices | dtype | one-hot | logits | `linear_cross_entropy` | the same, `chunk_size=256` |")
print("|---|---|---|---|---|---|")
for name, (data, model) in MESHES.items():
    for dtype in ("float32", "bfloat16"):
        losses = (one_hot, from_logits, linear, small_chunks)
        cells = [f"{temporaries(loss, TOKENS // data, CLASSES // model, dtype):.2f}" for loss in losses]
        print(f"| {name} | {dtype} | {' | '.join(cells)} |")
