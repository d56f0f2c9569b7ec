"""Online label smoothing: the mean belief for each class, learned by epochs or as a running mean."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import reference
import reference_adaptive
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ls import cross_entropy, online, smoothed_cross_entropy

K, N, STEPS = 4, 16, 3
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(STEPS, N, K)).astype(np.float32)
# Class 3 never comes; of the others about half is right, and some do not count.
LABELS = np.where(RNG.random((STEPS, N)) < 0.5, LOGITS.argmax(-1), RNG.integers(0, 3, (STEPS, N))).astype(np.int32)
LABELS = np.where(LABELS == 3, 0, LABELS).astype(np.int32)
WHERE = RNG.random((STEPS, N)) < 0.8
update = jax.jit(online.update)
next_epoch = jax.jit(online.next_epoch)


def run(state, logits=LOGITS, labels=LABELS, where=WHERE):
    for z, y, counts in zip(logits, labels, where, strict=True):
        state = update(state, z, y, where=counts)
    return state


def batches(logits=LOGITS):
    return list(zip(np.asarray(logits).astype(float), LABELS, WHERE, strict=True))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("first", ["zeros", "uniform"])
def test_an_epoch(first, dtype):
    start = np.full((K, K), 0.0 if first == "zeros" else 1 / K)
    with cases.precision(dtype):
        logits = jnp.asarray(LOGITS, dtype)
        state = run(online.init(K, first=first), logits)
        np.testing.assert_array_equal(state.matrix, start)
        state = next_epoch(state)
    cases.assert_close(state.matrix, reference_adaptive.online_epoch(start, batches(logits)))
    # A class that was never right gets 1/K, as published.
    np.testing.assert_array_equal(state.matrix[3], np.full(K, 1 / K))
    assert not np.any(state.sums)
    assert not np.any(state.counts)
    # The next one starts from here: an epoch of nothing changes nothing.
    np.testing.assert_array_equal(next_epoch(state).matrix, state.matrix)


@pytest.mark.parametrize("first", ["zeros", "uniform"])
def test_a_running_mean(first):
    start = np.full((K, K), 0.0 if first == "zeros" else 1 / K)
    state = run(online.init(K, first=first, decay=0.9))
    assert state.sums is None
    assert state.counts is None
    expected = reference_adaptive.online_average(start, batches(), 0.9)
    cases.assert_close(state.matrix, expected)
    np.testing.assert_array_equal(state.matrix[3], start[3])


def test_vmap_over_decay():
    decays = jnp.array([0.0, 0.5, 0.99])
    swept = jax.vmap(lambda d: run(online.init(K, decay=d)).matrix)(decays)
    for matrix, decay in zip(swept, decays, strict=True):
        expected = reference_adaptive.online_average(np.zeros((K, K)), batches(), float(decay))
        cases.assert_close(matrix, expected)


def test_batches_of_several_axes_and_none():
    flat = update(online.init(K), LOGITS[0], LABELS[0], where=WHERE[0])
    deep = update(online.init(K), LOGITS[0].reshape(2, 8, K), LABELS[0].reshape(2, 8), where=WHERE[0].reshape(2, 8))
    np.testing.assert_allclose(deep.sums, flat.sums, rtol=1e-6)
    one = update(online.init(K), 9 * np.eye(K, dtype=np.float32)[2], np.int32(2))
    np.testing.assert_array_equal(one.counts, [0, 0, 1, 0])


def test_a_scan_over_an_epoch():
    def step(state, batch):
        z, y, counts = batch
        return online.update(state, z, y, where=counts), None

    scanned = jax.jit(lambda s: jax.lax.scan(step, s, (LOGITS, LABELS, WHERE))[0])(online.init(K))
    np.testing.assert_allclose(scanned.sums, run(online.init(K)).sums, rtol=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 2**16), st.sampled_from([0.1, 1.0, 10.0]))
def test_laws(seed, scale):
    rng = np.random.default_rng(seed)
    z = (scale * rng.normal(size=(STEPS, N, K))).astype(np.float32)
    y = rng.integers(0, K, (STEPS, N)).astype(np.int32)
    where = rng.random((STEPS, N)) < 0.8
    first = run(online.init(K), z, y, where)
    matrix = np.asarray(next_epoch(first).matrix)
    seen = np.asarray(first.counts) > 0
    np.testing.assert_allclose(matrix.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(matrix[~seen], 1 / K)
    # What is right is likeliest: rows of correct predictions lead at their own class.
    assert np.all(matrix.argmax(-1)[seen] == np.arange(K)[seen])
    order = rng.permutation(N)
    again = run(online.init(K), z[:, order], y[:, order], where[:, order])
    np.testing.assert_allclose(next_epoch(again).matrix, matrix, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [None, 0.0])
def test_a_perfect_model_makes_the_identity(decay):
    state = update(online.init(K, decay=decay), 1000 * np.eye(K, dtype=np.float32), np.arange(K, dtype=np.int32))
    state = next_epoch(state) if decay is None else state
    np.testing.assert_array_equal(state.matrix, np.eye(K))


def test_what_does_not_count_leaves_no_trace():
    z, y = LOGITS[0].copy(), LABELS[0].copy()
    kept = np.arange(N) < 10
    expected = update(online.init(K), z[:10], y[:10])
    z[12:], y[10:] = np.nan, [-100, K, 0, 1, 2, 0]
    for found in (update(online.init(K), z, y), update(online.init(K), z, y, where=kept)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def test_the_published_loss():
    """½ CE(z, δ_y) + ½ CE(z, S_y); ½ CE(z, δ_y) in the first epoch."""
    state = online.init(K)

    @jax.jit
    def losses(z, state):
        return smoothed_cross_entropy(z, LABELS[0], 0.5, prior=online.target(state, LABELS[0]))

    hard = reference.losses(LOGITS[0].astype(float), LABELS[0], 0.0)
    cases.assert_close(losses(LOGITS[0], state), hard / 2, size=4)
    state = next_epoch(run(state))
    matrix = np.asarray(state.matrix, float)

    def by_definition(z):
        rows = (0.5 * reference.one_hot(y, K) + 0.5 * matrix[y] for y in LABELS[0])
        return np.array([reference.cross_entropy(x, q) for x, q in zip(z, rows, strict=True)])

    cases.assert_close(losses(LOGITS[0], state), by_definition(LOGITS[0].astype(float)), size=4)
    slope = jax.jit(jax.grad(lambda z: jnp.sum(losses(z, state))))(LOGITS[0])
    cases.assert_close(slope, reference.gradient_by_class(by_definition, LOGITS[0].astype(float)), size=4)


def test_the_state_is_a_constant():
    def loss(z):
        state = online.next_epoch(online.update(online.init(K), z, LABELS[0]))
        return jnp.sum(state.matrix) + jnp.sum(online.target(state, LABELS[0]).probs(K))

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(LOGITS[0]), np.zeros((N, K)))
    state = next_epoch(run(online.init(K)))
    f = jax.jit(lambda s: cross_entropy(LOGITS[0], online.target(s, LABELS[0])).sum())
    assert not np.any(jax.grad(f, allow_int=True)(state).matrix)


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_devices_that_split_the_batch_agree(mode, decay):
    """Inside shard_map, and on meshes that the compiler or the types look after; the state given is given up."""
    state = online.init(K, first="uniform", decay=decay)
    z, y = LOGITS[0].reshape(2, 8, K), LABELS[0].reshape(2, 8)
    expected = update(state, z, y)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(mode,) * 2)

    def place(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            functools.partial(online.update, batch_axis_name="data"),
            in_specs=(P(), P(None, "data"), P(None, "data")),
            out_specs=P(),
        )
        for step, classes in ((mapped, None), (online.update, None), (online.update, "model")):
            given = jax.tree.map(lambda x: place(jnp.copy(x)), state)
            types = jax.tree.map(jax.typeof, given)
            found = jax.jit(step, donate_argnums=0)(given, place(z, None, "data", classes), place(y, None, "data"))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
            assert mode == AxisType.Auto or jax.tree.map(jax.typeof, found) == types


@pytest.mark.parametrize("decay", [None, 0.9])
def test_its_buffers_can_be_given_up(decay):
    state = online.init(K, decay=decay)
    given = jax.tree.leaves(state)
    jax.jit(online.update, donate_argnums=0)(state, LOGITS[0], LABELS[0])
    assert all(x.is_deleted() for x in given)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_it_is_saved_and_restored(decay, tmp_path):
    state = run(online.init(K, decay=decay))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        found = saver.restore(tmp_path / "state", jax.eval_shape(lambda: online.init(K, decay=decay)))
    assert isinstance(found, online.OnlineState)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found, state)


BAD = [
    ("num_classes", lambda: online.init(0), "0"),
    ("num_classes", lambda: online.init(2.5), r"2\.5"),
    ("num_classes", lambda: online.init(50257), "50257 classes: 30,309,192,588 bytes"),
    ("num_classes", lambda: online.init(50257, decay=0.9), "50257 classes: 10,103,064,196 bytes"),
    ("num_classes", lambda: online.init(10, limit=1199), "1,200 bytes"),
    ("first", lambda: online.init(3, first="ones"), "'ones'"),
    ("decay", lambda: online.init(3, decay=1.0), r"1\.0"),
    ("decay", lambda: online.init(3, decay=-0.1), r"-0\.1"),
    ("decay", lambda: online.init(3, decay=jnp.zeros(2)), r"float32 \(2,\)"),
    ("logits", lambda: online.update(online.init(3), LOGITS[0], LABELS[0]), r"float32 \(16, 4\)"),
    ("logits", lambda: online.update(online.init(K), LABELS, LABELS), r"int32 \(3, 16\)"),
    ("labels", lambda: online.update(online.init(K), LOGITS[0], LABELS[0, :3]), r"int32 \(3,\)"),
    ("labels", lambda: online.target(online.init(K), LOGITS[0]), r"float32 \(16, 4\)"),
    ("where", lambda: online.update(online.init(K), LOGITS[0], LABELS[0], where=WHERE), r"bool \(3, 16\)"),
    ("state", lambda: online.next_epoch(online.init(K, decay=0.9)), "decay"),
    ("table", lambda: cross_entropy(LOGITS[0], online.target(online.init(5), LABELS[0])), r"float32 \(5, 5\)"),
]


@pytest.mark.parametrize(("name", "call", "got"), BAD)
def test_bad_input(name, call, got):
    with pytest.raises((AssertionError, TypeError, ValueError), match=rf"(?s){name}: expected .*{got}"):
        call()


def test_memory_up_to_the_limit_is_granted():
    assert sum(x.nbytes for x in jax.tree.leaves(online.init(10, limit=1200))) == 1200 + 80
