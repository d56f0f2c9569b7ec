"""The inputs of the last layer, projected to the plane through the templates of three classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.plotting._canvas import COLORS, MARKERS, finish, new_axes, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["penultimate_projection", "plot_penultimate"]


def penultimate_projection(
    features: ArrayLike, kernel: ArrayLike, *, bias: ArrayLike | None = None, classes: Sequence[int] = (0, 1, 2)
) -> tuple[np.ndarray, np.ndarray]:
    """Returns features and the templates of three classes, projected to the plane through the templates.

    The coordinates are x·e₁ and x·e₂, where e₁ and e₂ are an orthonormal basis of the span of w₁ − w₀ and w₂ − w₀. e₁
    points from w₀ to w₁, and e₂ to the side of w₂: pictures of several models have the same orientation. With a bias,
    the templates are (w_k, b_k) and the features (x, 1), so that their product is the logit.

    Args:
      features: inputs of the last layer, (N, D).
      kernel: weights of the last layer, (D, C) as in Flax; column k is the template w_k of class k.
      bias: bias of the last layer, (C,).
      classes: the three classes.

    Returns:
      Features (N, 2) and templates (3, 2), relative to the mean template.

    Raises:
      ValueError: `classes` that are not three of [0, C), or D = 1 without a bias: the templates then span no plane.

    Example:
      >>> from jax_ls import plotting
      >>> points, templates = plotting.penultimate_projection(np.eye(3), np.eye(3))
      >>> np.allclose(np.linalg.norm(points - points[[1, 2, 0]], axis=1), 2**0.5)
      True

    References:
      Müller et al., When Does Label Smoothing Help?, 2019.
    """
    x, w = numbers("features", features), numbers("kernel", kernel)
    checks.assert_rank("features", x, 2, "numbers (N, D)")
    checks.assert_rank("kernel", w, 2, f"({x.shape[1]}, C), a column a class")
    checks.assert_shape("kernel", w, [(x.shape[1], w.shape[1])], f"({x.shape[1]}, C), a column a class")
    if bias is not None:
        b = numbers("bias", bias)
        checks.assert_shape("bias", b, [(w.shape[1],)], f"({w.shape[1]},), a number a class")
        w, x = np.vstack([w, b]), np.hstack([x, np.ones((len(x), 1))])
    if len(w) < 2:
        raise ValueError(f"features: expected D of at least 2, or a bias, got {checks.describe(x)}")
    three = w[:, _three(classes, w.shape[1])].T
    basis, triangle = np.linalg.qr((three[1:] - three[0]).T)
    basis = basis * np.where(np.diag(triangle) < 0, -1, 1)
    centre = three.mean(axis=0)
    return (x - centre) @ basis, (three - centre) @ basis


def plot_penultimate(
    features: ArrayLike,
    labels: ArrayLike,
    kernel: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    classes: Sequence[int] = (0, 1, 2),
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the examples of three classes in the plane of their templates.

    With smoothing each class forms a tight cluster.

    Args:
      features, kernel, bias, classes: as in `penultimate_projection`.
      labels: integers (N,); examples of other classes are left out.
      names: names of the three classes, in the order of `classes`; their numbers if None.
      ax: matplotlib axes to draw on; a new figure if None.

    Returns:
      The axes. Dotted lines point to the templates.

    Raises:
      ImportError: matplotlib is missing.
      ValueError: as in `penultimate_projection`, or `names` that are not three.

    Example:
      >>> from jax_ls import plotting
      >>> plotting.plot_penultimate(np.eye(3), np.arange(3), np.eye(3)).get_title()
      'Penultimate layer'

    References:
      Müller et al., When Does Label Smoothing Help?, 2019.
    """
    points, templates = penultimate_projection(features, kernel, bias=bias, classes=classes)
    chosen = _three(classes, np.shape(kernel)[1])
    names = [f"class {k}" for k in chosen] if names is None else [str(name) for name in names]
    if len(names) != 3:
        raise ValueError(f"names: expected three, got {names}")
    y: Any = np.asarray(labels)
    checks.assert_shape("labels", y, [points.shape[:1]], f"{points.shape[:1]}, a label for each row of features")
    axes = new_axes(ax, (4.8, 4.6))
    shown = points[np.isin(y, chosen)]
    size = np.abs(shown).max() if len(shown) else 1.0
    looks = zip(COLORS[:3], MARKERS[:3], strict=True)
    for k, name, template, (color, marker) in zip(chosen, names, templates, looks, strict=True):
        # A template at the mean of the three has length 0, and no direction.
        tip = template / (np.linalg.norm(template) or 1) * size * 1.05
        axes.plot([0, tip[0]], [0, tip[1]], ":", color=color, lw=1.4, zorder=1)
        style = {"color": color, "marker": marker, "s": 16, "alpha": 0.55, "linewidths": 0}
        axes.scatter(*points[y == k].T, label=name, **style)
    axes.plot([], [], ":", color="0.4", label="towards the template")
    axes.set(title="Penultimate layer", xlabel="first axis of the templates' plane", ylabel="second axis")
    axes.set_aspect("equal", adjustable="datalim")
    finish(axes)
    return axes


def _three(classes: Any, count: int) -> list[int]:
    """Returns the classes as a list of three different numbers of [0, count)."""
    given = np.asarray(classes)
    chosen = given.tolist() if given.shape == (3,) and np.issubdtype(given.dtype, np.integer) else []
    if len(set(chosen) & set(range(count))) != 3:
        raise ValueError(f"classes: expected three of [0, {count}), got {classes!r}")
    return chosen
