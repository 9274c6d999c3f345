"""Weights as the kernels compute on them: close to how they lie in a checkpoint, and checked before they get here.

O: output features, I: input features, K: stored weights of a row (I of them, or as many as are kept), B: bytes of a row's
mask, ⌈I/8⌉, V: values, S: bytes of a stream, G: groups of a row, Γ: groups of all rows together, T: tiles of consecutive rows,
C: entries of a lookup table, N: outliers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor

#: What weights, inputs and outputs may be.
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Zero bytes after the last value or code, so that a wide load that begins inside the stream ends inside the tensor.
PADDING = 64


@dataclass(frozen=True)
class SparseWeight:
    """A pruned weight: the kept values row after row, and one bit a weight that says where they belong.

    Attributes:
        shape: (O, I).
        values_V: bfloat16, float16 or float32, and `PADDING` bytes of zeros after the last.
        bitmask_OB: uint8, least significant bit first; bits beyond column I are zero.
        start_O1: int64 `[O + 1]`, where each row's values begin, and where the last row's end.
        pattern: (N, M) where every group of M columns has exactly N bits set; None otherwise.
    """

    shape: tuple[int, int]
    values_V: Tensor
    bitmask_OB: Tensor
    start_O1: Tensor
    pattern: tuple[int, int] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weight."""
        return self.values_V.dtype


@dataclass(frozen=True)
class UniformGrid:
    """w = (code − zero) · scale, with one scale and zero point a group.

    Attributes:
        group_size: stored weights of a group; the last group of a row may have fewer.
        scale_Γ: float16 or bfloat16, groups row after row.
        zero_Γ: uint8; None when all zero points are 2^(bits − 1).
    """

    group_size: int
    scale_Γ: Tensor
    zero_Γ: Tensor | None


@dataclass(frozen=True)
class TwoLevelGrid:
    """The same with scales and zero points that are codes themselves: SpQR's.

    scale = low + step · c and zero = low + step · d, with low and step of each for every tile of rows and group.

    Attributes:
        group_size: as in `UniformGrid`.
        tile_rows: rows of a tile; the last tile may have fewer.
        pair_Γ: uint8 `[Γ]`, c + 16·d, where neither takes more than four bits; uint8 `[Γ, 2]`, c and d, otherwise.
        second_TG4: float16 or bfloat16: step and low of the scale, step and low of the zero point.
    """

    group_size: int
    tile_rows: int
    pair_Γ: Tensor
    second_TG4: Tensor


@dataclass(frozen=True)
class TableGrid:
    """w = table[row, code]: SqueezeLLM's.

    Attributes:
        table_OC: float16 or bfloat16, 2^bits values a row.
    """

    table_OC: Tensor


Grid = UniformGrid | TwoLevelGrid | TableGrid


@dataclass(frozen=True)
class SparseRows:
    """What has to be added to few weights, in compressed sparse rows.

    Attributes:
        start_O1: int32 `[O + 1]`.
        column_N: int32, each the number of a **stored** column; in no particular order within a row.
        value_N: float16 or bfloat16.
    """

    start_O1: Tensor
    column_N: Tensor
    value_N: Tensor


@dataclass(frozen=True)
class CodedWeight:
    """A quantized weight, and which of its weights are stored if not all are.

    Attributes:
        shape: (O, I).
        dtype: of the dense weight.
        bits: of a code, 1 to 8.
        codes_S: uint8, the codes of one row after the other, least significant bit first, each row from a new byte; and
            `PADDING` bytes of zeros after the last.
        start_O1: int64 `[O + 1]`, the byte where each row begins, and where the last one ends.
        count_O: int32, stored weights of each row, K; None when it is I for all.
        group_start_O1: int64 `[O + 1]`, the number of each row's first group; None for a grid without groups, and when each row
            has ⌈I/group_size⌉.
        grid: what the codes stand for.
        bitmask_OB: uint8, which stored columns have a weight at all (as in `SparseWeight`); None when all have.
        order_I: int32, the input feature of each stored column; None when columns are in natural order.
        outliers: to be added; None if there are none.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    bits: int
    codes_S: Tensor
    start_O1: Tensor
    count_O: Tensor | None
    group_start_O1: Tensor | None
    grid: Grid
    bitmask_OB: Tensor | None
    order_I: Tensor | None
    outliers: SparseRows | None


Packed = SparseWeight | CodedWeight

_T = TypeVar("_T")


def map_tensors(value: _T, change: Callable[[Tensor], Tensor]) -> _T:
    """The same dataclass with `change` applied to every tensor in it, at any depth."""
    if isinstance(value, Tensor):
        return change(value)  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: map_tensors(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return replace(value, **fields)
    return value


def nbytes(weight: Any) -> int:
    """Bytes of memory that a packed weight takes, or what a backend has made of it; what is there twice counts once."""
    return sum({id(tensor): tensor.nbytes for tensor in _tensors(weight)}.values())


def _tensors(weight: Any) -> Iterator[Tensor]:
    if isinstance(weight, SparseSemiStructuredTensor):
        # Its own `nbytes` are those of the dense weight.
        yield from _tensors({"packed": weight.packed, "meta": weight.meta})
    elif isinstance(weight, Tensor):
        yield weight
    elif isinstance(weight, Mapping):
        for value in weight.values():
            yield from _tensors(value)
    elif dataclasses.is_dataclass(weight):
        for field in dataclasses.fields(weight):
            yield from _tensors(getattr(weight, field.name))


def padded(stream: Tensor) -> Tensor:
    """A copy of a vector with `PADDING` bytes of zeros after it."""
    out = stream.new_empty(stream.numel() + PADDING // stream.element_size())
    out[: stream.numel()] = stream
    out[stream.numel() :] = 0
    return out


def unpadded(stream: Tensor) -> Tensor:
    """The vector that `padded` was given."""
    return stream[: stream.numel() - PADDING // stream.element_size()]


def some_rows(weight: Packed, start: int, end: int) -> Packed:
    """Some consecutive rows of a weight. Streams of codes stay whole: rows say where in them they begin."""
    I = weight.shape[1]
    if isinstance(weight, SparseWeight):
        first, last = weight.start_O1[[start, end]].tolist()
        return replace(
            weight,
            shape=(end - start, I),
            values_V=weight.values_V[first:last],
            bitmask_OB=weight.bitmask_OB[start:end],
            start_O1=weight.start_O1[start : end + 1] - first,
        )
    grid, outliers = weight.grid, weight.outliers
    group_start_O1 = weight.group_start_O1
    if isinstance(grid, TableGrid):
        grid = TableGrid(grid.table_OC[start:end])
    else:
        if group_start_O1 is None:
            group_start_O1 = torch.arange(weight.shape[0] + 1, device=weight.codes_S.device) * -(-I // grid.group_size)
        group_start_O1 = group_start_O1[start : end + 1]
        if not isinstance(grid, UniformGrid):
            tile_O = torch.arange(start, end, device=weight.codes_S.device) // grid.tile_rows
            grid = replace(grid, tile_rows=1, second_TG4=grid.second_TG4[tile_O])
    if outliers is not None:
        first, last = int(outliers.start_O1[start]), int(outliers.start_O1[end])
        outliers = SparseRows(
            outliers.start_O1[start : end + 1] - first, outliers.column_N[first:last], outliers.value_N[first:last]
        )
    return replace(
        weight,
        shape=(end - start, I),
        start_O1=weight.start_O1[start : end + 1],
        count_O=None if weight.count_O is None else weight.count_O[start:end],
        group_start_O1=group_start_O1,
        grid=grid,
        bitmask_OB=None if weight.bitmask_OB is None else weight.bitmask_OB[start:end],
        outliers=outliers,
    )
