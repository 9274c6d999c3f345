"""What a pruner returns.

O: output features, I: input features, U: units of input features.
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
        keep_U: bool, which units stay, where whole ones go.
        shift_O: what the outputs lack on average because of what went, for a bias to make up for.
    """

    W_OI: Tensor
    keep_OI: Tensor
    notes: tuple[str, ...] = ()
    keep_U: Tensor | None = None
    shift_O: Tensor | None = None
