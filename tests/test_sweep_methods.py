"""A sweep over methods, and its table in a notebook and in a file."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ls import sweeps


def train(key, method):
    return {"loss": method(jax.random.uniform(key, dtype=jnp.float32)), "curve": jnp.zeros(3)}


METHODS = {"a <b>": lambda x: x, "double": lambda x: 2 * x + 1}


def test_each_method_is_a_row():
    result = sweeps.sweep(train, METHODS, seeds=[3, 5], metric="loss", mode="min", progress=False)
    draws = np.array([jax.random.uniform(jax.random.key(seed)) for seed in (3, 5)])
    np.testing.assert_allclose(result.metrics["loss"], [draws, 2 * draws + 1], rtol=1e-6)
    assert result.metrics["curve"].shape == (2, 2, 3)
    assert result.best == {"method": "a <b>"}
    assert result.points["method"].tolist() == [*METHODS]
    assert "best loss: method=a <b>" in str(result)


def test_a_file_for_each_method_is_not_trained_again(tmp_path):
    calls = []

    def counted(key, method):
        calls.append(method)
        return train(key, method)

    path = tmp_path / "runs.jsonl"
    first = sweeps.sweep(counted, METHODS, seeds=2, results=path, name="mine", progress=False)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["runs-a <b>.jsonl", "runs-double.jsonl"]
    again = sweeps.sweep(counted, METHODS, seeds=2, results=path, name="mine", progress=False)
    np.testing.assert_array_equal(first.metrics["loss"], again.metrics["loss"])


def test_functions_and_numbers_do_not_mix():
    with pytest.raises(TypeError, match="smoothing: expected functions by name, or numbers by name, got"):
        sweeps.sweep(train, {"double": METHODS["double"], "smoothing": [0.1]})


def test_methods_must_report_the_same():
    with pytest.raises(ValueError, match="train: expected metrics"):
        sweeps.sweep(lambda key, name: {name(): 1.0}, {"a": lambda: "x", "b": lambda: "y"}, progress=False)


@pytest.fixture
def result():
    points = {"smoothing": np.array([0.0, 0.1], np.float32), "noise": np.array([0.5, 0.25], np.float32)}
    metrics = {"a < b": np.array([[1.0, 2.0], [3.0, np.nan]]), "curve": np.zeros((2, 2, 4))}
    return sweeps.SweepResult(points, np.array([7, 8], np.uint32), metrics, "a < b", "max")


def test_a_notebook_shows_a_table(result):
    page = result._repr_html_()
    assert "<th>a &lt; b</th>" in page
    assert page.count("<tr>") == 3
    assert "<td><b>1.50 ± 0.50</b></td>" in page
    assert "<p>note: diverged" in page
    assert result.table() in result._repr_markdown_()
    assert "**1.50 ± 0.50**" in result.table()


def test_a_file_has_a_line_for_each_run(result, tmp_path):
    result.write_csv(tmp_path / "runs.csv")
    with open(tmp_path / "runs.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["smoothing", "noise", "seed", "a < b"]
    assert rows[1:] == [
        ["0.0", "0.5", "7", "1.0"],
        ["0.0", "0.5", "8", "2.0"],
        ["0.1", "0.25", "7", "3.0"],
        ["0.1", "0.25", "8", "nan"],
    ]
