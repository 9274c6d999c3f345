"""What says beforehand which weights of a mixture need more bits: the findings and scorers of "QuantMoE-Bench: Examining
Post-Training Quantization for Mixture-of-Experts", Li et al. 2024, arXiv:2406.08155.

Attention and shared experts need more bits than experts that tokens are routed to, the first blocks more than the last, and
experts that are chosen often more than others. A linear with an outlying weight needs more; so does a block whose output is
unlike its input. The authors train a network that predicts how alike both are; here that is seen on a text.

L: layers, E: experts, O: output features, I: input features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

#: Bits of experts, of those that the rules prefer, and of all other linears, shared experts among them.
FEW, MORE, OTHERS = 2, 4, 4
# Of the blocks with experts, the first ones, which have more bits as a whole: four of 32 in the paper.
_FIRST = 1 / 8


def outlier_score(W_OI: Tensor) -> float:
    """max_i (max_o |w_oi| / mean_o |w_oi|): how far a weight lies out of those of the same input, at most."""
    size_OI = W_OI.float().abs()
    mean_I = size_OI.mean(0)
    return float((size_OI.amax(0) / mean_I.where(mean_I > 0, 1)).max())


def bits_by_rules(share_LE: Sequence[Sequence[float]], importance_L: Sequence[float], mean: float) -> list[list[int]]:
    """Bits of every expert of every layer, as many of them with more bits as the mean allows.

    The first layers come first, whole, with half of these experts at most; then, in each of the others, as many of those that
    are chosen most often; and what is left is one more in each of the most important of them.

    Args:
        share_LE: how often each is chosen.
        importance_L: of each layer, the more the greater.
        mean: bits, from `FEW` to `MORE`.
    """
    L, E = len(share_LE), len(share_LE[0])
    room = math.floor((mean - FEW) / (MORE - FEW) * L * E + 1e-9)
    first = min(math.ceil(L * _FIRST), room // 2 // E) if L > 1 else 0
    each, left = divmod(room - first * E, L - first)
    by_importance = sorted(range(first, L), key=lambda layer: (-importance_L[layer], layer))
    counts = [E if layer < first else each for layer in range(L)]
    for layer in by_importance[:left]:
        counts[layer] += 1
    return [_most_used(shares, count) for shares, count in zip(share_LE, counts, strict=True)]


def _most_used(share_E: Sequence[float], count: int) -> list[int]:
    order = sorted(range(len(share_E)), key=lambda e: (-share_E[e], e))
    preferred = set(order[:count])
    return [MORE if e in preferred else FEW for e in range(len(share_E))]
