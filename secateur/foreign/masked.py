"""Bit masks over codes, as compressed-tensors up to 0.14 laid them over whatever a quantizer had made.

A mask says which elements of a tensor are not zero; those follow each other row after row. From 0.9 on only the codes of a
weight are masked (`….up_proj.bitmask`), before that every tensor was (`….up_proj.weight_scale.bitmask`).

O: output features, I: input features, B: bytes of a row's mask, ⌈I/8⌉.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.layout import Decoder, Layout, Stored, bytes_of, check_parts, read_shape
from secateur.kernels.expand import count_rows, expand_bitmap, unpack_mask

#: What is stored of a masked tensor.
PARTS = Bitmap.parts
#: Under which name a decoder of codes finds the mask of its weight.
KEPT = "kept"


@dataclass(frozen=True)
class UnderMask(Decoder):
    """Decodes a weight some of whose tensors are masked, such as `weight.bitmask`; whatever has no point in its name is not.

    Attributes:
        codes: the decoder of what is below the masks.
    """

    codes: Decoder

    name: ClassVar[str] = "masked"
    rounded: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"{self.codes.name} under a mask")

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.codes.unpack(_without_masks(tensors))

    def ours(self, tensors: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]] | None:
        return self.codes.ours(_without_masks(tensors))

    def describe(self, tensors: Mapping[str, Tensor]) -> Stored:
        below = _without_masks(tensors)
        found = self.codes.describe(below)
        count = int(below[KEPT].sum()) if KEPT in below else found.count
        return replace(found, layout=self.name, count=count, bytes=bytes_of(tensors))


def _without_masks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors below the masks, and the mask of `weight`, if it has one. Raises ValueError, saying what is wrong."""
    masked: dict[str, dict[str, Tensor]] = {}
    below = {}
    for name, tensor in tensors.items():
        owner, _, part = name.rpartition(".")
        if owner:
            masked.setdefault(owner, {})[part] = tensor
        else:
            below[name] = tensor
    for name, parts in masked.items():
        below[name], keep = expand(name, parts)
        if name == "weight":
            below[KEPT] = keep
    return below


def expand(name: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A masked tensor of any dtype, of one dimension or two, and its mask. Raises ValueError, saying what is wrong."""
    try:
        check_parts(
            parts,
            {
                "compressed": lambda t: not t.is_complex(),
                "bitmask": lambda t: t.dtype == torch.uint8,
                "shape": lambda t: t.numel() in (1, 2) and t.dtype in (torch.int32, torch.int64),
            },
        )
        sizes = parts["shape"].flatten()
        O, I = read_shape(sizes if len(sizes) == 2 else torch.cat([torch.ones_like(sizes), sizes]))
        values, bitmask = parts["compressed"].flatten(), parts["bitmask"]
        if bitmask.numel() != O * ((I + 7) // 8):
            raise ValueError(f"its bitmask has {bitmask.numel()} bytes, which is not one bit for each of {O} × {I}")
        bitmask_OB = bitmask.reshape(O, -1)
        found_OI = expand_bitmap(values, bitmask_OB, I)
        count_O = count_rows(bitmask_OB, I)
        offsets = parts.get("row_offsets")
        if offsets is not None and not torch.equal(offsets.flatten().long(), count_O.cumsum(0) - count_O):
            raise ValueError("its row_offsets do not match the bits of the mask")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    shape = tuple(sizes.tolist())
    return found_OI.reshape(shape), unpack_mask(bitmask_OB, I).reshape(shape)
