"""examples/studies/preferences.py and value_function.py: what they find, what they write, what they refuse."""

from __future__ import annotations

import importlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

for package in ("gymnasium", "matplotlib"):
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "studies"))
preferences, value_function, frozen_lake = (
    importlib.import_module(name) for name in ("preferences", "value_function", "frozen_lake")
)
SCRIPTS = {"preferences": preferences, "value_function": value_function}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(value_function, "EPISODES", 200)
    monkeypatch.setattr(value_function, "HIDDEN", 16)
    # optax counts steps with integers.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(params=SCRIPTS)
def name(request):
    return request.param


def test_writes_table_figures_and_picture(name, tmp_path, capsys):
    out = tmp_path / "new" / "run"
    SCRIPTS[name].main(["--quick", "--seeds", "2", "--steps", "30", "--out", str(out)])
    printed = capsys.readouterr()
    assert printed.err == ""
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.json", f"{name}.md", f"{name}.png"]
    rows = json.loads((out / f"{name}.json").read_text())["rows"]
    written = (out / f"{name}.md").read_text()
    for row in rows:
        figure = row["last"] if "last" in row else row["slope"]
        assert np.isfinite(figure)
        assert len(row["runs"]) == 2
        assert np.mean(row["runs"]) == pytest.approx(figure, abs=1e-5)
        assert f"{figure:.3f} ±" in written
        assert f"{figure:.3f} ±" in printed.out
    png = (out / f"{name}.png").read_bytes()
    width, height = struct.unpack(">2I", png[16:24])
    assert png.startswith(b"\x89PNG")
    assert (width > 1000, height > 400, len(png) > 20_000) == (True, True, True)


def test_bad_input_ends_in_one_line_and_exit_code_2(name, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for flags in (["--seeds", "0"], ["--steps", "many"], ["--out", str(file / "run")], ["--unknown"]):
        with pytest.raises(SystemExit) as exit_info:
            SCRIPTS[name].main(flags)
        error = capsys.readouterr().err
        assert exit_info.value.code == 2
        assert error.startswith(f"{name}.py: error: ")
        assert error.count("\n") == 1
    assert not list(tmp_path.glob("run*"))


def test_runs_as_a_script(name, tmp_path):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    script = ROOT / "examples" / "studies" / f"{name}.py"
    result = subprocess.run(
        [sys.executable, "-W", "error", str(script), "--steps", "5"],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if name == "value_function":
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert "--steps: expected at least 10, got 5" in result.stderr
    else:
        assert (result.returncode, result.stderr) == (0, "")
        assert "time: " in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.reproduction
def test_robust_recovers_the_rewards_and_the_others_shrink_them_as_predicted():
    results = preferences.experiment(seeds=6, steps=300)
    slopes = preferences.slope(results["by_flip"]).mean(axis=-1)
    expected = preferences.slope(results["expected"])
    np.testing.assert_allclose(expected[2], 1, atol=0.01)
    assert (np.diff(expected[:2], axis=1) < -0.02).all()
    # 40 % flipped leaves too few for six seeds.
    np.testing.assert_allclose(slopes[:, :4], expected[:, :4], atol=0.04)
    # Of infinitely many comparisons too.
    middle = len(preferences.TRUE) // 2
    gap = results["expected"][:, 1, middle] - results["expected"][:, 1, middle - 1]
    truth = preferences.TRUE[middle] - preferences.TRUE[middle - 1]
    assert gap[1] < gap[0] < gap[2] == pytest.approx(truth, rel=0.01)
    errors = preferences.rmse(results["by_size"])
    assert errors[2, -1] < errors[0, -1] < errors[1, -1]
    # What being unbiased costs: robust fits of few comparisons scatter most.
    scatter = results["by_size"][:, 0].std(axis=1).mean(axis=-1)
    assert scatter[2] > 1.5 * scatter[0] > 1.5 * scatter[1]


def test_the_values_of_the_lake_solve_bellmans_equation_and_are_what_episodes_return():
    lake = frozen_lake.frozen_lake()
    assert lake.values[np.asarray(lake.over)].tolist() == [0] * 11
    assert lake.values.argmax() == 55
    states, totals = jax.jit(lambda key: frozen_lake.returns(lake, key, 20_000))(jax.random.key(0))
    exact = lake.values[np.asarray(states)]
    # A few thousandths are lost to the horizon.
    assert np.asarray(totals).mean() == pytest.approx(exact.mean(), abs=0.008)
    beside = np.asarray(states) == 55
    assert np.asarray(totals)[beside].mean() == pytest.approx(lake.values[55], abs=0.06)
