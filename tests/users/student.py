"""A student who has a Flax NNX script and one line of loss: optax's. The line is replaced, and ε is annealed.

python tests/users/student.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jax_ls


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.last = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        return self.last(nnx.relu(self.first(images)))


@nnx.jit
def train_step(model, optimizer, images, labels, smoothing):
    def loss(model):
        # Was: optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()
        return jax_ls.smoothed_cross_entropy(model(images), labels, smoothing, reduction="mean")

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


digits = load_digits()
images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
train, test = slice(0, 1500), slice(1500, None)

model = Network(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
annealed = optax.cosine_decay_schedule(0.2, 250)

for step in range(250):
    batch = jax.random.randint(jax.random.key(step), (128,), 0, 1500)
    value = train_step(model, optimizer, images[batch], labels[batch], annealed(step))

accuracy = jnp.mean(model(images[test]).argmax(-1) == labels[test])
print(f"loss {value:.3f}, accuracy {accuracy:.1%}")
assert accuracy > 0.85

# What a student types first is answered.
try:
    jax_ls.smoothed_cross_entropy(model(images[test]), labels[test], label_smoothing=0.1)
except TypeError as error:
    answer = str(error)
print(answer)
assert "the name smoothing=" in answer
