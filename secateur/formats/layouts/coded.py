"""What the quantized layouts share: rows of codes, streams, and outliers, checked as they are read.

O: output features, I: input features, K: stored weights of a row, G: groups of the row with most, Γ: groups of all rows,
B: bytes, N: outliers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.quantized import Codes, Outliers, Quantized
from secateur.formats.layouts.layout import all_finite, check_parts, read_shape
from secateur.kernels.bits import pack_bits, unpack_bits
from secateur.kernels.packed import CodedWeight, Grid, SparseRows, TableGrid, UniformGrid, padded, unpadded
from secateur.kernels.plain import dense_rows

HALF_DTYPES = (torch.float16, torch.bfloat16)
OUTLIER_PARTS = ("outlier_count", "outlier_column", "outlier_value")
_INDEX_DTYPES = (torch.uint16, torch.int32)


@dataclass(frozen=True)
class Rows:
    """How many weights are stored of each row of a weight `[O, I]`: all, or those that a mask keeps."""

    shape: tuple[int, int]
    length_O: Tensor

    @classmethod
    def full(cls, shape: tuple[int, int]) -> Rows:
        """All weights of every row."""
        return cls(shape, torch.tensor(shape[1]).expand(shape[0]))

    @property
    def longest(self) -> int:
        return int(self.length_O[0] if self.length_O.stride(0) == 0 else self.length_O.max())

    def groups(self, group_size: int) -> Rows:
        """The groups of each row, the last of which may be shorter."""
        return self._map(lambda length: -(-length // group_size))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """The same rows with other lengths. Where one number stands for all of them, it stays one."""
        one = self.length_O.stride(0) == 0
        return Rows(self.shape, change(self.length_O[:1]).expand(self.shape[0]) if one else change(self.length_O))

    @property
    def filled(self) -> Tensor:
        """Bool `[O, longest]`: where a row has something."""
        return torch.arange(self.longest) < self.length_O[:, None]

    @property
    def starts(self) -> Tensor:
        """Where each row begins when they are laid end to end, and where the last one ends: int64 `[O + 1]`."""
        return torch.nn.functional.pad(self.length_O.cumsum(0), (1, 0))

    @property
    def total(self) -> int:
        """What all rows have together."""
        return len(self.length_O) * self.longest if self._equal else int(self.length_O.sum())

    @property
    def _equal(self) -> bool:
        return self.length_O.stride(0) == 0 or int(self.length_O.min()) == self.longest

    def flatten(self, x_OK: Tensor) -> Tensor:
        """What the rows have, one after the other."""
        x_OK = x_OK[:, : self.longest]
        return x_OK.reshape(-1).contiguous() if self._equal else x_OK[self.filled]

    def spread(self, flat: Tensor) -> Tensor:
        """The reverse of `flatten`; zeros where a row has nothing."""
        if self._equal:
            return flat.view(self.shape[0], self.longest)
        x_OK = flat.new_zeros(self.shape[0], self.longest)
        x_OK[self.filled] = flat
        return x_OK

    def _bytes(self, bits: int) -> Rows:
        return self._map(lambda length: -(-length * bits // 8))

    def pack(self, code_OK: Tensor, bits: int) -> Tensor:
        """Codes as a stream of bytes, each row starting at a byte."""
        code_OK = code_OK[:, : self.longest]
        if not self._equal:
            # What lies beyond a row's end must not leave its bits in the last byte.
            code_OK = torch.where(self.filled, code_OK, 0)
        return self._bytes(bits).flatten(pack_bits(code_OK, bits))

    def unpack(self, stream_B: Tensor, bits: int, part: str) -> Tensor:
        """The codes of such a stream, `[O, longest]`. Raises ValueError when it has another length or bits too many."""
        self.check_stream(stream_B, bits, part)
        return unpack_bits(self._bytes(bits).spread(stream_B), bits, self.longest)

    def check_stream(self, stream_B: Tensor, bits: int, part: str) -> Tensor:
        """The byte at which each row of such a stream begins, and that at which the last ends, `[O + 1]`.

        Raises ValueError when the stream has another length or bits too many.
        """
        rows = self._bytes(bits)
        _check_length(stream_B, rows.total, part)  # before anything of that size is made
        start_O1 = rows.starts
        if self._equal and self.longest:
            last_O, used = stream_B.view(len(rows.length_O), -1)[:, -1], (self.longest * bits - 1) % 8 + 1
            stray = bool((last_O.int() >> used).any())
        else:
            some_O = rows.length_O > 0
            used_O = (self.length_O * bits - 1)[some_O] % 8 + 1
            stray = bool((stream_B[start_O1[1:][some_O] - 1].int() >> used_O).any())
        if stray:
            raise ValueError(f"its {part} has bits set after the last code of a row")
        return start_O1


class QuantizedLayout(ABC):
    """A layout of quantized weights: codes in one of several forms, and the outliers to be added to what they stand for.

    A subclass says how codes become tensors and back. It is used as it is where all weights are stored, and by `sparse-int`
    where some are.

    Attributes:
        has_outliers: whether there may be any.
        bits: of a code.
        dtype: of the dense weight.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    has_outliers: ClassVar[bool]
    bits: int
    dtype: torch.dtype

    @abstractmethod
    def pack_codes(self, codes: Codes, rows: Rows) -> dict[str, Tensor]:
        """The tensors of codes whose rows are so long. Raises ValueError when they are of another form."""

    @abstractmethod
    def unpack_codes(self, tensors: Mapping[str, Tensor], rows: Rows) -> Codes:
        """The reverse. Raises ValueError when a tensor is missing, or not what it should be."""

    @abstractmethod
    def read_grid(self, tensors: Mapping[str, Tensor], rows: Rows) -> Grid:
        """What the codes stand for, as kernels take it. Raises ValueError as `unpack_codes` does."""

    @abstractmethod
    def store_grid(self, grid: Any) -> dict[str, Tensor]:
        """The tensors that `read_grid` made it of."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """See `Layout`."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuantizedLayout:
        """See `Layout`."""

    def pack(self, weight: Quantized) -> dict[str, Tensor]:
        """The tensors of a quantized weight all of whose weights are stored."""
        if weight.keep_OI is not None:
            raise ValueError("it has a mask of kept weights, which only layout 'sparse-int' stores")
        return self.pack_rows(weight, Rows.full(weight.shape))

    def pack_rows(self, weight: Quantized, rows: Rows) -> dict[str, Tensor]:
        """Codes, outliers and shape of a weight of whose rows so much is stored."""
        if weight.outliers is not None and not self.has_outliers:
            raise ValueError(f"it has outliers, which layout {self.name!r} does not store")
        parts = {**self.pack_codes(weight.codes, rows), "shape": torch.tensor(weight.shape)}
        if weight.order_I is not None:
            parts["order"] = weight.order_I.to(_index_dtype(weight.shape[1]))
        if weight.outliers is not None:
            parts.update(pack_outliers(weight.outliers, weight.shape[1]))
        return parts

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        """The weight as it is stored, checked. Raises ValueError, saying what is wrong."""
        return self.read_rows(tensors, self._full_rows(tensors))

    def _full_rows(self, tensors: Mapping[str, Tensor]) -> Rows:
        check_parts(tensors, {"codes": is_stream})
        O, I = read_stored_shape(tensors)
        if tensors["codes"].numel() < O:  # before anything of that size is made
            raise ValueError(f"its codes are truncated: {tensors['codes'].numel()} bytes for {O} rows")
        return Rows.full((O, I))

    def read_rows(self, tensors: Mapping[str, Tensor], rows: Rows, keep_OI: Tensor | None = None) -> Quantized:
        """The reverse of `pack_rows`, with the mask that says where the weights of a row belong."""
        codes = self.unpack_codes(tensors, rows)
        return Quantized(codes, rows.shape, self.dtype, keep_OI, *self._read_rest(tensors, rows))

    def _read_rest(self, tensors: Mapping[str, Tensor], rows: Rows) -> tuple[Tensor | None, Outliers | None]:
        """The order of the columns, and the outliers."""
        order_I = _unpack_order(tensors["order"], rows.shape[1]) if "order" in tensors else None
        outliers = unpack_outliers(tensors, rows.shape)
        if outliers is not None and not self.has_outliers:
            raise ValueError(f"it has outliers, which layout {self.name!r} does not store")
        return order_I, outliers

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return unpacked(self.load(tensors))

    def load(self, tensors: Mapping[str, Tensor]) -> CodedWeight:
        return self.load_rows(tensors, self._full_rows(tensors))

    def load_rows(self, tensors: Mapping[str, Tensor], rows: Rows, bitmask_OB: Tensor | None = None) -> CodedWeight:
        """What `read_rows` reads, for the kernels: codes stay as they lie in the file."""
        grid = self.read_grid(tensors, rows)
        start_O1 = rows.check_stream(tensors["codes"], self.bits, "codes")
        order_I, outliers = self._read_rest(tensors, rows)
        group_start_O1 = None
        if bitmask_OB is not None and not isinstance(grid, TableGrid):
            group_start_O1 = rows.groups(grid.group_size).starts
        weight = CodedWeight(
            rows.shape,
            self.dtype,
            self.bits,
            padded(tensors["codes"]),
            start_O1,
            None if bitmask_OB is None else rows.length_O.int(),
            group_start_O1,
            grid,
            bitmask_OB,
            None if order_I is None else order_I.int(),
            None if outliers is None else _sparse_rows(outliers, order_I),
        )
        check_range(weight)
        return weight

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


def _sparse_rows(outliers: Outliers, order_I: Tensor | None) -> SparseRows:
    start_O1 = torch.nn.functional.pad(outliers.count_O.cumsum(0), (1, 0)).int()
    column_N = outliers.column_N if order_I is None else order_I.argsort()[outliers.column_N]
    return SparseRows(start_O1, column_N.int(), outliers.value_N.clone())


def check_range(weight: CodedWeight) -> None:
    """Raise ValueError when finite codes and scales stand for values beyond the dtype of the weight."""
    grid, limit = weight.grid, torch.finfo(weight.dtype).max / 2
    outlier = 0.0 if weight.outliers is None else _largest(weight.outliers.value_N)
    if isinstance(grid, TableGrid):
        bound = _largest(grid.table_OC)
    elif isinstance(grid, UniformGrid):
        bound = _largest(grid.scale_Γ) * 2**weight.bits
    else:
        code = 15 if grid.pair_Γ.ndim == 1 else 255
        step, low, zero_step, zero_low = (_largest(x_TG) for x_TG in grid.second_TG4.unbind(2))
        bound = (low + step * code) * (2**weight.bits + zero_low + zero_step * code)
    # A bound that holds whatever the codes are is enough nearly always.
    if not bound + outlier < limit:
        for _, W_RI in dense_rows(weight):
            finite(W_RI)


def unpacked(weight: CodedWeight) -> Tensor:
    """The dense weight `[O, I]`, made in pieces: what a piece takes on its way is many times its size."""
    W_OI = torch.empty(weight.shape, dtype=weight.dtype)
    for start, W_RI in dense_rows(weight):
        W_OI[start : start + len(W_RI)] = W_RI
    return W_OI


def _largest(x: Tensor) -> float:
    return float(x.float().abs().max()) if x.numel() else 0.0


def read_stored_shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(O, I), from the part `shape`. Raises ValueError when it is missing or makes no sense."""
    check_parts(tensors, {"shape": lambda t: t.numel() == 2})
    return read_shape(tensors["shape"])


def pack_stream(code: Tensor, bits: int) -> Tensor:
    """Codes as one stream."""
    return Rows((1, code.numel()), torch.tensor([code.numel()])).pack(code.reshape(1, -1), bits)


def unpack_stream(stream_B: Tensor, bits: int, count: int, part: str) -> Tensor:
    """The reverse of `pack_stream`. Raises ValueError when it has another length, or bits after its last code."""
    return Rows((1, count), torch.tensor([count])).unpack(stream_B, bits, part)[0]


def _check_length(stream_B: Tensor, wanted: int, part: str) -> None:
    if stream_B.numel() != wanted:
        raise ValueError(f"its {part} has {stream_B.numel()} bytes, not {wanted}: it is truncated, or of other bits")


def is_stream(tensor: Tensor) -> bool:
    return tensor.ndim == 1 and tensor.dtype == torch.uint8


def is_half_vector(tensor: Tensor) -> bool:
    return tensor.ndim == 1 and tensor.dtype in HALF_DTYPES


def check_finite(tensors: Mapping[str, Tensor], *parts: str) -> None:
    """Raise ValueError when one of these parts, which must be there, holds NaN or infinity."""
    for part in parts:
        if not torch.isfinite(tensors[part]).all():
            raise ValueError(f"its {part} holds values that are not finite")


def finite(W_OI: Tensor) -> Tensor:
    """The same weight. Raises ValueError when finite codes and scales stand for values beyond its dtype."""
    if not all_finite(W_OI):
        raise ValueError(f"its codes stand for values beyond {W_OI.dtype}")
    return W_OI


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


def _unpack_order(order: Tensor, I: int) -> Tensor:
    """The input feature of each stored column. Raises ValueError unless each of I features is there once."""
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


def read_choice(config: Mapping[str, Any], key: str, allowed: Any) -> Any:
    """A parameter of a layout. Raises ValueError when it is missing or not one of those allowed."""
    value = config.get(key)
    if not any(type(value) is type(choice) and value == choice for choice in allowed):  # True is not 1
        raise ValueError(f"{key} is {value!r}")
    return value


def read_size(config: Mapping[str, Any], key: str) -> int:
    """A parameter that is a whole number of at least 2. Raises ValueError when it is not."""
    value = config.get(key)
    if type(value) is not int or not 2 <= value < 2**31:
        raise ValueError(f"{key} is {value!r}")
    return value
