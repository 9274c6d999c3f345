"""The layout `columns`: a dense weight by input feature, of which decoding reads what belongs to the inputs that matter.

O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from secateur.formats.layouts.layout import Layout, check_parts, layout
from secateur.kernels.column_weight import DenseColumns
from secateur.kernels.packed import FLOAT_DTYPES, padded, unpadded


@layout
@dataclass(frozen=True)
class Columns(Layout):
    """`columns [I, O]`."""

    name: ClassVar[str] = "columns"
    rounded: ClassVar[bool] = False
    by_inputs: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("columns",)

    def pack(self, W_OI: Tensor) -> dict[str, Tensor]:
        return {"columns": W_OI.T.contiguous()}

    def load(self, tensors: Mapping[str, Tensor]) -> DenseColumns:
        check_parts(tensors, {"columns": lambda t: t.ndim == 2 and t.numel() > 0 and t.dtype in FLOAT_DTYPES})
        I, O = tensors["columns"].shape
        return DenseColumns((O, I), padded(tensors["columns"].reshape(-1)))

    def store(self, weight: DenseColumns) -> dict[str, Tensor]:
        return {"columns": unpadded(weight.values_V)}

    def values(self, weight: DenseColumns) -> list[Tensor]:
        return [unpadded(weight.values_V)]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Columns:
        return cls()
