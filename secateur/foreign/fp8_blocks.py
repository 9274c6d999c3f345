"""FP8 weights with a scale for each block of rows and columns, as DeepSeek, Qwen and others publish large models: read only.

`NAME` is `float8_e4m3fn [O, I]`, `NAME_scale_inv` has a scale for each block, by which its codes are multiplied in float32;
the product is rounded once to the model's dtype. The last blocks of rows and columns may be smaller than the others. Scales
of one byte are powers of two (e8m0). Experts may lie in one tensor, as `[E, O, I]`, with scales `[E, G, H]`.

What transformers' `Fp8Dequantize` computes is the same to the bit where blocks divide the weight, or one covers it. Otherwise
it takes the size of blocks from the number of scales, which fails for most shapes and is wrong for the rest (130 rows with 2
scales become two blocks of 65); its kernels, and those of others, take the size that the config says, as is done here.

E: experts, O: output features, I: input features, G: blocks of rows, H: blocks of columns, R: some rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.foreign.format import Foreign, foreign
from secateur.foreign.stacked import Stacked, dtype_of, with_dtype
from secateur.formats.layouts.layout import check_parts
from secateur.formats.layouts.packed_weight import PackedWeight

QUANT_METHOD = "fp8"
_SUFFIX = "_scale_inv"
_DEFAULT_BLOCK = (128, 128)
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
_MOST = 448.0  # the largest number of float8_e4m3fn, whose NaN would be 480
_READ = "secateur reads FP8 weights (float8_e4m3fn) with scales per block or per tensor"
_CHUNK = 2**19  # weights that are decoded at a time, which fit into the caches of a core


@dataclass(frozen=True)
class FP8(Stacked):
    """Decodes weights of one checkpoint.

    Attributes:
        block: rows and columns of a block; None: as many as make the number of scales, one of them where there is one.
    """

    block: tuple[int, int] | None = None

    name: ClassVar[str] = QUANT_METHOD
    parts: ClassVar[tuple[str, ...]] = ("weight", "weight_scale_inv", "activation_scale")

    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        check_parts(
            tensors,
            {
                "weight": lambda t: t.dtype == torch.float8_e4m3fn and t.ndim in (2, 3) and t.numel() > 0,
                "weight_scale_inv": lambda t: t.dtype in _SCALE_DTYPES,
            },
        )
        shape = tuple(tensors["weight"].shape)
        self._blocks(shape, tensors["weight_scale_inv"])
        return shape

    def _blocks(self, shape: tuple[int, ...], scale: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The scales as `[E, G, H]` or `[G, H]`, and the size of a block, for a weight of a shape.

        Raises ValueError where they do not fit.
        """
        *stack, O, I = shape
        if self.block is None and scale.numel() == (stack[0] if stack else 1):
            return scale.reshape(*stack, 1, 1), (O, I)
        if self.block is not None:
            block_O, block_I = min(self.block[0], O), min(self.block[1], I)
            if tuple(scale.shape) == (*stack, -(-O // block_O), -(-I // block_I)):
                return scale, (block_O, block_I)
        elif scale.ndim == len(shape) and list(scale.shape[:-2]) == stack and scale.numel():
            G, H = scale.shape[-2:]
            if O % G == 0 and I % H == 0:
                return scale, (O // G, I // H)
        blocks = "one" if self.block is None else f"one for each block of {self.block[0]} × {self.block[1]}"
        raise ValueError(
            f"its weight_scale_inv has shape {list(scale.shape)}, but a weight of {list(shape)} has {blocks}"
        )

    def matrix(self, tensors: Mapping[str, Tensor], expert: int) -> Tensor:
        code_OI, scale = tensors["weight"], tensors["weight_scale_inv"]
        scale, (block_O, block_I) = self._blocks(tuple(code_OI.shape), scale)
        if code_OI.ndim == 3:
            code_OI, scale = code_OI[expert], scale[expert]
        scale_GH = _scales(scale)
        O, I = code_OI.shape
        W_OI = torch.empty(O, I, dtype=self.made)
        rows = max(1, _CHUNK // I)
        for begin in range(0, O, rows):
            W_RI = _values(code_OI[begin : begin + rows])
            scale_RH = scale_GH[torch.arange(begin, begin + len(W_RI)) // block_O]
            W_RI *= scale_RH.repeat_interleave(block_I, 1)[:, :I]
            W_OI[begin : begin + rows] = W_RI
        return W_OI


def _values(code_RI: Tensor) -> Tensor:
    """Codes as float32. Raises ValueError where one is no number.

    torch converts them one by one. As a float16 of the same sign, exponent and mantissa, each is 2^8 too small.
    """
    half_RI = code_RI.contiguous().view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x407F)
    W_RI = half_RI.view(torch.float16).float().mul_(2.0**8)
    low, high = W_RI.aminmax()
    if max(-low.item(), high.item()) > _MOST:
        raise ValueError("its weight has codes that are NaN")
    return W_RI


def _scales(scale: Tensor) -> Tensor:
    """In float32. Raises ValueError where one is not finite."""
    found = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    if not torch.isfinite(found).all():
        raise ValueError("its weight_scale_inv has a scale that is not finite")
    return found


@foreign
class FP8Blocks(Foreign):
    """Which weights are FP8 is told by the scales beside them; lists of modules are not looked at, as transformers does not
    when it makes such models dense.
    """

    quant_method: ClassVar[str] = QUANT_METHOD
    reads: ClassVar[str] = "FP8 with scales per block or per tensor (fp8)"

    @classmethod
    def section(cls, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return with_dtype(super().section(config), config)

    @classmethod
    def packed_weights(cls, stored: Mapping[str, Tensor], section: Mapping[str, Any]) -> dict[str, PackedWeight]:
        layout = FP8(dtype_of(section), _read_block(section))
        packed = {}
        for key in stored:
            if not key.endswith(_SUFFIX):
                continue
            name = key.removesuffix(_SUFFIX)
            if name not in stored:
                raise CheckpointError(f"{key} stands alone: the files hold no {name}")
            parts = {"weight": name, "weight_scale_inv": key}
            activation = f"{name.removesuffix('.weight')}{'.' if name.endswith('.weight') else '_'}activation_scale"
            if activation in stored:  # of no use to the weight
                parts["activation_scale"] = activation
            packed[name] = PackedWeight(layout, parts)
        return packed


def _read_block(section: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size of a block. Raises CheckpointError when the section says what is not read here."""
    block = section.get("weight_block_size", _DEFAULT_BLOCK)
    pair = isinstance(block, list | tuple) and len(block) == 2
    for key, found, right in (
        ("weight_block_size", block, block is None or (pair and all(type(n) is int and n > 0 for n in block))),
        ("scale_fmt", section.get("scale_fmt"), section.get("scale_fmt") in (None, "float", "ue8m0")),
        ("expert_dtype", section.get("expert_dtype"), section.get("expert_dtype") in (None, "fp8")),
    ):
        if not right:
            raise CheckpointError(f"the checkpoint's quantization_config has {key} {found!r}: {_READ}")
    return None if block is None else (block[0], block[1])
