"""Terms on the logits that act like smoothing, one number an example, to be added to a loss with a weight.

    loss = cross_entropy(logits, labels) + 0.1 * penalties.max_suppression(logits)

Each is the `cross_entropy` of a target that the model sets itself, so that masks, shards and memory are as there; one
that is added to a loss of the same logits shares its maximum and Σ exp, and costs a pass or two over them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_ls import checks
from jax_ls.algebra import Restricted
from jax_ls.beliefs import Belief, Beneath, Conditional, Jensen, Likeliest, Square
from jax_ls.class_axis import AxisName
from jax_ls.losses import cross_entropy
from jax_ls.smoothing import Prior
from jax_ls.targets import Uniform, as_target

__all__ = ["conditional", "confidence_penalty", "jensen", "logit_norm", "margin", "max_suppression", "z_loss"]

Array = jax.typing.ArrayLike


def confidence_penalty(
    logits: Array,
    beta: Array,
    *,
    threshold: Array | None = None,
    where: Array | None = None,
    class_where: Array | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    """Low entropy costs: −β H(p), or β max(0, Γ − H(p)), which leaves predictions of entropy above Γ alone.

    Args:
      logits: z, real numbers with K classes on `axis`.
      beta: β, () or (*batch,).
      threshold: Γ, () or (*batch,).
      where, class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Penalties (*batch,) in float32 or wider.

    Raises:
      AssertionError, TypeError, ValueError: dtypes, shapes or an axis that do not fit, by name.

    Example:
      >>> from jax_ls import penalties
      >>> print(penalties.confidence_penalty(jnp.array([[0.0, 0.0], [0.0, 9.0]]), 1.0).round(4))
      [-0.6931 -0.0012]

    References:
      Pereyra et al., Regularizing Neural Networks by Penalizing Confident Output Distributions, 2017.
    """
    entropy = cross_entropy(
        logits, Belief(), where=where, class_where=class_where, axis=axis, class_axis_name=class_axis_name
    )
    weight = _parameter("beta", beta, entropy, where)
    if threshold is None:
        return -weight * entropy
    lacking = jax.nn.relu(_parameter("threshold", threshold, entropy, where) - entropy)
    return weight * (lacking if where is None else jnp.where(where, lacking, 0))


def jensen(
    logits: Array,
    alpha: Array,
    *,
    prior: Prior | None = None,
    where: Array | None = None,
    class_where: Array | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    """Generalised entropy regularisation: the skew Jensen divergence of p and a prior u, between two known penalties.

    [(1 − α) KL(u ‖ m) + α KL(p ‖ m)] / (α (1 − α)) with m = (1 − α) u + α p: KL(u ‖ p) at α = 1, which is label
    smoothing, and KL(p ‖ u) at α = 0, the confidence penalty.

    Args:
      logits: z, real numbers with K classes on `axis`.
      alpha: α, () or (*batch,), in [0, 1], NaN for an example whose traced α is not; its own derivative is exact in
        between.
      prior: u, (K,) or (*batch, K) or a `Target`, classes last; uniform if None.
      where, class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Penalties (*batch,) in float32 or wider, 0 where p is u.

    Raises:
      AssertionError, TypeError: dtypes or shapes that do not fit, by name.
      ValueError: α outside [0, 1], where it is concrete.

    Example:
      >>> from jax_ls import penalties
      >>> print(f"{penalties.jensen(jnp.array([0.0, 2.0]), 0.5):.4f}")
      0.3582

    References:
      Meister et al., Generalized Entropy Regularization or: There's Nothing Special about Label Smoothing, 2020.
    """
    skew = checks.as_weight("alpha", alpha)
    fits = (skew >= 0) & (skew <= 1)
    if not isinstance(fits, Tracer) and not np.all(fits):
        raise ValueError(f"alpha: expected numbers in [0, 1], got {alpha}")
    u = Uniform() if prior is None else as_target(prior)
    if class_where is not None and prior is not None:
        exists = jnp.asarray(class_where)
        u = Restricted(u, jnp.moveaxis(exists, axis, -1) if exists.ndim == jnp.ndim(logits) else exists)
    target = Jensen(jnp.where(fits, skew, jnp.nan), u)
    return cross_entropy(
        logits, target, where=where, class_where=class_where, axis=axis, class_axis_name=class_axis_name
    )


def max_suppression(
    logits: Array,
    *,
    where: Array | None = None,
    class_where: Array | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    """max_k z_k − mean_k z_k: label smoothing's term with the largest logit where that has the label's.

    Smoothing adds ε (z_y − mean z), which pushes the label down even where another class wins. Of classes that tie for
    the maximum the first has its gradient.

    Args:
      logits: z, real numbers with K classes on `axis`.
      where, class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Penalties (*batch,) in float32 or wider.

    Raises:
      AssertionError, TypeError, ValueError: dtypes, shapes or an axis that do not fit, by name.

    Example:
      >>> from jax_ls import penalties
      >>> print(penalties.max_suppression(jnp.array([[3.0, 0.0, 0.0]])))
      [2.]

    References:
      Zhou et al., MaxSup: Overcoming Representation Collapse in Label Smoothing, 2025.
    """
    target = Uniform() + -1.0 * Likeliest()
    return cross_entropy(
        logits, target, where=where, class_where=class_where, axis=axis, class_axis_name=class_axis_name
    )


def margin(
    logits: Array,
    margin: Array = 10.0,
    *,
    where: Array | None = None,
    class_where: Array | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    """Logits further than m below the largest cost: mean_k max(0, max z − z_k − m). Margin-based label smoothing.

    Args:
      logits: z, real numbers with K classes on `axis`.
      margin: m, () or (*batch,).
      where, class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Penalties (*batch,) in float32 or wider; the paper weighs them with 0.1.

    Raises:
      AssertionError, TypeError, ValueError: dtypes, shapes or an axis that do not fit, by name.

    Example:
      >>> from jax_ls import penalties
      >>> print(penalties.margin(jnp.array([[15.0, 0.0], [5.0, 0.0]]), 10.0))
      [2.5 0. ]

    References:
      Liu et al., The Devil is in the Margin: Margin-based Label Smoothing for Network Calibration, 2022.
    """
    target = Beneath(checks.as_weight("margin", margin))
    return cross_entropy(
        logits, target, where=where, class_where=class_where, axis=axis, class_axis_name=class_axis_name
    )


def conditional(
    logits: Array,
    margin: Array = 10.0,
    *,
    over: Array = 1.0,
    under: Array = 0.1,
    where: Array | None = None,
    class_where: Array | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    """Adaptive and conditional smoothing: the largest logit pushed below m, the others to within m of it.

    λ₁ max(0, max z − m)² + λ₂ mean_{k ≠ argmax} max(0, max z − z_k − m)², the second maximum a constant to
    differentiation. The first term is of z itself: a common offset of the logits moves it.

    Args:
      logits: z, real numbers with K classes on `axis`.
      margin: m ≥ 0, () or (*batch,).
      over, under: λ₁ and λ₂, () or (*batch,).
      where, class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Penalties (*batch,) in float32 or wider; the paper weighs them with 0.1.

    Raises:
      AssertionError, TypeError, ValueError: dtypes, shapes or an axis that do not fit, by name.

    Example:
      >>> from jax_ls import penalties
      >>> print(penalties.conditional(jnp.array([[12.0, 0.0], [5.0, 0.0]]), 10.0, under=0.5))
      [6. 0.]

    References:
      Park et al., ACLS: Adaptive and Conditional Label Smoothing for Network Calibration, 2023.
    """
    target = Conditional(
        checks.as_weight("margin", margin), checks.as_weight("over", over), checks.as_weight("under", under)
    )
    return cross_entropy(
        logits, target, where=where, class_where=class_where, axis=axis, class_axis_name=class_axis_name
    )


def logit_norm(
    logits: Array,
    *,
    where: Array | None = None,
    class_where: Array | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    """½ ‖z‖², over the classes that exist. Not the LogitNorm loss (Wei et al. 2022), which divides z by its norm.

    Args:
      logits: z, real numbers with K classes on `axis`.
      where, class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Penalties (*batch,) in float32 or wider.

    Raises:
      AssertionError, TypeError, ValueError: dtypes, shapes or an axis that do not fit, by name.

    Example:
      >>> from jax_ls import penalties
      >>> print(penalties.logit_norm(jnp.array([[3.0, 4.0]])))
      [12.5]

    References:
      Kornblith et al., Why Do Better Loss Functions Lead to Less Transferable Features?, 2021 (logit penalty).
    """
    return cross_entropy(
        logits, Square(), where=where, class_where=class_where, axis=axis, class_axis_name=class_axis_name
    )


def z_loss(
    logits: Array,
    *,
    where: Array | None = None,
    class_where: Array | None = None,
    axis: int = -1,
    class_axis_name: AxisName | None = None,
) -> jax.Array:
    """lse(z)²: keeps the normaliser near 1. The `z_loss` of the losses, as a term of its own.

    Args:
      logits: z, real numbers with K classes on `axis`.
      where, class_where, axis, class_axis_name: as in `cross_entropy`.

    Returns:
      Penalties (*batch,) in float32 or wider; PaLM weighs them with 1e-4.

    Raises:
      AssertionError, TypeError, ValueError: dtypes, shapes or an axis that do not fit, by name.

    Example:
      >>> from jax_ls import penalties
      >>> print(f"{penalties.z_loss(jnp.zeros(4)):.4f}")
      1.9218

    References:
      Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, 2022.
    """
    nothing = 0.0 * Uniform()
    return cross_entropy(
        logits, nothing, where=where, class_where=class_where, z_loss=1.0, axis=axis, class_axis_name=class_axis_name
    )


def _parameter(name: str, x: Array, like: jax.Array, where: Array | None) -> jax.Array:
    """() or (*batch,) in the dtype of the penalties; 0 for examples that do not count."""
    value = checks.as_weight(name, x)
    checks.assert_shape(name, value, [(), like.shape], f"() or {like.shape}, the shape of the batch")
    return value.astype(like.dtype) if where is None else jnp.where(where, value.astype(like.dtype), 0)
