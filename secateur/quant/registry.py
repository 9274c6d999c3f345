"""The names under which quantization methods are found, and the contract that they keep.

O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from secateur.calibration.stats import InputStats, Level
from secateur.codes import Quantized
from secateur.prune.registry import Pruned


class Quantizer(Protocol):
    """A method with its options: a frozen dataclass whose fields are the options that a recipe may give, all with defaults.

    Making one raises UsageError where an option makes no sense.
    """

    name: ClassVar[str]
    all_bits: ClassVar[tuple[int, ...]]
    """What `bits` may be, rising."""

    @property
    def bits(self) -> int:
        """Of a code."""
        ...

    @property
    def level(self) -> Level:
        """The least statistics of the inputs that it works from."""
        ...

    @property
    def needs_fisher(self) -> bool:
        """Whether it wants the squared gradient of the loss for every weight."""
        ...

    def solve(
        self,
        W_OI: Tensor,
        stats: InputStats,
        sizes: Sequence[int],
        dtype: torch.dtype,
        pruned: Pruned | None = None,
        fisher_OI: Tensor | None = None,
    ) -> list[Quantized]:
        """Quantize linears that read the same input, and change none of the arguments.

        Args:
            W_OI: their weights one below the other, float32.
            stats: of the input.
            sizes: how many rows each linear has.
            dtype: of the weights in the source, and of the dense weights that the result stands for.
            pruned: which weights are kept, and what a pruner made of them; None keeps all.
            fisher_OI: the squared gradients, where `needs_fisher`.

        Returns:
            One weight a linear. Where `pruned` is given its `keep_OI` is that mask, and what is not kept is exactly zero.
        """
        ...


QUANTIZERS: dict[str, type[Quantizer]] = {}

_Q = TypeVar("_Q", bound=type[Any])


def quantizer(cls: _Q) -> _Q:
    """Register a quantization method under its name."""
    QUANTIZERS[cls.name] = cls
    return cls


def storage_dtype(W_OI: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which 16 bits scales, tables and outliers are stored: float16, which is more precise, unless the model is in bfloat16
    or its weights are too large or too small for float16.
    """
    largest = W_OI.abs().amax().item()
    return torch.float16 if dtype != torch.bfloat16 and 2**-8 <= largest <= 2**14 else torch.bfloat16
