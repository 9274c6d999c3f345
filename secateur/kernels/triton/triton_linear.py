"""The Triton kernels, and which of them at which size. Imported only where they are used: Triton may not be installed.

One token: every thread keeps sums of its own columns, as a matrix-vector product has no use for tensor cores.
A few tokens: the tile goes through `tl.dot`.
Many tokens: the weight is expanded, some rows at a time, into memory that is used again, and torch multiplies. A tile would be
expanded again for every block of tokens, which costs more than to write it once and read it back.

Where a linear has too few rows to fill a GPU, its columns are split, and a second kernel adds the sums up: always in the same
order, so that the same inputs give the same bits, as atomic additions would not.

For how weights are kept compressed and expanded as they are read, see MACKO (Macko and Boža 2025) for bitmaps, SpQR (Dettmers
et al. 2023) for two-level scales with outliers, Marlin (Frantar et al. 2024) for codes to floats without conversion.

R: rows of a tile, C: its columns, W: its chunks, P: tokens of a tile, N: outliers at a time, S: splits.
O: output features, I: input features, T: tokens.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from secateur.kernels.torch_backend import times_rows
from secateur.kernels.triton.triton_tiles import coded_tile, sparse_tile
from secateur.kernels.triton.triton_weight import CHUNK, TritonWeight

# Above them, weights are expanded into memory. Products of float32 take no tensor cores, and more registers than there are.
TILED_TOKENS, TILED_TOKENS_FLOAT32 = 256, 32
# Weights that are expanded at a time: 64 MiB in 16 bits, about what the cache of an H100 holds.
EXPANDED = 1 << 25
# Programs of four warps that fill an H100: four for each of 132 multiprocessors.
PROGRAMS = 4 * 132
MAX_SPLITS = 8


@triton.jit
def multiply(sum_R, W_RC, x_TI, column, token_P, T, I, C: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr):
    """Add a tile times its inputs: to `[R, C]`, not yet summed over columns, for one token; to `[R, P]` for more."""
    column_C = column + tl.arange(0, C)
    if P == 1:
        x_C = tl.load(x_TI + column_C, mask=column_C < I, other=0.0).to(tl.float32)
        sum_R = tl.fma(W_RC.to(tl.float32), tl.broadcast_to(x_C[None, :], W_RC.shape), sum_R)
    else:
        inside_CP = (column_C[:, None] < I) & (token_P[None, :] < T)
        x_CP = tl.load(x_TI + token_P[None, :] * I + column_C[:, None], mask=inside_CP, other=0.0)
        W_RC = W_RC.to(x_TI.dtype.element_ty)
        if WIDE:  # Triton's interpreter multiplies bfloat16 as if it were integers
            W_RC, x_CP = W_RC.to(tl.float32), x_CP.to(tl.float32)
        sum_R = tl.dot(W_RC, x_CP, sum_R, input_precision="ieee")
    return sum_R


@triton.jit
def _multiply_outliers(start_O1, column_N, value_N, x_IT, row_R, token_P, split, O, T, S: tl.constexpr, R: tl.constexpr,
                       P: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """This split's outliers times their inputs, `[R, P]`. Inputs are read with a feature's tokens side by side."""
    begin_R = tl.load(start_O1 + row_R, mask=row_R < O, other=0)
    end_R = tl.load(start_O1 + row_R + 1, mask=row_R < O, other=0)
    sum_RP = tl.full([R, P], 0.0, tl.float32)
    for k in range(split * N, tl.max(end_R - begin_R, 0), S * N):
        at_RN = begin_R[:, None] + k + tl.arange(0, N)[None, :]
        inside_RN = at_RN < end_R[:, None]
        column_RN = tl.load(column_N + at_RN, mask=inside_RN, other=0)
        value_RN = tl.load(value_N + at_RN, mask=inside_RN, other=0.0).to(tl.float32)
        inside_RNP = inside_RN[:, :, None] & (token_P < T)[None, None, :]
        x_RNP = tl.load(x_IT + column_RN[:, :, None] * T + token_P[None, None, :], mask=inside_RNP, other=0.0)
        sum_RP += tl.sum(value_RN[:, :, None] * x_RNP.to(tl.float32), 1)
    return sum_RP


@triton.jit
def store(sum_RP, y, bias_O, row_R, token_P, split, O, T, S: tl.constexpr):
    """Write the tile of the output, or, where columns are split, of this split's share `[S, T, O]` of it."""
    inside_RP = (row_R[:, None] < O) & (token_P[None, :] < T)
    if S == 1 and bias_O is not None:
        sum_RP += tl.load(bias_O + row_R, mask=row_R < O, other=0.0).to(tl.float32)[:, None]
    at_RP = (split * T + token_P.to(tl.int64)[None, :]) * O + row_R[:, None]
    tl.store(y + at_RP, sum_RP.to(y.dtype.element_ty), mask=inside_RP)


@triton.jit
def _sparse_linear(x_TI, y, bias_O, O, I, T, values_V, bitmask_OB, start_OW,
                   R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, S: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """A tile `[P, R]` of the output of a pruned weight, or a split's share of it."""
    row = tl.program_id(0) * R
    token_P = tl.program_id(1) * P + tl.arange(0, P)
    split = tl.program_id(2)
    sum_R = tl.full([R, C if P == 1 else P], 0.0, tl.float32)
    for column in range(split * C, I, S * C):
        W_RC = sparse_tile(values_V, bitmask_OB, start_OW, row, column, O, I, R, C)
        sum_R = multiply(sum_R, W_RC, x_TI, column, token_P, T, I, C, P, WIDE)
    if P == 1:
        sum_R = tl.sum(sum_R, 1)[:, None]
    store(sum_R, y, bias_O, row + tl.arange(0, R), token_P, split, O, T, S)


@triton.jit
def _coded_linear(x_TI, y, bias_O, O, I, T, codes_S, scale, zero, second, x_IT, outlier_start_O1, outlier_column_N,
                  outlier_value_N, BITS: tl.constexpr, GRID: tl.constexpr, GROUP: tl.constexpr, TILE_ROWS: tl.constexpr,
                  RAGGED: tl.constexpr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
                  WIDE: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """The same for a quantized weight, with its outliers."""
    row = tl.program_id(0) * R
    row_R = row + tl.arange(0, R)
    token_P = tl.program_id(1) * P + tl.arange(0, P)
    split = tl.program_id(2)
    sum_R = tl.full([R, C if P == 1 else P], 0.0, tl.float32)
    for column in range(split * C, I, S * C):
        W_RC = coded_tile(codes_S, scale, zero, second, row, column, O, I, R, C, BITS, GRID, GROUP, TILE_ROWS, RAGGED)
        sum_R = multiply(sum_R, W_RC, x_TI, column, token_P, T, I, C, P, WIDE)
    if P == 1:
        sum_R = tl.sum(sum_R, 1)[:, None]
    if x_IT is not None:
        sum_R += _multiply_outliers(
            outlier_start_O1, outlier_column_N, outlier_value_N, x_IT, row_R, token_P, split, O, T, S, R, P, N
        )
    store(sum_R, y, bias_O, row_R, token_P, split, O, T, S)


@triton.jit
def add_splits(part_STO, y_TO, bias_O, size, O, S: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of all splits' shares, and the bias."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float32)
    for s in tl.static_range(S):
        total += tl.load(part_STO + s * size + at, mask=at < size, other=0.0)
    if bias_O is not None:
        total += tl.load(bias_O + at % O, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y_TO + at, total.to(y_TO.dtype.element_ty), mask=at < size)


@triton.jit
def store_dense(W_RC, W_OI, row, column, first_row, end_row, I, R: tl.constexpr, C: tl.constexpr):
    """Write a tile of the dense weight that begins with `first_row`."""
    row_R = row + tl.arange(0, R)
    column_C = column + tl.arange(0, C)
    inside_RC = (row_R[:, None] < end_row) & (column_C[None, :] < I)
    at_RC = (row_R - first_row).to(tl.int64)[:, None] * I + column_C[None, :]
    tl.store(W_OI + at_RC, W_RC.to(W_OI.dtype.element_ty), mask=inside_RC)


@triton.jit
def _sparse_expand(W_OI, first_row, end_row, I, values_V, bitmask_OB, start_OW, R: tl.constexpr, C: tl.constexpr):
    """A tile of rows `first_row` to `end_row − 1` of a pruned weight, dense."""
    row = first_row + tl.program_id(0) * R
    column = tl.program_id(1) * C
    W_RC = sparse_tile(values_V, bitmask_OB, start_OW, row, column, end_row, I, R, C)
    store_dense(W_RC, W_OI, row, column, first_row, end_row, I, R, C)


@triton.jit
def _coded_expand(W_OI, first_row, end_row, I, codes_S, scale, zero, second, BITS: tl.constexpr, GRID: tl.constexpr,
                  GROUP: tl.constexpr, TILE_ROWS: tl.constexpr, RAGGED: tl.constexpr, R: tl.constexpr,
                  C: tl.constexpr):  # fmt: skip
    """The same for a quantized weight, without its outliers."""
    row = first_row + tl.program_id(0) * R
    column = tl.program_id(1) * C
    W_RC = coded_tile(codes_S, scale, zero, second, row, column, end_row, I, R, C, BITS, GRID, GROUP, TILE_ROWS, RAGGED)
    store_dense(W_RC, W_OI, row, column, first_row, end_row, I, R, C)


@triton.jit
def _expand_outliers(W_OI, first_row, I, start_O1, column_N, value_N, N: tl.constexpr):
    """Add a row's outliers to the dense weight. No column is there twice, so that no two threads meet."""
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(start_O1 + first_row + row + 1)
    for k in range(tl.load(start_O1 + first_row + row), end, N):
        at_N = k + tl.arange(0, N)
        inside_N = at_N < end
        to_N = W_OI + row * I + tl.load(column_N + at_N, mask=inside_N, other=0)
        w_N = tl.load(to_N, mask=inside_N, other=0.0).to(tl.float32)
        w_N += tl.load(value_N + at_N, mask=inside_N, other=0.0).to(tl.float32)
        tl.store(to_N, w_N.to(W_OI.dtype.element_ty), mask=inside_N)


def linear(weight: TritonWeight, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + bias, `[T, O]` in the dtype of x, which is contiguous and has its columns in stored order."""
    T = len(x_TI)
    if T == 0:
        return x_TI.new_empty(0, weight.shape[0])
    most = TILED_TOKENS_FLOAT32 if x_TI.dtype == torch.float32 else TILED_TOKENS
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(x_TI):
        return _expanded(weight, x_TI, bias_O) if most < T else _tiled(weight, x_TI, bias_O)


@dataclass(frozen=True)
class Sizes:
    """Of one launch: rows, columns and tokens of a tile, splits of the columns, outliers at a time, and warps."""

    R: int
    C: int
    P: int
    S: int
    N: int
    warps: int


def sizes(O: int, I: int, T: int) -> Sizes:
    """Fixed rules rather than autotuning, which would run every choice at the first call of every shape of a model.

    One token: 32 weights a thread of four warps, in four rows, so that an input is read once for four weights.
    More: `tl.dot` takes at least 16 of each; more rows and tokens where there are many tokens, as it gains by reuse.
    """
    if T == 1:
        R, C, P, N, warps = 4, min(4 * CHUNK, max(CHUNK, triton.next_power_of_2(I))), 1, 32, 4
    elif T <= 32:
        R, C, P, N, warps = 32, CHUNK, max(16, triton.next_power_of_2(T)), 8, 4
    else:
        R, C, P, N, warps = 64, CHUNK, 64, 2, 8  # with four, registers spill
    programs = -(-O // R) * -(-T // P)
    return Sizes(R, C, P, min(max(1, PROGRAMS // programs), -(-I // C), MAX_SPLITS), N, warps)


def _tiled(weight: TritonWeight, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
    O, I = weight.shape
    T = len(x_TI)
    size = sizes(O, I, T)
    y_TO = x_TI.new_empty(T, O)
    out = y_TO if size.S == 1 else x_TI.new_empty(size.S, T, O, dtype=torch.float32)
    arguments = {
        **{"x_TI": x_TI, "y": out, "bias_O": bias_O, "O": O, "I": I, "T": T},
        **{"R": size.R, "C": size.C, "P": size.P, "S": size.S, "WIDE": x_TI.device.type == "cpu"},
        "num_warps": size.warps,
    }
    grid = (-(-O // size.R), -(-T // size.P), size.S)
    if not weight.constants:
        _sparse_linear[grid](**arguments, **weight.tensors)
    else:
        some = weight.packed.outliers
        outliers = {
            "x_IT": None if some is None else x_TI.T.contiguous(),
            "outlier_start_O1": None if some is None else some.start_O1,
            "outlier_column_N": None if some is None else some.column_N,
            "outlier_value_N": None if some is None else some.value_N,
        }
        _coded_linear[grid](**arguments, **outliers, **weight.tensors, **weight.constants, N=size.N)
    if size.S > 1:
        add_splits[(-(-T * O // 1024),)](out, y_TO, bias_O, T * O, O, S=size.S, BLOCK=1024)
    return y_TO


def gradient(weight: TritonWeight, grad_TO: Tensor) -> Tensor:
    """grad W, `[T, I]` in the dtype of grad, which is contiguous, with columns in stored order."""
    with torch.cuda.device_of(grad_TO):
        return times_rows(grad_TO, weight.shape[1], _expanded_rows(weight, grad_TO))


def _expanded(weight: TritonWeight, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
    y_TO = x_TI.new_empty(len(x_TI), weight.shape[0])
    for first, W_RI in _expanded_rows(weight, x_TI):
        end = first + len(W_RI)
        bias = None if bias_O is None else bias_O[first:end].to(x_TI.dtype)
        y_TO[:, first:end] = torch.nn.functional.linear(x_TI, W_RI, bias)
    return y_TO


def _expanded_rows(weight: TritonWeight, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The dense weight some rows at a time, with the number of the first, and with columns in stored order: in the dtype and on
    the device of a tensor, and in memory that is used again."""
    O, I = weight.shape
    R, C = 4, 4 * CHUNK
    rows = min(O, max(EXPANDED // I // R, 1) * R)
    W_OI = like.new_empty(rows, I)
    for first in range(0, O, rows):
        end = min(first + rows, O)
        arguments = {"W_OI": W_OI, "first_row": first, "end_row": end, "I": I, "R": R, "C": C}
        expand = _coded_expand if weight.constants else _sparse_expand
        expand[-(-(end - first) // R), -(-I // C)](**arguments, **weight.tensors, **weight.constants)
        if weight.packed.outliers is not None:
            some = weight.packed.outliers
            _expand_outliers[(end - first,)](W_OI, first, I, some.start_O1, some.column_N, some.value_N, N=128)
        yield first, W_OI[: end - first]
