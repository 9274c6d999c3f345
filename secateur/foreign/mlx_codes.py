"""Folders of MLX with affine codes, as mlx-lm writes them: read as mlx's own `dequantize` does on a CPU.

Beside `NAME.weight uint32 [O, W]`, a stream of bits a row with the first code in the least significant, are `NAME.scales` and
`NAME.biases [O, G]`. w = scale · code + bias, where product and sum are each rounded to the dtype of the scales. None of our
layouts rounds twice, or has scales below zero, as mlx's quantizer makes them: such weights become dense.

O: output features, I: input features, W: words of 32 bits, G: groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.foreign.format import Foreign, foreign
from secateur.formats.layouts.coded import check_finite
from secateur.formats.layouts.layout import Decoder, check_parts, only_finite
from secateur.formats.layouts.packed_weight import PackedWeight
from secateur.kernels.bits import unpack_bits
from secateur.kernels.packed import FLOAT_DTYPES

KEY = "quantization"
BITS = (2, 3, 4, 5, 6, 8)
_READ = "secateur reads MLX's affine codes of 2, 3, 4, 5, 6 or 8 bits in groups"


@dataclass(frozen=True)
class MLXCodes(Decoder):
    """Decodes one weight: that of a linear or an embedding."""

    bits: int
    group_size: int

    name: ClassVar[str] = "mlx"
    rounded: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("weight", "scales", "biases")

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(O, I). Raises ValueError where the parts do not fit together."""
        check_parts(
            tensors,
            {
                "weight": lambda t: t.ndim == 2 and t.dtype == torch.uint32 and t.numel() > 0,
                "scales": lambda t: t.ndim == 2 and t.dtype in FLOAT_DTYPES,
                "biases": lambda t: t.ndim == 2 and t.dtype in FLOAT_DTYPES,
            },
        )
        (O, W), (rows, G) = tensors["weight"].shape, tensors["scales"].shape
        if rows != O or G * self.group_size * self.bits != W * 32 or tensors["biases"].shape != (O, G):
            raise ValueError(
                f"its weight is {[O, W]}, its scales {[rows, G]} and its biases {list(tensors['biases'].shape)}, which is no "
                f"matrix of {self.bits} bits in groups of {self.group_size}"
            )
        if tensors["biases"].dtype != tensors["scales"].dtype:
            raise ValueError("its scales and biases are of two dtypes")
        return O, G * self.group_size

    def form(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[int, ...], torch.dtype]:
        return self.shape(tensors), tensors["scales"].dtype

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        _, I = self.shape(tensors)
        check_finite(tensors, "scales", "biases")
        code_OI = unpack_bits(
            tensors["weight"].clone(memory_format=torch.contiguous_format).view(torch.uint8), self.bits, I
        )
        scale_OI, bias_OI = (tensors[part].repeat_interleave(self.group_size, 1) for part in ("scales", "biases"))
        return only_finite((code_OI.to(scale_OI.dtype) * scale_OI).add_(bias_OI))


@foreign
class MLX(Foreign):
    """`quantization` in `config.json` says bits and size of groups, and by their names what is otherwise for modules."""

    quant_method: ClassVar[str] = "mlx"
    reads: ClassVar[str] = "MLX's affine codes"

    @classmethod
    def section(cls, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        other = config.get("quantization_config")
        found = config.get(KEY, other)
        if not isinstance(found, Mapping) or "quant_method" in found or not {"bits", "group_size"} <= found.keys():
            return None
        return None if isinstance(other, Mapping) and "quant_method" in other else found

    @classmethod
    def packed_weights(cls, stored: Mapping[str, Tensor], section: Mapping[str, Any]) -> dict[str, PackedWeight]:
        packed = {}
        for key in stored:
            module, _, part = key.rpartition(".")
            if part != "scales" or f"{module}.weight" not in stored:
                continue
            own = section.get(module)
            layout = _read_codes(module, {**section, **own} if isinstance(own, Mapping) else section)
            parts = {part: f"{module}.{part}" for part in layout.parts if f"{module}.{part}" in stored}
            packed[f"{module}.weight"] = PackedWeight(layout, parts)
        return packed


def _read_codes(module: str, section: Mapping[str, Any]) -> MLXCodes:
    """How the codes of a module are stored. Raises CheckpointError when they are not read here."""
    bits, size, mode = section.get("bits"), section.get("group_size"), section.get("mode", "affine")
    for what, found, right in (
        ("mode", mode, mode == "affine"),
        ("bits", bits, type(bits) is int and bits in BITS),
        ("group_size", size, type(size) is int and size in (32, 64, 128)),
    ):
        if not right:
            raise CheckpointError(f"the checkpoint's {KEY} has {what} {found!r} for {module}: {_READ}")
    assert isinstance(bits, int)
    assert isinstance(size, int)
    return MLXCodes(bits, size)
