"""The layout `columns-bitmap`: the nonzero weights of one input feature after the other, and one bit per weight.

O: output features, I: input features, B: bytes of the mask of an input's weights, ⌈O/8⌉.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.coded import read_stored_shape
from secateur.formats.layouts.layout import Layout, check_parts, layout
from secateur.kernels.column_weight import SparseColumns
from secateur.kernels.packed import unpadded


@layout
@dataclass(frozen=True)
class ColumnsBitmap(Layout):
    """`compressed [nnz]`, `bitmask uint8 [I, B]` (least significant bit first), `shape int64 [2]`: as in `bitmap`, of the
    transposed weight, but for the shape, which is (O, I)."""

    name: ClassVar[str] = "columns-bitmap"
    rounded: ClassVar[bool] = False
    by_inputs: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("compressed", "bitmask", "shape")

    def pack(self, W_OI: Tensor) -> dict[str, Tensor]:
        return {**Bitmap().pack(W_OI.T.contiguous()), "shape": torch.tensor(W_OI.shape)}

    def load(self, tensors: Mapping[str, Tensor]) -> SparseColumns:
        O, I = read_stored_shape(tensors)
        mask_shape = (I, (O + 7) // 8)
        check_parts(tensors, {"bitmask": lambda t: t.shape == mask_shape})
        return SparseColumns.of(Bitmap().load({**tensors, "shape": torch.tensor((I, O))}))

    def store(self, weight: SparseColumns) -> dict[str, Tensor]:
        inner = Bitmap().store(weight.inner)
        return {"compressed": inner["compressed"], "bitmask": inner["bitmask"], "shape": torch.tensor(weight.shape)}

    def values(self, weight: SparseColumns) -> list[Tensor]:
        return [unpadded(weight.inner.values_V)]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ColumnsBitmap:
        return cls()
