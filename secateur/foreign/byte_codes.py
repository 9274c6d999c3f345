"""The formats `int-quantized` and `float-quantized` of compressed-tensors: a code a byte, by itself or below a mask; read only.

`weight` is int8 or float8_e4m3fn `[O, I]`, `weight_scale` has one number for the tensor, for each row or for each group of a
row, and `weight_zero_point` as many, where there is one. w = (code − zero) · scale, in the dtype of the scale.

O: output features, I: input features, K: kept weights of a row, G: groups of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.quantized import Quantized, take_kept
from secateur.errors import CheckpointError
from secateur.foreign.masked import KEPT
from secateur.foreign.ours import as_ours
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.coded import check_finite
from secateur.formats.layouts.layout import Decoder, Layout, check_parts, only_finite
from secateur.formats.layouts.nm import NMBits
from secateur.formats.layouts.packed_int import Uniform
from secateur.formats.layouts.packed_weight import PackedWeight
from secateur.kernels.packed import FLOAT_DTYPES

#: What `format` in a section may call them.
FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
_CODES = (torch.int8, torch.float8_e4m3fn)
_ZEROS = (torch.int8, torch.int32, torch.int64, torch.float8_e4m3fn, *FLOAT_DTYPES)
_HALF = 128
# Of no use to dense weights: how activations were to be quantized.
_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
_READ = "secateur reads integers of up to 8 bits and FP8 weights, with scales per tensor, output channel or group"


@dataclass(frozen=True)
class _Codes:
    """A weight as it is stored, with a scale and a zero point for each group of a row.

    Attributes:
        keep_OI: which codes were stored; None: all.
    """

    code_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None
    keep_OI: Tensor | None

    @property
    def symmetric(self) -> bool:
        return self.zero_OG is None or not self.zero_OG.any()

    def dense(self) -> Tensor:
        W_OI = self.code_OI.float()
        size = W_OI.shape[1] // self.scale_OG.shape[1]
        if self.zero_OG is not None:
            W_OI -= self.zero_OG.repeat_interleave(size, 1)
        W_OI *= self.scale_OG.float().repeat_interleave(size, 1)
        return W_OI.to(self.scale_OG.dtype)


class ByteCodes(Decoder):
    """Decodes one such weight, and finds the layout of ours that is the same to the bit.

    Integers are `packed-int`, and those that are pruned, too, `sparse-int`; of pruned FP8 codes it is the products that
    `nm` or `bitmap` holds.
    """

    name: ClassVar[str] = "byte-codes"
    rounded: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("weight", "weight_scale", "weight_zero_point", *_ACTIVATIONS)

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return only_finite(_read(tensors).dense())

    def ours(self, tensors: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]] | None:
        found = _read(tensors)
        integers = not found.code_OI.is_floating_point()
        if found.keep_OI is None:
            return _packed(found) if integers else None
        if integers and found.symmetric:
            kept = _kept(found, found.keep_OI)
            if kept is not None:
                return kept
        W_OI = self.unpack(tensors)
        pairs = NMBits(2, 4)
        try:
            return pairs, pairs.pack(W_OI)
        except ValueError:  # not of this pattern
            return Bitmap(), Bitmap().pack(W_OI)


def _packed(found: _Codes) -> tuple[Layout, dict[str, Tensor]] | None:
    O, I = found.code_OI.shape
    size = I // found.scale_OG.shape[1]
    zero_OG = None if found.symmetric or found.zero_OG is None else (found.zero_OG + _HALF).to(torch.uint8)
    codes = Uniform(8, size, _unsigned(found.code_OI), found.scale_OG, zero_OG)
    return as_ours(Quantized(codes, (O, I), found.scale_OG.dtype), codes) if size > 1 else None


def _kept(found: _Codes, keep_OI: Tensor) -> tuple[Layout, dict[str, Tensor]] | None:
    """As codes of the kept weights, where groups of those are groups of all."""
    O, I = found.code_OI.shape
    G = found.scale_OG.shape[1]
    size = I
    if G > 1:
        count = keep_OI.view(O, G, -1).sum(2)
        size = int(count[0, 0])
        if size < 2 or (count != size).any():
            return None
    if not keep_OI.any() or I < 2:
        return None
    codes = Uniform(8, size, take_kept(_unsigned(found.code_OI), keep_OI), found.scale_OG, None)
    return as_ours(Quantized(codes, (O, I), found.scale_OG.dtype, keep_OI), codes)


def _unsigned(code_OI: Tensor) -> Tensor:
    return (code_OI.short() + _HALF).to(torch.uint8)


def _read(tensors: Mapping[str, Tensor]) -> _Codes:
    """The parts, which fit together. Raises ValueError, saying what is wrong."""
    check_parts(
        tensors,
        {
            "weight": lambda t: t.ndim == 2 and t.dtype in _CODES and t.numel() > 0,
            "weight_scale": lambda t: t.ndim <= 2 and t.dtype in FLOAT_DTYPES and t.numel() > 0,
        },
    )
    check_finite(tensors, "weight_scale")
    code_OI, zero_OG = tensors["weight"], None
    scale_OG = _by_group("weight_scale", tensors["weight_scale"], code_OI.shape)
    if "weight_zero_point" in tensors:
        check_parts(tensors, {"weight_zero_point": lambda t: t.dtype in _ZEROS})
        zero_OG = _by_group("weight_zero_point", tensors["weight_zero_point"], code_OI.shape).float()
        whole = zero_OG.round().clamp(-_HALF, _HALF - 1)
        if zero_OG.shape != scale_OG.shape or not torch.equal(whole, zero_OG):
            raise ValueError("its weight_zero_point is not a code for each weight_scale")
    return _Codes(code_OI, scale_OG, zero_OG, tensors.get(KEPT))


def _by_group(part: str, found: Tensor, shape: torch.Size) -> Tensor:
    """Scales or zero points as `[O, G]`. Raises ValueError when they are of another shape."""
    O, I = shape
    if found.numel() == 1:
        return found.reshape(1, 1).expand(O, 1)
    if found.ndim == 2 and len(found) == O and I % found.shape[1] == 0:
        return found
    raise ValueError(f"its {part} has shape {list(found.shape)}, which has no number for each row of {[O, I]}")


def packed_weights(names: Iterable[str], groups: Mapping[str, Any]) -> dict[str, PackedWeight]:
    """The weights of a checkpoint in these formats.

    Args:
        names: of its tensors, such as `….up_proj.weight_scale`.
        groups: the `config_groups` of its section.

    Raises:
        CheckpointError: weights are quantized in a way that is not read here.
    """
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise CheckpointError(f"the checkpoint's {name!r} of 'config_groups' has no 'weights': {_READ}")
        bits, strategy = weights.get("num_bits"), weights.get("strategy")
        for what, value, right in (
            ("num_bits", bits, bits == 8 or (weights.get("type") == "int" and bits in range(2, 8))),
            ("type", weights.get("type"), weights.get("type") in ("int", "float")),
            ("strategy", strategy, strategy in (None, "tensor", "channel", "group")),
            ("dynamic", weights.get("dynamic"), not weights.get("dynamic")),
            ("actorder", weights.get("actorder"), weights.get("actorder") in (None, False, "weight", "static")),
        ):
            if not right:
                raise CheckpointError(f"the checkpoint's {name!r} of 'config_groups' has {what} {value!r}: {_READ}")
    there = dict.fromkeys(names)
    packed = {}
    for name in there:
        module, _, part = name.rpartition(".")
        if part != "weight_scale":
            continue
        parts = {part: f"{module}.{part}" for part in ByteCodes.parts if f"{module}.{part}" in there}
        packed[f"{module}.weight"] = PackedWeight(ByteCodes(), parts)
    return packed
