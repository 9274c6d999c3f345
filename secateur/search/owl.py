"""OWL: "Outlier Weighed Layerwise Sparsity", Yin et al. 2023, arXiv:2310.05175.

O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

# OWL's: a weight is an outlier from so many times the mean score on, and sparsities differ from the mean by so much at most.
OUTLIER = 5.0


MOST_OFF = 0.08


def outlier_share(score_OI: Tensor) -> float:
    """The share of weights whose score, |W_ij|·‖X_j‖₂ as Wanda has it, is over five times the mean (OWL, equation 2)."""
    return (score_OI > OUTLIER * score_OI.mean()).float().mean().item()


def owl(outliers: Sequence[float], weights: Sequence[int], sparsity: float) -> list[float]:
    """Sparsities of blocks by their share of outliers: more outliers, fewer weights removed.

    "Outlier Weighed Layerwise Sparsity (OWL)", Yin et al. 2023, arXiv:2310.05175, section 3.2: shares are stretched to
    a range of twice 0.08, and shifted so that the mean over all weights is as asked. Where that left [0, 1) it is narrowed.

    Args:
        outliers: share of each block.
        weights: how many each block has.
        sparsity: of all together.
    """
    share = np.asarray(outliers, dtype=np.float64)
    spread = share.max() - share.min()
    if spread <= 0:
        return [sparsity] * len(outliers)
    off = (share - share.min()) / spread
    off -= np.average(off, weights=np.asarray(weights, dtype=np.float64))
    room = min(sparsity / max(off.max(), 1e-12), (0.999 - sparsity) / max(-off.min(), 1e-12))
    return [float(x) for x in sparsity - min(2 * MOST_OFF, max(room, 0.0)) * off]
