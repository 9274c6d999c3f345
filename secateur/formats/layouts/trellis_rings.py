"""The layout `trellis`: a weight that is scaled and rotated on both sides, and coded by a trellis in rings along its outputs.

O: output features, I: input features, R: rings of T outputs, B: bytes of a ring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.quantized import Quantized
from secateur.formats.layouts.coded import HALF_DTYPES, check_finite, read_choice, read_stored_shape
from secateur.formats.layouts.layout import DTYPES, Layout, all_finite, check_parts, dtype_name, layout
from secateur.kernels.bits import bytes_of, pack_bits, unpack_bits
from secateur.kernels.packed import padded, unpadded
from secateur.kernels.trellis_weight import TrellisWeight, rotated_back
from secateur.solvers.hadamard import block_of
from secateur.solvers.trellis import MOST_STATE_BITS, decode

BITS = (2, 3, 4)
_STATES = [2**bits for bits in range(2, MOST_STATE_BITS + 1)]
_BLOCKS = [2**bits for bits in range(11)]
_RINGS = range(1, 2**31)


@dataclass(frozen=True)
class TrellisCodes:
    """Symbols of rings along the outputs, of a weight that was rotated: see `kernels.trellis_weight`.

    Attributes:
        bits: of a symbol.
        state_bits: of a state.
        ring: outputs of a ring, which divide those of the weight.
        block: the most features that a block of a rotation has.
        symbol_OI: uint8.
        scale_out_O, scale_in_I: of either sign, in the dtype that they are stored in.
    """

    bits: int
    state_bits: int
    ring: int
    block: int
    symbol_OI: Tensor
    scale_out_O: Tensor
    scale_in_I: Tensor

    def values(self) -> Tensor:
        """The weights `[O, I]`, float32."""
        O, I = self.symbol_OI.shape
        symbol_RIT = self.symbol_OI.view(-1, self.ring, I).transpose(1, 2)
        Q_OI = decode(symbol_RIT, self.bits, self.state_bits).transpose(1, 2).reshape(O, I)
        blocks = block_of(O, self.block), block_of(I, self.block)
        return rotated_back(Q_OI, self.scale_out_O, self.scale_in_I, *blocks)

    def layout(self, dtype: torch.dtype) -> Trellis:
        return Trellis(self.bits, self.state_bits, self.ring, self.block, dtype)


@layout
@dataclass(frozen=True)
class Trellis(Layout):
    """`codes uint8 [R, I, B]`, `scale_in [I]`, `scale_out [O]`, `shape int64 [2]`.

    Attributes:
        bits, state_bits, ring, block: see `TrellisCodes`.
        dtype: of the dense weight.
    """

    bits: int
    state_bits: int
    ring: int
    block: int
    dtype: torch.dtype

    name: ClassVar[str] = "trellis"
    rounded: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("codes", "scale_in", "scale_out", "shape")

    def __post_init__(self) -> None:
        if not self.bits <= self.state_bits <= self.ring * self.bits:
            raise ValueError(
                f"states are {2**self.state_bits}, where {self.bits} bits and rings of {self.ring} allow "
                f"{2**self.bits} to {2 ** min(self.ring * self.bits, MOST_STATE_BITS)}"
            )

    def pack(self, weight: Quantized) -> dict[str, Tensor]:
        codes: Any = weight.codes
        own = codes.layout(weight.dtype)
        if own != self:
            raise ValueError(f"its codes are stored as {own.to_config()}, and this layout is {self.to_config()}")
        if weight.keep_OI is not None or weight.order_I is not None or weight.outliers is not None:
            raise ValueError("it has a mask, an order or outliers, which layout 'trellis' does not store")
        O, I = weight.shape
        symbol_NT = codes.symbol_OI.view(-1, self.ring, I).transpose(1, 2).reshape(-1, self.ring)
        return {
            "codes": pack_bits(symbol_NT, self.bits).view(O // self.ring, I, -1),
            "scale_in": codes.scale_in_I.clone(),  # which linears of one input have in common
            "scale_out": codes.scale_out_O,
            "shape": torch.tensor(weight.shape),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> TrellisWeight:
        O, I = self._check(tensors)
        scales = tensors["scale_out"].clone(), tensors["scale_in"].clone()
        blocks = block_of(O, self.block), block_of(I, self.block)
        form = self.bits, self.state_bits, self.ring, *blocks
        weight = TrellisWeight((O, I), self.dtype, *form, padded(tensors["codes"].reshape(-1)), *scales)
        # A bound that holds whatever the codes are is enough nearly always.
        surely = weight.bound() < torch.finfo(weight.dtype).max / 2
        if not surely and not all(all_finite(W) for _, W in weight.dense_rows()):
            raise ValueError(f"its codes stand for values beyond {weight.dtype}")
        return weight

    def values(self, weight: TrellisWeight) -> tuple[Tensor, ...]:
        return ()  # looked at already

    def store(self, weight: TrellisWeight) -> dict[str, Tensor]:
        return {
            "codes": unpadded(weight.codes_S),
            "scale_in": weight.scale_in_I,
            "scale_out": weight.scale_out_O,
            "shape": torch.tensor(weight.shape),
        }

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        O, I = self._check(tensors)
        symbol_NT = unpack_bits(tensors["codes"].reshape(-1, bytes_of(self.ring, self.bits)), self.bits, self.ring)
        symbol_OI = symbol_NT.view(-1, I, self.ring).transpose(1, 2).reshape(O, I)
        form = self.bits, self.state_bits, self.ring, self.block
        return Quantized(TrellisCodes(*form, symbol_OI, tensors["scale_out"], tensors["scale_in"]), (O, I), self.dtype)

    def _check(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(O, I), once the parts are known to fit together."""
        O, I = read_stored_shape(tensors)
        if O % self.ring:
            raise ValueError(f"its shape [{O}, {I}] has {O} outputs, which do not divide into rings of {self.ring}")
        codes_shape = (O // self.ring, I, bytes_of(self.ring, self.bits))
        check_parts(
            tensors,
            {
                "codes": lambda t: t.shape == codes_shape and t.dtype == torch.uint8,
                "scale_in": lambda t: t.shape == (I,) and t.dtype in HALF_DTYPES,
                "scale_out": lambda t: t.shape == (O,) and t.dtype in HALF_DTYPES,
            },
        )
        check_finite(tensors, "scale_in", "scale_out")
        rest = self.ring * self.bits % 8
        if rest and (tensors["codes"][..., -1] >> rest).any():
            raise ValueError("its codes have bits set after a ring's last symbol")
        return O, I

    def to_config(self) -> dict[str, Any]:
        own = {"bits": self.bits, "states": 2**self.state_bits, "ring": self.ring, "block": self.block}
        return {"layout": self.name, **own, "dtype": dtype_name(self.dtype)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Trellis:
        state_bits = int(read_choice(config, "states", _STATES)).bit_length() - 1
        bits, ring, block = (
            read_choice(config, key, allowed) for key, allowed in (("bits", BITS), ("ring", _RINGS), ("block", _BLOCKS))
        )
        return cls(bits, state_bits, ring, block, DTYPES[read_choice(config, "dtype", list(DTYPES))])
