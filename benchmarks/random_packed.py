"""Random weights as kernels take them, made without a model and without packing: for timing at sizes of real models.

Weights are bfloat16, on torch's current default device. Nothing about them matters but their form, and that values are finite.

O: output features, I: input features, G: groups of a row, Γ: groups of all rows, B: bytes of a row's mask, T: tiles of rows,
N: outliers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from secateur.formats.layouts.codebook import TableGrid
from secateur.formats.layouts.packed_int import UniformGrid
from secateur.formats.layouts.two_level_int import TwoLevelGrid
from secateur.kernels.bits import bytes_of
from secateur.kernels.column_weight import CodedColumns, DenseColumns, SparseColumns
from secateur.kernels.expand import compress_bitmap, count_rows, pack_mask
from secateur.kernels.factored_weight import FactoredWeight, full
from secateur.kernels.low_rank_weight import LowRankWeight
from secateur.kernels.packed import CodedWeight, Grid, Packed, SparseRows, SparseWeight, padded
from secateur.kernels.trellis_weight import TrellisWeight
from secateur.kernels.two_precisions_weight import TwoPrecisionsWeight
from secateur.solvers.hadamard import block_of
from secateur.solvers.trellis import STATE_BITS, ring_of

BF16, FP16 = torch.bfloat16, torch.float16
_TILE_ROWS = 16


def two_of_four(O: int, I: int) -> SparseWeight:
    """2:4: every half byte of the mask is one of the six with two bits."""
    halves_6 = torch.tensor([0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100], dtype=torch.uint8)
    low_OB, high_OB = halves_6[torch.randint(0, 6, (2, O, I // 8))]
    start_O1 = torch.arange(O + 1) * (I // 2)
    return SparseWeight((O, I), padded(torch.randn(O * I // 2).to(BF16)), low_OB | high_OB << 4, start_O1, (2, 4))


def bitmap(O: int, I: int, density: float) -> SparseWeight:
    """Pruned, without a pattern."""
    values, bitmask_OB = compress_bitmap(torch.randn(O, I).masked_fill_(torch.rand(O, I) >= density, 0).to(BF16))
    return SparseWeight((O, I), padded(values), bitmask_OB, _starts(count_rows(bitmask_OB, I)))


def low_rank(O: int, I: int, main: Callable[[int, int], Packed], share: float) -> LowRankWeight:
    """Factors beside another weight that have a share of its numbers."""
    rank = round(share * O * I / (O + I))
    return LowRankWeight(main(O, I), torch.randn(O, rank).to(BF16), torch.randn(rank, I).to(BF16))


def packed_int(O: int, I: int, bits: int, group_size: int, symmetric: bool = False) -> CodedWeight:
    """Codes on a uniform grid, as GPTQ makes them."""
    return _coded(O, I, bits, _uniform(O * -(-I // group_size), bits, group_size, symmetric))


def spqr(O: int, I: int, bits: int, group_size: int, outlier_share: float) -> CodedWeight:
    """Scales on grids of their own, columns out of order, and outliers in each row, as SpQR makes them. At most 4 bits."""
    G, N = -(-I // group_size), round(outlier_share * I)
    pair_Γ = _codes(O * G, bits) | _codes(O * G, bits) << 4
    # Scales from 0.5 in steps of 0.2, and zero points that are whole numbers.
    second_TG4 = torch.tensor([0.2, 0.5, 1, 0], dtype=FP16).repeat(-(-O // _TILE_ROWS), G, 1)
    # One in each of N stretches of a row, so that no two are in the same place.
    column_ON = torch.arange(N) * I // N + torch.randint(0, I // N, (O, N))
    start_O1 = torch.arange(O + 1, dtype=torch.int32) * N
    outliers = SparseRows(start_O1, column_ON.flatten().int(), torch.randn(O * N).to(FP16))
    grid = TwoLevelGrid(group_size, _TILE_ROWS, pair_Γ, second_TG4)
    return _coded(O, I, bits, grid, torch.randperm(I).int(), outliers)


def codebook(O: int, I: int, bits: int) -> CodedWeight:
    """Codes into a table for each row, as SqueezeLLM makes them."""
    return _coded(O, I, bits, TableGrid(torch.randn(O, 2**bits).to(FP16)))


def sparse_int(O: int, I: int, density: float, bits: int, group_size: int) -> CodedWeight:
    """Pruned without a pattern, and codes of the kept weights on a uniform grid."""
    pruned = bitmap(O, I, density)
    stored_O = pruned.start_O1.diff()
    start_O1, group_start_O1 = _starts(-(-stored_O * bits // 8)), _starts(-(-stored_O // group_size))
    return CodedWeight(
        (O, I),
        BF16,
        bits,
        padded(_codes(int(start_O1[-1]), 8)),
        start_O1,
        stored_O.int(),
        group_start_O1,
        _uniform(int(group_start_O1[-1]), bits, group_size, False),
        pruned.bitmask_OB,
        None,
        None,
    )


def columns(O: int, I: int) -> DenseColumns:
    """Dense, by input feature."""
    return DenseColumns((O, I), padded(torch.randn(O * I).to(BF16)))


def columns_bitmap(O: int, I: int, density: float) -> SparseColumns:
    """Pruned without a pattern, by input feature."""
    return SparseColumns.of(bitmap(I, O, density))


def columns_int(O: int, I: int, bits: int, group_size: int, symmetric: bool = False) -> CodedColumns:
    """Codes on a uniform grid, by input feature."""
    groups = -(-I // group_size) * O
    codes, scale = padded(_codes(I * bytes_of(O, bits), 8)), padded((torch.rand(groups) + 0.5).to(FP16))
    zero = None if symmetric else padded(_codes(groups, bits))
    return CodedColumns((O, I), BF16, bits, group_size, codes, scale, zero)


def dictionary(O: int, I: int, size: float, ratio: float = 2) -> FactoredWeight:
    """As many atoms as make the weight so large, of which each output uses some: 16 bits a number, and a mask."""
    atoms = int(size * 16 * O * I / (16 * I + 16 * O / ratio + O))
    keep_OK = torch.rand(O, atoms).argsort(1) < int(atoms / ratio)
    values, bitmask_OB = compress_bitmap(torch.randn(O, atoms).masked_fill_(~keep_OK, 0).to(BF16))
    coefficients = SparseWeight((O, atoms), padded(values), bitmask_OB, _starts(count_rows(bitmask_OB, atoms)))
    return FactoredWeight((O, I), BF16, full(torch.randn(atoms, I).to(BF16)), coefficients)


def two_precisions(O: int, I: int, bits: tuple[int, int], bank: int, high: int) -> TwoPrecisionsWeight:
    """In each bank so many weights in high bits, all others in low bits."""
    mask_OI = torch.rand(O, I // bank, bank).argsort(2).view(O, I) < high
    low = _coded(O, I, bits[1], _uniform(O * I // bank, bits[1], bank, True))
    count = I // bank * high
    start_O1 = torch.arange(O + 1) * bytes_of(count, bits[0])
    fine = CodedWeight(
        *((O, I), BF16, bits[0], padded(_codes(int(start_O1[-1]), 8)), start_O1),
        *(torch.full((O,), count, dtype=torch.int32), torch.arange(O + 1), _uniform(O, bits[0], I, True)),
        pack_mask(mask_OI),
    )
    return TwoPrecisionsWeight((O, I), low, fine)


def trellis(O: int, I: int, bits: int, state_bits: int = STATE_BITS, block: int = 128) -> TrellisWeight:
    """Codes of a trellis, in the rings that a weight of this size has."""
    ring, state_bits = ring_of(O, bits, state_bits)
    codes = padded(_codes(O // ring * I * bytes_of(ring, bits), 8))
    blocks = block_of(O, block), block_of(I, block)
    scales = (torch.rand(O) + 0.5).to(FP16), (torch.rand(I) + 0.5).to(FP16)
    return TrellisWeight((O, I), BF16, bits, state_bits, ring, *blocks, codes, *scales)


def _uniform(count: int, bits: int, group_size: int, symmetric: bool) -> UniformGrid:
    scale_Γ = (torch.rand(count) + 0.5).to(FP16)
    return UniformGrid(group_size, scale_Γ, None if symmetric else _codes(count, bits))


def _coded(
    O: int, I: int, bits: int, grid: Grid, order_I: Tensor | None = None, outliers: SparseRows | None = None
) -> CodedWeight:
    """Codes of all weights of every row."""
    width = bytes_of(I, bits)
    start_O1 = torch.arange(O + 1) * width
    return CodedWeight(
        (O, I), BF16, bits, padded(_codes(O * width, 8)), start_O1, None, None, grid, None, order_I, outliers
    )


def _codes(count: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (count,), dtype=torch.uint8)


def _starts(count_O: Tensor) -> Tensor:
    """Where each row begins when they lie end to end, and where the last one ends."""
    return pad(count_O.long().cumsum(0), (1, 0))
