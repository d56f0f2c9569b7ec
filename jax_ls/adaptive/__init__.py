"""ε from the model's predictions: each rule returns an ε for each example, and any loss of this library takes it.

    smoothed_cross_entropy(logits, labels, adaptive.confidence(logits, labels, 0.1))

Published methods disagree on which examples to smooth. So each rule is named by what it reads off the prediction.

- Confident predictions get more: `confidence`, `margin`, `entropy` (Lee et al. 2022 go by entropy; ACLS, Park et al.
  2023, pushes the largest logits down most). These rules act against overconfidence.
- Doubtful predictions get more: `uncertainty` (Maher & Kull 2021, with a teacher's p_y; the bootstrapping of Reed et
  al. 2014 also trusts the label less there) and `beta` (Zhang & Sabuncu 2020, by rank). These rules act against labels
  that may be wrong.
- Frequent classes get more: `label_aware` (Zhong et al. 2021). On long tails the model is surest of the head.
- All examples get the same ε, which follows how overconfident the model is: `CalibrationController`.

`focal_gamma` is a rule of the same kind for the γ of `jax_ls.focal_loss`.

Predictions are constants for differentiation: no gradient of ε reaches the logits. The gradients in `smoothing` and
`gamma` are exact. The rules need the maximum and Σ exp that the loss needs too, and XLA computes both once.
"""

from jax_ls.adaptive.class_counts import label_aware
from jax_ls.adaptive.controller import CalibrationController, CalibrationState
from jax_ls.adaptive.rules import beta, confidence, entropy, focal_gamma, margin, uncertainty

__all__ = [
    "CalibrationController",
    "CalibrationState",
    "beta",
    "confidence",
    "entropy",
    "focal_gamma",
    "label_aware",
    "margin",
    "uncertainty",
]
