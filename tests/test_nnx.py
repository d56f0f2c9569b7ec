"""The Flax NNX adapters: in a compiled training step, out of the optimizer's reach, and saved with the model."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

from jax_ls import calibration, mean, online, smoothed_cross_entropy
from jax_ls.adaptive import CalibrationController
from jax_ls.nnx import OnlineSmoothing, SmoothingController, SmoothingState

K, N, D = 3, 24, 4
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(N, D)).astype(np.float32)
LABELS = np.argmax(INPUTS[:, :K], axis=-1).astype(np.int32)
CONTROLLER = CalibrationController(rate=0.5)


class Model(nnx.Module):
    def __init__(self, decay=None):
        self.linear = nnx.Linear(D, K, rngs=nnx.Rngs(0))
        self.online = OnlineSmoothing(K, decay=decay)
        self.control = SmoothingController(CONTROLLER)

    def __call__(self, inputs):
        return self.linear(inputs)


@nnx.jit
def train_step(model, optimizer, inputs, labels):
    def loss(model):
        logits = model(inputs)
        value = mean(
            smoothed_cross_entropy(logits, labels, model.control.smoothing[...], prior=model.online.target(labels))
        )
        model.online.update(logits, labels)
        model.control.update(logits, labels)
        return value

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def trained(decay=None, epochs=2, steps=10):
    model = Model(decay)
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)
    history = []
    for _ in range(epochs):
        history += [train_step(model, optimizer, INPUTS, LABELS) for _ in range(steps)]
        if decay is None:
            model.online.next_epoch()
    return model, history


def by_hand(decay=None, epochs=2, steps=10):
    """The same training with pure functions."""
    graph, params, rest = nnx.split(Model(decay), nnx.Param, ...)
    tx = optax.sgd(0.5)
    opt, soft, control = tx.init(params), online.init(K, decay=decay), CONTROLLER.init()

    @jax.jit
    def step(params, opt, soft, control):
        def loss(params):
            logits = nnx.merge(graph, params, rest)(INPUTS)
            losses = smoothed_cross_entropy(logits, LABELS, control.smoothing, prior=online.target(soft, LABELS))
            return mean(losses), logits

        (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        soft, control = online.update(soft, logits, LABELS), CONTROLLER.update(control, logits, LABELS)
        return optax.apply_updates(params, updates), opt, soft, control, value

    history = []
    for _ in range(epochs):
        for _ in range(steps):
            params, opt, soft, control, value = step(params, opt, soft, control)
            history.append(value)
        soft = online.next_epoch(soft) if decay is None else soft
    return params, soft, control, history


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_training_step_does_what_the_pure_functions_do(decay):
    model, history = trained(decay)
    params, soft, control, expected = by_hand(decay)
    np.testing.assert_allclose(history, expected, rtol=1e-4)
    found = nnx.state(model, nnx.Param)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), model.online.state, soft)
    np.testing.assert_allclose(model.control.smoothing[...], control.smoothing, rtol=1e-4)
    np.testing.assert_allclose(model.control.gap[...], control.gap, rtol=1e-3)
    assert history[-1] < history[0]


@pytest.mark.parametrize("decay", [None, 0.9])
def test_it_is_saved_and_restored_with_the_model(decay, tmp_path):
    model, _ = trained(decay, epochs=1, steps=3)
    graph, state = nnx.split(model)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "model", nnx.to_pure_dict(state))
        saver.wait_until_finished()
        fresh = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Model(decay))))
        found = saver.restore(tmp_path / "model", fresh)
    nnx.replace_by_pure_dict(state, found)
    again = nnx.merge(graph, state)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))
    optimizers = [nnx.Optimizer(m, optax.sgd(0.1), wrt=nnx.Param) for m in (model, again)]
    values = [train_step(m, o, INPUTS, LABELS) for m, o in zip((model, again), optimizers, strict=True)]
    assert values[0] == values[1]


def test_its_variables_are_of_a_kind_of_their_own():
    _, params, learned = nnx.split(Model(), nnx.Param, SmoothingState)
    assert len(jax.tree.leaves(params)) == 2
    assert set(learned) == {"online", "control"}
    assert set(learned["online"]) == {"matrix", "sums", "counts", "lost_sums", "lost_counts"}
    assert set(learned["control"]) == {"smoothing", "gap"}


def test_masks_reach_the_state():
    soft, control = OnlineSmoothing(K), SmoothingController(CONTROLLER)
    nothing = np.zeros(N, bool)
    soft.update(INPUTS[:, :K], LABELS, where=nothing)
    control.update(INPUTS[:, :K], LABELS, where=nothing)
    assert not np.any(soft.counts[...])
    assert control.smoothing[...] == np.float32(0.1)
    soft.update(INPUTS[:, :K], LABELS)
    control.update(INPUTS[:, :K], LABELS)
    assert np.sum(soft.counts[...]) == N
    assert control.smoothing[...] != np.float32(0.1)


def test_a_controller_of_arrays_is_held_as_numbers():
    control = SmoothingController(CalibrationController(rate=jnp.float32(0.5)))
    nnx.jit(lambda c: c.update(INPUTS[:, :K], LABELS))(control)
    expected = SmoothingController(CONTROLLER)
    expected.update(INPUTS[:, :K], LABELS)
    np.testing.assert_allclose(control.smoothing[...], expected.smoothing[...], rtol=1e-6)
    assert SmoothingController().smoothing[...] == np.float32(0.1)


def test_bad_input():
    with pytest.raises(ValueError, match="num_classes: expected"):
        OnlineSmoothing(50257)
    with pytest.raises(ValueError, match="state: expected one with epochs"):
        OnlineSmoothing(K, decay=0.5).next_epoch()


def test_the_package_does_without_flax():
    alone = "import sys, jax_ls; from jax_ls import adaptive, online; assert not {'flax', 'orbax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", alone], check=True)


STATES = {
    "epochs": lambda: online.update(online.init(K), INPUTS[:, :K], LABELS),
    "decay": lambda: online.update(online.init(K, decay=0.9), INPUTS[:, :K], LABELS),
    "controller": lambda: CalibrationController().update(CalibrationController().init(), INPUTS[:, :K], LABELS),
    "reliability": lambda: calibration.reliability(INPUTS[:, :K], LABELS),
    "mean": lambda: calibration.Mean.of(jnp.arange(3.0)),
}


@pytest.mark.parametrize("name", STATES)
def test_flax_serialization_stores_states(name):
    """Alone and within a tree; what does not fit is refused."""
    state = STATES[name]()
    empty = jax.tree.map(jnp.zeros_like, state)
    found = serialization.from_bytes({"state": empty, "step": 0}, serialization.to_bytes({"state": state, "step": 7}))
    assert found["step"] == 7
    assert jax.tree.structure(found["state"]) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found["state"], state)
    again = serialization.from_bytes(empty, serialization.to_bytes(state))
    jax.tree.map(np.testing.assert_array_equal, again, state)
    with pytest.raises(ValueError, match="expected the fields"):
        serialization.from_state_dict(empty, {"matrix": jnp.eye(K)})
