"""An engineer who ports a PyTorch training step: first call for call, then in the words of the library.

python tests/users/engineer.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_ls
from jax_ls.compat import torch_cross_entropy

# As in PyTorch: images (N, C, H, W), a mask of labels with 255 for "void", NumPy weights of classes.
rng = np.random.default_rng(0)
masks = rng.integers(0, 5, (4, 8, 8))
images = jnp.asarray(np.eye(5)[masks].transpose(0, 3, 1, 2) + 0.3 * rng.normal(size=(4, 5, 8, 8)), jnp.float32)
masks[:, 0] = 255
weights = np.array([0.5, 1.0, 2.0, 1.0, 1.0], np.float32)
parameters = {"weight": jnp.zeros((5, 5)), "bias": jnp.zeros(5)}


def network(parameters, images):
    """A convolution of size 1."""
    return jnp.einsum("nchw,ck->nkhw", images, parameters["weight"]) + parameters["bias"][None, :, None, None]


def ported(parameters):
    # criterion = torch.nn.CrossEntropyLoss(weight=weights, ignore_index=255, label_smoothing=0.1)
    return torch_cross_entropy(network(parameters, images), masks, weights, 255, label_smoothing=0.1)


def rewritten(parameters):
    logits = network(parameters, images)
    return jax_ls.smoothed_cross_entropy(
        logits, masks, 0.1, axis=1, ignore_index=255, class_weights=jnp.asarray(weights), reduction="mean"
    )


optimizer = optax.sgd(1.0, momentum=0.9)
state = optimizer.init(parameters)


@jax.jit
def train_step(parameters, state):
    value, gradients = jax.value_and_grad(ported)(parameters)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(parameters, updates), state, value


first = ported(parameters)
for _ in range(30):
    parameters, state, value = train_step(parameters, state)
print(f"loss {first:.3f} -> {value:.3f}")
assert value < 0.7 * first

for name, gradient in jax.grad(ported)(parameters).items():
    np.testing.assert_allclose(gradient, jax.grad(rewritten)(parameters)[name], rtol=1e-5, atol=1e-7)
kept = masks != 255
hits = network(parameters, images).argmax(1) == masks
print(f"accuracy {hits[kept].mean():.1%} of the pixels that are no void")
assert hits[kept].mean() > 0.9

# What is forgotten in a port is answered: the axis.
try:
    jax_ls.smoothed_cross_entropy(network(parameters, images), masks, 0.1)
except AssertionError as error:
    answer = str(error).splitlines()[0]
print(answer)
assert "axis=1" in answer
