"""In which 16 bits the floating parts of a quantized weight are stored.

O: output features, I: input features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def storage_dtype(W_OI: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which 16 bits scales, tables and outliers are stored: float16, which is more precise, unless the model is in bfloat16
    or its weights are too large or too small for float16.
    """
    largest = W_OI.abs().amax().item()
    return torch.float16 if dtype != torch.bfloat16 and 2**-8 <= largest <= 2**14 else torch.bfloat16
