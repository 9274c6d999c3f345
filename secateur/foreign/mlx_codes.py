"""Folders of MLX with affine codes, as mlx-lm writes them: read as mlx's own `dequantize` does on a CPU, and written.

Beside `NAME.weight uint32 [O, W]`, a stream of bits a row with the first code in the least significant, are `NAME.scales` and
`NAME.biases [O, G]`. w = scale · code + bias, where product and sum are each rounded to the dtype of the scales. None of our
layouts rounds twice, or has scales below zero, as mlx's quantizer makes them: such weights become dense as they are read.

O: output features, I: input features, W: words of 32 bits, G: groups of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.quantized import Quantized
from secateur.errors import CheckpointError
from secateur.foreign.format import Foreign, foreign
from secateur.foreign.pack_quantized import check_codes_alone, uniform_codes
from secateur.formats.layouts.coded import check_finite
from secateur.formats.layouts.layout import Decoder, all_finite, check_parts, dtype_name, only_finite
from secateur.formats.layouts.packed_weight import PackedWeight
from secateur.kernels.bits import pack_bits, unpack_bits
from secateur.kernels.packed import FLOAT_DTYPES

KEY = "quantization"
_OPENING = """```python
from mlx_lm import generate, load  # pip install mlx-lm

model, tokenizer = load("FOLDER")
print(generate(model, tokenizer, prompt="Once upon a time"))
```

FOLDER is this folder, or its name on the hub. The weights are in MLX's format, which transformers does not read.
"""
BITS = (2, 3, 4, 5, 6, 8)
_SIZES = (128, 64, 32)
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


def pack(weight: Quantized) -> tuple[MLXCodes, dict[str, Tensor], float]:
    """A weight as mlx keeps it: how, its tensors by the names behind that of its module, and by what share of a step at most
    its zero points have moved.

    Codes and scales are the same numbers, and −zero · scale is rounded to their dtype, which is the weight's. Groups are cut
    where mlx has none as large, and codes of 7 bits, of which it has none, take 8.

    Raises:
        ValueError: mlx has no such codes.
    """
    try:
        codes = uniform_codes(weight)
    except ValueError as error:
        raise ValueError("its codes are not on a uniform grid, and MLX's affine codes are") from error
    check_codes_alone(weight, "MLX")
    I = weight.shape[1]
    group = min(codes.group_size, I)
    size = next((each for each in _SIZES if math.gcd(group, I) % each == 0), None)
    if size is None:
        raise ValueError(
            f"its {I} input features in groups of {group} do not divide into groups of 32, the least of MLX's"
        )
    scale_OG = codes.scale_OG.to(weight.dtype)
    if not torch.equal(scale_OG.float(), codes.scale_OG.float()):
        raise ValueError(
            f"its scales are {dtype_name(codes.scale_OG.dtype)} numbers that {dtype_name(weight.dtype)}, the model's dtype, "
            "does not have"
        )
    zero_OG = torch.full_like(scale_OG, 2 ** (codes.bits - 1)) if codes.zero_OG is None else codes.zero_OG
    exact_OG = scale_OG.float() * -zero_OG.float()
    bias_OG = exact_OG.to(weight.dtype)
    if not all_finite(bias_OG):
        raise ValueError(f"its scales times zero points overflow {dtype_name(weight.dtype)}, the model's dtype")
    moved = ((bias_OG.float() - exact_OG) / scale_OG.float()).abs().amax().item()
    form = MLXCodes(codes.bits if codes.bits in BITS else 8, size)
    scale_OG, bias_OG = (
        x_OG.repeat_interleave(group // size, 1)[:, : I // size].contiguous() for x_OG in (scale_OG, bias_OG)
    )
    word_OW = pack_bits(codes.code_OK, form.bits).clone(memory_format=torch.contiguous_format).view(torch.uint32)
    return form, {"weight": word_OW, "scales": scale_OG, "biases": bias_OG}, moved


def section_of(forms: Mapping[str, MLXCodes]) -> dict[str, Any]:
    """What `config.json` says under `KEY` of modules with such weights: what is so for most, and by their names the others."""
    found = list(forms.values())
    most = max(dict.fromkeys(found), key=found.count)
    others = {name: {**vars(form)} for name, form in forms.items() if form != most}
    return {"group_size": most.group_size, "bits": most.bits, "mode": "affine", **others}


@foreign
class MLX(Foreign):
    """`quantization` in `config.json` says bits and size of groups, and by their names what is otherwise for modules."""

    quant_method: ClassVar[str] = "mlx"
    reads: ClassVar[str] = "MLX's affine codes"
    library: ClassVar[str] = "mlx"
    opening: ClassVar[str] = _OPENING

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
        ("group_size", size, type(size) is int and size in _SIZES),
    ):
        if not right:
            raise CheckpointError(f"the checkpoint's {KEY} has {what} {found!r} for {module}: {_READ}")
    assert isinstance(bits, int)
    assert isinstance(size, int)
    return MLXCodes(bits, size)
