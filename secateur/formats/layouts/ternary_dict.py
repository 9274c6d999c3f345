"""The layout `ternary-dict`: three values a row, zero among them, whose sequences have codes of a dictionary.

O: output features, I: input features, N: codes of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.quantized import Quantized
from secateur.formats.layouts.coded import HALF_DTYPES, check_finite, read_choice, read_stored_shape
from secateur.formats.layouts.layout import DTYPES, Layout, check_parts, dtype_name, layout
from secateur.kernels.packed import largest
from secateur.kernels.ternary_weight import TernaryWeight
from secateur.solvers.ternary_dictionary import (
    CODES,
    HIGH,
    LOW,
    PARTS,
    before,
    decode,
    dictionary,
    encode,
    parts_of_zeros,
)


@dataclass(frozen=True)
class TernaryCodes:
    """Weights of which each is zero, or one of two values of its row.

    Attributes:
        symbol_OI: uint8, `ZERO`, `HIGH` or `LOW` (see `solvers.ternary_dictionary`).
        low_O, high_O: in the dtype that they are stored in.
    """

    symbol_OI: Tensor
    low_O: Tensor
    high_O: Tensor

    @property
    def bits(self) -> int:
        """That a weight would take at most."""
        return 2

    def values(self) -> Tensor:
        """The weights `[O, I]`, float32."""
        value_O3 = torch.stack([torch.zeros_like(self.high_O), self.high_O, self.low_O], 1).float()
        return value_O3.gather(1, self.symbol_OI.long())

    def layout(self, dtype: torch.dtype) -> TernaryDict:
        return TernaryDict(dtype)


@layout
@dataclass(frozen=True)
class TernaryDict(Layout):
    """`codes uint16 [N]`, `offsets int32 [O + 1]`, `low [O]`, `high [O]`, `zeros uint8 [1]`, `shape int64 [2]`."""

    dtype: torch.dtype

    name: ClassVar[str] = "ternary-dict"
    rounded: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("codes", "offsets", "low", "high", "zeros", "shape")

    def pack(self, weight: Quantized) -> dict[str, Tensor]:
        codes: Any = weight.codes
        own = codes.layout(weight.dtype)
        if own != self:
            raise ValueError(f"its codes are stored as {own.to_config()}, and this layout is {self.to_config()}")
        if weight.keep_OI is not None or weight.order_I is not None or weight.outliers is not None:
            raise ValueError("it has a mask, an order or outliers, which layout 'ternary-dict' does not store")
        zeros = parts_of_zeros(1 - torch.count_nonzero(codes.symbol_OI).item() / codes.symbol_OI.numel())
        code_N, count_O = encode(codes.symbol_OI, dictionary(zeros))
        if len(code_N) >= 2**31:
            raise ValueError(f"it has {len(code_N)} codes, more than 32 bits count")
        return {
            "codes": code_N,
            "offsets": torch.nn.functional.pad(count_O.cumsum(0), (1, 0)).int(),
            "low": codes.low_O.contiguous(),
            "high": codes.high_O.contiguous(),
            "zeros": torch.tensor([zeros], dtype=torch.uint8),
            "shape": torch.tensor(weight.shape),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> TernaryWeight:
        O, I = read_stored_shape(tensors)
        check_parts(
            tensors,
            {
                "codes": lambda t: t.ndim == 1 and t.dtype == torch.uint16,
                "offsets": lambda t: t.shape == (O + 1,) and t.dtype == torch.int32,
                "low": lambda t: t.shape == (O,) and t.dtype in HALF_DTYPES,
                "high": lambda t: t.shape == (O,) and t.dtype in HALF_DTYPES,
                "zeros": lambda t: t.shape == (1,) and t.dtype == torch.uint8,
            },
        )
        check_finite(tensors, "low", "high")
        if max(largest(tensors[part]) for part in ("low", "high")) > torch.finfo(self.dtype).max:
            raise ValueError(f"its codes stand for values beyond {self.dtype}")
        zeros = int(tensors["zeros"])
        if not 0 < zeros < PARTS:
            raise ValueError(f"its zeros are {zeros}, where dictionaries are for 1 to {PARTS - 1}")
        codes_N, offset_O1 = tensors["codes"].view(torch.int16).clone(), tensors["offsets"].long()
        halves = tensors["low"].clone(), tensors["high"].clone()
        weight = TernaryWeight((O, I), self.dtype, codes_N, offset_O1, *halves, dictionary(zeros))
        _check_codes(weight)
        return weight

    def values(self, weight: TernaryWeight) -> tuple[Tensor, ...]:
        return ()  # looked at already

    def store(self, weight: TernaryWeight) -> dict[str, Tensor]:
        return {
            "codes": weight.codes_N.view(torch.uint16),
            "offsets": weight.offset_O1.int(),
            "low": weight.low_O,
            "high": weight.high_O,
            "zeros": torch.tensor([weight.dictionary.zeros], dtype=torch.uint8),
            "shape": torch.tensor(weight.shape),
        }

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        weight = self.load(tensors)
        row_M, column_M, high_M = decode(weight.codes_N.long() & 0xFFFF, weight.offset_O1, weight.dictionary)
        symbol_OI = torch.zeros(weight.shape, dtype=torch.uint8)
        symbol_OI[row_M, column_M] = torch.where(high_M, HIGH, LOW).to(torch.uint8)
        return Quantized(TernaryCodes(symbol_OI, weight.low_O, weight.high_O), weight.shape, self.dtype)

    def to_config(self) -> dict[str, Any]:
        return {"layout": self.name, "dtype": dtype_name(self.dtype)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TernaryDict:
        return cls(DTYPES[read_choice(config, "dtype", list(DTYPES))])


def _check_codes(weight: TernaryWeight) -> None:
    """Raise ValueError unless every code is one, every row's sequences end in or right behind it, and only zeros are beyond."""
    (O, I), offset_O1, N = weight.shape, weight.offset_O1, len(weight.codes_N)
    code_N = weight.codes_N.long() & 0xFFFF
    if (code_N >= CODES).any():
        raise ValueError(f"its codes have {int(code_N.max())}, which is not in a dictionary of {CODES}")
    if offset_O1[0] != 0 or offset_O1[-1] != N or (offset_O1.diff() <= 0).any():
        raise ValueError(f"its offsets do not rise from 0 to its {N} codes, row by row")
    length_N = weight.dictionary.on(code_N.device).length_E[code_N].long()
    row_N = torch.repeat_interleave(torch.arange(O), offset_O1.diff())
    begin_N = before(length_N, offset_O1, row_N)
    last_O = offset_O1[1:] - 1
    wrong_O = (begin_N[last_O] >= I) | (begin_N[last_O] + length_N[last_O] < I)
    if wrong_O.any():
        raise ValueError(f"its codes of row {int(wrong_O.nonzero()[0])} do not add up to {I} weights")
    row_M, column_M, _ = decode(code_N[last_O], torch.arange(O + 1), weight.dictionary)
    if (column_M + begin_N[last_O][row_M] >= I).any():
        raise ValueError("its codes have weights that are not zero after the end of a row")
