"""Calibration errors, proper scores, and the temperature that removes most of a calibration error.

A score is NaN if no example counts: the set is empty, or `where` leaves every example out. A perfect score would
mislead. A score is also NaN if an example that counts holds a NaN, or a label that names no class.

Two classes add up over batches and devices: `Reliability` for confidence against accuracy, and `Mean` for any loss of
each example. Add the parts, and take the number at the end.

    bins = bins + calibration.reliability(logits, labels)                  # bins.error(), bins.overconfidence
    nll = nll + calibration.Mean.of(jax_ls.cross_entropy(logits, labels))  # nll.value

Equal-mass bins and the risk-coverage curve need all examples at once. Equal-mass bins of several batches add up if all
of them use the `edges` of the first batch.
"""

from jax_ls.calibration.errors import (
    area_under_risk_coverage,
    classwise_calibration_error,
    expected_calibration_error,
    overconfidence,
)
from jax_ls.calibration.reliability import Reliability, classwise_reliability, reliability
from jax_ls.calibration.scores import Mean, brier_score, negative_log_likelihood, squared_error
from jax_ls.calibration.temperature import fit_temperature

__all__ = [
    "Mean",
    "Reliability",
    "area_under_risk_coverage",
    "brier_score",
    "classwise_calibration_error",
    "classwise_reliability",
    "expected_calibration_error",
    "fit_temperature",
    "negative_log_likelihood",
    "overconfidence",
    "reliability",
    "squared_error",
]
