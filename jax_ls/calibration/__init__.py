"""Does p mean what it says: errors of calibration, proper scores, the temperature that mends most of it.

Scores of nothing, an empty set or one that `where` leaves out, are NaN: no data must not read as a perfect model.
So is the score of a set that holds a NaN, or a label that names no class, in an example that counts.

What adds up over batches and devices is a sum: `Reliability` for confidence against accuracy, `Mean` for any loss
of each example. Add them, and take the number at the end.

    bins = bins + calibration.reliability(logits, labels)                  # bins.error(), bins.overconfidence
    nll = nll + calibration.Mean.of(jax_ls.cross_entropy(logits, labels))  # nll.value

Equal-mass bins and risk against coverage need all examples at once; bins add up with the `edges` of a first batch.
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
