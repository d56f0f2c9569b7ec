"""How far diabetes came in a year, in ten ordered classes: 442 real patients, a network for them, its scores.

Efron et al., "Least Angle Regression", 2004; shipped by scikit-learn, which mlxtend brings.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_ls

CLASSES, HIDDEN, RATE = 10, 64, 3e-3


class Patients(NamedTuple):
    """Measurements (n, 10), and the class of the progression (n,), 0 to 9."""

    inputs: np.ndarray
    labels: np.ndarray


def load() -> Patients:
    """The edges of the classes are deciles of all patients: they say what the task is."""
    from sklearn.datasets import load_diabetes

    data: Any = load_diabetes(scaled=False)
    edges = np.quantile(data.target, np.arange(1, CLASSES) / CLASSES)
    labels = np.searchsorted(edges, data.target, side="right")
    return Patients(data.data.astype(np.float32), labels.astype(np.int32))


def fit(key: jax.Array, data: Patients, kept: jax.Array, target: jax_ls.Target, steps: int) -> jax.Array:
    """Logits of all patients, from a network trained on those that are kept (n,)."""
    inputs, weights = jnp.asarray(data.inputs), kept.astype(jnp.float32)
    mean = weights @ inputs / jnp.sum(weights)
    deviation = jnp.sqrt(weights @ jnp.square(inputs - mean[None]) / jnp.sum(weights))
    inputs = (inputs - mean[None]) / deviation[None]

    first, second = jax.random.split(key)
    size = inputs.shape[1]
    params = {
        "w1": jax.random.normal(first, (size, HIDDEN)) * math.sqrt(2 / size),
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(second, (HIDDEN, CLASSES)) * math.sqrt(1 / HIDDEN),
        "b2": jnp.zeros(CLASSES),
    }
    rule = optax.adam(RATE)

    def predict(params: dict[str, jax.Array]) -> jax.Array:
        hidden = jax.nn.relu(inputs @ params["w1"] + params["b1"][None])
        return hidden @ params["w2"] + params["b2"][None]

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return jax_ls.mean(jax_ls.cross_entropy(predict(params), target, where=kept), weights)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = rule.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, rule.init(params)), length=steps)
    return predict(params)


def scores(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Of each example: how far the median class is off, ranked probability score, NLL, whether the mode is right."""
    p = jax.nn.softmax(logits, axis=-1)
    below = jnp.cumsum(p, axis=-1)
    reached = (jnp.arange(CLASSES)[None] >= labels[:, None]).astype(p.dtype)
    median = jnp.sum(below < 0.5, axis=-1)
    return {
        "distance": jnp.abs(median - labels).astype(p.dtype),
        "rps": jnp.sum(jnp.square(below - reached), axis=-1),
        "nll": jax_ls.cross_entropy(logits, labels),
        "correct": (jnp.argmax(logits, axis=-1) == labels).astype(p.dtype),
    }
