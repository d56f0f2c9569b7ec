"""Pictures: what they show is what they were given, on the axes that they were given."""

import dataclasses
import sys

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest

from jax_ls import calibration, plotting, smooth, sweeps

mpl.use("Agg")
from matplotlib import pyplot as plt

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(60, 4)), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, 4, 60), jnp.int32)
BINS = calibration.reliability(LOGITS, LABELS, num_bins=5)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def swept(smoothing, values, mode="max", **points):
    """A result, as `sweep` returns it."""
    values = np.array(values)
    points = {"smoothing": np.array(smoothing)} | points
    return sweeps.SweepResult(points, np.arange(values.shape[1]), {"accuracy": values}, "accuracy", mode)


def draw_all():
    features, kernel = RNG.normal(size=(60, 6)), RNG.normal(size=(6, 4))
    return {
        "targets": lambda ax: plotting.plot_targets(smooth(jnp.arange(4), 0.1), 4, ax=ax),
        "reliability": lambda ax: plotting.plot_reliability(BINS, ax=ax),
        "confidence": lambda ax: plotting.plot_confidence(BINS, ax=ax),
        "sweep": lambda ax: plotting.plot_sweep(swept([0.0, 0.1], [[1.0, 2.0], [2.0, 3.0]]), ax=ax),
        "penultimate": lambda ax: plotting.plot_penultimate(features, LABELS, kernel, ax=ax),
    }


@pytest.mark.parametrize("name", list(draw_all()))
def test_pictures_take_axes_or_make_them(name):
    figure, given = plt.subplots()
    returned = draw_all()[name](given)
    assert returned is given
    fresh = draw_all()[name](None)
    assert fresh.figure is not figure
    for ax in (returned, fresh):
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        ax.figure.canvas.draw()


def test_targets_are_written_in_where_they_fit():
    ax = plotting.plot_targets(smooth(jnp.arange(4), 0.2), 4, rows="abcd")
    np.testing.assert_allclose(ax.images[0].get_array(), smooth(jnp.arange(4), 0.2).probs(4))
    assert [text.get_text() for text in ax.texts[:5]] == [".85", ".05", ".05", ".05", ".05"]
    assert [text.get_text() for text in ax.get_yticklabels()] == list("abcd")
    assert not plotting.plot_targets(jnp.eye(30)).texts
    assert plotting.plot_targets(jnp.array([2, 0]), 3).texts[2].get_text() == "1"
    ax = plotting.plot_targets(np.array([[10.5, -9.5, 20.25, -1e-4, -0.4, 100, 1e-4, 0.25]]))
    assert [text.get_text() for text in ax.texts] == ["10.5", "-9.5", "20.25", "0", "-.4", "100", "0", ".25"]
    ax = plotting.plot_targets(jnp.full((2, 4), 0.25, jnp.bfloat16))
    assert [text.get_text() for text in ax.texts] == [".25"] * 8
    ax = plotting.plot_targets(jnp.array([5, 1]), 2)  # 5 names no class
    assert (ax.images[0].norm.vmin, ax.images[0].norm.vmax) == (0, 1)
    assert [(text.get_text(), text.get_color()) for text in ax.texts[:2]] == [("nan", "black")] * 2


def bars(ax, color):
    return [p for p in ax.patches if mpl.colors.to_hex(p.get_facecolor()).upper() == color and p.get_width() > 0]


def test_a_bar_a_bin_with_its_gap_and_count():
    ax = plotting.plot_reliability(BINS)
    full = np.asarray(BINS.count) > 0
    accuracy, confidence = np.asarray(BINS.accuracy)[full], np.asarray(BINS.confidence)[full]
    solid, gaps = ax.containers
    np.testing.assert_allclose([bar.get_height() for bar in solid], accuracy, rtol=1e-6)
    np.testing.assert_allclose([bar.get_x() for bar in solid], np.asarray(BINS.edges)[:-1][full], rtol=1e-6)
    np.testing.assert_allclose([bar.get_y() + bar.get_height() for bar in gaps], confidence, rtol=1e-6)
    (top,) = [other for other in ax.figure.axes if other is not ax]
    assert [bar.get_height() for bar in top.containers[0]] == np.asarray(BINS.count)[full].tolist()
    assert [text.get_text() for text in top.texts] == [f"{n:.0f}" for n in np.asarray(BINS.count)[full]]
    assert f"ECE {float(BINS.error()):.1%}; overconfident" in ax.get_legend().get_title().get_text()


def test_accuracy_is_seen_whole_where_the_model_is_underconfident():
    """The gap reaches down to the confidence, .25, and must not cover the accuracy, .8, that lies above."""
    logits = jnp.log(jnp.tile(jnp.array([[0.25, 0.2, 0.2, 0.2, 0.15]]), (5, 1)))
    ax = plotting.plot_reliability(calibration.reliability(logits, jnp.array([0, 0, 0, 0, 1]), num_bins=5))
    canvas = ax.figure.canvas
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    (left, low), (right, high) = ax.transData.transform([(0.22, 0.3), (0.38, 0.75)]).astype(int)
    inside = pixels[len(pixels) - high : len(pixels) - low, left:right].reshape(-1, 3)
    blue = np.array(mpl.colors.to_rgb(plotting.charts.BLUE)) * 255
    assert (np.abs(inside - blue).max(-1) < 8).mean() > 0.5
    assert all(bar.get_facecolor()[3] == 0 for bar in ax.containers[1])


@pytest.mark.parametrize("draw", [plotting.plot_reliability, plotting.plot_confidence])
def test_no_predictions_and_bins_without_width_are_drawn(draw):
    draw(calibration.reliability(LOGITS[:0], LABELS[:0])).figure.canvas.draw()
    tied = calibration.reliability(jnp.zeros((9, 4)), LABELS[:9], binning="mass")
    draw(tied).figure.canvas.draw()


def written(ax):
    legend = ax.get_legend()
    return [legend.get_title().get_text(), *(text.get_text() for text in legend.get_texts())]


def accuracy_of(bins):
    return float(bins.correct.sum() / bins.count.sum())


def test_no_data_reads_as_no_figure():
    empty = calibration.reliability(LOGITS[:0], LABELS[:0])
    lost = calibration.reliability(LOGITS * jnp.nan, LABELS)
    for bins, message in ((empty, "no examples"), (lost, "confidence of NaN")):
        assert written(plotting.plot_confidence(bins, label="plain"))[1:] == [f"plain: {message}"]
        assert written(plotting.plot_reliability(bins))[0] == message


def test_models_on_the_same_axes_differ_in_color():
    ax = plotting.plot_confidence(BINS, label="plain")
    plotting.plot_confidence(BINS, label="smoothed", ax=ax)
    assert len({line.get_color() for line in ax.lines}) == 2
    assert len({line.get_marker() for line in ax.lines}) == 2
    assert [line.get_xdata()[0] for line in ax.lines[1::2]] == pytest.approx([accuracy_of(BINS)] * 2)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[1] == f"plain: accuracy {accuracy_of(BINS):.1%}"
    assert texts[2].startswith("smoothed: mean confidence")
    heights = ax.patches[0].get_data().values
    np.testing.assert_allclose(heights, np.asarray(BINS.share), rtol=1e-6)


def test_a_sweep_shows_means_errors_and_the_best():
    values = np.array([[3.0, 5.0, 4.0], [1.0, 1.0, 1.0], [1.0, np.nan, 0.0], [np.nan] * 3])
    ax = plotting.plot_sweep(swept([0.2, 0.0, 0.3, 0.4], values, mode="min"))
    line = ax.containers[0].lines[0]
    np.testing.assert_array_equal(line.get_xdata(), [0.0, 0.2, 0.3, 0.4])
    np.testing.assert_array_equal(line.get_ydata(), [1.0, 4.0, 0.5, np.nan])
    low, high = ax.containers[0].lines[2][0].get_segments()[1][:, 1]
    np.testing.assert_allclose((high - low) / 2, np.std([3, 5, 4], ddof=1) / 3**0.5)
    assert "best: ε = 0, 1" in [text.get_text() for text in ax.get_legend().get_texts()]
    assert ax.get_xlabel() == "smoothing ε"
    assert ax.get_ylabel() == "accuracy"
    top = plotting.plot_sweep(swept([0.2, 0.0, 0.3, 0.4], values))
    assert "best: ε = 0.2, 4" in [text.get_text() for text in top.get_legend().get_texts()]


def test_the_ring_of_a_sweep_is_the_best_of_its_result():
    train = lambda key, p: {"loss": (p["rate"] - 0.2) ** 2, "other": p["rate"], "row": p["rate"] * jnp.ones(2)}  # noqa: E731
    result = sweeps.sweep(train, {"rate": [0.1, 0.2, 0.4]}, 2, metric="loss", mode="min", progress=False)
    ax = plotting.plot_sweep(result)
    assert "best: rate = 0.2, 0" in written(ax)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("rate", "loss")
    other = plotting.plot_sweep(result, "other")
    assert not any(text.startswith("best") for text in written(other))
    plain = sweeps.sweep(lambda key, e: {"loss": e}, [0.1, 0.2], progress=False)
    assert plotting.plot_sweep(plain).get_ylabel() == "loss"
    with pytest.raises(ValueError, match=r'metric: expected "loss" \| "other", got None'):
        plotting.plot_sweep(dataclasses.replace(result, metric=None))


def test_an_infinite_run_leaves_the_errors_of_the_others():
    values = [[1.0, 2.0, np.inf], [1.0, 2.0, 3.0]]
    ax = plotting.plot_sweep(swept([0.1, 0.2], values))
    np.testing.assert_allclose(ax.containers[0].lines[0].get_ydata(), [1.5, 2.0])
    low, high = ax.containers[0].lines[2][0].get_segments()[0][:, 1]
    np.testing.assert_allclose((high - low) / 2, np.std([1, 2], ddof=1) / 2**0.5)


def test_runs_that_diverged_are_marked_on_the_axis():
    ax = plotting.plot_sweep(swept([0.3, 0.1, 0.2], [[1.0, np.inf], [1.0, 2.0], [np.nan, np.nan]]))
    (crosses,) = [line for line in ax.lines if line.get_marker() == "x"]
    assert sorted(crosses.get_xdata()) == [0.2, 0.3]
    assert crosses.get_transform() == ax.get_xaxis_transform()
    assert "3 runs diverged" in written(ax)
    assert not any("diverged" in text for text in written(plotting.plot_sweep(swept([0.1], [[1.0, 2.0]]))))


def test_names_and_classes_of_the_clusters():
    features, kernel = RNG.normal(size=(60, 6)), RNG.normal(size=(6, 4))
    for names in (["a", "b", "c"], np.array(["a", "b", "c"])):
        ax = plotting.plot_penultimate(features, LABELS, kernel, classes=np.array([3, 0, 1]), names=names)
        assert written(ax)[1:4] == ["a", "b", "c"]
    assert written(plotting.plot_penultimate(features, LABELS, kernel, classes=(3, 0, 1)))[1] == "class 3"
    # A template that is the mean of the three has no direction.
    plotting.plot_penultimate(features, LABELS, np.ones((6, 1)) * np.arange(4.0))


def test_the_plane_of_the_templates_keeps_their_distances():
    features, kernel, bias = RNG.normal(size=(20, 6)), RNG.normal(size=(6, 4)), RNG.normal(size=4)
    for b in (None, bias):
        w = kernel if b is None else np.vstack([kernel, b])
        points, templates = plotting.penultimate_projection(features, kernel, bias=b, classes=(3, 0, 1))
        three = w[:, [3, 0, 1]].T
        for i in range(3):
            apart = np.linalg.norm(three[i] - three[i - 1])
            np.testing.assert_allclose(np.linalg.norm(templates[i] - templates[i - 1]), apart)
        # The first template lies on the left, the second on the right at the same height, the third above.
        np.testing.assert_allclose(templates[0, 1], templates[1, 1])
        assert templates[0, 0] < templates[1, 0]
        assert templates[2, 1] > templates[0, 1]
        # Differences of logits among the three are all in the plane, for features in any place.
        x = features if b is None else np.hstack([features, np.ones((20, 1))])
        in_plane = (points - points[0]) @ (templates[1] - templates[0])
        np.testing.assert_allclose(in_plane, (x - x[0]) @ (three[1] - three[0]), atol=1e-12)


def test_bad_input_raises_by_name():
    with pytest.raises(TypeError, match="num_classes: expected a positive integer, got None"):
        plotting.plot_targets(jnp.array([0, 1]))
    with pytest.raises(AssertionError, match="bins: expected the bins of one model"):
        plotting.plot_reliability(calibration.classwise_reliability(LOGITS, LABELS))
    with pytest.raises(ValueError, match="result: expected a sweep over one parameter, got smoothing, noise"):
        plotting.plot_sweep(swept([0.0, 0.1], [[1.0], [2.0]], noise=np.zeros(2)))
    with pytest.raises(ValueError, match="metric: expected \"accuracy\", got 'loss'"):
        plotting.plot_sweep(swept([0.0], [[1.0]]), "loss")
    with pytest.raises(ValueError, match=r"classes: expected three of \[0, 4\), got \(0, 1\)"):
        plotting.penultimate_projection(np.ones((2, 3)), np.ones((3, 4)), classes=(0, 1))
    with pytest.raises(AssertionError, match=r"kernel: expected \(3, C\)"):
        plotting.penultimate_projection(np.ones((2, 3)), np.ones((4, 4)))
    with pytest.raises(AssertionError, match=r"labels: expected \(2,\)"):
        plotting.plot_penultimate(np.ones((2, 3)), np.ones(3, int), np.eye(3))


WIDE, TALL = np.ones((2, 3)), np.ones((3, 4))


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: plotting.plot_targets(np.zeros((0, 3))), ValueError, r"target: expected at least one example, got"),
        (lambda: plotting.plot_targets(np.zeros(0, int), 3), ValueError, r"target: expected at least one example, got"),
        (lambda: plotting.plot_targets(0.5), AssertionError, r"target: expected probabilities \(N, K\), got float64"),
        (lambda: plotting.plot_targets(WIDE, rows=["a"]), ValueError, r"rows: expected 2 names, got \['a'\]"),
        (
            lambda: plotting.plot_reliability(LOGITS),
            TypeError,
            r"bins: expected a Reliability, .* float32 \(60, 4\)",
        ),
        (lambda: plotting.plot_confidence(None), TypeError, "bins: expected a Reliability, .*got None"),
        (lambda: plotting.plot_sweep([0.1]), TypeError, r"result: expected a SweepResult, .*got \[0.1\]"),
    ],
)
def test_what_cannot_be_drawn_raises_by_name(draw, error, message):
    with pytest.raises(error, match=message):
        draw()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"classes": (0, 1, 2, 2)}, ValueError, r"classes: expected three of \[0, 4\), got \(0, 1, 2, 2\)"),
        ({"classes": (0.5, 1.7, 2.2)}, ValueError, r"classes: expected three of \[0, 4\), got \(0.5, 1.7, 2.2\)"),
        ({"classes": (0, 1, 4)}, ValueError, r"classes: expected three of \[0, 4\), got \(0, 1, 4\)"),
        ({"classes": 3}, ValueError, r"classes: expected three of \[0, 4\), got 3"),
        ({"names": ["a", "b"]}, ValueError, r"names: expected three, got \['a', 'b'\]"),
        ({"kernel": 1.0}, AssertionError, r"kernel: expected \(3, C\), a column a class, got float64 \(\)"),
        ({"kernel": np.ones(3)}, AssertionError, r"kernel: expected \(3, C\), a column a class, got float64 \(3,\)"),
        ({"features": "x"}, TypeError, "features: expected real numbers, got 'x'"),
        ({"features": WIDE[:, :1], "kernel": TALL[:1]}, ValueError, r"features: expected D of at least 2, or a bias"),
    ],
)
def test_no_plane_no_picture(wrong, error, message):
    with pytest.raises(error, match=message):
        plotting.plot_penultimate(**{"features": WIDE, "labels": np.zeros(2, int), "kernel": TALL} | wrong)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "jax_ls\[plot\]"'):
        plotting.plot_sweep(swept([0.0], [[1.0]]))
