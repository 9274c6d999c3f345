"""The layout `bitmap`: the nonzero weights row after row, and one bit per weight that says where they belong.

O: output features, I: input features, B: bytes of a row's mask, ⌈I/8⌉.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from secateur.formats.layouts.layout import Layout, check_parts, layout, read_shape
from secateur.kernels.expand import compress_bitmap, count_rows, expand_bitmap
from secateur.kernels.packed import FLOAT_DTYPES, SparseWeight, padded, unpadded


@layout
@dataclass(frozen=True)
class Bitmap(Layout):
    """`compressed [nnz]`, `bitmask uint8 [O, B]` (least significant bit first), `shape int64 [2]`.

    The published layout `sparse-bitmask` also stores `row_offsets`, the running count of the mask's bits. They say nothing
    that the mask does not and cost 64 bits a row, so they are not written; where a file has them they must agree.
    """

    name: ClassVar[str] = "bitmap"
    rounded: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("compressed", "bitmask", "shape", "row_offsets")

    def pack(self, W_OI: Tensor) -> dict[str, Tensor]:
        values, bitmask_OB = compress_bitmap(W_OI)
        return {"compressed": values, "bitmask": bitmask_OB, "shape": torch.tensor(W_OI.shape)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        I, _ = self._check(tensors)
        return expand_bitmap(tensors["compressed"], tensors["bitmask"], I)

    def load(self, tensors: Mapping[str, Tensor]) -> SparseWeight:
        I, count_O = self._check(tensors)
        values, bitmask_OB = tensors["compressed"], tensors["bitmask"]
        start_O1 = pad(count_O.cumsum(0), (1, 0))
        if int(start_O1[-1]) != values.numel():
            raise ValueError(f"the bit mask has {int(start_O1[-1])} bits set but there are {values.numel()} values")
        return SparseWeight((len(bitmask_OB), I), padded(values), bitmask_OB.clone(), start_O1)

    def values(self, weight: SparseWeight) -> list[Tensor]:
        return [unpadded(weight.values_V)]

    def ours(self, tensors: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        return self, self.pack(self.unpack(tensors))

    def store(self, weight: SparseWeight) -> dict[str, Tensor]:
        return {
            "compressed": unpadded(weight.values_V),
            "bitmask": weight.bitmask_OB,
            "shape": torch.tensor(weight.shape),
            "row_offsets": weight.start_O1[:-1],
        }

    def _check(self, tensors: Mapping[str, Tensor]) -> tuple[int, Tensor]:
        """I, and how many values each row has, once the parts are known to fit together."""
        check_parts(
            tensors,
            {
                "compressed": lambda t: t.ndim == 1 and t.dtype in FLOAT_DTYPES,
                "bitmask": lambda t: t.ndim == 2 and t.dtype == torch.uint8,
                "shape": lambda t: t.numel() == 2,
            },
        )
        O, I = read_shape(tensors["shape"])
        bitmask_OB = tensors["bitmask"]
        if bitmask_OB.shape != (O, (I + 7) // 8):
            raise ValueError(
                f"its bitmask is {list(bitmask_OB.shape)}, but a weight of shape [{O}, {I}] has [{O}, {(I + 7) // 8}]"
            )
        count_O = count_rows(bitmask_OB, I)
        if "row_offsets" in tensors:
            offset_O = tensors["row_offsets"].flatten()
            whole = offset_O.dtype in (torch.int32, torch.int64)
            if not whole or not torch.equal(offset_O.long(), count_O.cumsum(0) - count_O):
                raise ValueError("its row_offsets are out of order: they do not match the bits of the mask")
        return I, count_O

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Bitmap:
        return cls()
