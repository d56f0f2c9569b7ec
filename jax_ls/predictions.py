"""What the model predicts, as constants: the probability of the label, of its rival, of the likeliest class.

Each is a cross-entropy, CE(z, δ_y) = −log p_y, with a target that reads the logits that it meets. Masks, sharding,
offsets and half precision are then those of `cross_entropy`, and so are maximum and Σ exp: XLA takes them once, for
the loss and for whatever is asked here of the same logits.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jax_ls import checks
from jax_ls.algebra import Target, pytree
from jax_ls.class_axis import AxisName, ClassAxis, align
from jax_ls.losses import cross_entropy
from jax_ls.targets import OneHot

Array = jax.typing.ArrayLike


@pytree()
@dataclass(frozen=True, eq=False)
class Predicted(Target):
    """δ of the likeliest class: its cross-entropy is −log max p."""

    def contract(self, values: jax.Array | None, axis: ClassAxis) -> jax.Array:
        return jnp.ones(()) if values is None else _less_offset(axis.max(values), axis)


@pytree(labels=0)
@dataclass(frozen=True, eq=False)
class Rival(Target):
    """δ of the likeliest class but y: its cross-entropy is −log max_{k≠y} p_k."""

    labels: jax.Array

    def contract(self, values: jax.Array | None, axis: ClassAxis) -> jax.Array:
        if values is None:
            return jnp.ones(())
        # In real numbers, for XLA on CPU writes the operand of a maximum out where it holds a select or integers.
        classes = jax.lax.optimization_barrier(jnp.arange(values.shape[-1], dtype=values.dtype))
        away = jnp.abs(align(classes, values.ndim) - (self.labels - axis.start)[..., None].astype(values.dtype))
        return _less_offset(axis.max(values + (1 - jnp.minimum(away, 1)) * jnp.finfo(values.dtype).min), axis)


def _less_offset(x: jax.Array, axis: ClassAxis) -> jax.Array:
    return x if axis.offset is None else x - axis.offset


def one_hot(labels: Array) -> OneHot:
    """Integers alone: soft labels have no p_y."""
    return OneHot(checks.as_labels("labels", labels))


def log_prob(
    logits: Array,
    target: Target,
    where: Array | None,
    class_where: Array | None,
    axis: int,
    class_axis_name: AxisName | None,
) -> jax.Array:
    """log p of what the target names, as a constant; 0 where examples do not count."""
    # The gradient is cut here and not at the logits: only then does XLA see the very operations of the loss.
    loss = cross_entropy(
        logits, target, where=where, class_where=class_where, axis=axis, class_axis_name=class_axis_name
    )
    return -jax.lax.stop_gradient(loss)


def is_correct(logits: Array, labels: jax.Array, class_where: Array | None = None, axis: int = -1) -> jax.Array:
    """Whether argmax_k p_k over the classes that exist is y, (*batch,); of those that tie, the first is taken.

    Never where there are no finite numbers to compare.
    """
    z = jnp.moveaxis(jnp.asarray(logits), axis, -1)
    z = z.astype(checks.wide(z.dtype))
    if class_where is not None:
        exists = jnp.asarray(class_where)
        exists = jnp.moveaxis(exists, axis, -1) if exists.ndim == z.ndim else align(exists, z.ndim)
        z = jnp.where(exists, z, -jnp.inf)
    return ClassAxis().first(z, ClassAxis().max(z)) == labels.astype(z.dtype)
