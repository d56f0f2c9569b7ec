"""examples/studies/long_tailed_digits.py, and the methods and errors that the studies share."""

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
import reference
import reference_methods

for package in ("mlxtend", "matplotlib"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "studies"))
names = ("long_tailed_digits", "methods", "tables", "trials")
long_tailed, methods, tables, trials = (importlib.import_module(name) for name in names)


@pytest.fixture(autouse=True)
def as_a_user_has_it(monkeypatch):
    """One device: eight pretended ones on two cores mostly wait for each other. optax.adam mixes its dtypes."""
    monkeypatch.setattr(trials, "sweep", functools.partial(trials.sweep, devices=jax.devices()[:1]))
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_sizes_fall_by_one_factor():
    assert long_tailed.sizes(400, 100.0).tolist() == [400, 240, 144, 86, 52, 31, 19, 11, 7, 4]
    assert long_tailed.sizes(400, 1.0).tolist() == [400] * 10
    assert long_tailed.sizes(20, 1e6)[-1] == 1


def test_every_class_has_the_digits_of_its_place():
    labels = np.random.default_rng(0).integers(0, 10, 900)
    pool = long_tailed.pool_of(labels)
    assert pool.shape == (10, np.bincount(labels).min())
    counts = long_tailed.sizes(pool.shape[1], 20.0)
    rows, place = jax.jit(lambda key: long_tailed.draw_tail(key, pool, counts))(jax.random.key(0))
    assert len(set(rows.tolist())) == len(rows) == counts.sum()
    np.testing.assert_array_equal(np.bincount(labels[rows], minlength=10), counts[place])
    assert sorted(place.tolist()) == [*range(10)]
    _, other = long_tailed.draw_tail(jax.random.key(1), pool, counts)
    assert place.tolist() != other.tolist()


def test_groups_are_places():
    right, place = jnp.array([1, 0, 1, 1, 0], jnp.int8), jnp.array([0, 2, 3, 9, 7])
    found = long_tailed.by_group(right, place)
    assert {name: float(x) for name, x in found.items()} == {"head": 0.5, "middle": 1.0, "tail": 0.5}


RNG = np.random.default_rng(0)
COUNTS = np.array([40, 30, 20, 12, 9, 6, 4, 3, 2, 1])
LOGITS = RNG.normal(size=(4, 10)).astype(np.float32)
LABELS = np.array([0, 3, 9, 5])
POSTERIOR = LOGITS + np.log(COUNTS / COUNTS.sum())
EPSILON = reference_methods.label_aware(COUNTS.astype(float), 0.3, 0.0, "sine")[LABELS]
BY_DEFINITION = {
    "label-aware": (LOGITS, EPSILON, None),
    "adjusted": (POSTERIOR, np.full(4, 0.3), None),
    "adjusted, label-aware": (POSTERIOR, EPSILON, None),
    "adjusted, to frequencies": (POSTERIOR, np.full(4, 0.3), COUNTS / COUNTS.sum()),
    "adjusted, label-aware, to frequencies": (POSTERIOR, EPSILON, COUNTS / COUNTS.sum()),
}


def batch_of(memory, strength=0.3):
    return methods.Batch(
        jnp.asarray(LOGITS), jnp.asarray(LABELS), jnp.ones(4, bool), jnp.float32(strength), memory, jnp.arange(4) + 5
    )


@pytest.mark.parametrize("name", methods.FOR_LONG_TAILS)
def test_losses_for_long_tails_are_the_papers(name):
    z, epsilon, prior = BY_DEFINITION[name]
    method = methods.FOR_LONG_TAILS[name]
    labels = jnp.asarray(np.repeat(np.arange(10), COUNTS))
    losses = method.losses(batch_of(method.begin(jnp.zeros((len(labels), 1)), labels)))
    rows = zip(z.astype(float), LABELS, epsilon, strict=True)
    expected = [reference.cross_entropy(x, reference.smooth(y, e, 10, prior=prior)) for x, y, e in rows]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_losses_for_wrong_labels_are_the_papers():
    losses = {}
    for name, strength in (("generalized-cross-entropy", 0.7), ("symmetric-cross-entropy", 0.9), ("focal", 2.0)):
        losses[name] = methods.FOR_NOISE[name].losses(batch_of({}, strength))
    for i, (z, y) in enumerate(zip(LOGITS.astype(float), LABELS, strict=True)):
        expected = (
            reference_methods.generalized_cross_entropy(z, y, 0.7),
            reference_methods.symmetric_cross_entropy(z, y, 0.1, 0.9),
            reference_methods.focal(z, reference.one_hot(y, 10), 2.0),
        )
        np.testing.assert_allclose([x[i] for x in losses.values()], expected, rtol=1e-5)


def test_early_learning_sees_the_averages_with_this_batch_in_them():
    method = methods.FOR_NOISE["early-learning"]
    averages = np.zeros((9, 10))
    memory = method.begin(jnp.zeros((9, 1)), jnp.zeros(9, int))
    for _ in range(2):
        batch = batch_of(memory, 3.0)
        averages[5:] = 0.7 * averages[5:] + 0.3 * np.exp([reference.log_softmax(z) for z in LOGITS.astype(float)])
        expected = [
            reference_methods.early_learning(z, y, t, 3.0)
            for z, y, t in zip(LOGITS.astype(float), LABELS, averages[5:], strict=True)
        ]
        np.testing.assert_allclose(method.losses(batch), expected, rtol=1e-4)
        memory = method.learn(memory, batch)
        np.testing.assert_allclose(memory, averages, atol=1e-6)


def test_a_method_that_is_not_chosen_cannot_spoil_a_training():
    """Under `vmap` all losses are computed: at strength 0 generalised cross-entropy is NaN, at 20 bootstrapping is."""
    inputs, labels = jnp.asarray(RNG.normal(size=(20, 784)), jnp.float32), jnp.asarray(RNG.integers(0, 10, 20))
    names = "uniform", "generalized-cross-entropy", "focal", "relaxation"

    def fit(number, strength):
        point = {"method": number, "strength": strength}
        return trials.fit(jax.random.key(0), inputs, labels, point, methods=names, epochs=1)[-1][0]

    trained = jax.jit(jax.vmap(fit))(jnp.array([0.0, 2.0]), jnp.array([0.0, 20.0]))
    assert np.isfinite(trained).all()


def test_gains_are_paired_by_seed_and_by_digit():
    ours, theirs = (RNG.random((3, 50)) < share for share in (0.9, 0.7))
    found = trials.gain(ours.astype(np.int8), theirs.astype(np.int8))
    apart = ours.astype(float) - theirs
    assert found["mean"] == pytest.approx(apart.mean(), abs=1e-6)
    assert found["standard_error"] == pytest.approx(apart.mean(axis=1).std(ddof=1) / 3**0.5, abs=1e-6)
    assert found["over_digits"] == pytest.approx(apart.mean(axis=0).std(ddof=1) / 50**0.5, abs=1e-6)
    assert found["runs"] == pytest.approx(apart.mean(axis=1), abs=1e-6)
    assert trials.gain(ours[:1], theirs[:1])["standard_error"] is None
    assert trials.cell("gain", found).startswith(f"+{100 * apart.mean():.2f} ± ")


def test_json_keeps_a_list_of_numbers_on_its_line():
    record = {"rows": [{"runs": [0.5, None, 1], "name": "ε [x]"}], "empty": [], "nested": [[1, 2], [3, 4]]}
    text = tables.as_json(record)
    assert json.loads(text) == record
    assert '"runs": [0.5, null, 1],' in text


@pytest.mark.reproduction
def test_quick_adjustment_helps_the_tail(tmp_path, capsys):
    flags = ["--quick", "--epochs", "60", "--out", str(tmp_path / "new")]
    long_tailed.main(flags)
    printed = capsys.readouterr()
    assert printed.err == ""
    files = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    written = [f"long_tailed_digits.{suffix}" for suffix in ("json", "md", "png")]
    assert sorted(files) == [*written, "runs.jsonl"]
    record = json.loads(files[written[0]])
    rows = {row["method"]: row for row in record["rows"]}
    assert [*rows] == [way.title for way in long_tailed.WAYS]
    plain, adjusted = rows["plain"], rows["logit adjustment"]
    assert plain["head"]["mean"] > plain["tail"]["mean"] + 0.3
    assert adjusted["tail"]["mean"] > plain["tail"]["mean"] + 0.1
    assert adjusted["tail_gain"]["mean"] == pytest.approx(adjusted["tail"]["mean"] - plain["tail"]["mean"], abs=1e-5)
    assert files[written[1]].decode().split("\n\n", 1)[1].strip() in printed.out
    assert struct.unpack(">2I", files[written[2]][16:24]) == (1035, 522)
    long_tailed.main(flags)
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == files


def test_bad_flags_end_in_one_line(tmp_path, capsys):
    for flags, message in (
        (["--imbalance", "0.5"], "--imbalance: expected a number of at least 1, got '0.5'"),
        (["--imbalance", "nan"], "--imbalance: expected a number of at least 1, got 'nan'"),
        (["--train", "4001"], "the data holds 4,000 training digits"),
    ):
        with pytest.raises(SystemExit, match="2"):
            long_tailed.main(flags)
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
