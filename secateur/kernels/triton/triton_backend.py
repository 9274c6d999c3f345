"""The backend `triton`: weights stay packed in the memory of a GPU, and its kernels expand them in registers.

This file prepares weights; `triton_linear` computes, and is imported only then: Triton may not be installed.

O: output features, I: input features, B: bytes of a row's mask, V: values, W: chunks of a row, T: tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from secateur.kernels.backends import backend
from secateur.kernels.packed import FLOAT_DTYPES, CodedWeight, Packed, SparseWeight, map_tensors
from secateur.kernels.triton.triton_weight import TritonWeight

if TYPE_CHECKING:
    from secateur.kernels.trellis_weight import TrellisWeight


@backend
class Triton:
    """Pruned and quantized weights on CUDA devices; not weights that are both."""

    name: ClassVar[str] = "triton"
    first_on: ClassVar[dict[str, int]] = {"cuda": 1}

    def why_not(self, weight: Packed, device: torch.device, dtype: torch.dtype) -> str | None:
        if find_spec("triton") is None:
            return "triton is not installed: install it, or use backend 'dense' or 'torch'"
        # Triton's interpreter computes with tensors of the CPU, slowly: for tests.
        if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            return f"its kernels run on CUDA devices, not on {device.type}, where backends 'dense' and 'torch' do"
        if dtype not in FLOAT_DTYPES:
            return f"it computes in float32, bfloat16 and float16, not in {dtype}, which backend 'torch' may"
        if weight.kernels not in _PREPARED:
            return "it has no kernel for this layout, which backends 'dense' and 'torch' take"
        if weight.masked:
            return "it has no kernel for layout 'sparse-int', which backends 'dense' and 'torch' take"
        return None

    def prepare(self, weight: Packed, device: torch.device, dtype: torch.dtype) -> TritonWeight:
        weight = map_tensors(weight, lambda tensor: tensor.to(device).contiguous())
        return _PREPARED[weight.kernels](weight)

    def linear(self, weight: Any, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        linear = _module_of(weight).linear
        found: Tensor
        if weight.packed.order_I is not None:
            x_TI = x_TI[:, weight.packed.order_I]
        found = linear(weight, x_TI.contiguous(), bias_O)
        return found

    def linear_kept(self, weight: Any, x_TI: Tensor, kept_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        if weight.packed.kernels != "columns":
            return self.linear(weight, x_TI.masked_fill(~kept_TI, 0), bias_O)
        found: Tensor = _module_of(weight).linear(weight, x_TI.contiguous(), bias_O, kept_TI.contiguous())
        return found

    def gradient(self, weight: Any, grad_TO: Tensor) -> Tensor:
        grad_TI: Tensor = _module_of(weight).gradient(weight, grad_TO.contiguous())
        if weight.packed.order_I is None:
            return grad_TI
        return torch.empty_like(grad_TI).index_copy_(1, weight.packed.order_I.long(), grad_TI)

    def packed(self, weight: Any) -> Packed:
        found: Packed = weight.packed
        return found


def _sparse(weight: SparseWeight) -> TritonWeight:
    """N:M goes the same way: to know where its rows start saves nothing once chunks have starts."""
    from secateur.kernels.column_weight import chunk_starts  # models on a CPU need nothing of it

    bitmask_OB = weight.bitmask_OB
    start_OW = _starts(weight, chunk_starts(bitmask_OB))
    return TritonWeight(
        weight.shape, {"values_V": weight.values_V, "bitmask_OB": bitmask_OB, "start_OW": start_OW}, {}, weight
    )


def _starts(weight: SparseWeight, before_OW: Tensor) -> Tensor:
    """Where the values of each chunk begin, `[O, W]`."""
    start_OW = weight.start_O1[:-1, None] + before_OW
    # Four bytes for 256 weights: 1.4 % of a weight of 16 bits at a density of 50 %.
    return start_OW.int() if weight.values_V.numel() < 2**31 else start_OW


def _coded(weight: CodedWeight) -> TritonWeight:
    grid, I = weight.grid.operands(), weight.shape[1]
    assert grid is not None
    if grid.table is not None:
        kind, scale = "table", grid.table
    elif grid.scale is not None:
        kind, scale = "symmetric" if grid.zero is None else "uniform", grid.scale
        if grid.zero is not None and grid.zero.is_floating_point():
            kind = "level"
    else:
        assert grid.pair is not None
        kind, scale = "two-level" if grid.pair.ndim == 1 else "two-level bytes", grid.pair
    constants = {
        "BITS": weight.bits,
        "GRID": kind,
        # One group a row is as good in whole words, and a file may claim groups of any size.
        "GROUP": min(grid.group_size or I, -(-I // 8) * 8),
        "TILE_ROWS": grid.tile_rows or 1,
        "RAGGED": I % 8 != 0,
    }
    tensors = {"codes_S": weight.codes_S, "scale": scale, "zero": grid.zero, "second": grid.second}
    return TritonWeight(weight.shape, tensors, constants, weight)


def _trellis(weight: TrellisWeight) -> TritonWeight:
    words, rest = divmod(weight.ring * weight.bits, 32)
    words = 0 if rest else words
    codes = weight.codes_S.view(torch.int32) if words else weight.codes_S
    constants = {"BITS": weight.bits, "STATES": weight.state_bits, "RING": weight.ring, "WORDS": words}
    return TritonWeight(weight.shape, {"codes": codes}, constants, weight)


def _columns(weight: Any) -> TritonWeight:
    _, values, bitmask_IB, start_I1, before_IW, codes, bits, group_size, scale, zero = weight.operands()
    start_IW = None if start_I1 is None else _starts(weight.inner, before_IW)
    coded = "by input, symmetric" if zero is None else "by input"
    form = "bitmap" if start_IW is not None else "dense" if codes is None else coded
    tensors = {"values_V": values, "bitmask_OB": bitmask_IB, "start_OW": start_IW, "codes_S": codes}
    constants = {"FORM": form, "BITS": bits, "GROUP": group_size}
    return TritonWeight(weight.shape, {**tensors, "scale": scale, "zero": zero}, constants, weight)


def _module_of(weight: TritonWeight) -> Any:
    """The kernels for a weight, which only now need Triton."""
    own = weight.packed.kernels
    return import_module(f"{__package__}.triton_{own if own in ('columns', 'trellis') else 'linear'}")


_PREPARED: dict[str, Callable[[Any], TritonWeight]] = {
    "sparse": _sparse,
    "coded": _coded,
    "trellis": _trellis,
    "columns": _columns,
}
