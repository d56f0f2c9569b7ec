"""examples/language_model.py trains, says what is wrong in one line, and resumes on a mesh of another shape."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

for package in ("flax", "orbax.checkpoint", "matplotlib", "tqdm"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
language_model, stdlib_text, transformer, checkpoints = (
    importlib.import_module(name) for name in ("language_model", "stdlib_text", "transformer", "checkpoints")
)

# The last batch of the held-out windows is a short one.
TINY = ("--small", "--max-files", "20", "--steps", "4", "--every", "2", "--batch-size", "8", "--seq-len", "40")
TINY += ("--prior", "unigram")

# Dies in the fourth step of its first network, as if killed: no handler runs.
KILLED = """
import os, sys
import language_model as script
train, calls = script.Trainer.train, []
def killed(*args):
    calls.append(args)
    return os._exit(9) if len(calls) == 7 else train(*args)
script.Trainer.train = killed
script.main(sys.argv[1:])
"""


def process(*command):
    """On eight pretended devices and compiled as the tests are, to be equal in bits."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH"))))
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    return subprocess.run(
        [sys.executable, "-W", "error", *map(str, command)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """Optax raises a float to the power of an integer, which the strictness of the other tests forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def saved():
    """Copies of every state that reaches a checkpoint: (directory's name, step) -> arrays by their paths."""
    states = {}
    save = language_model.RunDirectory.save

    def spy(run, done, state, rows):
        leaves = jax.tree_util.tree_leaves_with_path(state)
        states[run.path and run.path.name, done] = {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}
        save(run, done, state, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model.RunDirectory, "save", spy)
        yield states


@pytest.fixture
def train(capsys):
    """Runs the script in this process, where no bar may show; returns what it printed."""

    def run(*flags):
        capsys.readouterr()
        language_model.main([*TINY, *map(str, flags)])
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


@pytest.fixture
def refused(train, capsys):
    """Runs the script expecting one line on stderr and exit code 2; returns that line."""

    def run(*flags):
        with pytest.raises(SystemExit) as exit_info:
            train(*flags)
        error = capsys.readouterr().err
        assert exit_info.value.code == 2
        assert error.startswith("language_model.py: error: ")
        assert error.count("\n") == 1
        return error

    return run


@pytest.fixture(scope="module")
def whole(saved, tmp_path_factory):
    """A run of four steps on eight devices, never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    language_model.main([*TINY, "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The same run, dead in its fourth step."""
    out = tmp_path_factory.mktemp("runs") / "killed"
    result = process("-c", KILLED, *TINY, "--out", out)
    assert (result.returncode, result.stderr) == (9, "")
    return out


@pytest.fixture
def copy_of(tmp_path):
    return lambda run, name: shutil.copytree(run, tmp_path / name)


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_killed_run_resumes_exactly(train, saved, whole, killed, copy_of):
    assert {row["step"] for row in metrics(killed)} == {2}
    out = copy_of(killed, "same")
    train("--out", out, "--resume")
    assert metrics(out) == metrics(whole)
    resumed, expected = saved["same", 4], saved["whole", 4]
    assert resumed.keys() == expected.keys()
    assert len(expected) > 100
    for name, leaf in expected.items():
        np.testing.assert_array_equal(resumed[name], leaf, err_msg=name)


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 8, 1)])
def test_killed_run_resumes_on_another_mesh(train, saved, whole, killed, copy_of, mesh):
    name = "x".join(map(str, mesh))
    out = copy_of(killed, name)
    printed = train("--out", out, "--resume", "--mesh", ",".join(map(str, mesh)))
    assert "devices: {} x {} x {}".format(*mesh) in printed
    assert_close(metrics(out), metrics(whole))
    resumed, expected = saved[name, 4], saved["whole", 4]
    assert resumed.keys() == expected.keys()
    for name, leaf in expected.items():
        # A gradient that is zero but for rounding still moves its parameter: only the whole of an array agrees.
        assert np.linalg.norm(resumed[name] - leaf) <= 1e-4 * np.linalg.norm(leaf), name


def assert_close(rows, expected):
    assert [(row["run"], row["step"]) for row in rows] == [(row["run"], row["step"]) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for key in ("train_loss", "nll", "perplexity"):
            assert row[key] == pytest.approx(other[key], rel=1e-5)


def test_one_device_agrees_with_eight(train, whole, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert "devices: 1 x 1 x 1" in train("--out", tmp_path / "one")
    assert_close(metrics(tmp_path / "one"), metrics(whole))


def test_lost_metrics_come_back(train, whole, copy_of):
    """As of a run killed after its last checkpoint was written, before its metrics were."""
    out = copy_of(whole, "lost")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:2]))
    printed = train("--out", out, "--resume")
    assert metrics(out) == metrics(whole)
    for row, line in zip(metrics(whole)[-2:], printed.splitlines()[-5:-3], strict=True):
        assert line.split()[-3:] == [f"{row['train_loss']:.4f}", f"{row['nll']:.4f}", f"{row['perplexity']:.2f}"]


def test_perplexity_is_of_the_plain_likelihood_of_every_held_out_token(saved, whole):
    args = language_model.parse([*TINY])[1]
    text = stdlib_text.load(args.max_files, args.seq_len)
    trainer = language_model.Trainer(args, text, transformer.Devices((1, 1, 1)))
    structure = jax.tree.structure(dict.fromkeys(("smoothing 0.1, unigram", "no smoothing"), trainer.first_state))
    states = jax.tree.unflatten(structure, saved["whole", 4].values())
    windows = text.held_out_windows(16_384, args.seq_len)
    assert len(windows) == (len(text.held_out) - 1) // args.seq_len
    assert len(windows) % args.batch_size
    counted = math.exp(-np.log(text.unigram()[windows[:, 1:]]).mean())
    for row in metrics(whole)[-2:]:
        state = states[row["run"]]
        model, _ = language_model.nnx.merge(trainer.plan, state)
        hidden = np.asarray(model(windows[:, :-1]), np.float64)
        logits = (hidden @ np.asarray(model.words.embedding[...]).T + np.asarray(model.bias[...]))[..., : text.words]
        chosen = np.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
        nll = np.mean(np.log(np.exp(logits).sum(axis=-1)) - chosen)
        assert row["nll"] == pytest.approx(nll, rel=1e-5)
        assert row["perplexity"] == math.exp(row["nll"])
        assert row["perplexity"] < 0.97 * counted


def test_the_text_has_32000_words_and_draws_by_seed_and_step():
    text = stdlib_text.load(None, 64)
    assert text.words >= 32_000
    assert len(text.counts) % 128 == 0
    assert text.unigram().sum(dtype=np.float64) == pytest.approx(1, abs=1e-5)
    assert not text.unigram()[~text.exists()].any()
    for part in (text.train, text.held_out):
        assert (part.min(), part.max() < text.words) == (0, True)
    inputs, targets = text.batch(3, 7, 4, 16)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(inputs, text.batch(3, 7, 4, 16)[0])
    assert (inputs != text.batch(3, 8, 4, 16)[0]).any()
    assert text.held_out_windows(1_000, 16).shape == (62, 17)
    every = text.held_out_windows(10**9, 16)[:, 1:].ravel()
    np.testing.assert_array_equal(every, text.held_out[1 : 1 + len(every)])
    assert len(text.held_out) - 1 - len(every) < 16


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (("--mesh", "3,7,1"), "--mesh 3,7,1 takes 21 devices, but there are 8"),
        (("--mesh", "4,2"), "argument --mesh: invalid mesh value: '4,2'"),
        (("--mesh", "8,1,0"), "--mesh: expected a whole number of at least 1 and at most 1,000,000, got 0"),
        (("--steps", "99999999999"), "--steps: expected a whole number of at least 1 and at most 1,000,000, got 999"),
        (("--out", ""), "--out"),
        (("--out", "x" * 5000), "cannot write to --out xxx"),
        (("--batch-size", "12"), "--batch-size 12 does not divide among 8 devices"),
        (("--batch-size", "0"), "expected a whole number of at least 1"),
        (("--smoothing", "nan"), "expected --smoothing in [-1, 1)"),
        (("--max-files", "1"), "1 source files in"),
        (("--seq-len", "9999"), "tokens to hold out"),
        (("--resume",), "--resume needs --out"),
        (("--step", "3"), "unrecognized arguments: --step 3"),
    ],
)
def test_bad_flags_end_in_one_line(bad, message, refused):
    assert message in refused(*bad)


def test_vocabulary_that_does_not_divide_is_told(refused, monkeypatch, tmp_path):
    words = len(stdlib_text.load(20, 40).counts)
    parts = next(parts for parts in (3, 5, 7) if words % parts)
    monkeypatch.setattr(jax, "device_count", lambda: parts)
    error = refused("--mesh", f"1,1,{parts}", "--out", tmp_path / "new")
    assert f"the vocabulary of {words:,} entries does not divide by {parts}" in error
    error = refused("--mesh", f"1,{parts},1", "--batch-size", 2 * parts, "--out", tmp_path / "new")
    assert f"the width of 128 does not divide by {parts}" in error
    assert not (tmp_path / "new").exists()


def test_diverging_loss_is_told(refused, monkeypatch):
    monkeypatch.setattr(language_model.Trainer, "train", lambda *args: (args[1], math.nan))
    assert "no longer finite in step 1" in refused()


def test_bad_directories_are_told(refused, tmp_path):
    file, new = tmp_path / "file", tmp_path / "new"
    file.write_text("mine")
    for out in (file, file / "below", "/proc/none"):
        assert "cannot write to --out" in refused("--out", out)
    assert "holds no run to resume" in refused("--out", new, "--resume")
    assert not new.exists()
    (new / "checkpoints").mkdir(parents=True)
    assert "holds no checkpoint to resume from" in refused("--out", new, "--resume")
    assert contents(tmp_path) == {file: b"mine"}


def test_other_runs_are_left_alone(refused, whole, copy_of):
    out = copy_of(whole, "kept")
    before = contents(out)
    assert "already holds a run" in refused("--out", out)
    for flag, old, new in (("--smoothing", 0.1, 0.2), ("--steps", 4, 6), ("--batch-size", 8, 16), ("--seed", 0, 1)):
        error = refused("--out", out, "--resume", flag, new)
        assert f"was started with {flag} {old}, not {new}" in error
    assert "was started with text of checksum" in refused("--out", out, "--resume", "--max-files", 30)
    assert contents(out) == before


def files_of(checkpoint):
    return sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())


def test_every_damage_to_a_checkpoint_is_told_and_nothing_is_lost(whole, copy_of, refused):
    """Orbax itself went on from some of these, and printed hundreds of lines about others."""
    names = files_of(whole / "checkpoints" / "4")
    assert len(names) > 10
    assert Path("state/_CHECKPOINT_METADATA") in names
    out = copy_of(whole, "damaged")
    for name in names:
        file = out / "checkpoints" / "4" / name
        content = file.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else b"x"
        for damaged in (flipped, content[:middle] if content else None, None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with checkpoints.RunDirectory(out, {}, True) as run, pytest.raises(checkpoints.InputError) as told:
                run.restore({})
            assert re.search(r"4 is damaged \(.*\): remove it to continue from 2$", str(told.value))
            assert str(name) in str(told.value) or name.name == "checksums.json"
            file.write_bytes(content)
    (out / "checkpoints" / "4" / "state" / "_CHECKPOINT_METADATA").write_text("{")
    before = contents(out)
    assert "is damaged (state/_CHECKPOINT_METADATA): remove it to continue from 2" in refused("--out", out, "--resume")
    assert contents(out) == before


def test_a_run_continues_from_the_whole_checkpoint_before_a_damaged_one(train, whole, copy_of):
    out = copy_of(whole, "behind")
    shutil.rmtree(out / "checkpoints" / "4")
    train("--out", out, "--resume")
    assert metrics(out) == metrics(whole)


def test_a_full_disk_is_told_in_one_line_and_costs_no_checkpoint(whole, copy_of, monkeypatch):
    out = copy_of(whole, "full")
    before = contents(out)

    def full(*args, **options):
        (out / "checkpoints" / "part" / "state").mkdir()
        raise ValueError(
            "RESOURCE_EXHAUSTED: Error writing\n[a page of details] [OS error 28: No space left on device]"
        )

    monkeypatch.setattr(checkpoints.ocp.StandardCheckpointer, "save", full)
    with checkpoints.RunDirectory(out, {}, True) as run, pytest.raises(checkpoints.InputError) as told:
        run.save(6, {}, [])
    assert str(told.value) == (
        f"cannot write the checkpoint {out}/checkpoints/6 (the last whole one is 4): No space left on device"
    )
    assert contents(out) == before


def test_the_picture_is_drawn_and_only_two_checkpoints_are_kept(whole):
    assert sorted(path.name for path in whole.iterdir()) == ["checkpoints", "curves.png", "metrics.jsonl"]
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["2", "4"]
    png = (whole / "curves.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">2I", png[16:24]) == (1152, 480)


def test_bar_counts_tokens_on_a_terminal(monkeypatch, capsys):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(language_model.Trainer, "train", lambda *args: (args[1], 1.5))
    monkeypatch.setattr(language_model.Trainer, "held_out_nll", lambda *args: 0.0)
    language_model.main(TINY)
    printed = capsys.readouterr()
    assert "tok/s" in printed.err
    assert "loss 1.500 | loss 1.500" in printed.err
    assert "tokens/s: held-out perplexity 1.0 (smoothing 0.1, unigram), 1.0 (no smoothing)" in printed.out


def test_script_refuses_in_one_line(tmp_path):
    result = process(ROOT / "examples" / "language_model.py", *TINY, "--mesh", "3,3,1", "--out", tmp_path / "new")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "language_model.py: error: --mesh 3,3,1 takes 9 devices, but there are 8\n"
    assert not (tmp_path / "new").exists()
