"""Losses that correct for wrong labels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jax_ls import checks
from jax_ls.algebra import Target, pytree
from jax_ls.beliefs import Belief, Likeliest
from jax_ls.class_axis import AxisName, ClassAxis, look_up, saved
from jax_ls.losses import cross_entropy
from jax_ls.noise.labels import as_matrix, as_rate, assert_one_given
from jax_ls.smoothing import smooth
from jax_ls.targets import OneHot, Rows

__all__ = ["backward_correction", "bootstrap", "forward_correction", "label_relaxation"]


def forward_correction(
    logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    resample_rate: jax.typing.ArrayLike | None = None,
    *,
    matrix: jax.typing.ArrayLike | None = None,
    where: jax.typing.ArrayLike | None = None,
    class_where: jax.typing.ArrayLike | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    """Cross-entropy of the label as noise would show it: −log Σ_k T_ky p_k. Bounded, and at no noise cross-entropy.

    Symmetric noise needs no matrix: −log((1 − α) p_y + α/K). Labels flipped with probability e have α = e K/(K−1).

    Args:
      logits: z, real numbers with K classes on `axis`.
      labels: the noisy y, integers (*batch,).
      resample_rate: α, the share of labels drawn anew from all K classes; () or (*batch,), in [0, 1). An example
        whose traced α is outside gets NaN.
      matrix: T, (K, K), in place of α: T_ij = P(seen as j | i). It is whole even where classes are split over devices.
        A traced one is not checked.
      where, class_where, axis, class_axis_name: as in `cross_entropy`; K counts the classes that exist.

    Returns:
      Losses (*batch,) in float32 or wider. At α = 0 the derivative in α is held at that of p_y = e⁻⁶⁰/K.

    Raises:
      AssertionError: dtypes or shapes that do not fit, by name.
      ValueError: rates outside [0, 1) or rows that are no distributions, where they are concrete.
      TypeError: `resample_rate` and `matrix` are both given, or neither is.

    Example:
      >>> from jax_ls import noise
      >>> losses = noise.forward_correction(jnp.array([[9.0, 0.0], [-9.0, 0.0]]), jnp.array([0, 0]), 0.2)
      >>> print(losses.round(4))
      [0.1055 2.3016]

    References:
      Patrini et al., Making Deep Neural Networks Robust to Label Noise, 2017; Lukasik et al., Does Label Smoothing
      Mitigate Label Noise?, 2020 (symmetric).
    """
    z, y = _arguments(logits, labels, axis)
    assert_one_given("resample_rate", resample_rate, matrix)
    if matrix is None:
        rate = as_rate("resample_rate", resample_rate, y.shape)
        classes = jnp.log(_num_classes(z, class_where, axis, class_axis_name))

        def loss(nll: jax.Array, alpha: jax.Array) -> jax.Array:
            # −log((1 − α) p + α/K) = nll − log(1 + α (eᵈ − 1)) with eᵈ = 1 / (K p), which overflows for a small p.
            log_k = classes.astype(nll.dtype)
            d = nll - log_k
            far = (d > 60) & (alpha > 0)
            log_alpha = jnp.log(jnp.where(far, alpha, 1))
            bounded = -jnp.logaddexp(jnp.log1p(-alpha) - nll, log_alpha - log_k)
            return jnp.where(far, bounded, nll - jnp.log1p(alpha * jnp.expm1(jnp.minimum(d, 60))))

        return _of_nll(loss, z, y, rate, where, class_where, axis, class_axis_name)
    table = as_matrix("matrix", matrix, z.shape[axis] * _num_devices(class_axis_name))
    return cross_entropy(
        z, _Seen(table, y), where=where, class_where=class_where, axis=axis, class_axis_name=class_axis_name
    )


def backward_correction(
    logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    resample_rate: jax.typing.ArrayLike | None = None,
    *,
    matrix: jax.typing.ArrayLike | None = None,
    where: jax.typing.ArrayLike | None = None,
    class_where: jax.typing.ArrayLike | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    """The loss whose average over the noise is the cross-entropy of the clean label: q = row y of T⁻¹.

    Symmetric noise is smoothing with a negative ε, spread="all": q = smooth(y, −α / (1 − α)), and exactly that.
    Unbounded below: train plainly first, or take `forward_correction`.

    Args:
      logits, labels, resample_rate, matrix, where, class_where, axis, class_axis_name: as in
        `forward_correction`. T is inverted in every call; `cross_entropy(logits, Rows(inverse, labels))` takes the
        inverse.

    Returns:
      Losses (*batch,) in float32 or wider, of any sign; not finite if T has no inverse.

    Raises:
      AssertionError, TypeError, ValueError: as `forward_correction`.

    Example:
      >>> from jax_ls import noise
      >>> print(noise.backward_correction(jnp.array([[1.0, 0.0]]), jnp.array([0]), 0.2).round(4))
      [0.1883]

    References:
      Patrini et al., Making Deep Neural Networks Robust to Label Noise, 2017; Lukasik et al., Does Label Smoothing
      Mitigate Label Noise?, 2020.
    """
    z, y = _arguments(logits, labels, axis)
    assert_one_given("resample_rate", resample_rate, matrix)
    if matrix is None:
        rate = as_rate("resample_rate", resample_rate, y.shape)
        target: Target = smooth(y, -rate / (1 - rate))
    else:
        table = as_matrix("matrix", matrix, z.shape[axis] * _num_devices(class_axis_name))
        target = Rows(_held(jnp.linalg.inv(table), z.shape[axis], class_axis_name), y)
    return cross_entropy(z, target, where=where, class_where=class_where, axis=axis, class_axis_name=class_axis_name)


def label_relaxation(
    logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    relaxation: jax.typing.ArrayLike = 0.1,
    *,
    where: jax.typing.ArrayLike | None = None,
    class_where: jax.typing.ArrayLike | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    """KL divergence to the nearest target that gives y at least 1 − α: 0 once p_y ≥ 1 − α, gradient too.

    Elsewhere (1 − α) log((1 − α) / p_y) + α log(α / (1 − p_y)): the other classes share α as p does.

    Args:
      logits: z, real numbers with K classes on `axis`.
      labels: y, integers (*batch,).
      relaxation: α, () or (*batch,), in [0, 1), NaN for an example whose traced α is not; 0 is cross-entropy, and
        has no derivative in α.
      where, class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Losses (*batch,) in float32 or wider.

    Raises:
      AssertionError: dtypes or shapes that do not fit, by name.
      ValueError: α outside [0, 1), where it is concrete.

    Example:
      >>> from jax_ls import noise
      >>> print(noise.label_relaxation(jnp.array([[3.0, 0.0], [0.0, 0.0]]), jnp.array([0, 0]), 0.1).round(4))
      [0.     0.3681]

    References:
      Lienen and Hüllermeier, From Label Smoothing to Label Relaxation, 2021.
    """
    z, y = _arguments(logits, labels, axis)

    def loss(nll: jax.Array, alpha: jax.Array) -> jax.Array:
        # The slope in nll is (1 − α − p) / (1 − p), in [0, 1] outside the relaxed set: no digit of nll is lost, so
        # log(1 − p) may come from it.
        kept = jnp.log1p(-alpha)
        relaxed = nll <= -kept
        nll = jnp.where(relaxed, 1, nll)
        log_alpha = jnp.log(jnp.where(alpha > 0, alpha, 1))
        apart = (1 - alpha) * (kept + nll) + alpha * (log_alpha - jnp.log(-jnp.expm1(-nll)))
        return jnp.where(relaxed, 0, apart)

    return _of_nll(loss, z, y, as_rate("relaxation", relaxation, y.shape), where, class_where, axis, class_axis_name)


def bootstrap(
    logits: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    beta: jax.typing.ArrayLike,
    *,
    kind: Literal["soft", "hard"] = "soft",
    where: jax.typing.ArrayLike | None = None,
    class_where: jax.typing.ArrayLike | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    """Cross-entropy of a label that the model may overrule: q = β δ_y + (1 − β) p, or δ of its likeliest class.

    "soft" is β CE + (1 − β) H(p), gradient through both; "hard" takes the likeliest class as a constant.

    Args:
      logits: z, real numbers with K classes on `axis`.
      labels: y, integers (*batch,).
      beta: β, () or (*batch,), how far the label is trusted; the paper takes 0.95 soft and 0.8 hard.
      kind: "soft" or "hard".
      where, class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Losses (*batch,) in float32 or wider.

    Raises:
      AssertionError: dtypes or shapes that do not fit, by name.
      ValueError: an unknown `kind`.

    Example:
      >>> from jax_ls import noise
      >>> print(noise.bootstrap(jnp.array([[0.0, 5.0]]), jnp.array([0]), 0.8, kind="hard").round(4))
      [4.0067]

    References:
      Reed et al., Training Deep Neural Networks on Noisy Labels with Bootstrapping, 2014.
    """
    z, y = _arguments(logits, labels, axis)
    checks.check_option("kind", kind, ("soft", "hard"))
    trust = checks.as_weight("beta", beta)
    target = trust * OneHot(y) + (1 - trust) * (Belief() if kind == "soft" else Likeliest())
    return cross_entropy(z, target, where=where, class_where=class_where, axis=axis, class_axis_name=class_axis_name)


@pytree(matrix=2, labels=0)
@dataclass(frozen=True, eq=False)
class _Seen(Target):
    """The label through noise: ⟨q, z⟩ is log Σ_k T_ky exp z_k, so that the cross-entropy is −log Σ_k T_ky p_k."""

    matrix: jax.Array
    labels: jax.Array

    def contract(self, values: jax.Array | None, axis: ClassAxis) -> jax.Array:
        if values is None:
            return axis.pick(None, self.labels[..., None])[..., 0]
        seen = look_up(_held(self.matrix.T, values.shape[-1], axis.class_axis_name), self.labels).astype(values.dtype)
        top = axis.max(jnp.where(seen > 0, values, -jnp.inf))
        top = saved(jnp.where(jnp.isfinite(top), top, 0))
        # Only where T is 0 can the exponent be large; that derivative in T stays finite.
        terms = seen * jnp.exp(jnp.minimum(values - top[..., None], 60))
        offset = 0 if axis.offset is None else axis.offset
        return jnp.log(saved(axis.psum(jnp.sum(terms, axis=-1)))) + (top - offset)


def _arguments(logits: jax.typing.ArrayLike, labels: jax.typing.ArrayLike, axis: int) -> tuple[jax.Array, jax.Array]:
    z = checks.as_logits("logits", logits)
    axis = checks.check_axis("axis", axis, z.ndim)
    y = checks.as_labels("labels", labels)
    batch = z.shape[:axis] + z.shape[axis + 1 :]
    checks.assert_shape("labels", y, [batch], f"integers {batch}")
    return z, y


def _of_nll(
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    z: jax.Array,
    y: jax.Array,
    alpha: jax.Array,
    where: jax.typing.ArrayLike | None,
    class_where: jax.typing.ArrayLike | None,
    axis: int,
    class_axis_name: AxisName | None,
) -> jax.Array:
    """`loss(−log p_y, α)` of each example that counts, 0 for the others."""
    nll = cross_entropy(z, OneHot(y), where=where, class_where=class_where, axis=axis, class_axis_name=class_axis_name)
    alpha = jnp.broadcast_to(alpha.astype(nll.dtype), nll.shape)
    if where is None:
        return loss(nll, alpha)
    return jnp.where(where, loss(nll, jnp.where(where, alpha, 0)), 0)


def _num_devices(class_axis_name: AxisName | None) -> int:
    return 1 if class_axis_name is None else jax.lax.axis_size(class_axis_name)


def _num_classes(
    z: jax.Array, class_where: jax.typing.ArrayLike | None, axis: int, class_axis_name: AxisName | None
) -> jax.Array:
    if class_where is None:
        return jnp.asarray(z.shape[axis] * _num_devices(class_axis_name), jnp.result_type(float))
    kept = jnp.asarray(class_where)
    count = jnp.sum(kept, axis=axis if kept.ndim == z.ndim else -1).astype(jnp.result_type(float))
    return count if class_axis_name is None else jax.lax.psum(count, class_axis_name)


def _held(table: jax.Array, size: int, class_axis_name: AxisName | None) -> jax.Array:
    """The columns of a table (K, K) whose classes this device holds."""
    if class_axis_name is None:
        return table
    return jax.lax.dynamic_slice_in_dim(table, jax.lax.axis_index(class_axis_name) * size, size, axis=1)
