"""Codes of a table of embeddings, or of a head: the nearest levels of searched grids, or those that GPTQ finds.

Some rows at a time: a table may be the largest matrix of a model by far, and no row depends on another.

V: vocabulary, I: features, R: some rows, G: groups of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.core.quantized import Codes, Quantized
from secateur.core.stack import Stack
from secateur.core.stats import InputStats
from secateur.formats.layouts.block_types import BLOCK_TYPES, BlockType, type_for
from secateur.quant.block_grid import BlockGrid
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

#: How a table is stored: in codes of so many bits, or on the grid of a type of GGUF's, by what `grid` calls it.
TableForm = int | str


def is_symmetric(bits: int) -> bool:
    """Whether a table of so many bits has its zero points in the middle."""
    return bits >= _SYMMETRIC_FROM


def table_type(form: TableForm, features: int) -> BlockType | None:
    """The type for rows of so many weights; None where codes are on no grid of GGUF's, or no blocks divide the rows."""
    return type_for(form.upper(), features) if isinstance(form, str) else None


def about_bits(form: TableForm) -> float:
    """Of a weight, to tell which of two forms is the larger."""
    return BLOCK_TYPES[form.upper()].bits_per_weight if isinstance(form, str) else form + 16 / GROUP_SIZE


def table_bytes(form: TableForm, shape: tuple[int, int]) -> dict[str, int]:
    """Bytes of each part of a table in such codes."""
    V, I = shape
    block = table_type(form, I)
    if block is not None:
        scales = 2 * (V * I // block.block_size)
        scale_codes = -(-(V * I // block.group_size) * block.scale_bits // 8)
        found = {"codes": V * I * block.bits // 8, "scale": scales, "shape": 16}
        found |= {"offset": scales} if block.has_offset else {}
        found |= {"scale_codes": scale_codes} if block.scale_bits else {}
        return found | ({"offset_codes": scale_codes} if block.scale_bits and block.has_offset else {})
    bits = int(form)
    groups = V * -(-I // GROUP_SIZE)
    zeros = {} if is_symmetric(bits) else {"zero": -(-groups * bits // 8)}
    return {"codes": V * -(-I * bits // 8), "scale": 2 * groups, **zeros, "shape": 16}


def sweeping_bytes(shape: tuple[int, int]) -> int:
    """Of memory that GPTQ takes at most for a table besides its weight and its codes."""
    V, I = shape
    return 4 * (_SWEEPING * min(V * I, max(_SWEPT, I)) + 2 * I * I)


def quantize_table(
    W_VI: Tensor, form: TableForm, dtype: torch.dtype, device: torch.device, stats: InputStats | None = None
) -> Quantized:
    """The codes of a table.

    Args:
        W_VI: in any dtype, on any device.
        form: of the codes.
        dtype: of the dense table that the codes stand for.
        device: where to compute.
        stats: of its inputs, with their Gram matrix, where they are known: GPTQ then; without, each weight is rounded to the
            nearest level.
    """
    V, I = W_VI.shape
    block = table_type(form, I)
    if block is not None:
        grid: Grid | BlockGrid = BlockGrid(block)
    else:
        bits = int(form)
        half = storage_dtype(torch.stack(torch.aminmax(W_VI)).float(), dtype)
        grid = Grid(bits, GROUP_SIZE, is_symmetric(bits), True, half)
    at_once = max(1, (_ROUNDED if stats is None else _SWEPT) // I)
    pieces = (W_RI.to(device, torch.float32) for W_RI in W_VI.split(at_once))
    found = list(_rounded(pieces, grid) if stats is None else _swept(pieces, grid, stats))
    return Quantized(_joined(found), (V, I), dtype).cpu()


def _rounded(pieces: Iterator[Tensor], grid: Any) -> Iterator[Codes]:
    for W_RI in pieces:
        yield grid.assemble(fit_groups(grid.fit, grid.group_size, W_RI, None), W_RI, 0, len(W_RI))


def _swept(pieces: Iterator[Tensor], grid: Grid | BlockGrid, stats: InputStats) -> Iterator[Codes]:
    for W_RI in pieces:
        [found] = carry_error(Stack.of([W_RI], stats), grid, "activation", DAMPING, None)
        yield found.codes


def _joined(pieces: Sequence[Any]) -> Any:
    """Codes of some rows after others': every tensor that they have has a row for each of theirs."""
    tensors = _tensors(pieces[0])
    return dataclasses.replace(
        pieces[0], **{name: torch.cat([getattr(each, name) for each in pieces]) for name in tensors}
    )


def some_rows(codes: Any, rows: slice) -> Any:
    """The codes of some rows of a table."""
    return dataclasses.replace(codes, **{name: x[rows] for name, x in _tensors(codes).items()})


def _tensors(codes: Any) -> dict[str, Tensor]:
    named = {field.name: getattr(codes, field.name) for field in dataclasses.fields(codes)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}
