"""The layout `columns-int`: integer codes of one input feature after the other.

O: output features, I: input features, G: groups of inputs.
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
from secateur.formats.layouts.packed_int import PackedInt, Uniform
from secateur.formats.layouts.rows import Rows, is_stream
from secateur.kernels.column_weight import CodedColumns
from secateur.kernels.packed import padded, unpadded


@layout
@dataclass(frozen=True)
class ColumnsInt(Layout):
    """`codes uint8` (those of an input feature start at a byte), `scale [G, O]`, `zero uint8` (codes, too; those of a group
    start at a byte), `shape int64 [2]`. `zero` is there unless the grid is symmetric.

    Attributes:
        bits: of a code.
        group_size: inputs of an output that share a scale and zero point; the last group may have fewer.
        symmetric: all zero points are 2^(bits − 1).
        dtype: of the dense weight.
    """

    bits: int
    group_size: int
    symmetric: bool
    dtype: torch.dtype

    name: ClassVar[str] = "columns-int"
    rounded: ClassVar[bool] = True
    by_inputs: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("codes", "scale", "zero", "shape")

    def pack(self, weight: Quantized) -> dict[str, Tensor]:
        codes: Any = weight.codes
        own = codes.layout(weight.dtype)
        if own != PackedInt(self.bits, self.group_size, self.symmetric, self.dtype):
            raise ValueError(f"its codes are stored as {own.to_config()}, and this layout is {self.to_config()}")
        if weight.keep_OI is not None or weight.order_I is not None or weight.outliers is not None:
            raise ValueError(f"it has a mask, an order or outliers, which layout {self.name!r} does not store")
        O, I = weight.shape
        parts = {"codes": Rows.full((I, O)).pack(codes.code_OK.T, self.bits), "scale": codes.scale_OG.T.contiguous()}
        if codes.zero_OG is not None:
            parts["zero"] = Rows.full(codes.zero_OG.T.shape).pack(codes.zero_OG.T, self.bits)
        return {**parts, "shape": torch.tensor(weight.shape)}

    def load(self, tensors: Mapping[str, Tensor]) -> CodedColumns:
        (O, I), zero_GO = self._check(tensors)
        weight = CodedColumns(
            (O, I),
            self.dtype,
            self.bits,
            min(self.group_size, I),  # a file may claim groups of any size
            padded(tensors["codes"]),
            padded(tensors["scale"].reshape(-1)),
            None if zero_GO is None else padded(zero_GO.reshape(-1)),
        )
        # A bound that holds whatever the codes are is enough nearly always.
        surely = weight.bound() < torch.finfo(weight.dtype).max / 2
        if not surely and not all_finite(weight.dense()):
            raise ValueError(f"its codes stand for values beyond {weight.dtype}")
        return weight

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        (O, I), zero_GO = self._check(tensors)
        code_OI = Rows.full((I, O)).unpack(tensors["codes"], self.bits, "codes").T.contiguous()
        zero_OG = None if zero_GO is None else zero_GO.T.contiguous()
        codes = Uniform(self.bits, self.group_size, code_OI, tensors["scale"].T.contiguous(), zero_OG)
        return Quantized(codes, (O, I), self.dtype)

    def _check(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[int, int], Tensor | None]:
        """(O, I) and the zero points `[G, O]`, once the parts are known to fit together."""
        O, I = read_stored_shape(tensors)
        groups = (-(-I // self.group_size), O)
        check_parts(tensors, {"codes": is_stream, "scale": lambda t: t.shape == groups and t.dtype in HALF_DTYPES})
        Rows.full((I, O)).check_stream(tensors["codes"], self.bits, "codes")
        check_finite(tensors, "scale")
        if (tensors["scale"] <= 0).any():
            raise ValueError("its scale holds values that are not positive")
        if self.symmetric:
            if "zero" in tensors:
                raise ValueError("it has a zero part, but the config says that it is symmetric")
            return (O, I), None
        check_parts(tensors, {"zero": is_stream})
        return (O, I), Rows.full(groups).unpack(tensors["zero"], self.bits, "zero")

    def store(self, weight: CodedColumns) -> dict[str, Tensor]:
        parts = {
            "codes": unpadded(weight.codes_S),
            "scale": weight.scale_GO,
            "shape": torch.tensor(weight.shape),
        }
        if weight.zero_GO is not None:
            parts["zero"] = Rows.full((len(weight.zero_GO), weight.shape[0])).pack(weight.zero_GO, self.bits)
        return parts

    def values(self, weight: CodedColumns) -> tuple[Tensor, ...]:
        return ()  # looked at already

    def to_config(self) -> dict[str, Any]:
        own = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return {"layout": self.name, **own, "dtype": dtype_name(self.dtype)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ColumnsInt:
        bits, group_size, symmetric = (read_choice(config, key, allowed) for key, allowed in PackedInt.choices.items())
        return cls(bits, group_size, symmetric, DTYPES[read_choice(config, "dtype", list(DTYPES))])
