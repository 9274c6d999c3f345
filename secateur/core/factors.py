"""A part of low rank that is beside a weight.

O: output features, I: input features, R: rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateur.core.quantized import Quantized


@dataclass(frozen=True)
class WithFactors:
    """A weight, and a part of low rank that is added to it.

    Attributes:
        main: the weight, dense or in codes.
        out_OR, in_RI: the factors of the part, in the dtype that they are stored in.
    """

    main: Tensor | Quantized
    out_OR: Tensor
    in_RI: Tensor
