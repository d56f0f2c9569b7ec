"""A researcher who compares methods: one training function, a table with standard errors, a file of all runs.

python tests/users/researcher.py
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jax_ls
from jax_ls import calibration, penalties, sweeps

digits = load_digits()
images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
train, held_out = slice(0, 300), slice(1200, None)
optimizer = optax.adam(1e-2)


def train_with(key, loss):
    """Trains a network on 300 digits with `loss(logits, labels)`, a mean; returns what is reported."""
    keys = jax.random.split(key)
    parameters = [0.1 * jax.random.normal(k, shape) for k, shape in zip(keys, [(64, 32), (32, 10)], strict=True)]

    def network(parameters, images):
        return jax.nn.relu(images @ parameters[0]) @ parameters[1]

    def step(carry, _):
        parameters, state = carry
        gradients = jax.grad(lambda p: loss(network(p, images[train]), labels[train]))(parameters)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(parameters, updates), state), None

    (parameters, _), _ = jax.lax.scan(step, (parameters, optimizer.init(parameters)), length=60)
    logits = network(parameters, images[held_out])
    return {
        "accuracy": jnp.mean(logits.argmax(-1) == labels[held_out]),
        "NLL": calibration.negative_log_likelihood(logits, labels[held_out]),
    }


def smoothed(smoothing, **options):
    return lambda z, y: jax_ls.smoothed_cross_entropy(z, y, smoothing, reduction="mean", **options)


def with_confidence_penalty(z, y):
    return jnp.mean(jax_ls.cross_entropy(z, y) + penalties.confidence_penalty(z, 0.1))


methods = {
    "cross-entropy": smoothed(0.0),
    "smoothing": smoothed(0.1),
    "others": smoothed(0.1, spread="others"),
    "confidence penalty": with_confidence_penalty,
}
result = sweeps.sweep(train_with, methods, seeds=3, metric="NLL", mode="min", progress=False)
print(result)
assert len(result.points["method"]) == 4
assert result.best["method"] in methods
assert result.metrics["accuracy"].min() > 0.7

# The table in a paper, in a notebook, and in a spreadsheet.
assert "| smoothing " in result._repr_markdown_()
assert "<td>smoothing</td>" in result._repr_html_()
with tempfile.TemporaryDirectory() as folder:
    result.write_csv(Path(folder) / "runs.csv")
    head, *lines = (Path(folder) / "runs.csv").read_text().splitlines()
assert head == "method,seed,NLL,accuracy"
assert len(lines) == 12

# The same function takes numbers: the best ε.
by_number = sweeps.sweep(
    lambda key, epsilon: train_with(key, smoothed(epsilon)), [0.0, 0.1, 0.3], seeds=3, metric="accuracy", progress=False
)
print(by_number)
