"""Weights as the kernels compute on them: close to how they lie in a checkpoint, and checked before they get here.

O: output features, I: input features, K: stored weights of a row (I of them, or as many as are kept), B: bytes of a row's
mask, ⌈I/8⌉, V: values, S: bytes of a stream, G: groups of the row with most, Γ: groups of all rows together, R: some rows,
N: outliers, T: tokens.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from torch.sparse import SparseSemiStructuredTensor

from secateur.kernels.bits import unpack_bits
from secateur.kernels.expand import expand_bitmap, unpack_mask

#: What weights, inputs and outputs may be.
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Bytes after the last value or code, of any value, so that a wide load that begins in the stream ends in the tensor.
PADDING = 64
_WEIGHTS_AT_ONCE = 2**19  # which a CPU's caches hold on their way from codes


class Packed(ABC):
    """A weight `[O, I]` that is not dense: a frozen dataclass of tensors, all on one device.

    Attributes:
        shape: (O, I).
        dtype: of the dense weight.
        kernels: which of the compiled kernels compute on it, those of `sparse` weights or of `coded` ones; "": none do.
        pattern: (N, M) where every group of M columns has exactly N stored weights; None otherwise.
        order_I: int32, the input feature of each stored column; None when columns are in natural order.
        outliers: to be added; None if there are none.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    pattern: tuple[int, int] | None = None
    order_I: Tensor | None = None
    outliers: SparseRows | None = None

    @property
    def kernels(self) -> str:
        return ""

    def operands(self) -> tuple[Any, ...]:
        """What those kernels take between inputs and bias."""
        return ()

    def compiled(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """The same as `linear` by the compiled kernels for the CPU, which must be loaded."""
        found: Tensor = getattr(torch.ops.secateur, f"{self.kernels}_linear")(x_TI, *self.operands(), bias_O)
        return found

    @property
    def bare(self) -> Packed:
        """The weight without what is computed beside it: what a backend is chosen by."""
        return self

    def beside(self, backend: Any) -> Any:
        """The backend that was chosen by `bare`, as it computes on all of this weight."""
        return backend

    @property
    def masked(self) -> bool:
        """Whether a mask says which of its weights have a code."""
        return False

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(tensors_in(self)).device

    @abstractmethod
    def dense(self) -> Tensor:
        """The dense weight `[O, I]`, input features in natural order, by operations that torch can trace on any device."""

    @abstractmethod
    def rows(self, start: int, end: int) -> Packed:
        """Some consecutive rows. Streams of codes may stay whole: rows say where in them they begin."""

    @abstractmethod
    def count(self) -> int:
        """How many of its weights are not just zero: those with another value, or with a code, whatever it stands for."""

    def read_bytes(self, share: float) -> float:
        """Bytes that a product reads of it where this share of the inputs is kept."""
        return nbytes(self)

    def dense_rows(self) -> Iterator[tuple[int, Tensor]]:
        """The dense weight some rows at a time, with the number of the first: on their way they take many times their size."""
        O, I = self.shape
        step = max(1, _WEIGHTS_AT_ONCE // I)
        for start in range(0, O, step):
            yield start, self.rows(start, min(start + step, O)).expanded()

    def expanded(self) -> Tensor:
        """The same as `dense`, as fast as it can be had."""
        return self.dense()

    def linear(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x W^T + bias, `[T, O]` in the dtype of x, by operations that torch can trace on any device."""
        return linear(x_TI, self.dense().to(x_TI.dtype), bias_O)


@dataclass(frozen=True)
class SparseWeight(Packed):
    """A pruned weight: the kept values row after row, and one bit a weight that says where they belong.

    Attributes:
        values_V: bfloat16, float16 or float32, and `PADDING` bytes after the last.
        bitmask_OB: uint8, least significant bit first; bits beyond column I are zero.
        start_O1: int64 `[O + 1]`, where each row's values begin, and where the last row's end.
    """

    shape: tuple[int, int]
    values_V: Tensor
    bitmask_OB: Tensor
    start_O1: Tensor
    pattern: tuple[int, int] | None = None

    @property
    def kernels(self) -> str:
        return "sparse"

    def operands(self) -> tuple[Any, ...]:
        return self.values_V, self.bitmask_OB, self.start_O1

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.values_V.dtype

    def dense(self) -> Tensor:
        keep_OI = unpack_mask(self.bitmask_OB, self.shape[1])
        return self.values_V.new_zeros(self.shape).masked_scatter_(keep_OI, self.values_V)

    def expanded(self) -> Tensor:
        return expand_bitmap(self.values_V[: int(self.start_O1[-1])], self.bitmask_OB, self.shape[1])

    def rows(self, start: int, end: int) -> SparseWeight:
        first, last = self.start_O1[[start, end]].tolist()
        return replace(
            self,
            shape=(end - start, self.shape[1]),
            values_V=self.values_V[first:last],
            bitmask_OB=self.bitmask_OB[start:end],
            start_O1=self.start_O1[start : end + 1] - first,
        )

    def count(self) -> int:
        return int(torch.count_nonzero(self.values_V[: int(self.start_O1[-1])]))


class GridOperands(NamedTuple):
    """A grid as the compiled kernels take it, which know three kinds; what its kind does not have is None, or 0.

    Attributes:
        group_size: weights of a group.
        scale: of each group, where it is a number `[Γ]`.
        zero: of each group, a code `[Γ]`, or a float32 that need not be one; None where all are 2^(bits − 1).
        pair: where scales and zero points are codes c and d: `[Γ]`, c + 16·d, where neither has more than four bits; `[Γ, 2]`
            otherwise.
        second: what those codes stand for, `[T, G, 4]`: step and low of the scale, step and low of the zero point.
        tile_rows: rows of a tile, which share that.
        table: values of each row, `[O, 2^bits]`.
    """

    group_size: int = 0
    scale: Tensor | None = None
    zero: Tensor | None = None
    pair: Tensor | None = None
    second: Tensor | None = None
    tile_rows: int = 0
    table: Tensor | None = None


class Grid(ABC):
    """What codes stand for: a frozen dataclass of tensors. A family of codes has one of its own.

    Attributes:
        group_size: stored weights of a row that go together, of which the last may be fewer; None where it has no groups.
    """

    group_size: int | None

    @abstractmethod
    def values(self, code_OK: Tensor, at_OG: Tensor | None, bits: int) -> Tensor:
        """What the codes of each row stand for, `[O, K]` float32. `at_OG` numbers the groups of the rows, if there are groups;
        where a row has fewer than others, any number may stand."""

    @abstractmethod
    def rows(self, start: int, end: int) -> Grid:
        """The grid of some consecutive rows. Groups keep their numbers."""

    @abstractmethod
    def bound(self, bits: int) -> float:
        """What no code of so many bits stands for more than, whatever its sign."""

    def operands(self) -> GridOperands | None:
        """The grid as compiled kernels take it; None where they do not."""
        return None


def on_groups(code_OK: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_size: int) -> Tensor:
    """(code − zero) · scale, with float32 scales and zero points of groups of a row."""
    K, G = code_OK.shape[1], scale_OG.shape[1]
    size = max(min(group_size, K), 1)  # a file may claim groups of any size
    code_OGg = pad(code_OK, (0, G * size - K)).unflatten(1, (G, size))
    return (code_OGg - zero_OG[..., None]).mul_(scale_OG[..., None]).flatten(1)[:, :K]


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

    def rows(self, start: int, end: int) -> SparseRows:
        """Those of some consecutive rows."""
        first, last = int(self.start_O1[start]), int(self.start_O1[end])
        return SparseRows(self.start_O1[start : end + 1] - first, self.column_N[first:last], self.value_N[first:last])


@dataclass(frozen=True)
class CodedWeight(Packed):
    """A quantized weight, and which of its weights are stored if not all are.

    Attributes:
        shape: (O, I).
        dtype: of the dense weight.
        bits: of a code, 1 to 8.
        codes_S: uint8, the codes of one row after the other, least significant bit first, each row from a new byte; and
            `PADDING` bytes after the last.
        start_O1: int64 `[O + 1]`, the byte where each row begins, and where the last one ends.
        count_O: int32, stored weights of each row, K; None when it is I for all.
        group_start_O1: int64 `[O + 1]`, the number of each row's first group; None for a grid without groups, and when each row
            has ⌈I/group_size⌉.
        grid: what the codes stand for.
        bitmask_OB: uint8, which stored columns have a weight at all (as in `SparseWeight`); None when all have.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    bits: int
    codes_S: Tensor
    start_O1: Tensor
    count_O: Tensor | None
    group_start_O1: Tensor | None
    grid: Grid
    bitmask_OB: Tensor | None = None
    order_I: Tensor | None = None
    outliers: SparseRows | None = None

    @property
    def kernels(self) -> str:
        return "" if self.grid.operands() is None else "coded"

    @property
    def masked(self) -> bool:
        return self.bitmask_OB is not None

    def operands(self) -> tuple[Any, ...]:
        few = self.outliers
        return (
            *(self.bits, self.codes_S, self.start_O1, self.count_O, self.group_start_O1),
            *(self.grid.operands() or ()),
            *(self.bitmask_OB, self.order_I),
            *((None, None, None) if few is None else (few.start_O1, few.column_N, few.value_N)),
        )

    def dense(self) -> Tensor:
        W_OI = W_OK = self._stored()
        if self.bitmask_OB is not None:
            keep_OI = unpack_mask(self.bitmask_OB, self.shape[1])
            place_OI = (keep_OI.cumsum(1) - 1).clamp_(min=0)
            W_OI = W_OK.gather(1, place_OI).masked_fill_(~keep_OI, 0) if W_OK.shape[1] else W_OK.new_zeros(self.shape)
        if self.outliers is not None:
            start_O1, column_N, value_N = self.outliers.start_O1, self.outliers.column_N, self.outliers.value_N
            row_N = torch.arange(self.shape[0], device=W_OI.device).repeat_interleave(start_O1.diff().long())
            W_OI.index_put_((row_N, column_N.long()), value_N.float(), accumulate=True)
        if self.order_I is not None:
            W_OI = torch.empty_like(W_OI).index_copy_(1, self.order_I.long(), W_OI)
        return W_OI.to(self.dtype)

    def _stored(self) -> Tensor:
        """What the codes of each row stand for, `[O, K]` in float32; what lies beyond a row's own codes means nothing."""
        K = self.shape[1] if self.count_O is None else int(self.count_O.max())
        width = -(-K * self.bits // 8)
        if self.count_O is None and not torch.compiler.is_compiling():  # all are as long, and need not be gathered
            stream_OW = self.codes_S.narrow(0, int(self.start_O1[0]), self.shape[0] * width).view(-1, width)
        else:
            at_OW = self.start_O1[:-1, None] + torch.arange(width, device=self.codes_S.device)
            stream_OW = self.codes_S[at_OW.clamp_(max=self.codes_S.numel() - 1)]
        return self.grid.values(unpack_bits(stream_OW, self.bits, K), self._groups(), self.bits)

    def _groups(self) -> Tensor | None:
        """The number of each group of each row, `[O, G]`; of those that a row does not have, any."""
        if self.grid.group_size is None:
            return None
        if self.group_start_O1 is None:
            start_O, G = self._equal_groups(), -(-self.shape[1] // self.grid.group_size)
        else:
            start_O, G = self.group_start_O1, int(self.group_start_O1.diff().max())
        return start_O[:-1, None] + torch.arange(G, device=self.codes_S.device)

    def _equal_groups(self) -> Tensor:
        assert self.grid.group_size is not None
        return torch.arange(self.shape[0] + 1, device=self.codes_S.device) * -(-self.shape[1] // self.grid.group_size)

    def rows(self, start: int, end: int) -> CodedWeight:
        group_start_O1 = self.group_start_O1
        if group_start_O1 is None and self.grid.group_size is not None:
            group_start_O1 = self._equal_groups()
        return replace(
            self,
            shape=(end - start, self.shape[1]),
            start_O1=self.start_O1[start : end + 1],
            count_O=None if self.count_O is None else self.count_O[start:end],
            group_start_O1=None if group_start_O1 is None else group_start_O1[start : end + 1],
            grid=self.grid.rows(start, end),
            bitmask_OB=None if self.bitmask_OB is None else self.bitmask_OB[start:end],
            outliers=None if self.outliers is None else self.outliers.rows(start, end),
        )

    def count(self) -> int:
        return self.shape[0] * self.shape[1] if self.count_O is None else int(self.count_O.sum(dtype=torch.int64))

    def bound(self) -> float:
        """What no weight is greater than, whatever its sign."""
        return self.grid.bound(self.bits) + (0.0 if self.outliers is None else largest(self.outliers.value_N))


def largest(x: Tensor) -> float:
    """The greatest absolute value; 0 where there is none."""
    return max(abs(float(extreme)) for extreme in torch.aminmax(x)) if x.numel() else 0.0


_T = TypeVar("_T")


def map_tensors(value: _T, change: Callable[[Tensor], Tensor]) -> _T:
    """The same dataclass with `change` applied to every tensor in it, at any depth, and in dictionaries."""
    if isinstance(value, Tensor):
        return change(value)  # type: ignore[return-value]
    if isinstance(value, dict):
        return {key: map_tensors(each, change) for key, each in value.items()}  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        changed = {name: new for name, old in fields.items() if (new := map_tensors(old, change)) is not old}
        return replace(value, **changed) if changed else value
    return value


def nbytes(weight: Any) -> int:
    """Bytes of memory that a packed weight takes, or what a backend has made of it; what is there twice counts once."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors_in(weight)}.values())


def tensors_in(weight: Any) -> Iterator[Tensor]:
    """All tensors of a weight, in the order of `map_tensors`."""
    if isinstance(weight, SparseSemiStructuredTensor):
        # Its own `nbytes` are those of the dense weight.
        yield from tensors_in({"packed": weight.packed, "meta": weight.meta})
    elif isinstance(weight, Tensor):
        yield weight
    elif isinstance(weight, Mapping):
        for value in weight.values():
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(weight):
        for field in dataclasses.fields(weight):
            yield from tensors_in(getattr(weight, field.name))


def padded(stream: Tensor) -> Tensor:
    """A vector and `PADDING` bytes after it: where it is, if its memory goes on for just so long, or else a copy."""
    spare = PADDING // stream.element_size()
    end = stream.storage_offset() + stream.numel() + spare
    if stream.is_contiguous() and stream.untyped_storage().nbytes() == end * stream.element_size():
        return stream.as_strided((stream.numel() + spare,), (1,))
    return torch.cat((stream, stream.new_zeros(spare)))


def unpadded(stream: Tensor) -> Tensor:
    """The vector that `padded` was given."""
    return stream[: stream.numel() - PADDING // stream.element_size()]
