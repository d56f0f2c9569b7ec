"""ε by what the model believes: each rule gives ε of each example, and any loss of this library takes it.

    smoothed_cross_entropy(logits, labels, adaptive.confidence(logits, labels, 0.1))

Published methods disagree on whom to smooth, so a rule is named by what it looks at and none is called "adaptive".

- The confident get more: `confidence`, `margin`, `entropy` (Lee et al. 2022 go by entropy; ACLS, Park et al. 2023,
  presses the largest logits hardest). They fight overconfidence: what is sure already need not become surer.
- The doubtful get more: `uncertainty` (Maher & Kull 2021, with a teacher's p_y; the bootstrapping of Reed et al. 2014
  also trusts the label less there), `beta` (Zhang & Sabuncu 2020, by rank). They fight labels that may be wrong.
- Frequent classes get more: `label_aware` (Zhong et al. 2021). On long tails the model is surest of the head.
- All get the same, which follows how overconfident the model is: `CalibrationController`.

`focal_gamma` is a rule of the same kind for the γ of `jax_ls.focal_loss`.

Predictions enter as constants: no gradient of ε reaches the logits; those in `smoothing` and `gamma` are exact. Maximum
and Σ exp are the ones that the loss takes of the same logits, and XLA computes them once.
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
