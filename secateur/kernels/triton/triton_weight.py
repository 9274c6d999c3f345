"""A packed weight as the Triton kernels take it.

O: output features, I: input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from secateur.kernels.packed import Packed

#: Columns of a chunk: those of 32 bytes of a mask, one for each thread of a warp.
CHUNK = 256


@dataclass(frozen=True)
class TritonWeight:
    """A weight as the kernels take it.

    Attributes:
        shape: (O, I).
        tensors: arguments of the kernels of its kind, by name; None where a grid has no such thing.
        constants: what the kernels are compiled for, by name; empty for a pruned weight, which is how kinds are told apart.
        packed: the weight that it was made of, most of whose memory is that of the tensors.
    """

    shape: tuple[int, int]
    tensors: dict[str, Tensor | None]
    constants: dict[str, Any]
    packed: Packed
