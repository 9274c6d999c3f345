"""A format of somebody else's, in one file: a byte a weight and a scale a row, which our `packed-int` holds, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.quantized import Quantized
from secateur.errors import CheckpointError
from secateur.foreign.format import Foreign, foreign
from secateur.formats.layouts.choose import layout_for
from secateur.formats.layouts.layout import Decoder, Layout, check_parts
from secateur.formats.layouts.packed_int import Uniform
from secateur.formats.layouts.packed_weight import PackedWeight


class RowsOfBytes(Decoder):
    """`q uint8 [O, I]`, `s float16 [O]`: w = (q − 128) · s."""

    name: ClassVar[str] = "rows-of-bytes"
    rounded: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("q", "s")

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.read(tensors).dequantize()

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        check_parts(tensors, {"q": lambda t: t.ndim == 2 and t.dtype == torch.uint8, "s": lambda t: t.ndim == 1})
        code_OI, scale_O = tensors["q"], tensors["s"]
        O, I = code_OI.shape
        if len(scale_O) != O or not (scale_O > 0).all():
            raise ValueError("its s is not a positive scale for each row")
        return Quantized(Uniform(8, I, code_OI, scale_O[:, None], None), (O, I), torch.float16)

    def ours(self, tensors: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        weight = self.read(tensors)
        layout = layout_for(weight)
        return layout, layout.pack(weight)


@foreign
class Bytes(Foreign):
    """Known by `quant_method`; packed weights end in `.q` and `.s`."""

    quant_method: ClassVar[str] = "rows-of-bytes"
    reads: ClassVar[str] = "rows of bytes"

    @classmethod
    def packed_weights(cls, stored: Mapping[str, Tensor], section: Mapping[str, Any]) -> dict[str, PackedWeight]:
        modules = [name.removesuffix(".q") for name in stored if name.endswith(".q")]
        for module in modules:
            if f"{module}.s" not in stored:
                raise CheckpointError(f"{module}.q has no scales")
        return {f"{m}.weight": PackedWeight(RowsOfBytes(), {"q": f"{m}.q", "s": f"{m}.s"}) for m in modules}
