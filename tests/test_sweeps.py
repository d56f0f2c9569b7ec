"""sweep against one run after another: whatever the batch and the devices, wherever it was killed."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from jax_ls import mean, smoothed_cross_entropy
from jax_ls.sweeps import grid, log_uniform, sweep
from jax_ls.sweeps.storage import fingerprint
from jax_ls.sweeps.sweep import _groups, _runs

EPSILONS = np.array([-0.2, 0.0, 0.1, 0.2, 0.5], dtype=np.float32)
SEEDS = (3, 0, 2**32 - 1, 7)
X = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 64).astype(np.int32)


def probe(key, epsilon):
    """Whatever of a run can be known exactly."""
    return {"bits": jax.random.bits(key), "epsilon": epsilon, "deep": [jax.random.bits(key, (2,)) * 2]}


def train(key, epsilon):
    """A network 5-8-3 and ten steps of gradient descent."""
    first, second, shuffle = jax.random.split(key, 3)
    params = jax.random.normal(first, (5, 8)), jax.random.normal(second, (8, 3))

    def loss(params, x, y):
        return mean(smoothed_cross_entropy(jnp.tanh(x @ params[0]) @ params[1], y, epsilon))

    def step(params, key):
        rows = jax.random.permutation(key, len(X))[:16]
        value, grads = jax.value_and_grad(loss)(params, jnp.asarray(X)[rows], jnp.asarray(Y)[rows])
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    params, losses = jax.lax.scan(step, params, jax.random.split(shuffle, 10))
    return {"loss": loss(params, X, Y), "losses": losses}


def one_after_another(function, epsilons=EPSILONS, seeds=SEEDS):
    jitted = jax.jit(function)
    runs = [[jitted(jax.random.key(seed), epsilon) for seed in seeds] for epsilon in epsilons]
    stacked = [jax.tree.map(lambda *x: np.stack(x), *row) for row in runs]
    return jax.tree.map(lambda *x: np.stack(x), *stacked)


@functools.cache
def expected(function):
    return one_after_another(function)


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("batch", [None, 1, 3, 7, 16, 100])
def test_every_run_is_the_run_of_its_own_key_and_epsilon(batch, devices):
    result = sweep(probe, EPSILONS, SEEDS, batch=batch, devices=jax.devices()[:devices])
    want = expected(probe)
    assert list(result.metrics) == ["bits", "deep.0", "epsilon"]
    for name, x in (("bits", want["bits"]), ("epsilon", want["epsilon"]), ("deep.0", want["deep"][0])):
        np.testing.assert_array_equal(result.metrics[name], x)
        assert result.metrics[name].dtype == x.dtype
    # A seed means the same key for every ε.
    assert (result.metrics["bits"] == result.metrics["bits"][:1]).all()


@pytest.mark.parametrize(("batch", "devices"), [(None, 8), (7, 2), (1, 1)])
def test_training_agrees_with_a_loop_to_the_last_digits(batch, devices):
    result = sweep(train, EPSILONS, SEEDS, batch=batch, devices=jax.devices()[:devices])
    for name, want in expected(train).items():
        np.testing.assert_allclose(result.metrics[name], want, rtol=2e-6)
    assert np.ptp(result.metrics["loss"]) > 0.1


def test_several_parameters_and_a_bare_metric():
    points = grid(smoothing=[0.0, 0.5], rate=[1, 2, 3])
    assert {name: x.tolist() for name, x in points.items()} == {
        "smoothing": [0.0, 0.0, 0.0, 0.5, 0.5, 0.5],
        "rate": [1, 2, 3, 1, 2, 3],
    }
    with pytest.warns(UserWarning, match="the best rate, 1, is the lowest of the search"):
        result = sweep(lambda key, p: p["rate"] - 10 * p["smoothing"], points, 2, metric="value", mode="min", batch=4)
    np.testing.assert_array_equal(result.metrics["value"], np.repeat([[1], [2], [3], [-4], [-3], [-2]], 2, axis=1))
    assert result.best == {"smoothing": 0.5, "rate": 1.0}
    assert result.seeds.tolist() == [0, 1]


def test_one_program_for_all_groups_and_for_the_next_sweep(caplog):
    def train(key, epsilon):
        return {"a": epsilon * 3}

    with jax.log_compiles():
        for values in (EPSILONS, EPSILONS / 2):
            result = sweep(train, values, SEEDS, batch=3, devices=jax.devices()[:1])
            np.testing.assert_array_equal(result.metrics["a"], np.repeat(3 * values[:, None], 4, axis=1))
    assert sum("Finished XLA compilation of jit(tile)" in message for message in caplog.messages) == 1


def test_data_is_an_argument_of_the_program_wherever_it_lies():
    data = jax.device_put(jnp.arange(1000.0), jax.devices()[3])
    result = sweep(lambda key, epsilon: epsilon * data.sum(), [1.0, 2.0], 4)
    assert result.metrics["value"].tolist() == [[499500.0] * 4, [999000.0] * 4]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axes", [{"d": 8}, {"runs": 4, "x": 2}])
def test_whatever_mesh_the_caller_has_set(axes, kind):
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))
    with jax.set_mesh(mesh):
        data = jnp.arange(4.0)
        result = sweep(lambda key, epsilon: {"bits": jax.random.bits(key), "a": epsilon * data.sum()}, EPSILONS, SEEDS)
        assert jax.sharding.get_mesh() == mesh
    np.testing.assert_array_equal(result.metrics["bits"], expected(probe)["bits"])
    np.testing.assert_array_equal(result.metrics["a"], np.repeat(EPSILONS[:, None] * 6, 4, axis=1))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 90), st.integers(1, 8), st.sets(st.integers(0, 80)))
def test_groups_cover_what_is_left_within_the_limit(seeds, points, limit, devices, done):
    finished = {divmod(cell, seeds) for cell in done}
    groups = list(_groups((seeds, points), limit, devices, finished))
    assert len({(rows.shape, columns.shape) for rows, columns in groups}) <= 1
    seen = set()
    for rows, columns in groups:
        assert rows.shape[0] == columns.shape[0] == devices
        assert rows.shape[1] * columns.shape[1] <= limit
        seen |= {cell for cell, _ in _runs(rows, columns, {})}
    everything = {(point, seed) for point in range(points) for seed in range(seeds)}
    assert everything - finished <= seen <= everything
    if limit >= seeds * points:
        assert len(groups) <= 1


def test_random_search_is_reproducible_and_in_range():
    values = log_uniform(5, 1e-3, 0.5, 2000)
    assert (values.shape, values.dtype) == ((2000,), np.float32)
    np.testing.assert_array_equal(values, log_uniform(jax.random.key(5), 1e-3, 0.5, 2000))
    assert (values != log_uniform(6, 1e-3, 0.5, 2000)).any()
    assert (np.diff(values) >= 0).all()
    assert (values[0] >= np.float32(1e-3), values[-1] <= np.float32(0.5)) == (True, True)
    # Quantiles of log ε are those of a uniform distribution, up to 2 % of its range.
    share = (np.log(values) - np.log(1e-3)) / np.log(500)
    assert np.abs(share - np.linspace(0, 1, 2000)).max() < 0.04


def test_integers_resume_to_the_last_bit(tmp_path):
    with jax.enable_x64(True):
        most = jnp.array([2**53 + 1, 2**63 - 1, -(2**63)])
        unsigned = jnp.array(2**64 - 1, jnp.uint64)
        for _ in range(2):
            result = sweep(lambda key, e: {"n": most, "u": unsigned}, [0.0, 0.1], results=tmp_path / "runs.jsonl")
            np.testing.assert_array_equal(result.metrics["n"][1, 0], most)
            assert result.metrics["u"].tolist() == [[2**64 - 1]] * 2
            assert result.metrics["n"].dtype == np.int64


FINGERPRINT = """
import jax
from jax.sharding import PartitionSpec as P
from jax_ls.sweeps.storage import fingerprint
policy = jax.checkpoint_policies.save_only_these_names("a", "b", "c", "d")
mesh = jax.make_mesh((1, 1, 1), ("first", "second", "third"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
split = jax.shard_map(lambda x: jax.lax.psum(x, mesh.axis_names), mesh=mesh, in_specs=P(mesh.axis_names), out_specs=P())
def f(x):
    jax.debug.print("{}", x)
    return split(x[None] ** 2)[0]
print(fingerprint(jax.make_jaxpr(jax.grad(jax.checkpoint(f, policy=policy)))(1.0)))
"""


@pytest.mark.parametrize("other", [{"data": 2.0}, {"nested": 2.0}, {"seed": 1}, {"power": 2}])
def test_a_program_with_another_constant_is_another_program(other):
    """Constants of the function, of a function that it jits, keys among them, and numbers written in it."""

    def identity(data=1.0, nested=1.0, seed=0, power=1):
        x, y, key = data * jnp.arange(3.0), nested * np.arange(3.0, dtype=np.float32), jax.random.key(seed)
        inner = jax.jit(lambda e: (y * e).sum())
        return fingerprint(jax.make_jaxpr(lambda e: x.sum() * inner(e) ** power + jax.random.normal(key))(0.5))

    assert identity() == identity()
    assert identity() != identity(**other)


def test_another_process_knows_the_function_again():
    """Sets are ordered by hashes, and those of strings change from process to process."""
    path = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", FINGERPRINT],
            env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(2)
    ]
    first, second = (run.communicate()[0] for run in runs)
    assert len(first.strip()) == 16
    assert first == second


GOOD = {"train": probe, "smoothing": EPSILONS, "seeds": 2}
BAD = [
    ({"train": 3}, TypeError, "train: expected a function .key, smoothing. -> metrics, got 3"),
    ({"smoothing": 0.1}, AssertionError, r"smoothing: expected numbers \(n,\), got float32 \(\)"),
    ({"smoothing": []}, ValueError, "smoothing: expected at least one number, got none"),
    ({"smoothing": "much"}, TypeError, "smoothing: expected a number or an array"),
    ({"smoothing": {}}, ValueError, "smoothing: expected parameters of one length, got {}"),
    ({"smoothing": {"a": [0.0], "b": [0.0, 1.0]}}, ValueError, "parameters of one length, got {'a': 1, 'b': 2}"),
    ({"smoothing": {"a": [[0.0]]}}, AssertionError, r"smoothing\['a'\]: expected numbers \(n,\)"),
    ({"seeds": 0}, ValueError, "seeds: expected a positive integer, got 0"),
    ({"seeds": True}, ValueError, "seeds: expected how many, or distinct integers"),
    ({"seeds": [1, 1]}, ValueError, "seeds: expected how many, or distinct integers"),
    ({"seeds": [-1]}, ValueError, "seeds: expected how many, or distinct integers"),
    ({"seeds": []}, ValueError, "seeds: expected how many, or distinct integers"),
    ({"seeds": [0.5]}, ValueError, "seeds: expected how many, or distinct integers"),
    ({"batch": 0}, ValueError, "batch: expected a positive integer, got 0"),
    ({"batch": 2.0}, TypeError, "batch: expected a positive integer, got 2.0"),
    ({"metric": "deep.0"}, ValueError, r'metric: expected "bits" \| "epsilon", got \'deep.0\''),
    ({"mode": "best"}, ValueError, r'mode: expected "max" \| "min", got \'best\''),
    ({"seeds": 2**33}, ValueError, "seeds: expected at most 16,777,216 runs, got 8,589,934,592 for each of 5"),
    ({"smoothing": {3: [0.1]}}, TypeError, r"smoothing: expected parameters by name, got \[3\]"),
    ({"results": 5}, TypeError, "results: expected the path of a file, got 5"),
    ({"results": "."}, ValueError, r"results: expected the JSON lines of a sweep, \. holds something else"),
    ({"devices": []}, ValueError, r"devices: expected a sequence of at least one device, got \[\]"),
    ({"devices": "cpu"}, ValueError, "devices: expected a sequence of at least one device, got 'cpu'"),
    ({"devices": [0]}, ValueError, r"devices: expected a sequence of at least one device, got \[0\]"),
    ({"train": lambda key, epsilon: {}}, ValueError, "train: expected metrics of different names, got none"),
    ({"train": lambda key, epsilon: key}, TypeError, "train: expected real numbers as metric 'value', got key"),
    ({"train": lambda key, e: {"a": jax.lax.complex(e, e)}}, TypeError, r"real numbers as metric 'a', got complex64"),
    ({"train": lambda key, e: {"a": {"b": e}, "a.b": e}}, ValueError, "train: expected metrics of different names"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_raises_by_name(wrong, error, message):
    with pytest.raises(error, match=message):
        sweep(**GOOD | wrong)


def test_a_bare_device_is_none_of_the_devices():
    with pytest.raises(ValueError, match="devices: expected a sequence of at least one device, got"):
        sweep(**GOOD, devices=jax.devices()[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("x", 0.1, 1, 3), TypeError, "seed: expected an integer or a key, got 'x'"),
        ((1.5, 0.1, 1, 3), TypeError, "seed: expected an integer or a key, got 1.5"),
        ((None, 0.1, 1, 3), TypeError, "seed: expected an integer or a key, got None"),
        ((0, "low", 1, 3), TypeError, "low: expected a number or an array of numbers, got 'low'"),
        ((0, 0.1, None, 3), TypeError, "high: expected a number or an array of numbers, got None"),
        ((0, [0.1, 0.2], 1, 3), AssertionError, r"low: expected a number, got float32 \(2,\)"),
        ((0, 0.1, 1, 2.5), TypeError, "num: expected a positive integer, got 2.5"),
    ],
)
def test_what_random_search_cannot_draw_from_raises_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        log_uniform(*arguments)


def test_bad_searches_raise_by_name():
    with pytest.raises(ValueError, match="low, high: expected 0 < low < high, got 0, 1"):
        log_uniform(0, 0, 1, 3)
    with pytest.raises(ValueError, match="num: expected a positive integer, got 0"):
        log_uniform(0, 0.1, 1, 0)
    with pytest.raises(ValueError, match="grid: expected name=values, got nothing"):
        grid()
    with pytest.raises(AssertionError, match=r"noise: expected numbers \(n,\)"):
        grid(noise=0.1)


def test_the_bar_shows_on_a_terminal_alone_and_only_with_tqdm(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    run = functools.partial(sweep, probe, EPSILONS, 2, batch=4)
    run()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(progress=False)
    assert capsys.readouterr().err == ""
    run()
    shown = capsys.readouterr().err
    assert "sweep" in shown
    assert "10/10" in shown
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert run().metrics["bits"].shape == (5, 2)
    assert capsys.readouterr().err == ""
