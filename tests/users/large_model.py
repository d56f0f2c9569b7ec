"""Someone who trains a large model with FSDP: eight devices, every matrix split over all of them, no logits anywhere.

python tests/users/large_model.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ls

jax.config.update("jax_num_cpu_devices", 8)

BATCH, LENGTH, D, WORDS = 8, 16, 32, 512

mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
jax.set_mesh(mesh)
split = {"embedding": P(None, "fsdp"), "mix": P("fsdp"), "kernel": P("fsdp")}
keys = jax.random.split(jax.random.key(0), 4)
parameters = {
    "embedding": 0.1 * jax.random.normal(keys[0], (WORDS, D)),
    "mix": jax.random.normal(keys[1], (D, D)) / D**0.5,
    "kernel": jax.random.normal(keys[2], (D, WORDS)) / D**0.5,
}
parameters = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), parameters, split)
tokens = jax.random.randint(keys[3], (BATCH, LENGTH + 1), 0, WORDS)
tokens = jax.device_put(tokens.at[:, -3:].set(0), NamedSharding(mesh, P("fsdp")))  # 0 is padding
optimizer = optax.adam(1e-2)
state = optimizer.init(parameters)


def hidden_states(parameters, tokens):
    """What a transformer would compute."""
    return jnp.tanh(parameters["embedding"][tokens] @ parameters["mix"])


def loss(parameters, tokens):
    inputs, words = tokens[:, :-1], tokens[:, 1:]
    parts = jax_ls.linear_cross_entropy(
        hidden_states(parameters, inputs),
        parameters["kernel"],
        words,
        smoothing=0.1,
        ignore_index=0,
        z_loss=1e-4,
        return_parts=True,
        hidden_spec=P("fsdp", None, None),
        kernel_spec=P("fsdp", None),
    )
    return parts.loss, parts


@jax.jit
def train_step(parameters, state, tokens):
    (_, parts), gradients = jax.value_and_grad(loss, has_aux=True)(parameters, tokens)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(parameters, updates), state, parts


before = jax.device_get(parameters)
parameters, state, first = train_step(parameters, state, tokens)
for _ in range(20):
    parameters, state, parts = train_step(parameters, state, tokens)
print(f"loss {first.loss:.3f} -> {parts.loss:.3f}, without smoothing {parts.unsmoothed:.3f}, z-loss {parts.z_loss:.4f}")
assert parts.loss < first.loss
assert parameters["kernel"].sharding.shard_shape((D, WORDS)) == (D // 8, WORDS), "the kernel stays split"

# The number is that of one device, with logits.
with jax.set_mesh(jax.make_mesh((1,), ("one",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])):
    whole = jax.tree.map(jnp.asarray, before)
    words = jnp.asarray(np.asarray(tokens))
    logits = hidden_states(whole, words[:, :-1]) @ whole["kernel"]
    plain = jax_ls.smoothed_cross_entropy(logits, words[:, 1:], 0.1, ignore_index=0, z_loss=1e-4, reduction="mean")
np.testing.assert_allclose(first.loss, plain, rtol=1e-5)
