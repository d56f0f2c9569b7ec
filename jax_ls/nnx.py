"""Flax NNX modules and metrics: the state of online smoothing, of the ε controller and of calibration scores.

A module goes into the model or beside it. It is updated in place, inside `nnx.jit` too, and saved with the model. No
other module of jax_ls imports Flax:

    from jax_ls import nnx as ls_nnx
"""

from __future__ import annotations

import abc
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_ls import checks, online
from jax_ls.adaptive import CalibrationController, CalibrationState
from jax_ls.calibration.reliability import Reliability, reliability
from jax_ls.calibration.scores import Mean, negative_log_probability, squared_error, where_and_mask
from jax_ls.class_axis import AxisName
from jax_ls.targets import Target

try:
    from flax import nnx, serialization
except ImportError as error:
    raise ImportError('jax_ls.nnx: expected flax; pip install "jax_ls[flax]" brings it') from error

__all__ = [
    "BrierScore",
    "CalibrationError",
    "NegativeLogLikelihood",
    "OnlineSmoothing",
    "Overconfidence",
    "SmoothingController",
    "SmoothingState",
]


# The fields of `OnlineState`, and the variables of `OnlineSmoothing` that hold them.
ONLINE = ("matrix", "sums", "counts", "decay", "lost_sums", "lost_counts")


def _restored(state: Any, arrays: dict[str, Any]) -> Any:
    """A state of the kind of `state` from what `flax.serialization` has stored, field by field."""
    expected = {name for name, x in vars(state).items() if x is not None}
    if set(arrays) != expected:
        raise ValueError(f"state: expected the fields {sorted(expected)}, got {sorted(arrays)}")
    fields = {
        name: serialization.from_state_dict(getattr(state, name), x, name=name) for name, x in sorted(arrays.items())
    }
    return type(state)(**{name: fields.get(name) for name in vars(state)})


def _stored(state: Any) -> dict[str, Any]:
    return {name: serialization.to_state_dict(x) for name, x in vars(state).items() if x is not None}


# So that `flax.serialization.to_bytes` and `from_bytes`, and checkpoints made of them, take these states.
for _kind in (online.OnlineState, CalibrationState, Reliability, Mean):
    serialization.register_serialization_state(_kind, _stored, _restored, override=True)


class SmoothingState(nnx.Variable):
    """A variable that smoothing learns and the optimizer does not change.

    `nnx.split(model, nnx.Param, SmoothingState)` separates the two kinds.

    Example:
      >>> from flax import nnx
      >>> from jax_ls.nnx import OnlineSmoothing, SmoothingState
      >>> sorted(nnx.state(OnlineSmoothing(3), SmoothingState))
      ['counts', 'lost_counts', 'lost_sums', 'matrix', 'sums']
    """


class OnlineSmoothing(nnx.Module):
    """Online label smoothing: the fields of `jax_ls.online.OnlineState`, each in a variable.

    Args:
      num_classes, first, decay, limit: as in `jax_ls.online.init`.

    Example:
      >>> from jax_ls.nnx import OnlineSmoothing
      >>> soft = OnlineSmoothing(2)
      >>> soft.update(99 * jnp.eye(2), jnp.array([0, 1]))
      >>> soft.next_epoch()
      >>> soft.target(jnp.array([1])).probs(2).tolist()
      [[0.0, 1.0]]

    References:
      Zhang et al., Delving Deep into Label Smoothing, 2021.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        first: Literal["zeros", "uniform"] = "zeros",
        decay: float | None = None,
        limit: int = 2**30,
    ) -> None:
        state = online.init(num_classes, first=first, decay=decay, limit=limit)
        self.matrix = SmoothingState(state.matrix)
        self.sums = None if state.sums is None else SmoothingState(state.sums)
        self.counts = None if state.counts is None else SmoothingState(state.counts)
        self.decay = None if state.decay is None else SmoothingState(state.decay)
        self.lost_sums = None if state.lost_sums is None else SmoothingState(state.lost_sums)
        self.lost_counts = None if state.lost_counts is None else SmoothingState(state.lost_counts)

    @property
    def state(self) -> online.OnlineState:
        """The `OnlineState` that the variables hold now."""
        return online.OnlineState(**{name: _value(getattr(self, name)) for name in ONLINE})

    def target(self, labels: ArrayLike) -> Target:
        """Returns `jax_ls.online.target` of the state."""
        return online.target(self.state, labels)

    def update(
        self,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        where: ArrayLike | None = None,
        batch_axis_name: AxisName | None = None,
    ) -> None:
        """Replaces the state by `jax_ls.online.update` of it."""
        self._set(online.update(self.state, logits, labels, where=where, batch_axis_name=batch_axis_name))

    def next_epoch(self) -> None:
        """Replaces the state by `jax_ls.online.next_epoch` of it."""
        self._set(online.next_epoch(self.state))

    def _set(self, state: online.OnlineState) -> None:
        for name in ONLINE:
            if name != "decay" and (variable := getattr(self, name)) is not None:
                variable[...] = getattr(state, name)


class SmoothingController(nnx.Module):
    """A `CalibrationController` with its state in the variables `smoothing` (ε) and `gap`.

    Args:
      controller: the controller; `jax_ls.adaptive.CalibrationController()` if None. Its numbers become constants.

    Example:
      >>> from jax_ls.nnx import SmoothingController
      >>> control = SmoothingController()
      >>> control.update(jnp.array([[99.0, 0.0]]), jnp.array([1]))
      >>> control.smoothing[...] > 0.1
      Array(True, dtype=bool)
    """

    def __init__(self, controller: CalibrationController | None = None) -> None:
        # `nnx.jit` compiles a module with its Python numbers as constants; arrays would be data.
        self.controller = jax.tree.map(float, CalibrationController() if controller is None else controller)
        state = self.controller.init()
        self.smoothing = SmoothingState(state.smoothing)
        self.gap = SmoothingState(state.gap)

    def update(
        self,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        where: ArrayLike | None = None,
        class_where: ArrayLike | None = None,
        axis: int = -1,
        batch_axis_name: AxisName | None = None,
    ) -> None:
        """Replaces the state by `CalibrationController.update` of it."""
        options: dict[str, Any] = {
            "where": where,
            "class_where": class_where,
            "axis": axis,
            "batch_axis_name": batch_axis_name,
        }
        state = CalibrationState(self.smoothing[...], self.gap[...])
        state = self.controller.update(state, logits, labels, **options)
        self.smoothing[...], self.gap[...] = state.smoothing, state.gap


class _Score(nnx.Metric):
    """A metric for `nnx.MultiMetric`: its sums are variables, batches add up, and `compute` returns one number.

    `update` takes the arguments of `flax.nnx.metrics.Accuracy`, and ignores those of other metrics. The sums are
    float32, with their rounding errors beside them, so that they stay exact to rounding over any number of batches.
    """

    def __init__(self) -> None:
        for name, x in vars(self._empty()).items():
            setattr(self, name, nnx.metrics.MetricState(x))

    @abc.abstractmethod
    def _measure(self, logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None) -> Reliability | Mean:
        """Returns the sums of one batch."""

    def _empty(self) -> Any:
        return self._measure(jnp.zeros((0, 1), jnp.float32), jnp.zeros((0,), jnp.int32), None)

    @property
    def sums(self) -> Any:
        """The `Reliability` or `Mean` that the variables hold now."""
        empty = jax.eval_shape(self._empty)
        return type(empty)(**{name: getattr(self, name)[...] for name in vars(empty)})

    def update(
        self,
        *,
        logits: ArrayLike,
        labels: ArrayLike,
        where: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        batch_axis_name: AxisName | None = None,
        **_: Any,
    ) -> None:
        """Adds a batch.

        Args:
          logits, labels: z (*batch, K) and integers (*batch,).
          where: boolean (*batch,), the examples that count.
          mask: Flax's name for `where`, which may be numbers; an example counts if both keep it.
          batch_axis_name: mesh axes that the examples are split over, inside `jax.shard_map`.
        """
        y = checks.as_labels("labels", labels)
        checks.assert_batch("labels", y, checks.as_logits("logits", logits))
        batch = self._measure(logits, y, where_and_mask(where, mask, y)).psum(batch_axis_name)
        sums = self.sums
        self._set(sums + jax.tree.map(lambda x, like: x.astype(like.dtype), batch, sums))

    def reset(self) -> None:
        """Forgets all batches."""
        self._set(self._empty())

    def _set(self, sums: Reliability | Mean) -> None:
        for name, x in vars(sums).items():
            getattr(self, name)[...] = x


class CalibrationError(_Score):
    """`jax_ls.calibration.expected_calibration_error` of all batches, in bins of equal width; NaN before the first.

    Args:
      num_bins, norm: as in `jax_ls.calibration.expected_calibration_error`.

    Example:
      >>> from flax import nnx
      >>> from jax_ls.nnx import BrierScore, CalibrationError
      >>> metrics = nnx.MultiMetric(ece=CalibrationError(), brier=BrierScore())
      >>> metrics.update(logits=jnp.zeros((4, 2)), labels=jnp.array([0, 0, 0, 1]))
      >>> {name: value.item() for name, value in metrics.compute().items()}
      {'ece': 0.25, 'brier': 0.5}
    """

    def __init__(self, *, num_bins: int = 15, norm: float = 1) -> None:
        self.num_bins, self.norm = num_bins, norm
        self._empty().error(norm)  # an unknown norm raises here, not at the first `compute`
        super().__init__()

    def _measure(self, logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None) -> Reliability:
        return reliability(logits, labels, num_bins=self.num_bins, where=where)

    def compute(self) -> Array:
        """Returns the calibration error of all batches since the last reset."""
        return self.sums.error(self.norm)


class Overconfidence(_Score):
    """`jax_ls.calibration.overconfidence` of all batches; NaN before the first.

    Example:
      >>> from jax_ls.nnx import Overconfidence
      >>> score = Overconfidence()
      >>> score.update(logits=jnp.zeros((2, 4)), labels=jnp.array([0, 3]))
      >>> print(f"{score.compute():.4f}")
      -0.2500
    """

    def _measure(self, logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None) -> Reliability:
        return reliability(logits, labels, num_bins=1, where=where)

    def compute(self) -> Array:
        """Returns the mean confidence minus the accuracy of all batches since the last reset."""
        return self.sums.overconfidence


class NegativeLogLikelihood(_Score):
    """`jax_ls.calibration.negative_log_likelihood` of all batches, in nats per example; NaN before the first.

    Example:
      >>> from jax_ls.nnx import NegativeLogLikelihood
      >>> score = NegativeLogLikelihood()
      >>> score.update(logits=jnp.zeros((2, 4)), labels=jnp.array([0, 3]))
      >>> print(f"{score.compute():.4f}")
      1.3863
    """

    def _measure(self, logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None) -> Mean:
        return Mean.of(negative_log_probability(logits, labels, where=where), where)

    def compute(self) -> Array:
        """Returns the mean of all batches since the last reset."""
        return self.sums.value


class BrierScore(NegativeLogLikelihood):
    """`jax_ls.calibration.brier_score` of all batches, from 0 to 2; NaN before the first.

    Example:
      >>> from jax_ls.nnx import BrierScore
      >>> score = BrierScore()
      >>> score.update(logits=jnp.zeros((2, 4)), labels=jnp.array([0, 3]))
      >>> print(f"{score.compute():.4f}")
      0.7500
    """

    def _measure(self, logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None) -> Mean:
        return Mean.of(squared_error(logits, labels, where=where), where)


def _value(variable: SmoothingState | None) -> Any:
    return None if variable is None else variable[...]
