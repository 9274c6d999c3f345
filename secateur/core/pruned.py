"""What a pruner returns.

O: output features, I: input features.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pruned:
    """What a pruner returns.

    Attributes:
        W_OI: the new weights, float32; zero wherever `keep_OI` is false.
        keep_OI: bool, which weights are kept.
        notes: what the user should know about how it went, such as damping that had to be raised.
    """

    W_OI: Tensor
    keep_OI: Tensor
    notes: tuple[str, ...] = ()
