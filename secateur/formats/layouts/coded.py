"""What families of codes have in common: their layout on disk, and outliers, checked as they are read.

A family is one file of this folder: its codes as quantizers return them, its grid as kernels take it, and its layout.

O: output features, I: input features, N: outliers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from secateur.core.quantized import Codes, Outliers, Quantized
from secateur.formats.layouts.layout import DTYPES, Layout, all_finite, check_parts, dtype_name, layout, read_shape
from secateur.formats.layouts.rows import Rows, is_stream
from secateur.kernels.packed import CodedWeight, Grid, SparseRows, padded, unpadded

HALF_DTYPES = (torch.float16, torch.bfloat16)
OUTLIER_PARTS = ("outlier_count", "outlier_column", "outlier_value")
#: What sizes of groups and tiles may be.
SIZES = range(2, 2**31)
_INDEX_DTYPES = (torch.uint16, torch.int32)


class QuantizedLayout(Layout):
    """A layout of quantized weights: codes in one of several forms, and the outliers to be added to what they stand for.

    A subclass is a frozen dataclass under `@family`, and says how codes become tensors and back. It is used as it is where all
    weights are stored, and by `sparse-int` where some are.

    Attributes:
        has_outliers: whether there may be any.
        choices: what its fields may be, but for `dtype`.
        bits: of a code.
        dtype: of the dense weight.
    """

    rounded: ClassVar[bool] = True
    has_outliers: ClassVar[bool]
    choices: ClassVar[Mapping[str, Sequence[Any]]]
    bits: int
    dtype: torch.dtype

    @abstractmethod
    def pack_codes(self, codes: Any, rows: Rows) -> dict[str, Tensor]:
        """The tensors of codes of this family whose rows are so long."""

    @abstractmethod
    def unpack_codes(self, grid: Any, code_OK: Tensor, rows: Rows) -> Codes:
        """The reverse, of a grid and codes that were read."""

    @abstractmethod
    def read_grid(self, tensors: Mapping[str, Tensor], rows: Rows) -> Grid:
        """What the codes stand for. Raises ValueError when a tensor is missing, or not what it should be."""

    @abstractmethod
    def store_grid(self, grid: Any) -> dict[str, Tensor]:
        """The tensors that `read_grid` made it of."""

    def to_config(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {"layout": self.name, **own, "dtype": dtype_name(self.dtype)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        own = {name: read_choice(config, name, allowed) for name, allowed in cls.choices.items()}
        return cls(**own, dtype=DTYPES[read_choice(config, "dtype", list(DTYPES))])  # type: ignore[call-arg]

    def pack(self, weight: Quantized) -> dict[str, Tensor]:
        """The tensors of a quantized weight all of whose weights are stored."""
        if weight.keep_OI is not None:
            raise ValueError("it has a mask of kept weights, which only layout 'sparse-int' stores")
        return self.pack_rows(weight, Rows.full(weight.shape))

    def pack_rows(self, weight: Quantized, rows: Rows) -> dict[str, Tensor]:
        """Codes, outliers and shape of a weight of whose rows so much is stored."""
        own = weight.codes.layout(weight.dtype)
        if own != self:
            raise ValueError(f"its codes are stored as {own.to_config()}, and this layout is {self.to_config()}")
        if weight.outliers is not None and not self.has_outliers:
            raise ValueError(f"it has outliers, which layout {self.name!r} does not store")
        parts = {**self.pack_codes(weight.codes, rows), "shape": torch.tensor(weight.shape)}
        if weight.order_I is not None:
            parts["order"] = stored_order(weight.order_I)
        if weight.outliers is not None:
            parts.update(pack_outliers(weight.outliers, weight.shape[1]))
        return parts

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        return self.read_rows(tensors, self._full_rows(tensors))

    def _full_rows(self, tensors: Mapping[str, Tensor]) -> Rows:
        check_parts(tensors, {"codes": is_stream})
        O, I = read_stored_shape(tensors)
        if tensors["codes"].numel() < O:  # before anything of that size is made
            raise ValueError(f"its codes are truncated: {tensors['codes'].numel()} bytes for {O} rows")
        return Rows.full((O, I))

    def read_rows(self, tensors: Mapping[str, Tensor], rows: Rows, keep_OI: Tensor | None = None) -> Quantized:
        """The reverse of `pack_rows`, with the mask that says where the weights of a row belong."""
        grid = self.read_grid(tensors, rows)
        codes = self.unpack_codes(grid, rows.unpack(tensors["codes"], self.bits, "codes"), rows)
        return Quantized(codes, rows.shape, self.dtype, keep_OI, *self._read_rest(tensors, rows))

    def _read_rest(self, tensors: Mapping[str, Tensor], rows: Rows) -> tuple[Tensor | None, Outliers | None]:
        """The order of the columns, and the outliers."""
        order_I = read_order(tensors, rows.shape[1])
        outliers = unpack_outliers(tensors, rows.shape)
        if outliers is not None and not self.has_outliers:
            raise ValueError(f"it has outliers, which layout {self.name!r} does not store")
        return order_I, outliers

    def load(self, tensors: Mapping[str, Tensor]) -> CodedWeight:
        return self.load_rows(tensors, self._full_rows(tensors))

    def load_rows(self, tensors: Mapping[str, Tensor], rows: Rows, bitmask_OB: Tensor | None = None) -> CodedWeight:
        """What `read_rows` reads, for the kernels: codes stay as they lie in the file."""
        grid = self.read_grid(tensors, rows)
        start_O1 = rows.check_stream(tensors["codes"], self.bits, "codes")
        order_I, outliers = self._read_rest(tensors, rows)
        some = bitmask_OB is not None
        weight = CodedWeight(
            rows.shape,
            self.dtype,
            self.bits,
            padded(tensors["codes"]),
            start_O1,
            rows.length_O.int() if some else None,
            rows.groups(grid.group_size).starts if some and grid.group_size is not None else None,
            grid,
            bitmask_OB,
            None if order_I is None else order_I.int(),
            None if outliers is None else _sparse_rows(outliers, order_I),
        )
        # A bound that holds whatever the codes are is enough nearly always.
        surely = weight.bound() < torch.finfo(weight.dtype).max / 2
        if not surely and not all(all_finite(W_RI) for _, W_RI in weight.dense_rows()):
            raise ValueError(f"its codes stand for values beyond {weight.dtype}")
        return weight

    def values(self, weight: CodedWeight) -> Iterable[Tensor]:
        return ()  # looked at already

    def store(self, weight: CodedWeight) -> dict[str, Tensor]:
        """The reverse of `load_rows`, but for the mask."""
        parts = {
            "codes": unpadded(weight.codes_S),
            "shape": torch.tensor(weight.shape),
            **self.store_grid(weight.grid),
        }
        if weight.order_I is not None:
            parts["order"] = weight.order_I
        if weight.outliers is not None:
            column_N = weight.outliers.column_N
            parts["outlier_count"] = weight.outliers.start_O1.diff()
            parts["outlier_column"] = column_N if weight.order_I is None else weight.order_I[column_N.long()]
            parts["outlier_value"] = weight.outliers.value_N
        return parts


FAMILIES: dict[str, type[QuantizedLayout]] = {}
_F = TypeVar("_F", bound=type[QuantizedLayout])


def family(cls: _F) -> _F:
    """Register the layout of a family of codes, which `sparse-int` then stores some of, too."""
    FAMILIES[cls.name] = layout(cls)
    return cls


def _sparse_rows(outliers: Outliers, order_I: Tensor | None) -> SparseRows:
    start_O1 = torch.nn.functional.pad(outliers.count_O.cumsum(0), (1, 0)).int()
    column_N = outliers.column_N if order_I is None else order_I.argsort()[outliers.column_N]
    return SparseRows(start_O1, column_N.int(), outliers.value_N.clone())


def read_stored_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(O, I), from the part `shape`. Raises ValueError when it is missing or makes no sense."""
    check_parts(tensors, {"shape": lambda t: t.numel() == 2})
    return read_shape(tensors["shape"])


def is_half_vector(tensor: Tensor) -> bool:
    return tensor.ndim == 1 and tensor.dtype in HALF_DTYPES


def check_finite(tensors: Mapping[str, Tensor], *parts: str) -> None:
    """Raise ValueError when one of these parts, which must be there, holds NaN or infinity."""
    for part in parts:
        if not all_finite(tensors[part]):
            raise ValueError(f"its {part} holds values that are not finite")


def pack_outliers(outliers: Outliers, I: int) -> dict[str, Tensor]:
    """Outliers as tensors; counts and columns take 16 bits where the input features allow it."""
    index = _index_dtype(I)
    return {
        "outlier_count": outliers.count_O.to(index),
        "outlier_column": outliers.column_N.to(index),
        "outlier_value": outliers.value_N,
    }


def unpack_outliers(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Outliers | None:
    """The outliers among a weight's parts, or None if it has none.

    Raises:
        ValueError: a part is missing or of another form, the counts do not add up, or columns are out of order or range.
    """
    if not any(part in tensors for part in OUTLIER_PARTS):
        return None
    check_parts(
        tensors,
        {
            "outlier_count": lambda t: t.ndim == 1 and t.dtype in _INDEX_DTYPES,
            "outlier_column": lambda t: t.ndim == 1 and t.dtype in _INDEX_DTYPES,
            "outlier_value": is_half_vector,
        },
    )
    O, I = shape
    count_O, column_N, value_N = (tensors[part] for part in OUTLIER_PARTS)
    # On 64 bits before anything is compared or added up.
    count_O, column_N = _to_int64(count_O), _to_int64(column_N)
    if count_O.numel() != O or (count_O < 0).any() or (count_O > I).any():
        raise ValueError(f"its outlier_count is not one number from 0 to {I} for each of {O} rows")
    if not int(count_O.sum()) == column_N.numel() == value_N.numel():
        raise ValueError(
            f"its outlier_count says {int(count_O.sum())} outliers, but there are {column_N.numel()} columns and "
            f"{value_N.numel()} values"
        )
    if ((column_N < 0) | (column_N >= I)).any():
        raise ValueError(f"its outlier_column points outside the row of {I}")
    outliers = Outliers(count_O, column_N, value_N)
    row_N = outliers.row_N
    if ((row_N[1:] == row_N[:-1]) & (column_N[1:] <= column_N[:-1])).any():
        raise ValueError("its outlier_column is out of order within a row")
    check_finite(tensors, "outlier_value")
    return outliers


def stored_order(order_I: Tensor) -> Tensor:
    """The part `order` of columns in an order of their own."""
    return order_I.to(_index_dtype(len(order_I)))


def read_order(tensors: Mapping[str, Tensor], I: int) -> Tensor | None:
    """The input feature of each stored column, where there is a part `order`. Raises ValueError unless each of I features is
    there once.
    """
    if "order" not in tensors:
        return None
    order = tensors["order"]
    if order.dtype not in _INDEX_DTYPES or order.shape != (I,):
        raise ValueError(f"its order has dtype {order.dtype} and shape {list(order.shape)}, not {I} columns")
    order_I = _to_int64(order)
    if not torch.equal(order_I.sort().values, torch.arange(I)):
        raise ValueError(f"its order does not name each of {I} input features once")
    return order_I


def _index_dtype(I: int) -> torch.dtype:
    return torch.uint16 if I < 2**16 else torch.int32


def _to_int64(index: Tensor) -> Tensor:
    return index.view(torch.int16).long() & 0xFFFF if index.dtype == torch.uint16 else index.long()


def read_choice(config: Mapping[str, Any], key: str, allowed: Sequence[Any]) -> Any:
    """A parameter of a layout. Raises ValueError when it is missing or not one of those allowed."""
    value = config.get(key)
    if type(value) is not type(allowed[0]) or value not in allowed:  # True is not 1
        raise ValueError(f"{key} is {value!r}")
    return value
