"""A small decoder-only Transformer, and its smoothed loss on a mesh of (data, model) devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ls


@dataclass(frozen=True)
class Shape:
    """The sizes of a network."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    length: int


class Block(nnx.Module):
    """Attention to what came before, then two dense layers; each adds to its input."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs):
        d = shape.width
        self.heads = shape.heads
        self.norm1, self.norm2 = nnx.RMSNorm(d, rngs=rngs), nnx.RMSNorm(d, rngs=rngs)
        self.qkv = nnx.Linear(d, 3 * d, use_bias=False, rngs=rngs)
        self.mix = nnx.Linear(d, d, use_bias=False, rngs=rngs)
        self.up, self.down = nnx.Linear(d, 4 * d, rngs=rngs), nnx.Linear(4 * d, d, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, d = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, d // self.heads)
        q, k, v = (qkv[:, :, i] for i in range(3))
        x = x + self.mix(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """Tokens (batch, length) -> hidden states (batch, length, D). Its embeddings (K, D) are the output layer too."""

    def __init__(self, shape: Shape, unigram: np.ndarray, rngs: nnx.Rngs):
        small = nnx.initializers.normal(0.02)
        self.words = nnx.Embed(shape.vocabulary, shape.width, embedding_init=small, rngs=rngs)
        self.places = nnx.Embed(shape.length, shape.width, embedding_init=small, rngs=rngs)
        self.blocks = nnx.List([Block(shape, rngs) for _ in range(shape.layers)])
        self.norm = nnx.RMSNorm(shape.width, rngs=rngs)
        # Training begins where counting words ends.
        self.bias = nnx.Param(jnp.log(jnp.maximum(unigram, 1e-9)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.words(tokens) + self.places(jnp.arange(tokens.shape[1]))[None]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Devices:
    """A mesh with axes "data", "fsdp" and "model", and what each splits.

    Tokens are split over "data" and "fsdp". The vocabulary is split over "model". Every matrix, the embeddings
    included, is split over "fsdp" too, and gathered where it is used.
    """

    def __init__(self, shape: tuple[int, int, int], devices: Any = None):
        names = ("data", "fsdp", "model")
        self.mesh: Mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3, devices=devices)
        self.tokens = NamedSharding(self.mesh, P(("data", "fsdp")))
        self.replicated = NamedSharding(self.mesh, P())

    def of_state(self, state: Any, vocabulary: int) -> Any:
        """Shardings of parameters and their moments."""

        def one(leaf: jax.Array) -> NamedSharding:
            if leaf.ndim > 0 and leaf.shape[0] == vocabulary:
                spec = P("model", "fsdp") if leaf.ndim == 2 else P("model")
            else:
                spec = P("fsdp") if leaf.ndim == 2 and leaf.shape[0] % self.mesh.shape["fsdp"] == 0 else P()
            return NamedSharding(self.mesh, spec)

        return jax.tree.map(one, state)

    def loss(self, hidden: jax.Array, model: Transformer, targets: jax.Array, **options: Any) -> jax.Array:
        """Mean smoothed loss over all devices; none ever holds the logits of all its tokens.

        Runs under jax.set_mesh: on an Auto mesh, arrays that are traced do not know how they lie, and specs say it.
        """
        return jax_ls.linear_cross_entropy(
            hidden,
            model.words.embedding[...],
            targets,
            transposed=True,
            bias=model.bias[...],
            hidden_spec=self.tokens.spec,
            kernel_spec=P("model", "fsdp"),
            **options,
        )
