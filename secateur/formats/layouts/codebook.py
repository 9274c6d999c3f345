"""The layout `codebook`: codes that number the entries of a lookup table a row, and outliers as compressed sparse rows.

O: output features, C: entries of a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.quantized import Codes, Table
from secateur.formats.layouts.coded import (
    HALF_DTYPES,
    OUTLIER_PARTS,
    QuantizedLayout,
    Rows,
    check_finite,
    is_stream,
    read_choice,
)
from secateur.formats.layouts.layout import DTYPES, check_parts, layout
from secateur.kernels.packed import TableGrid


@layout
@dataclass(frozen=True)
class Codebook(QuantizedLayout):
    """`codes uint8` (each row starts at a byte), `table [O, 2^bits]`, `shape int64 [2]`, and the outliers `outlier_count [O]`,
    `outlier_column [N]`, `outlier_value [N]`.
    """

    bits: int
    dtype: torch.dtype

    name: ClassVar[str] = "codebook"
    parts: ClassVar[tuple[str, ...]] = ("codes", "table", "shape", "order", *OUTLIER_PARTS)
    has_outliers: ClassVar[bool] = True

    def pack_codes(self, codes: Codes, rows: Rows) -> dict[str, Tensor]:
        if not isinstance(codes, Table) or codes.bits != self.bits:
            raise ValueError(f"its codes do not number the entries of tables of 2^{self.bits}")
        return {"codes": rows.pack(codes.code_OK, self.bits), "table": codes.table_OC.contiguous()}

    def unpack_codes(self, tensors: Mapping[str, Tensor], rows: Rows) -> Table:
        table_OC = self.read_grid(tensors, rows).table_OC
        return Table(self.bits, rows.unpack(tensors["codes"], self.bits, "codes"), table_OC)

    def read_grid(self, tensors: Mapping[str, Tensor], rows: Rows) -> TableGrid:
        shape = (rows.shape[0], 2**self.bits)
        check_parts(tensors, {"codes": is_stream, "table": lambda t: t.shape == shape and t.dtype in HALF_DTYPES})
        check_finite(tensors, "table")
        return TableGrid(tensors["table"].clone())

    def store_grid(self, grid: TableGrid) -> dict[str, Tensor]:
        return {"table": grid.table_OC}

    def to_config(self) -> dict[str, Any]:
        return {"layout": self.name, "bits": self.bits, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Codebook:
        return cls(read_choice(config, "bits", range(1, 9)), DTYPES[read_choice(config, "dtype", DTYPES)])
