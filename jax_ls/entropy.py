"""The one computation under every cross-entropy. It never writes q out, for it is linear in q.

CE(z, q) = M · lse(z) − ⟨q, z⟩, M = Σ_k q_k, and ∂CE/∂z = M · softmax(z) − q comes from differentiating that.
"""

import functools

import jax
import jax.numpy as jnp

from jax_ls import checks
from jax_ls.algebra import Target
from jax_ls.class_axis import SAVED, AxisName, ClassAxis, align, saved


@functools.partial(jax.checkpoint, static_argnums=(6, 7), policy=jax.checkpoint_policies.save_only_these_names(SAVED))
def fused_cross_entropy(
    logits: jax.Array,
    target: Target,
    where: jax.Array | None,
    class_where: jax.Array | None,
    class_weights: jax.Array | None,
    z_loss: jax.Array | None,
    class_axis_name: AxisName | None,
    relative: bool,
) -> jax.Array:
    """M · lse − ⟨q, z⟩ [− H(q) if relative] + z_loss · lse², classes last.

    Only the logits and a few numbers a row are kept for the backward pass. The sums are over z − max, so that a
    common offset leaves no trace; ⟨q, z⟩ sees the maximum through a barrier, or XLA on CPU would write z − max out
    for the sums to share.
    """
    z = logits.astype(checks.wide(logits.dtype))
    if class_where is not None:
        z = jnp.where(align(class_where, z.ndim), z, -jnp.inf)
    if where is not None:
        z, target = jnp.where(where[..., None], z, 0), target.counted(where)
    axis = ClassAxis(z.shape[-1], where=class_where, rows=where, class_axis_name=class_axis_name)
    top = axis.max(z)
    top = saved(jnp.where(jnp.isfinite(top), top, 0))
    total = saved(axis.psum(jnp.sum(jnp.exp(z - top[..., None]), axis=-1)))
    if class_weights is not None:
        target = target.weighted(class_weights)
    dot = target.dot(z, axis=axis.shifted(jax.lax.optimization_barrier(top)))
    loss = target.mass(axis=axis).astype(z.dtype) * jnp.log(total) - dot
    if relative:
        loss = loss + saved(axis.psum(_negentropy(target.probs_on(axis)))).astype(z.dtype)
    if z_loss is not None:
        loss = loss + z_loss.astype(z.dtype) * jnp.square(jnp.log(total) + top)
    return loss if where is None else jnp.where(where, loss, 0)


def _negentropy(q: jax.Array) -> jax.Array:
    """Σ_k q log q, with 0 log 0 = 0."""
    return jnp.sum(jnp.where(q == 0, 0, q * jnp.log(jnp.where(q == 0, 1, q))), axis=-1)
