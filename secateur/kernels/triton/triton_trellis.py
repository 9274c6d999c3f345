"""The Triton kernels for trellis codes. Imported only where they are used: Triton may not be installed.

Inputs are scaled and rotated, multiplied by the coded weights, and what comes of it is rotated back: three kernels a call. As
in `triton_linear`, tiles of weights are decoded in registers for few tokens, and into memory for many.

Every weight is decoded by itself: its state is a window of the bits of its ring, which an odd factor spreads over 32 bits, and
the sum of their four bytes is its value.

R: outputs of a tile, C: its inputs, P: tokens of a tile, S: splits, N: blocks of a rotation at a time, B: features of one.
O: output features, I: input features, T: tokens.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from secateur.kernels.torch_backend import times_rows
from secateur.kernels.triton.triton_linear import (
    EXPANDED,
    MAX_SPLITS,
    PROGRAMS,
    TILED_TOKENS,
    TILED_TOKENS_FLOAT32,
    multiply,
    store,
    store_dense,
)
from secateur.kernels.triton.triton_weight import TritonWeight

_MIDDLE, _DEVIATION = tl.constexpr(510), 147.8
# Features that a program rotates, at least.
_ROTATED = 1024


@triton.jit
def trellis_tile(codes, row, column, O, I, R: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, STATES: tl.constexpr,
                 RING: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """Outputs `row` to `row + R − 1` of inputs `column` to `column + C − 1`, float32, without scales or rotations; outside of
    the weight anything. `codes` are words of 32 bits where every ring is WORDS of them, and bytes where WORDS is 0."""
    row_R1 = (row + tl.arange(0, R))[:, None]
    column_1C = (column + tl.arange(0, C))[None, :]
    bit_R1 = row_R1 % RING * BITS
    ring_RC = (row_R1 // RING).to(tl.int64) * I + column_1C
    inside_RC = (row_R1 < O) & (column_1C < I)
    if WORDS > 0:
        first_R1 = bit_R1 // 32
        low_RC = tl.load(codes + ring_RC * WORDS + first_R1, mask=inside_RC, other=0).to(tl.uint32, bitcast=True)
        high_RC = tl.load(codes + ring_RC * WORDS + (first_R1 + 1) % WORDS, mask=inside_RC, other=0)
        word_RC = low_RC.to(tl.uint64) | (high_RC.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)
        state_RC = (word_RC >> (bit_R1 % 32)).to(tl.uint32)
    else:
        SIZE: tl.constexpr = (RING * BITS + 7) // 8
        at_R1 = bit_R1 // 8
        ring_RC = codes + ring_RC * SIZE
        word_RC = tl.load(ring_RC + at_R1, mask=inside_RC, other=0).to(tl.uint32)
        for i in tl.static_range(1, 3):
            more_RC = tl.load(ring_RC + at_R1 + i, mask=inside_RC & (at_R1 + i < SIZE), other=0)
            word_RC |= more_RC.to(tl.uint32) << (8 * i)
        # After the last bit of a ring, which need not end a byte, comes its first.
        left_R1 = RING * BITS - bit_R1
        wraps_RC = inside_RC & (left_R1 < STATES)
        start_RC = tl.load(ring_RC, mask=wraps_RC, other=0).to(tl.uint32)
        start_RC |= tl.load(ring_RC + 1, mask=wraps_RC & (SIZE > 1), other=0).to(tl.uint32) << 8
        left_R1 = tl.minimum(left_R1, 24).to(tl.uint32)
        state_RC = ((word_RC >> (bit_R1 % 8)) & ((1 << left_R1) - 1)) | (start_RC << left_R1)
    x_RC = (state_RC & ((1 << STATES) - 1)) * 0x83DCD12D
    pairs_RC = (x_RC & 0xFF00FF) + ((x_RC >> 8) & 0xFF00FF)
    return (((pairs_RC & 0xFFFF) + (pairs_RC >> 16)).to(tl.int32) - _MIDDLE).to(tl.float32)


@triton.jit
def _trellis_linear(x_TI, y, codes, O, I, T, BITS: tl.constexpr, STATES: tl.constexpr, RING: tl.constexpr,
                    WORDS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
                    WIDE: tl.constexpr):  # fmt: skip
    """A tile `[P, R]` of the product with the coded weight, or a split's share of it."""
    row = tl.program_id(0) * R
    token_P = tl.program_id(1) * P + tl.arange(0, P)
    split = tl.program_id(2)
    sum_R = tl.full([R, C if P == 1 else P], 0.0, tl.float32)
    for column in range(split * C, I, S * C):
        W_RC = trellis_tile(codes, row, column, O, I, R, C, BITS, STATES, RING, WORDS)
        sum_R = multiply(sum_R, W_RC, x_TI, column, token_P, T, I, C, P, WIDE)
    if P == 1:
        sum_R = tl.sum(sum_R, 1)[:, None]
    store(sum_R, y, None, row + tl.arange(0, R), token_P, split, O, T, S)


@triton.jit
def _trellis_expand(W_OI, first_row, end_row, I, codes, BITS: tl.constexpr, STATES: tl.constexpr, RING: tl.constexpr,
                    WORDS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """A tile of rows `first_row` to `end_row − 1` of the coded weight."""
    row = first_row + tl.program_id(0) * R
    column = tl.program_id(1) * C
    W_RC = trellis_tile(codes, row, column, end_row, I, R, C, BITS, STATES, RING, WORDS)
    store_dense(W_RC, W_OI, row, column, first_row, end_row, I, R, C)


@triton.jit
def _rotate(x, y_TF, before_F, after_F, bias_F, factor, F, size, S: tl.constexpr, B: tl.constexpr, STEPS: tl.constexpr,
            N: tl.constexpr):  # fmt: skip
    """Of a token, N blocks of the sum of S matrices `[T, F]`, scaled, transformed in STEPS of additions, and scaled again."""
    at = tl.program_id(0) * N * B + tl.arange(0, N * B)
    token = tl.program_id(1).to(tl.int64) * F
    inside = at < F
    value = tl.full([N * B], 0.0, tl.float32)
    for s in tl.static_range(S):
        value += tl.load(x + s * size + token + at, mask=inside, other=0.0).to(tl.float32)
    if before_F is not None:
        value *= tl.load(before_F + at, mask=inside, other=0.0).to(tl.float32)
    for _ in tl.static_range(STEPS):
        # Sums and differences of the halves of each block, interleaved: after all steps that is the natural order.
        low, high = tl.split(tl.permute(tl.reshape(value, [N, 2, B // 2]), (0, 2, 1)))
        value = tl.reshape(tl.join(low + high, low - high), [N * B])
    value *= factor
    if after_F is not None:
        value *= tl.load(after_F + at, mask=inside, other=0.0).to(tl.float32)
    if bias_F is not None:
        value += tl.load(bias_F + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_TF + token + at, value.to(y_TF.dtype.element_ty), mask=inside)


def _rotated(x_STF: Tensor, dtype: torch.dtype, block: int, factor: float, **vectors: Tensor | None) -> Tensor:
    """Blocks transformed, `[T, F]`: orthonormal but for the factor."""
    S, T, F = x_STF.shape
    y_TF = x_STF.new_empty(T, F, dtype=dtype)
    N = max(1, _ROTATED // block)
    constants = {"S": S, "B": block, "STEPS": block.bit_length() - 1, "N": N}
    given: dict[str, Any] = {"before_F": None, "after_F": None, "bias_F": None, **vectors, **constants}
    _rotate[-(-F // (N * block)), T](x_STF, y_TF, factor=factor * block**-0.5, F=F, size=T * F, **given)
    return y_TF


def linear(weight: TritonWeight, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + bias, `[T, O]` in the dtype of x, which is contiguous."""
    T, O = len(x_TI), weight.shape[0]
    if T == 0:
        return x_TI.new_empty(0, O)
    packed: Any = weight.packed
    # Rotated values of float16 could be beyond it; those of bfloat16 are rounded only for the tensor cores.
    dtype = torch.bfloat16 if x_TI.dtype == torch.bfloat16 and T > 1 else torch.float32
    with torch.cuda.device_of(x_TI):
        source_TI = _rotated(x_TI[None], dtype, packed.block_in, 1.0, before_F=packed.scale_in_I)
        most = TILED_TOKENS_FLOAT32 if dtype == torch.float32 else TILED_TOKENS
        y_STO = _expanded(weight, source_TI)[None] if most < T else _tiled(weight, source_TI)
        vectors = {"after_F": packed.scale_out_O, "bias_F": bias_O}
        return _rotated(y_STO, x_TI.dtype, packed.block_out, 1 / _DEVIATION, **vectors)


def gradient(weight: TritonWeight, grad_TO: Tensor) -> Tensor:
    """grad W, `[T, I]` in the dtype of grad, which is contiguous."""
    packed: Any = weight.packed
    dtype = torch.bfloat16 if grad_TO.dtype == torch.bfloat16 else torch.float32
    with torch.cuda.device_of(grad_TO):
        source_TO = _rotated(grad_TO[None], dtype, packed.block_out, 1 / _DEVIATION, before_F=packed.scale_out_O)
        grad_TI = times_rows(source_TO, weight.shape[1], _expanded_rows(weight, source_TO))
        return _rotated(grad_TI[None], grad_TO.dtype, packed.block_in, 1.0, after_F=packed.scale_in_I)


def _tiled(weight: TritonWeight, x_TI: Tensor) -> Tensor:
    """The product with the coded weight, in as many parts as its inputs are split, `[S, T, O]`."""
    O, I = weight.shape
    T = len(x_TI)
    R, C, P, warps = (64, 32, 1, 4) if T == 1 else (64, 64, min(64, max(16, triton.next_power_of_2(T))), 4)
    programs = -(-O // R) * -(-T // P)
    S = min(max(1, PROGRAMS // programs), -(-I // C), MAX_SPLITS)
    y_STO = x_TI.new_empty(S, T, O, dtype=torch.float32)
    sizes = {"O": O, "I": I, "T": T, "R": R, "C": C, "P": P, "S": S, "WIDE": x_TI.device.type == "cpu"}
    grid = (-(-O // R), -(-T // P), S)
    _trellis_linear[grid](x_TI, y_STO, **sizes, **weight.tensors, **weight.constants, num_warps=warps)
    return y_STO


def _expanded(weight: TritonWeight, x_TI: Tensor) -> Tensor:
    y_TO = x_TI.new_empty(len(x_TI), weight.shape[0])
    for first, W_RI in _expanded_rows(weight, x_TI):
        y_TO[:, first : first + len(W_RI)] = torch.nn.functional.linear(x_TI, W_RI)
    return y_TO


def _expanded_rows(weight: TritonWeight, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The coded weight some rows at a time, with the number of the first, in the dtype and on the device of a tensor, and in
    memory that is used again."""
    O, I = weight.shape
    R, C = 64, 32
    rows = min(O, max(EXPANDED // I // R, 1) * R)
    W_OI = like.new_empty(rows, I)
    for first in range(0, O, rows):
        end = min(first + rows, O)
        grid = (-(-(end - first) // R), -(-I // C))
        sizes = {"first_row": first, "end_row": end, "I": I, "R": R, "C": C}
        _trellis_expand[grid](W_OI, **sizes, **weight.tensors, **weight.constants)
        yield first, W_OI[: end - first]
