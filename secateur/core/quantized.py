"""Quantized weights: what quantizers return and layouts store.

O: output features, I: input features, K: stored weights of a row (I of them, or as many as are kept), N: outliers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

BITS = (2, 3, 4, 5, 6, 7, 8)


class Codes(Protocol):
    """The codes of a weight and what they stand for: a frozen dataclass of a family of codes (see `formats.layouts`).

    Attributes:
        bits: of a code.
    """

    @property
    def bits(self) -> int: ...

    def values(self) -> Tensor:
        """The stored weights `[O, K]`, float32."""
        ...

    def layout(self, dtype: torch.dtype) -> Any:
        """What stores them, as codes of a weight that is of this dtype where it is dense."""
        ...


@dataclass(frozen=True)
class Outliers:
    """Few weights that the codes do not do justice to: what has to be added to each, in compressed sparse rows.

    Attributes:
        count_O: int64, how many each row has.
        column_N: int64, row after row, rising within a row.
        value_N: in the dtype that they are stored in.
    """

    count_O: Tensor
    column_N: Tensor
    value_N: Tensor

    @classmethod
    def of(cls, difference_OI: Tensor, outlier_OI: Tensor, dtype: torch.dtype) -> Outliers:
        """Those that a mask tells, with the difference between each weight and what its code stands for."""
        return cls(outlier_OI.sum(1), outlier_OI.nonzero()[:, 1], difference_OI[outlier_OI].to(dtype))

    @property
    def row_N(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.count_O), device=self.count_O.device), self.count_O)


@dataclass(frozen=True)
class Quantized:
    """A quantized weight `[O, I]`.

    Attributes:
        codes: of its stored weights.
        shape: (O, I).
        dtype: of the dense weight.
        keep_OI: bool, the weights that are stored, columns in stored order; the others are zero. None if all are. Rows of
            `codes` are as long as the row that keeps most; what they hold beyond their own row's weights means nothing.
        order_I: int64, the input feature of each stored column, where columns are not in their natural order.
        outliers: to be added, columns in natural order.
        notes: what the user should know about how it went.
    """

    codes: Codes
    shape: tuple[int, int]
    dtype: torch.dtype
    keep_OI: Tensor | None = None
    order_I: Tensor | None = None
    outliers: Outliers | None = None
    notes: tuple[str, ...] = ()

    @property
    def stored(self) -> int:
        """How many weights have a code."""
        return self.shape[0] * self.shape[1] if self.keep_OI is None else int(self.keep_OI.sum())

    @property
    def outlier_count(self) -> int:
        """How many weights are outliers."""
        return 0 if self.outliers is None else self.outliers.column_N.numel()

    def cpu(self) -> Quantized:
        """The same with all its tensors in the CPU's memory."""
        return _on_cpu(self)

    def dequantize(self) -> Tensor:
        """The dense weight: computed in float32, rounded to `dtype` at the end."""
        W_OI = self.codes.values()
        if self.keep_OI is not None:
            W_OI = place_kept(W_OI, self.keep_OI)
        if self.order_I is not None:
            W_OI = torch.empty_like(W_OI).index_copy_(1, self.order_I, W_OI)
        if self.outliers is not None:
            W_OI[self.outliers.row_N, self.outliers.column_N] += self.outliers.value_N.float()
        return W_OI.to(self.dtype)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _on_cpu(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


def take_kept(W_OI: Tensor, keep_OI: Tensor) -> Tensor:
    """The kept weights of each row moved to its beginning: `[O, K]`, with zeros after the last."""
    count_O = keep_OI.sum(1)
    W_OK = W_OI.new_zeros(len(W_OI), int(count_O.max()))
    W_OK[_filled(count_O, W_OK.shape[1])] = W_OI[keep_OI]
    return W_OK


def place_kept(W_OK: Tensor, keep_OI: Tensor) -> Tensor:
    """The reverse of `take_kept`."""
    W_OI = W_OK.new_zeros(keep_OI.shape)
    W_OI[keep_OI] = W_OK[_filled(keep_OI.sum(1), W_OK.shape[1])]
    return W_OI


def _filled(count_O: Tensor, K: int) -> Tensor:
    return torch.arange(K, device=count_O.device) < count_O[:, None]
