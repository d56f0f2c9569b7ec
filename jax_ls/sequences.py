"""Losses of sequences whose labels are not aligned with their frames."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import Target
from jax_ls.class_axis import everywhere, laid_as, multiply, with_whole_rows
from jax_ls.losses import kl_divergence
from jax_ls.smoothing import Prior
from jax_ls.targets import Uniform, as_target

__all__ = ["smoothed_ctc_loss"]


# Compiled once: optax's scan is over a function that it makes anew in each call.
@functools.partial(jax.jit, static_argnames="blank_id")
def _ctc_loss(logits: Array, logit_paddings: Array, labels: Array, label_paddings: Array, blank_id: int) -> Array:
    # optax mixes float32 with the logits' dtype.
    with jax.numpy_dtype_promotion("standard"):
        return optax.ctc_loss(logits, logit_paddings, labels, label_paddings, blank_id=blank_id)


def _paths(logits: Array, arrays: tuple[Array, ...], blank_id: int) -> Array:
    """Returns the CTC loss; on an explicit mesh that splits the sequences, each device takes its own."""
    sharding = jax.typeof(logits).sharding
    loss = functools.partial(_ctc_loss, blank_id=blank_id)
    if not any(sharding.spec):
        return loss(logits, *(everywhere(x) for x in arrays))
    specs = PartitionSpec(sharding.spec[0])
    local = jax.shard_map(loss, mesh=sharding.mesh, in_specs=specs, out_specs=specs, check_vma=False)
    return local(logits, *(laid_as(x, logits, 1) for x in arrays))


@checks.named_options
def smoothed_ctc_loss(
    logits: ArrayLike,
    logit_paddings: ArrayLike,
    labels: ArrayLike,
    label_paddings: ArrayLike,
    smoothing: ArrayLike = 0.1,
    *,
    prior: Prior | None = None,
    blank_id: int = 0,
    where: ArrayLike | None = None,
) -> Array:
    """Returns the CTC loss with label smoothing: (1 − ε) CTC + ε Σ_t KL(u ‖ p_t) over the frames that are real.

    The paths of CTC have no label for a frame, so the mass goes to u on every frame. For the mean over frames, divide ε
    by their number. `optax.ctc_loss` needs all classes on one device: no `class_axis_name`.

    Args:
      logits: z, real numbers (B, T, K).
      logit_paddings: (B, T), 1 for the frames that are padding and 0 for the others, as in `optax.ctc_loss`.
      labels: y, integers (B, N), without blanks.
      label_paddings: (B, N), 1 for padding.
      smoothing: ε, () or (B,), may be traced.
      prior: u, (K,) or a `Target` of (B, T); uniform if None. `priors.unigram(counts, class_where=...)` leaves out the
        blank, on which uniform smoothing puts as much as on any label.
      blank_id: the class of the blank.
      where: boolean (B,), the sequences that count; elsewhere loss and gradient are exactly 0.

    Returns:
      Losses (B,) in float32 or wider.

    Example:
      >>> logits, labels = jnp.zeros((1, 2, 4)), jnp.array([[2]])
      >>> losses = jax_ls.smoothed_ctc_loss(logits, jnp.zeros((1, 2)), labels, jnp.zeros((1, 1)), 0.1)
      >>> print(losses.round(4))
      [1.5066]

    References:
      Kim et al., Improved Training for Online End-to-end Speech Recognition Systems, 2018; Graves et al.,
      Connectionist Temporal Classification, 2006.
    """
    z = checks.as_logits("logits", logits)
    checks.assert_rank("logits", z, 3, "real numbers (B, T, K)")
    # All classes and all frames of a sequence on one device of an explicit mesh.
    z = with_whole_rows(z.astype(checks.wide(z.dtype)))
    y = checks.as_labels("labels", labels)
    checks.assert_rank("labels", y, 2, "integers (B, N)")
    checks.assert_shape("labels", y, [(z.shape[0], y.shape[1])], f"integers ({z.shape[0]}, N)")
    paddings = checks.as_broadcast("logit_paddings", logit_paddings, z[..., 0])
    label_paddings = checks.as_weight("label_paddings", label_paddings).astype(z.dtype)
    checks.assert_shape("label_paddings", label_paddings, [y.shape], f"{y.shape}, the shape of the labels")
    epsilon = checks.as_batch_numbers("smoothing", smoothing, z.shape[:1]).astype(z.dtype)
    real = paddings == 0
    real, epsilon = laid_as(real, z, 2), laid_as(epsilon, z, epsilon.ndim)
    if where is not None:
        where = laid_as(checks.as_where("where", where, z.shape[:1]), z, 1)
        label_paddings = laid_as(label_paddings, z, 1)
        real &= where[:, None]
        epsilon = jnp.where(where, epsilon, 0)
        label_paddings = jnp.where(where[:, None], label_paddings, 1)
    if prior is None:
        u: Target = Uniform()
    else:
        if not isinstance(prior, Target):
            prior = checks.as_class_values("prior", prior, widened=False)
            checks.assert_class_values("prior", prior, z)
        u = as_target(prior)
    shown = jnp.where(real[..., None], z, 0)
    paths = _paths(shown, (1 - real.astype(z.dtype), y, label_paddings), blank_id).astype(z.dtype)
    apart = jnp.sum(kl_divergence(z, u, where=real), axis=-1)
    losses = multiply(1 - epsilon, paths) + multiply(epsilon, apart)
    return losses if where is None else jnp.where(where, losses, 0)
