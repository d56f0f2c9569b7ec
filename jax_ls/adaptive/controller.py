"""A controller of ε that follows calibration. Its state is a pytree, for `jit`, `scan` and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_ls import checks
from jax_ls.algebra import pytree
from jax_ls.class_axis import AxisName
from jax_ls.logits import Logits, on_logits
from jax_ls.reductions import sum_over_devices

__all__ = ["CalibrationController", "CalibrationState"]


@pytree()
@dataclass(frozen=True)
class CalibrationState:
    """The state of a `CalibrationController`: ε and the running mean of confidence − accuracy, both ().

    Example:
      >>> from jax_ls import adaptive
      >>> adaptive.CalibrationController(initial=0.25).init().smoothing.item()
      0.25
    """

    smoothing: Array
    gap: Array


@pytree()
@dataclass(frozen=True)
class CalibrationController:
    """A rule for one ε for all examples: ε rises while the model is overconfident, and falls while it is not.

    gap <- d gap + (1 − d) mean(max p − [argmax p = y]);  ε <- clip(ε + η gap, low, high)

    Update it with held-out batches if you can. On training batches a model that overfits looks calibrated.

    Args:
      initial: ε to start from, in [low, high].
      low, high: the range of ε.
      rate: η >= 0, how far a gap of 1 moves ε in a step.
      decay: d in [0, 1), the share of the old gap that is kept.

    Raises:
      ValueError: a concrete number outside its range.

    Example:
      >>> from jax_ls import adaptive
      >>> controller = adaptive.CalibrationController(rate=0.1, decay=0.0)
      >>> state = controller.update(controller.init(), jnp.array([[99.0, 0.0], [99.0, 0.0]]), jnp.array([0, 1]))
      >>> round(float(state.gap), 4), round(float(state.smoothing), 4)
      (0.5, 0.15)

    References:
      Steers by the gap as AdaFocal does: Ghosh et al., AdaFocal, 2022.
    """

    initial: ArrayLike = 0.1
    low: ArrayLike = 0.0
    high: ArrayLike = 0.3
    rate: ArrayLike = 0.01
    decay: ArrayLike = 0.99

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in type(self).__annotations__}
        for name, x in values.items():
            checks.assert_shape(name, checks.as_weight(name, x), [()], "a number")
        if any(isinstance(x, Tracer) for x in values.values()):
            return
        low, high = np.asarray(self.low), np.asarray(self.high)
        checks.check_values("high", high, lambda x: x >= low, f"a number >= low, {low}")
        checks.check_values("initial", self.initial, lambda x: (x >= low) & (x <= high), f"a number in [{low}, {high}]")
        checks.check_values("rate", self.rate, lambda x: x >= 0, "a number >= 0")
        checks.check_values("decay", self.decay, lambda x: (x >= 0) & (x < 1), "a number in [0, 1)")

    def init(self) -> CalibrationState:
        """Returns the first state: ε is `initial`, and the gap 0."""
        smoothing = jnp.array(checks.as_weight("initial", self.initial))
        return CalibrationState(smoothing, jnp.zeros_like(smoothing))

    def update(
        self,
        state: CalibrationState,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        where: ArrayLike | None = None,
        class_where: ArrayLike | None = None,
        axis: int = -1,
        batch_axis_name: AxisName | None = None,
    ) -> CalibrationState:
        """Returns the state after one more batch.

        An example does not count if its label names no class or a logit is NaN. If no example counts, nothing changes.

        Args:
          state: from `init` or the last `update`.
          logits, labels, where, class_where, axis: as in `confidence`.
          batch_axis_name: inside `jax.shard_map`, the mesh axes that split the batch, as in `mean`.
        """
        y = checks.as_labels("labels", labels)
        options = {"where": where, "class_where": class_where, "axis": axis}
        surplus, counted = jax.lax.stop_gradient(on_logits(_overconfidence, logits, {"labels": y}, **options))
        total = jnp.sum(jnp.where(counted, surplus, 0)).astype(state.gap.dtype)
        count = jnp.sum(counted).astype(state.gap.dtype)
        total, count = sum_over_devices((total, count), batch_axis_name)
        decay = checks.as_weight("decay", self.decay).astype(state.gap.dtype)
        gap = decay * state.gap + (1 - decay) * total / jnp.maximum(count, 1)
        dtype = state.smoothing.dtype
        rate, low, high = (
            checks.as_weight(name, getattr(self, name)).astype(dtype) for name in ("rate", "low", "high")
        )
        smoothing = jnp.clip(state.smoothing + rate * gap.astype(dtype), low, high)
        moved = CalibrationState(smoothing, gap)
        return jax.tree.map(lambda new, old: jnp.where(count > 0, new, old), moved, state)


def _overconfidence(z: Logits, labels: Array) -> tuple[Array, Array]:
    """Returns max p − [argmax p = y], and whether the example counts: no logit is NaN and its label names a class."""
    log_top = -z.log_total
    surplus = jnp.exp(log_top) - z.is_likeliest(labels).astype(z.dtype)
    return surplus, ~jnp.isnan(z.log_prob(labels) + log_top)
