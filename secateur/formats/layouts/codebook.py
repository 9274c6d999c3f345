"""The family `codebook`: codes that number the entries of a lookup table a row, and outliers as compressed sparse rows.

O: output features, K: stored weights of a row, C: entries of a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.formats.layouts.coded import HALF_DTYPES, OUTLIER_PARTS, QuantizedLayout, check_finite, family
from secateur.formats.layouts.layout import check_parts
from secateur.formats.layouts.rows import Rows, is_stream
from secateur.kernels.packed import Grid, GridOperands, largest


@dataclass(frozen=True)
class Table:
    """Codes that number the entries of a lookup table, one table a row: SqueezeLLM's.

    Attributes:
        bits: of a code.
        code_OK: uint8.
        table_OC: 2^bits values of each row, in the dtype that they are stored in.
    """

    bits: int
    code_OK: Tensor
    table_OC: Tensor

    def values(self) -> Tensor:
        """The stored weights `[O, K]`, float32."""
        return self.table_OC.float().gather(1, self.code_OK.long())

    def layout(self, dtype: torch.dtype) -> Codebook:
        return Codebook(self.bits, dtype)


@dataclass(frozen=True)
class TableGrid(Grid):
    """w = table[row, code]: SqueezeLLM's.

    Attributes:
        table_OC: float16 or bfloat16, 2^bits values a row.
    """

    table_OC: Tensor
    group_size: None = None

    def values(self, code_OK: Tensor, at_OG: Tensor | None, bits: int) -> Tensor:
        return self.table_OC.float().gather(1, code_OK.long())

    def rows(self, start: int, end: int) -> TableGrid:
        return TableGrid(self.table_OC[start:end])

    def bound(self, bits: int) -> float:
        return largest(self.table_OC)

    def operands(self) -> GridOperands:
        return GridOperands(table=self.table_OC)


@family
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
    choices: ClassVar[Mapping[str, Sequence[Any]]] = {"bits": range(1, 9)}

    def pack_codes(self, codes: Table, rows: Rows) -> dict[str, Tensor]:
        return {"codes": rows.pack(codes.code_OK, self.bits), "table": codes.table_OC.contiguous()}

    def unpack_codes(self, grid: TableGrid, code_OK: Tensor, rows: Rows) -> Table:
        return Table(self.bits, code_OK, grid.table_OC)

    def read_grid(self, tensors: Mapping[str, Tensor], rows: Rows) -> TableGrid:
        shape = (rows.shape[0], 2**self.bits)
        check_parts(tensors, {"codes": is_stream, "table": lambda t: t.shape == shape and t.dtype in HALF_DTYPES})
        check_finite(tensors, "table")
        return TableGrid(tensors["table"].clone())

    def store_grid(self, grid: TableGrid) -> dict[str, Tensor]:
        return {"table": grid.table_OC}
