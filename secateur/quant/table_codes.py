"""Codes of a table of embeddings, or of a head: the nearest levels of searched grids, or those that GPTQ finds.

Some rows at a time: a table may be the largest matrix of a model by far, and no row depends on another.

V: vocabulary, I: features, R: some rows, G: groups of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from secateur.core.quantized import Quantized
from secateur.core.stack import Stack
from secateur.core.stats import InputStats
from secateur.formats.layouts.packed_int import Uniform
from secateur.quant.error_feedback import carry_error
from secateur.quant.grid import Grid
from secateur.quant.groups import fit_groups
from secateur.quant.storage import storage_dtype
from secateur.solvers.inverse_cholesky import DAMPING

# Weights that are rounded at a time, which caches hold, and that GPTQ sweeps over, for which it factors a Gram matrix.
_ROUNDED, _SWEPT = 2**19, 2**23
# Copies of what GPTQ sweeps over, at most.
_SWEEPING = 8
#: Weights of a row that share a scale. Of half as many, scales cost more bits than they save; of twice as many, fewer.
GROUP_SIZE = 64
# From so many bits on a zero point gains nothing.
_SYMMETRIC_FROM = 8


def is_symmetric(bits: int) -> bool:
    """Whether a table of so many bits has its zero points in the middle."""
    return bits >= _SYMMETRIC_FROM


def table_bytes(bits: int, shape: tuple[int, int]) -> dict[str, int]:
    """Bytes of each part of a table in codes of so many bits."""
    V, I = shape
    groups = V * -(-I // GROUP_SIZE)
    zeros = {} if is_symmetric(bits) else {"zero": -(-groups * bits // 8)}
    return {"codes": V * -(-I * bits // 8), "scale": 2 * groups, **zeros, "shape": 16}


def sweeping_bytes(shape: tuple[int, int]) -> int:
    """Of memory that GPTQ takes at most for a table besides its weight and its codes."""
    V, I = shape
    return 4 * (_SWEEPING * min(V * I, max(_SWEPT, I)) + 2 * I * I)


def quantize_table(
    W_VI: Tensor, bits: int, dtype: torch.dtype, device: torch.device, stats: InputStats | None = None
) -> Quantized:
    """The codes of a table.

    Args:
        W_VI: in any dtype, on any device.
        bits: of a code.
        dtype: of the dense table that the codes stand for.
        device: where to compute.
        stats: of its inputs, with their Gram matrix, where they are known: GPTQ then; without, each weight is rounded to the
            nearest level.
    """
    V, I = W_VI.shape
    half = storage_dtype(torch.stack(torch.aminmax(W_VI)).float(), dtype)
    grid = Grid(bits, GROUP_SIZE, is_symmetric(bits), True, half)
    at_once = max(1, (_ROUNDED if stats is None else _SWEPT) // I)
    pieces = (W_RI.to(device, torch.float32) for W_RI in W_VI.split(at_once))
    found = list(_rounded(pieces, grid) if stats is None else _swept(pieces, grid, stats))
    code_VI, scale_VG = torch.cat([each.code_OK for each in found]), torch.cat([each.scale_OG for each in found])
    zeros = [each.zero_OG for each in found if each.zero_OG is not None]
    zero_VG = torch.cat(zeros) if zeros else None
    return Quantized(Uniform(bits, grid.group_size, code_VI, scale_VG, zero_VG), (V, I), dtype).cpu()


def _rounded(pieces: Iterator[Tensor], grid: Grid) -> Iterator[Uniform]:
    for W_RI in pieces:
        yield grid.assemble(fit_groups(grid.fit, grid.group_size, W_RI, None), W_RI, 0, len(W_RI))


def _swept(pieces: Iterator[Tensor], grid: Grid, stats: InputStats) -> Iterator[Uniform]:
    for W_RI in pieces:
        [found] = carry_error(Stack.of([W_RI], stats), grid, "activation", DAMPING, None)
        codes: Any = found.codes
        yield codes
