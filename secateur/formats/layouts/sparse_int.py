"""The layout `sparse-int`: one bit a weight that says which are kept, and codes of those only.

O: output features, I: input features, B: bytes of a row's mask, ⌈I/8⌉.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from secateur.core.quantized import Quantized
from secateur.formats.layouts.coded import FAMILIES, QuantizedLayout, read_stored_shape
from secateur.formats.layouts.layout import LAYOUTS, Layout, check_parts, layout
from secateur.formats.layouts.rows import Rows
from secateur.kernels.expand import count_rows
from secateur.kernels.packed import CodedWeight

_STRAY_OUTLIER = "its outlier_column points at a weight that is not kept"


@layout
@dataclass(frozen=True)
class SparseInt(Layout):
    """`bitmask uint8 [O, B]` (least significant bit first), and the parts of another quantized layout for the kept weights.

    The mask is of columns as they are stored: where there is an `order`, it is over columns in that order.
    The kept weights of a row stand next to each other: row r has as many codes as its mask has bits, and its groups are of
    kept weights. Outliers are among the kept weights, and keep the columns that they have in the dense weight.
    """

    codes: QuantizedLayout

    name: ClassVar[str] = "sparse-int"
    rounded: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("bitmask",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", ("bitmask", *self.codes.parts))

    def pack(self, weight: Quantized) -> dict[str, Tensor]:
        if weight.keep_OI is None:
            raise ValueError("it has no mask of kept weights")
        bitmask_OB = np.packbits(weight.keep_OI.cpu().numpy(), axis=1, bitorder="little")
        rows = Rows(weight.shape, weight.keep_OI.sum(1))
        return {"bitmask": torch.from_numpy(bitmask_OB), **self.codes.pack_rows(weight, rows)}

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        rows = self._rows(tensors)
        I = rows.shape[1]
        keep_OI = torch.from_numpy(np.unpackbits(tensors["bitmask"].numpy(), axis=1, count=I, bitorder="little")).bool()
        weight = self.codes.read_rows(tensors, rows, keep_OI)
        if weight.outliers is not None:
            column_I = torch.arange(I) if weight.order_I is None else weight.order_I.argsort()  # where it is stored
            if not keep_OI[weight.outliers.row_N, column_I[weight.outliers.column_N]].all():
                raise ValueError(_STRAY_OUTLIER)
        return weight

    def _rows(self, tensors: Mapping[str, Tensor]) -> Rows:
        O, I = read_stored_shape(tensors)
        mask_shape = (O, (I + 7) // 8)
        check_parts(tensors, {"bitmask": lambda t: t.shape == mask_shape and t.dtype == torch.uint8})
        return Rows((O, I), count_rows(tensors["bitmask"], I))

    def load(self, tensors: Mapping[str, Tensor]) -> CodedWeight:
        weight = self.codes.load_rows(tensors, self._rows(tensors), tensors["bitmask"].clone())
        if weight.outliers is not None and weight.bitmask_OB is not None:
            row_N = torch.arange(weight.shape[0]).repeat_interleave(weight.outliers.start_O1.diff().long())
            column_N = weight.outliers.column_N.long()
            if not (weight.bitmask_OB[row_N, column_N >> 3] >> (column_N & 7).to(torch.uint8) & 1).all():
                raise ValueError(_STRAY_OUTLIER)
        return weight

    def values(self, weight: CodedWeight) -> Iterable[Tensor]:
        return self.codes.values(weight)

    def store(self, weight: CodedWeight) -> dict[str, Tensor]:
        assert weight.bitmask_OB is not None
        return {"bitmask": weight.bitmask_OB, **self.codes.store(weight)}

    def to_config(self) -> dict[str, Any]:
        return {"layout": self.name, "codes": self.codes.to_config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SparseInt:
        codes = config.get("codes")
        if not isinstance(codes, Mapping):
            raise ValueError(f"codes is {codes!r}")
        name = codes.get("layout")
        # Asked for among all layouts first, which imports its file, and that makes it one of the families.
        if not isinstance(name, str) or name not in LAYOUTS or name not in FAMILIES:
            raise ValueError(f"the kept weights are said to have layout {name!r}")
        return cls(FAMILIES[name].from_config(codes))
