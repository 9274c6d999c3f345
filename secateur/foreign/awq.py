"""AWQ checkpoints in the order that AutoAWQ calls GEMM: read only.

`qweight int32 [I, O/8]` and `qzeros int32 [G, O/8]` hold eight codes of neighbouring output features a word: the even ones of
them first, then the odd ones. `scales [G, O]`. w = (code − zero) · scale in the dtype of the scales, rounded once.

O: output features, I: input features, G: groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.quantized import Quantized
from secateur.errors import CheckpointError
from secateur.foreign.format import Foreign, foreign
from secateur.foreign.gptq_format import owners
from secateur.foreign.ours import as_ours
from secateur.formats.layouts.coded import HALF_DTYPES, check_finite
from secateur.formats.layouts.layout import Decoder, Layout, check_parts, only_finite
from secateur.formats.layouts.packed_int import Uniform
from secateur.formats.layouts.packed_weight import PackedWeight
from secateur.kernels.bits import unpack_bits

QUANT_METHOD = "awq"
BITS = 4
#: Which of eight output features each code of a word is of.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_READ = "secateur reads AWQ of 4 bits in GEMM order"


@dataclass(frozen=True)
class AWQWeight(Decoder):
    """Decodes weights of one checkpoint.

    Attributes:
        group_size: weights of a group; None: all of a row.
    """

    group_size: int | None

    name: ClassVar[str] = QUANT_METHOD
    rounded: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return only_finite(self.read(tensors).dequantize())

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        return self._read(tensors)[0]

    def ours(self, tensors: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]] | None:
        return as_ours(*self._read(tensors))

    def _read(self, tensors: Mapping[str, Tensor]) -> tuple[Quantized, Uniform]:
        check_parts(
            tensors,
            {
                "qweight": lambda t: t.ndim == 2 and t.dtype == torch.int32 and t.numel() > 0,
                "qzeros": lambda t: t.ndim == 2 and t.dtype == torch.int32,
                "scales": lambda t: t.ndim == 2 and t.dtype in HALF_DTYPES,
            },
        )
        word_IV, scale_GO = tensors["qweight"], tensors["scales"]
        I, O = word_IV.shape[0], 32 // BITS * word_IV.shape[1]
        size = self.group_size or I
        G = I // size
        if I % size or scale_GO.shape != (G, O) or tensors["qzeros"].shape != (G, word_IV.shape[1]):
            raise ValueError(
                f"its qweight is {list(word_IV.shape)}, but its scales are {list(scale_GO.shape)} and its qzeros "
                f"{list(tensors['qzeros'].shape)}, which is not one of each for groups of {size} of {I} weights"
            )
        check_finite(tensors, "scales")
        zero_OG = _unpack(tensors["qzeros"])
        middle = bool((zero_OG == 2 ** (BITS - 1)).all())
        codes = Uniform(BITS, size, _unpack(word_IV), scale_GO.T.contiguous(), None if middle else zero_OG)
        return Quantized(codes, (O, I), scale_GO.dtype), codes


def _unpack(word: Tensor) -> Tensor:
    """Codes `[O, …]` of words `[…, O/8]`."""
    code = unpack_bits(word.clone(memory_format=torch.contiguous_format).view(torch.uint8), BITS, 8 * word.shape[1])
    place = torch.arange(0, code.shape[1], 8)[:, None] + torch.tensor(ORDER)
    return torch.empty_like(code).index_copy_(1, place.flatten(), code).T.contiguous()


@foreign
class AWQ(Foreign):
    """Its tensors are called such as `….up_proj.qweight`; those alone tell which modules are quantized."""

    quant_method: ClassVar[str] = QUANT_METHOD
    reads: ClassVar[str] = "AWQ"

    @classmethod
    def packed_weights(cls, stored: Mapping[str, Tensor], section: Mapping[str, Any]) -> dict[str, PackedWeight]:
        bits, size = section.get("bits", BITS), section.get("group_size", 128)
        order = section.get("version") or section.get("format") or "gemm"
        for what, found, right in (
            ("bits", bits, bits == BITS),
            ("group_size", size, type(size) is int and (size == -1 or size > 1)),
            ("version", order, isinstance(order, str) and order.lower() == "gemm"),
            ("backend", section.get("backend"), section.get("backend") != "llm-awq"),
        ):
            if not right:
                raise CheckpointError(f"the checkpoint's quantization_config has {what} {found!r}: {_READ}")
        layout = AWQWeight(None if size == -1 else size)
        return {
            f"{module}.weight": PackedWeight(layout, parts) for module, parts in owners(stored, layout.parts).items()
        }
