"""Outliers among the weights of a linear, as OWL counts them.

O: output features, I: input features.
"""

from __future__ import annotations

from torch import Tensor

# A weight is an outlier from so many times the mean score on.
OUTLIER = 5.0


def outlier_share(score_OI: Tensor) -> float:
    """The share of weights whose score, |W_ij|·‖X_j‖₂ as Wanda has it, is over five times the mean (OWL, equation 2)."""
    return (score_OI > OUTLIER * score_OI.mean()).float().mean().item()
