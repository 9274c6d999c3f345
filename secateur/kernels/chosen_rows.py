"""Some rows of a packed weight, in any order: what a table of embeddings is asked for.

O: output features, I: input features, N: rows asked for, G: groups of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.kernels.bits import bytes_of, unpack_bits
from secateur.kernels.packed import Packed

# What a CPU's caches hold on their way from codes.
_WEIGHTS_AT_ONCE = 2**19


def chosen_rows(weight: Packed, row_N: Tensor) -> Tensor:
    """The dense rows of these numbers, `[N, I]`, each as often as it is named; no others are unpacked.

    Raises:
        IndexError: there is no such row. On other devices than a CPU that is for them to say.
    """
    O, I = weight.shape
    if not row_N.numel():
        return torch.empty(0, I, dtype=weight.dtype, device=weight.device)
    if row_N.device.type == "cpu" and not 0 <= int(row_N.min()) <= int(row_N.max()) < O:
        raise IndexError(f"rows {int(row_N.min())} to {int(row_N.max())} are asked for, and there are {O}")
    if weight.kernels == "coded" and _is_plain(weight):
        some = [_plain_rows(weight, row_R) for row_R in row_N.split(max(1, _WEIGHTS_AT_ONCE // I))]
        return some[0] if len(some) == 1 else torch.cat(some)
    return torch.cat([weight.rows(row, row + 1).dense() for row in row_N.tolist()])


def _is_plain(weight: Any) -> bool:
    """Whether all rows are alike, and groups are all that makes weights of their codes."""
    operands = weight.grid.operands()
    uniform = operands is not None and operands.scale is not None and weight.group_start_O1 is None
    return bool(uniform and not weight.masked and weight.order_I is None and weight.outliers is None)


def _plain_rows(weight: Any, row_N: Tensor) -> Tensor:
    I, device = weight.shape[1], row_N.device
    groups = -(-I // weight.grid.group_size)
    at_NB = weight.start_O1[row_N, None] + torch.arange(bytes_of(I, weight.bits), device=device)
    at_NG = row_N[:, None] * groups + torch.arange(groups, device=device)
    code_NI = unpack_bits(weight.codes_S[at_NB], weight.bits, I)
    W_NI: Tensor = weight.grid.values(code_NI, at_NG, weight.bits)
    return W_NI.to(weight.dtype)
