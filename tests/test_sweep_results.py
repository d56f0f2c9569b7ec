"""What a sweep leaves: a file to continue from, a table, and a word on what diverged or lies at the edge."""

import doctest
import importlib
import json
import os
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ls import sweeps
from jax_ls.sweeps import grid, log_uniform, storage, sweep

EPSILONS = np.array([-0.2, 0.0, 0.1, 0.2, 0.5], dtype=np.float32)
SEEDS = (3, 0, 2**32 - 1, 7)


def train(key, epsilon):
    """Numbers of every kind; not one of them short."""
    draws = jax.random.uniform(key, (3,)) * epsilon
    return {"loss": draws[2], "losses": draws, "half": draws[0].astype(jnp.bfloat16), "wins": draws[1] > 0}


@pytest.fixture
def trained(monkeypatch):
    """The runs, (point, seed), that were really trained."""
    module = importlib.import_module("jax_ls.sweeps.sweep")  # `sweeps.sweep` is the function
    runs, compiled = [], module._compiled

    def spy(program, mesh):
        run = compiled(program, mesh)

        def record(constants, seeds, points):
            for row, column in zip(np.array(seeds), np.array(points[0]), strict=True):
                runs.extend((float(point), int(seed)) for point in column for seed in row)
            return run(constants, seeds, points)

        return record

    monkeypatch.setattr(module, "_compiled", spy)
    return runs


def interrupt(monkeypatch, after):
    """As if killed between two groups."""
    add, calls = storage.ResultsFile.add, []

    def killed(self, runs):
        calls.append(runs)
        if len(calls) > after:
            raise KeyboardInterrupt
        return add(self, runs)

    monkeypatch.setattr(storage.ResultsFile, "add", killed)


@pytest.mark.parametrize("batch", [4, 6, None])
def test_resumes_after_a_kill_between_groups(trained, monkeypatch, tmp_path, batch):
    path = tmp_path / "new" / "runs.jsonl"
    with monkeypatch.context() as patch:
        interrupt(patch, after=2)
        with pytest.raises(KeyboardInterrupt):
            sweep(train, EPSILONS, SEEDS, batch=4, devices=jax.devices()[:1], results=path)
    kept = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert len(kept) == 8
    assert len(trained) == 12
    whole = sweep(train, EPSILONS, SEEDS)
    trained.clear()

    result = sweep(train, EPSILONS, SEEDS, batch=batch, devices=jax.devices()[:1], results=path)
    if batch == 4:
        assert len(trained) == len(set(trained)) == 12
        assert not set(trained) & {(float(np.float32(line["smoothing"])), line["seed"]) for line in kept}
    for name, want in whole.metrics.items():
        np.testing.assert_array_equal(result.metrics[name], want)
    for line in kept:
        i, j = line["run"]
        assert np.float32(line["metrics"]["loss"]) == result.metrics["loss"][i, j]

    # Nothing is left: the same numbers to the last bit, and nothing is trained.
    trained.clear()
    again = sweep(train, EPSILONS, SEEDS, results=path)
    assert not trained
    for name, want in result.metrics.items():
        np.testing.assert_array_equal(again.metrics[name], want)
        assert again.metrics[name].dtype == want.dtype
    assert [child.name for child in path.parent.iterdir()] == ["runs.jsonl"]


def test_a_write_that_fails_leaves_the_file_as_it_was(monkeypatch, tmp_path):
    path = tmp_path / "runs.jsonl"
    interrupt(monkeypatch, after=1)
    with pytest.raises(KeyboardInterrupt):
        sweep(train, EPSILONS, SEEDS, batch=4, results=path)
    monkeypatch.undo()
    before = path.read_bytes()

    def full(file, data):
        written.append(write(file, data[: len(data) // 2]))
        raise OSError(28, "No space left on device")

    written, write = [], storage.os.write
    monkeypatch.setattr(storage.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        sweep(train, EPSILONS, SEEDS, batch=4, results=path)
    assert sum(written) > 0
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["runs.jsonl"]


def scaled(scale):
    table = jnp.arange(3.0) * scale
    inner = jax.jit(lambda x: x * table)
    return lambda key, epsilon: {"a": inner(epsilon).sum()}


@pytest.mark.filterwarnings("ignore:the best smoothing")
def test_a_file_of_another_sweep_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "runs.jsonl"
    sweep(scaled(1.0), EPSILONS, 2, results=path)
    sweep(scaled(1.0), EPSILONS, 2, results=path, batch=3, metric="a")
    before = path.read_bytes()
    for other, what in [
        ({"seeds": 3}, "seeds: expected .0, 1, 2., got .0, 1"),
        ({"smoothing": EPSILONS[1:]}, "points"),
        ({"train": scaled(2.0)}, "train"),
        ({"train": lambda key, epsilon: {"a": jnp.sin(epsilon)}}, "train"),
        ({"train": lambda key, epsilon: {"b": epsilon}}, "train"),
        ({"name": "mine"}, "train: expected mine"),
    ]:
        arguments = {"train": scaled(1.0), "smoothing": EPSILONS, "seeds": 2} | other
        with pytest.raises(ValueError, match=rf"runs\.jsonl holds a sweep of other {what}"):
            sweep(**arguments, results=path)
    assert path.read_bytes() == before

    # A name says that functions are the same.
    sweep(scaled(1.0), EPSILONS, 2, results=tmp_path / "named.jsonl", name="mine")
    sweep(scaled(2.0), EPSILONS, 2, results=tmp_path / "named.jsonl", name="mine")


@pytest.mark.filterwarnings("ignore:the best smoothing")
def test_a_refusal_shows_where_long_settings_differ(tmp_path):
    values = np.linspace(0, 1, 40)
    sweep(scaled(1.0), values, 2, results=tmp_path / "runs.jsonl", name="a" * 200 + "b")
    message = "holds a sweep of other points['smoothing'][39]: expected 2.0, got 1.0"
    with pytest.raises(ValueError, match=re.escape(message)):
        sweep(scaled(1.0), [*values[:-1], 2.0], 2, results=tmp_path / "runs.jsonl", name="a" * 200 + "b")
    message = "holds a sweep of other points['smoothing'][40]: expected 2.0, got nothing"
    with pytest.raises(ValueError, match=re.escape(message)):
        sweep(scaled(1.0), [*values, 2.0], 2, results=tmp_path / "runs.jsonl", name="a" * 200 + "b")
    with pytest.raises(ValueError, match=r"other train: expected a{200}c, got a{200}b$"):
        sweep(scaled(1.0), values, 2, results=tmp_path / "runs.jsonl", name="a" * 200 + "c")


@pytest.mark.parametrize(
    "kept",
    [
        lambda line: line[:-20],
        lambda line: "",
        lambda line: "[]",
        lambda line: line.replace("metrics", "figures"),
        lambda line: line.replace(line[line.index('"n": ') :], '"n": 9999999999}}'),
    ],
)
def test_a_line_that_is_damaged_is_named_and_the_others_resume(kept, tmp_path):
    path = tmp_path / "runs.jsonl"
    train = lambda key, epsilon: {"n": jnp.int32(7), "a": epsilon}  # noqa: E731
    whole = sweep(train, EPSILONS, 2, results=path)
    lines = path.read_text().splitlines()
    damaged = "\n".join([*lines[:-1], kept(lines[-1]), ""])
    path.write_text(damaged)
    with pytest.raises(ValueError, match=r"line 11 of .* holds something else; without that line the sweep resumes"):
        sweep(train, EPSILONS, 2, results=path)
    assert path.read_text() == damaged
    path.write_text("\n".join([*lines[:-1], ""]))
    np.testing.assert_array_equal(sweep(train, EPSILONS, 2, results=path).metrics["a"], whole.metrics["a"])


@pytest.mark.parametrize(
    "change",
    [
        {"run": [9, 0]},
        {"run": [0, 9]},
        {"run": [-1, 0]},
        {"run": [True, True]},
        {"run": "21"},
        {"run": [4.0, 1.0]},
        {"run": [4, 1, 0]},
        {"smoothing": 0.3},
        {"smoothing": True},
        {"smoothing": None},
        {"seed": 7},
        {"metrics": {"n": 7.5, "a": 0.5}},
        {"metrics": {"n": True, "a": 0.5}},
        {"metrics": {"n": 7, "a": "0.5"}},
        {"metrics": {"n": 7, "a": True}},
        {"metrics": {"n": 7, "a": [0.5]}},
        {"metrics": {"n": 7, "a": 1e300}},
        {"metrics": {"n": 7, "a": None}},
        {"metrics": [7, 0.5]},
    ],
    ids=str,
)
def test_a_line_that_no_sweep_has_written_is_refused(change, tmp_path):
    path = tmp_path / "runs.jsonl"
    train = lambda key, epsilon: {"n": jnp.int32(7), "a": epsilon}  # noqa: E731
    sweep(train, EPSILONS, 2, results=path)
    *lines, last = path.read_text().splitlines()
    damaged = "\n".join([*lines, json.dumps(json.loads(last) | change), ""])
    path.write_text(damaged)
    with pytest.raises(ValueError, match=r"results: expected .*line 11 of .*; without that line the sweep resumes"):
        sweep(train, EPSILONS, 2, results=path)
    assert path.read_text() == damaged


@pytest.mark.parametrize("line", [2, 1])
def test_json_without_a_bottom_is_refused(line, tmp_path):
    path = tmp_path / "runs.jsonl"
    sweep(train, EPSILONS, 2, results=path)
    lines = path.read_text().splitlines()
    lines[line - 1] = "[" * 100_000
    path.write_text("\n".join([*lines, ""]))
    with pytest.raises(ValueError, match="results: expected the JSON lines of a sweep"):
        sweep(train, EPSILONS, 2, results=path)


def test_a_file_that_ends_within_a_line_is_continued(tmp_path):
    """What a process leaves that is killed while it writes."""
    path = tmp_path / "runs.jsonl"
    whole = sweep(train, EPSILONS, 2, results=path)
    text = path.read_bytes()
    path.write_bytes(text[:-20])
    again = sweep(train, EPSILONS, 2, results=path)
    for name, want in whole.metrics.items():
        np.testing.assert_array_equal(again.metrics[name], want)
    assert path.read_bytes() == text


def test_a_file_that_is_finished_is_read_where_nothing_can_be_written(monkeypatch, tmp_path):
    path = tmp_path / "runs.jsonl"
    whole = sweep(train, EPSILONS, 2, results=path)
    opened = os.open

    def on_a_read_only_disk(path, flags, *args):
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(30, "Read-only file system", str(path))
        return opened(path, flags, *args)

    monkeypatch.setattr(storage.os, "open", on_a_read_only_disk)
    monkeypatch.setattr(storage.os, "replace", lambda *_: on_a_read_only_disk(path, os.O_RDWR))
    monkeypatch.setattr(storage.os, "link", lambda *_: on_a_read_only_disk(path, os.O_RDWR))
    again = sweep(train, EPSILONS, 2, results=path)
    for name, want in whole.metrics.items():
        np.testing.assert_array_equal(again.metrics[name], want)
    # One that is not must not be found out about after an hour of training.
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(OSError, match="Read-only"):
        sweep(train, EPSILONS, 2, results=path)


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "far").mkdir()
    link, target = tmp_path / "runs.jsonl", tmp_path / "far" / "real.jsonl"
    link.symlink_to(target)
    for _ in range(2):
        sweep(train, EPSILONS, 2, results=link, batch=4)
        assert link.is_symlink()
        assert len(target.read_text().splitlines()) == 11
    assert sorted(child.name for child in tmp_path.iterdir()) == ["far", "runs.jsonl"]
    assert [child.name for child in (tmp_path / "far").iterdir()] == ["real.jsonl"]


def test_a_batch_is_appended_and_nothing_rewritten(tmp_path):
    path, sizes = tmp_path / "runs.jsonl", []
    write = storage.os.write

    def spy(file, data):
        sizes.append(len(data))
        return write(file, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.os, "write", spy)
        sweep(train, EPSILONS, 20, batch=1, results=path)
    assert len([size for size in sizes if size]) == 100
    head = path.read_bytes().index(b"\n") + 1
    assert sum(sizes) == path.stat().st_size - head


def test_a_file_that_is_taken_away_is_written_again(monkeypatch, tmp_path):
    path, add = tmp_path / "runs.jsonl", storage.ResultsFile.add

    def robbed(self, runs):
        if len(self.runs) == 4:
            path.unlink()
        return add(self, runs)

    monkeypatch.setattr(storage.ResultsFile, "add", robbed)
    sweep(train, EPSILONS, 2, batch=4, devices=jax.devices()[:1], results=path)
    assert len(path.read_text().splitlines()) == 11


def test_parameters_may_have_the_names_of_the_file(tmp_path):
    path = tmp_path / "runs.jsonl"
    points = {name: np.array([0.5, 0.25], np.float32) for name in ("run", "seed", "metrics", "sweep")}
    for _ in range(2):
        result = sweep(lambda key, point: {"a": point["run"] + point["seed"]}, points, 2, results=path)
        np.testing.assert_array_equal(result.metrics["a"], [[1.0, 1.0], [0.5, 0.5]])


WORKER = """
import sys, warnings
import jax, jax.numpy as jnp, numpy as np
from jax_ls.sweeps import sweep
jax.config.update("jax_platforms", "cpu")
warnings.simplefilter("ignore")
train = lambda key, e: {"a": e + jax.random.uniform(key)}
result = sweep(train, np.linspace(0, 1, 10, dtype=np.float32), 10, batch=1, results=sys.argv[1], name="mine")
np.save(sys.argv[2], result.metrics["a"])
"""


def test_processes_that_share_a_file(tmp_path):
    """None dies, whoever reads meanwhile sees whole lines, and all have the same numbers."""
    path = tmp_path / "runs.jsonl"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path), str(tmp_path / f"{i}.npy")], stderr=subprocess.PIPE, text=True
        )
        for i in range(3)
    ]
    reads = 0
    while any(worker.poll() is None for worker in workers):
        if path.exists():
            head, *rest = path.read_bytes().split(b"\n")
            assert "sweep" in json.loads(head)
            assert all(json.loads(line)["metrics"] for line in rest[:-1])
            reads += 1
    for worker in workers:
        assert worker.wait() == 0, worker.stderr.read()
        worker.stderr.close()
    assert reads
    assert sorted(json.loads(line)["run"] for line in path.read_text().splitlines()[1:]) == [
        [i, j] for i in range(10) for j in range(10)
    ]
    found = [np.load(tmp_path / f"{i}.npy") for i in range(3)]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    assert sorted(child.name for child in tmp_path.iterdir()) == ["0.npy", "1.npy", "2.npy", "runs.jsonl"]


@pytest.mark.parametrize("content", [b"", b"{}\n", b"[1]\n", b"notes of mine\n", b"\xff\xfe"])
def test_a_file_that_is_no_sweep_is_refused_and_left_alone(content, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"results: expected the JSON lines of a sweep, .*file holds something else"):
        sweep(train, EPSILONS, 2, results=path)
    assert path.read_bytes() == content


def diverging(key, epsilon):
    """Seed 1 at ε = 0.1 has a NaN, seed 0 at ε = 0.5 an infinite loss, all of ε < 0 half a curve of NaN."""
    first = (jax.random.key_data(key) == jax.random.key_data(jax.random.key(1))).all() & (epsilon == 0.1)
    second = (jax.random.key_data(key) == jax.random.key_data(jax.random.key(0))).all() & (epsilon == 0.5)
    accuracy = jnp.where(first, jnp.nan, 1 - epsilon**2)
    curve = jnp.stack([epsilon, jnp.where(epsilon < 0, jnp.nan, epsilon)])
    return {"accuracy": accuracy, "loss": jnp.where(second, jnp.inf, epsilon), "curve": curve}


def test_a_run_that_diverges_is_nan_alone_and_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    message = r"diverged, .*: smoothing=-0.2, .*; smoothing=0.1, seed=1 \(accuracy\); smoothing=0.5, seed=0 \(loss\)"
    for _ in range(2):
        with pytest.warns(UserWarning, match=message) as caught:
            result = sweep(diverging, EPSILONS, 3, metric="accuracy", results=path, batch=4)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert np.argwhere(~np.isfinite(result.metrics["accuracy"])).tolist() == [[2, 1]]
        assert np.argwhere(np.isinf(result.metrics["loss"])).tolist() == [[4, 0]]
        assert np.isnan(result.metrics["curve"][0, :, 1]).all()
        assert result.best == {"smoothing": 0.0}
    curves = [({"smoothing": -0.2}, seed, ["curve"]) for seed in range(3)]
    assert result.diverged == [*curves, ({"smoothing": 0.1}, 1, ["accuracy"]), ({"smoothing": 0.5}, 0, ["loss"])]
    rows = result.table().splitlines()
    assert "0.99 (2 of 3)" in rows[4]
    assert "diverged, and left out of the means" in str(result)
    json.loads(path.read_text().splitlines()[1], parse_constant=pytest.fail)


def test_an_array_that_diverges_is_named():
    """It does not speak for the metric that `best` looks at: a NaN may be an empty bin's."""

    def train(key, epsilon):
        return {
            "a": -jnp.abs(epsilon - 0.2),
            "curve": [jnp.zeros((2, 0)), jnp.where(epsilon > 0.3, jnp.inf, jnp.ones((2, 3)))],
        }

    with pytest.warns(UserWarning, match=r"diverged, .*: smoothing=0.5, seed=0 \(curve.1\)"):
        result = sweep(train, EPSILONS, metric="a")
    assert result.best == {"smoothing": 0.2}
    # Without a scalar there is no column to show it.
    with pytest.warns(UserWarning, match=r"diverged, .*: smoothing=0.1, seed=0 \(value\)"):
        result = sweep(lambda key, e: jnp.stack([e, e * jnp.nan]), [0.1])
    assert str(result).splitlines()[0] == "| smoothing |"


def test_an_epsilon_that_always_diverges_is_never_best():
    with pytest.warns(UserWarning, match="smoothing=0.5, seed=0"):
        result = sweep(lambda key, e: {"a": jnp.where(e > 0.3, jnp.nan, -jnp.abs(e))}, EPSILONS, 2, metric="a")
    assert result.best == {"smoothing": 0.0}
    assert "| diverged " in result.table()
    with pytest.warns(UserWarning, match="diverged") as caught:
        assert sweep(lambda key, e: {"a": e * jnp.nan}, EPSILONS, 2, metric="a").best is None
    assert "seed=1 (a) and 2 more" in str(caught[0].message)
    assert [str(warning.message) for warning in caught][1:] == ["no best a: it diverged in some run of each row"]


@pytest.mark.parametrize(("top", "side"), [(-1.0, "lowest"), (1.0, "highest"), (0.1, None)])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_best_at_the_edge_is_told(top, side, mode):
    sign = 1.0 if mode == "max" else -1.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = sweep(lambda key, e: {"score": -sign * jnp.abs(e - top)}, EPSILONS, metric="score", mode=mode)
    best = EPSILONS[np.abs(EPSILONS - top).argmin()]
    assert result.best == {"smoothing": pytest.approx(float(best))}
    messages = [str(warning.message) for warning in caught]
    assert messages == ([] if side is None else [f"the best smoothing, {best:.4g}, is the {side} of the search: "
                                                 "a better one may lie beyond"])  # fmt: skip


def test_two_values_have_no_inside():
    assert sweep(lambda key, e: {"a": e}, [0.0, 0.1], metric="a").best == {"smoothing": 0.1}


def test_means_errors_and_table():
    noise = jnp.array([0.0, 0.5, -0.3])
    result = sweep(lambda key, e: {"a": 1 + e + noise[jax.random.key_data(key)[-1]], "v": e + noise}, [0.0, 0.25], 3)
    values = 1 + np.array([[0.0], [0.25]]) + np.array([0.0, 0.5, -0.3])
    np.testing.assert_allclose(result.mean("a"), values.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(result.standard_error("a"), values.std(axis=1, ddof=1) / np.sqrt(3), rtol=1e-5)
    assert result.mean("v").shape == result.standard_error("v").shape == (2, 3)
    np.testing.assert_allclose(result.mean("v")[1], [0.25, 0.75, -0.05], rtol=1e-6)
    assert result.best is None
    assert str(result).splitlines() == [
        "| smoothing | a           |",
        "| --------- | ----------- |",
        "| 0         | 1.07 ± 0.23 |",
        "| 0.25      | 1.32 ± 0.23 |",
    ]
    with pytest.raises(ValueError, match=r"metric: expected \"a\" \| \"v\", got 'b'"):
        result.mean("b")
    alone = sweep(lambda key, e: {"a": e}, [0.0, 0.25])
    assert np.isnan(alone.standard_error("a")).all()
    assert alone.table().endswith("| 0.25      | 0.25 |")


@pytest.mark.parametrize("thing", [sweep, grid, log_uniform, sweeps.SweepResult], ids=lambda thing: thing.__name__)
def test_examples_of_the_docstrings_run(thing):
    (test,) = doctest.DocTestFinder(recurse=False).find(thing, globs={"np": np})
    assert test.examples
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0
