"""The layout `sq`: banks of weights of which a fixed number have codes of high precision, and all others of low precision.

O: output features, I: input features, H: weights of a row in high bits, L: in low bits, G: banks of a row, Γ: of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.quantized import BITS, Quantized
from secateur.formats.layouts.coded import (
    check_finite,
    is_half_vector,
    read_choice,
    read_order,
    read_stored_shape,
    stored_order,
)
from secateur.formats.layouts.layout import DTYPES, Layout, all_finite, check_parts, dtype_name, layout
from secateur.formats.layouts.packed_int import UniformGrid
from secateur.formats.layouts.rows import Rows, is_stream
from secateur.kernels.bits import bytes_of, unpack_bits
from secateur.kernels.expand import pack_mask, unpack_mask
from secateur.kernels.packed import CodedWeight, on_groups, padded, unpadded
from secateur.kernels.two_precisions_weight import TwoPrecisionsWeight

#: A position in a bank has eight bits at most.
MOST_IN_BANK = 256


def high_count(features: int, bank: int, high: int) -> int:
    """How many weights of a row are in high bits: of a last bank that is short its share, rounded down."""
    return features // bank * high + features % bank * high // bank


@dataclass(frozen=True)
class Banks:
    """Codes of two precisions: w = (code − 2^(bits − 1)) · scale, with the bits and the scale of its precision.

    Attributes:
        high_bits, low_bits: of a code.
        bank: weights of a bank; the last of a row may have fewer.
        high: how many of a whole bank are in high bits.
        high_OI: bool, which are.
        code_OI: uint8.
        high_scale_O: of a row's weights in high bits, in the dtype that it is stored in.
        low_scale_OG: of those of a bank in low bits.
    """

    high_bits: int
    low_bits: int
    bank: int
    high: int
    high_OI: Tensor
    code_OI: Tensor
    high_scale_O: Tensor
    low_scale_OG: Tensor

    @property
    def bits(self) -> int:
        """Of most codes."""
        return self.low_bits

    def values(self) -> Tensor:
        """The weights `[O, I]`, float32."""
        low_OG = self.low_scale_OG.float()
        low_OI = on_groups(self.code_OI, low_OG, torch.full_like(low_OG, 2 ** (self.low_bits - 1)), self.bank)
        high_OI = (self.code_OI.float() - 2 ** (self.high_bits - 1)) * self.high_scale_O.float()[:, None]
        return torch.where(self.high_OI, high_OI, low_OI)

    def layout(self, dtype: torch.dtype) -> TwoPrecisions:
        return TwoPrecisions(self.high_bits, self.low_bits, self.bank, self.high, dtype)


@layout
@dataclass(frozen=True)
class TwoPrecisions(Layout):
    """`high_codes uint8`, `low_codes uint8` (each row starts at a byte), `high_scale [O]`, `low_scale [Γ]`, `shape int64 [2]`,
    which weights are in high bits, and perhaps `order [I]`.

    That is `positions uint8`, where each has in its bank (each row starts at a byte), where those take fewer bits than a mask;
    else `bitmask uint8 [O, ⌈I/8⌉]`.

    Attributes:
        high_bits, low_bits, bank, high: see `Banks`.
        dtype: of the dense weight.
    """

    high_bits: int
    low_bits: int
    bank: int
    high: int
    dtype: torch.dtype

    name: ClassVar[str] = "sq"
    rounded: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = (
        *("high_codes", "low_codes", "high_scale", "low_scale", "positions", "bitmask", "shape", "order"),
    )

    def __post_init__(self) -> None:
        if not (2 <= self.bank <= MOST_IN_BANK and 0 < self.high < self.bank):
            raise ValueError(f"{self.high} weights of banks of {self.bank} are in high bits")

    @property
    def position_bits(self) -> int:
        """Of a position in a bank."""
        return (self.bank - 1).bit_length()

    @property
    def has_positions(self) -> bool:
        """Whether positions take fewer bits than a mask."""
        return self.high * self.position_bits < self.bank

    def _rows(self, shape: tuple[int, int]) -> tuple[Rows, Rows]:
        """The weights of each row in high and in low bits."""
        H = high_count(shape[1], self.bank, self.high)
        return tuple(Rows(shape, count) for count in (H, shape[1] - H))  # type: ignore[return-value]

    def pack(self, weight: Quantized) -> dict[str, Tensor]:
        codes: Any = weight.codes
        own = codes.layout(weight.dtype)
        if own != self:
            raise ValueError(f"its codes are stored as {own.to_config()}, and this layout is {self.to_config()}")
        if weight.keep_OI is not None or weight.outliers is not None:
            raise ValueError("it has a mask of kept weights or outliers, which layout 'sq' does not store")
        high, low = self._rows(weight.shape)
        O = weight.shape[0]
        parts = {
            "high_codes": _packed(high, codes.code_OI[codes.high_OI].view(O, -1), self.high_bits),
            "low_codes": _packed(low, codes.code_OI[~codes.high_OI].view(O, -1), self.low_bits),
            "high_scale": codes.high_scale_O,
            "low_scale": codes.low_scale_OG.reshape(-1).contiguous(),
            "shape": torch.tensor(weight.shape),
        }
        if self.has_positions:
            position_OH = (codes.high_OI.nonzero()[:, 1] % self.bank).to(torch.uint8).view(O, -1)
            parts["positions"] = _packed(high, position_OH, self.position_bits)
        else:
            parts["bitmask"] = pack_mask(codes.high_OI)
        if weight.order_I is not None:
            parts["order"] = stored_order(weight.order_I)
        return parts

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        shape = O, I = read_stored_shape(tensors)
        check_parts(
            tensors,
            {
                "high_codes": is_stream,
                "low_codes": is_stream,
                "high_scale": lambda t: is_half_vector(t) and t.numel() == O,
                "low_scale": lambda t: is_half_vector(t) and t.numel() == O * -(-I // self.bank),
            },
        )
        for part in ("high_scale", "low_scale"):
            check_finite(tensors, part)
            if (tensors[part] <= 0).any():
                raise ValueError(f"its {part} holds values that are not positive")
        high, low = self._rows(shape)
        # Their lengths are checked before anything of the weight's size is made.
        low_OL = _unpacked(low, tensors["low_codes"], self.low_bits, "low_codes")
        high_OH = _unpacked(high, tensors["high_codes"], self.high_bits, "high_codes")
        high_OI = self._read_mask(tensors, high)
        code_OI = torch.empty(O, I, dtype=torch.uint8)
        code_OI[high_OI], code_OI[~high_OI] = high_OH.reshape(-1), low_OL.reshape(-1)
        form = self.high_bits, self.low_bits, self.bank, self.high
        scales = tensors["high_scale"].clone(), tensors["low_scale"].view(O, -1).clone()
        return Quantized(Banks(*form, high_OI, code_OI, *scales), shape, self.dtype, order_I=read_order(tensors, I))

    def _read_mask(self, tensors: Mapping[str, Tensor], high: Rows) -> Tensor:
        """Which weights are in high bits, as many of each bank as there have to be."""
        O, I = high.shape
        G = -(-I // self.bank)
        unwanted = "bitmask" if self.has_positions else "positions"
        if unwanted in tensors:
            raise ValueError(f"it has a part {unwanted!r}, which such banks do not")
        if self.has_positions:
            check_parts(tensors, {"positions": is_stream})
            position_OH = _unpacked(high, tensors["positions"], self.position_bits, "positions").long()
            column_OH = position_OH + torch.arange(high.longest) // self.high * self.bank
            if (column_OH >= I).any() or (position_OH >= self.bank).any():
                raise ValueError("its positions point outside their bank")
            if (column_OH.diff(dim=1) <= 0).any():
                raise ValueError("its positions are out of order within a bank")
            return torch.zeros(O, I, dtype=torch.bool).scatter_(1, column_OH, True)
        mask_shape = (O, -(-I // 8))
        check_parts(tensors, {"bitmask": lambda t: t.shape == mask_shape and t.dtype == torch.uint8})
        if I % 8 and (tensors["bitmask"][:, -1] >> I % 8).any():
            raise ValueError("its bitmask has bits set beyond the last column")
        high_OI = unpack_mask(tensors["bitmask"], I)
        whole_OI = torch.nn.functional.pad(high_OI, (0, G * self.bank - I))
        wanted_G = torch.full((G,), self.high)
        wanted_G[-1] = high.longest - (G - 1) * self.high
        if not torch.equal(whole_OI.view(O, G, -1).sum(2), wanted_G.expand(O, G)):
            raise ValueError(f"its bitmask has banks that have not {self.high} bits set of {self.bank}")
        return high_OI

    def load(self, tensors: Mapping[str, Tensor]) -> TwoPrecisionsWeight:
        weight = self.read(tensors)
        codes: Any = weight.codes
        shape = O, I = weight.shape
        high, _ = self._rows(shape)
        zero = 2 ** (self.low_bits - 1)
        every = Rows.full(shape)
        low_codes = every.pack(codes.code_OI.masked_fill(codes.high_OI, zero), self.low_bits)
        order_I = None if weight.order_I is None else weight.order_I.int()
        low = CodedWeight(
            *(shape, self.dtype, self.low_bits, padded(low_codes)),
            *(torch.arange(O + 1) * bytes_of(I, self.low_bits), None, None),
            UniformGrid(self.bank, codes.low_scale_OG.reshape(-1), None),
            order_I=order_I,
        )
        start_O1 = torch.arange(O + 1) * bytes_of(high.longest, self.high_bits)
        one_a_row = torch.arange(O + 1) if high.longest else torch.zeros(O + 1, dtype=torch.int64)
        high_weight = CodedWeight(
            *(shape, self.dtype, self.high_bits, padded(tensors["high_codes"]), start_O1),
            *(high.length_O.int().contiguous(), one_a_row),
            UniformGrid(I, codes.high_scale_O, None),
            pack_mask(codes.high_OI),
            order_I,
        )
        found = TwoPrecisionsWeight(shape, low, high_weight)
        surely = max(low.bound(), high_weight.bound()) < torch.finfo(self.dtype).max / 2
        if not surely and not all(all_finite(W_RI) for _, W_RI in found.dense_rows()):
            raise ValueError(f"its codes stand for values beyond {self.dtype}")
        return found

    def values(self, weight: TwoPrecisionsWeight) -> tuple[Tensor, ...]:
        return ()  # looked at already

    def store(self, weight: TwoPrecisionsWeight) -> dict[str, Tensor]:
        O, I = weight.shape
        assert weight.high.bitmask_OB is not None
        high_grid: Any = weight.high.grid
        low_grid: Any = weight.low.grid
        high_OI = unpack_mask(weight.high.bitmask_OB, I)
        code_OI = unpack_bits(unpadded(weight.low.codes_S).view(O, -1), self.low_bits, I)
        high, low = self._rows(weight.shape)
        parts = {
            "high_codes": unpadded(weight.high.codes_S),
            "low_codes": _packed(low, code_OI[~high_OI].view(O, -1), self.low_bits),
            "high_scale": high_grid.scale_Γ,
            "low_scale": low_grid.scale_Γ,
            "shape": torch.tensor(weight.shape),
            "bitmask": weight.high.bitmask_OB,
        }
        if self.has_positions:
            position_OH = (high_OI.nonzero()[:, 1] % self.bank).to(torch.uint8).view(O, -1)
            parts["positions"] = _packed(high, position_OH, self.position_bits)
        if weight.low.order_I is not None:
            parts["order"] = weight.low.order_I
        return parts

    def to_config(self) -> dict[str, Any]:
        own = {"high_bits": self.high_bits, "low_bits": self.low_bits, "bank": self.bank, "high": self.high}
        return {"layout": self.name, **own, "dtype": dtype_name(self.dtype)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TwoPrecisions:
        high_bits, low_bits = (read_choice(config, key, BITS) for key in ("high_bits", "low_bits"))
        bank, high = (read_choice(config, key, range(1, MOST_IN_BANK + 1)) for key in ("bank", "high"))
        return cls(high_bits, low_bits, bank, high, DTYPES[read_choice(config, "dtype", list(DTYPES))])


def _packed(rows: Rows, code_OK: Tensor, bits: int) -> Tensor:
    return rows.pack(code_OK, bits) if rows.longest else torch.zeros(0, dtype=torch.uint8)


def _unpacked(rows: Rows, stream_B: Tensor, bits: int, part: str) -> Tensor:
    """Raises as `Rows.unpack`, also where rows have nothing."""
    if rows.longest:
        return rows.unpack(stream_B, bits, part)
    if stream_B.numel():
        raise ValueError(f"its {part} has {stream_B.numel()} bytes, where no weight has any")
    return torch.zeros(rows.shape[0], 0, dtype=torch.uint8)
