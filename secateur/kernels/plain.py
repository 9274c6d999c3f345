"""The backend `torch`: every packed weight in plain torch, on any device. It is what the others are tested against.

O: output features, I: input features, K: stored weights of the row with most, G: groups of the row with most, T: tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from secateur.kernels.backends import backend
from secateur.kernels.bits import unpack_bits
from secateur.kernels.expand import expand_bitmap, unpack_mask
from secateur.kernels.packed import (
    CodedWeight,
    Packed,
    SparseWeight,
    TableGrid,
    UniformGrid,
    map_tensors,
    some_rows,
)

# Which a CPU's caches hold on their way from codes.
_WEIGHTS_AT_ONCE = 2**19


def dense_weight(weight: Packed) -> Tensor:
    """The dense weight `[O, I]`, in its own dtype, input features in natural order."""
    if isinstance(weight, SparseWeight):
        keep_OI = unpack_mask(weight.bitmask_OB, weight.shape[1])
        W_OI = weight.values_V.new_zeros(weight.shape)
        return W_OI.masked_scatter_(keep_OI, weight.values_V)
    W_OK = _stored_weights(weight)
    if weight.bitmask_OB is not None:
        keep_OI = unpack_mask(weight.bitmask_OB, weight.shape[1])
        place_OI = (keep_OI.cumsum(1) - 1).clamp_(min=0)
        W_OI = W_OK.gather(1, place_OI).masked_fill_(~keep_OI, 0) if W_OK.shape[1] else W_OK.new_zeros(weight.shape)
    else:
        W_OI = W_OK
    if weight.outliers is not None:
        start_O1, column_N, value_N = weight.outliers.start_O1, weight.outliers.column_N, weight.outliers.value_N
        row_N = torch.arange(weight.shape[0], device=W_OI.device).repeat_interleave(start_O1.diff().long())
        W_OI.index_put_((row_N, column_N.long()), value_N.float(), accumulate=True)
    if weight.order_I is not None:
        W_OI = torch.empty_like(W_OI).index_copy_(1, weight.order_I.long(), W_OI)
    return W_OI.to(weight.dtype)


def _stored_weights(weight: CodedWeight) -> Tensor:
    """What the codes of each row stand for, `[O, K]` in float32; what lies beyond a row's own codes means nothing."""
    I = weight.shape[1]
    K = I if weight.count_O is None else int(weight.count_O.max())
    width = -(-K * weight.bits // 8)
    at_OW = weight.start_O1[:-1, None] + torch.arange(width, device=weight.codes_S.device)
    stream_OW = weight.codes_S[at_OW.clamp_(max=weight.codes_S.numel() - 1)]
    code_OK = unpack_bits(stream_OW, weight.bits, K)
    if isinstance(weight.grid, TableGrid):
        return weight.grid.table_OC.float().gather(1, code_OK.long())
    scale_OG, zero_OG = _scales(weight)
    group_K = torch.arange(K, device=code_OK.device) // weight.grid.group_size
    return (code_OK - zero_OG[:, group_K]).mul_(scale_OG[:, group_K])


def _scales(weight: CodedWeight) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group, both `[O, G]` in float32; of groups that a row does not have, any."""
    grid = weight.grid
    assert not isinstance(grid, TableGrid)
    O, I = weight.shape
    device = weight.codes_S.device
    G = -(-I // grid.group_size)
    if weight.group_start_O1 is None:
        start_O = torch.arange(O, device=device) * G
    else:
        start_O = weight.group_start_O1[:-1]
        G = int(weight.group_start_O1.diff().max())
    at_OG = start_O[:, None] + torch.arange(G, device=device)
    if isinstance(grid, UniformGrid):
        at_OG = at_OG.clamp_(max=max(grid.scale_Γ.numel() - 1, 0))
        scale_OG = grid.scale_Γ[at_OG].float()
        zero_OG = (
            torch.full_like(scale_OG, 2 ** (weight.bits - 1)) if grid.zero_Γ is None else grid.zero_Γ[at_OG].float()
        )
        return scale_OG, zero_OG
    at_OG = at_OG.clamp_(max=max(len(grid.pair_Γ) - 1, 0))
    pair_OG = grid.pair_Γ[at_OG]
    c_OG, d_OG = (pair_OG & 15, pair_OG >> 4) if grid.pair_Γ.ndim == 1 else pair_OG.unbind(2)
    tile_O = torch.arange(O, device=device) // grid.tile_rows
    step_OG, low_OG, zero_step_OG, zero_low_OG = grid.second_TG4.float()[tile_O, :G].unbind(2)
    return low_OG + step_OG * c_OG, zero_low_OG + zero_step_OG * d_OG


def dense_rows(weight: Packed) -> Iterator[tuple[int, Tensor]]:
    """The dense weight some rows at a time, with the number of the first: on their way they take many times their size."""
    O, I = weight.shape
    step = max(1, _WEIGHTS_AT_ONCE // I)
    for start in range(0, O, step):
        rows = some_rows(weight, start, min(start + step, O))
        if isinstance(rows, SparseWeight):
            count = int(rows.start_O1[-1])
            yield start, expand_bitmap(rows.values_V[:count], rows.bitmask_OB, I)
        else:
            yield start, dense_weight(rows)


def times_rows(y_TO: Tensor, I: int, rows: Iterable[tuple[int, Tensor]]) -> Tensor:
    """y W `[T, I]` in the dtype of y, for a W that comes some rows at a time: products are rounded to that dtype, sums not."""
    total_TI = y_TO.new_zeros(len(y_TO), I, dtype=torch.float32)
    for start, W_RI in rows:
        total_TI += y_TO[:, start : start + len(W_RI)] @ W_RI.to(y_TO.dtype)
    return total_TI.to(y_TO.dtype)


@backend
class Torch:
    """Makes the weight dense for every call, and forgets it again."""

    name: ClassVar[str] = "torch"

    def why_not(self, weight: Packed, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def prepare(self, weight: Packed, device: torch.device, dtype: torch.dtype) -> Packed:
        return map_tensors(weight, lambda tensor: tensor.to(device))

    def linear(self, weight: Any, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        return linear(x_TI, dense_weight(weight).to(x_TI.dtype), bias_O)

    def gradient(self, weight: Any, grad_TO: Tensor) -> Tensor:
        return times_rows(grad_TO, weight.shape[1], dense_rows(weight))

    def packed(self, weight: Any) -> Packed:
        found: Packed = weight
        return found
