"""Tiles of packed weights, expanded in registers: what the Triton kernels share.

The unit of work is a word: eight columns of one row, which are one byte of a bit mask, or as many whole bytes of a stream of
codes as a code has bits. A thread expands whole words, so that the compiler knows every shift.

R: rows of a tile, C: its columns, L: its words, W: chunks of 32 words. O: output features, I: input features.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from secateur.kernels.triton import triton_weight

CHUNK = tl.constexpr(triton_weight.CHUNK)


@triton.jit
def _columns(w0, w1, w2, w3, w4, w5, w6, w7, R: tl.constexpr, C: tl.constexpr):
    """The tile `[R, C]` of the eight columns of every word. All eight stay in the thread that has them."""
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.reshape(tl.join(even, odd), [R, C])


@triton.jit
def _value(first_RWL, byte_RWL, j: tl.constexpr):
    """Column j of every word of a bitmap: the next value where its bit is set, else zero; and where the one after it is."""
    bit_RWL = (byte_RWL >> j) & 1
    return tl.load(first_RWL, mask=bit_RWL != 0, other=0.0), first_RWL + bit_RWL


@triton.jit
def sparse_tile(values_V, bitmask_OB, start_OW, row, column, O, I, R: tl.constexpr, C: tl.constexpr, kept_R=None):
    """Rows `row` to `row + R − 1` and columns `column` to `column + C − 1` of a bitmap, in the dtype of the values.

    `column` and C are multiples of CHUNK. `start_OW` is where the values of each chunk begin, so that no chunk waits for the
    count of the one before. Where there is a mask of rows, nothing of the others is loaded, and they are zero.
    """
    B = (I + 7) // 8
    chunks = (I + CHUNK - 1) // CHUNK
    W: tl.constexpr = C // CHUNK
    row_R11 = (row + tl.arange(0, R)).to(tl.int64)[:, None, None]
    chunk_1W1 = (tl.arange(0, W) + column // CHUNK)[None, :, None]
    at_1WL = chunk_1W1 * 32 + tl.arange(0, 32)[None, None, :]
    inside_R11 = row_R11 < O
    if kept_R is not None:
        inside_R11 = inside_R11 & kept_R[:, None, None]
    byte_RWL = tl.load(bitmask_OB + row_R11 * B + at_1WL, mask=inside_R11 & (at_1WL < B), other=0).to(tl.int32)
    inside_RW1 = inside_R11 & (chunk_1W1 < chunks)
    start_RW1 = tl.load(start_OW + row_R11 * chunks + chunk_1W1, mask=inside_RW1, other=0)
    # Bits set: of pairs, of nibbles, of all eight.
    count_RWL = byte_RWL - ((byte_RWL >> 1) & 0x55)
    count_RWL = (count_RWL & 0x33) + ((count_RWL >> 2) & 0x33)
    count_RWL = (count_RWL + (count_RWL >> 4)) & 15
    # The 32 words of a chunk are in one warp: this sum needs no shared memory.
    next_RWL = values_V + start_RW1 + (tl.cumsum(count_RWL, 2) - count_RWL)
    w0, next_RWL = _value(next_RWL, byte_RWL, 0)
    w1, next_RWL = _value(next_RWL, byte_RWL, 1)
    w2, next_RWL = _value(next_RWL, byte_RWL, 2)
    w3, next_RWL = _value(next_RWL, byte_RWL, 3)
    w4, next_RWL = _value(next_RWL, byte_RWL, 4)
    w5, next_RWL = _value(next_RWL, byte_RWL, 5)
    w6, next_RWL = _value(next_RWL, byte_RWL, 6)
    w7, next_RWL = _value(next_RWL, byte_RWL, 7)
    return _columns(w0, w1, w2, w3, w4, w5, w6, w7, R, C)


@triton.jit
def _above(code, BITS: tl.constexpr):
    """2^BITS + code in float32. The code goes on top of a mantissa: a GPU converts an integer at a quarter of the speed."""
    return (((127 + BITS) << 23) | (code << (23 - BITS))).to(tl.float32, bitcast=True)


@triton.jit
def _line(scale, zero, second, row_R1, tile_R1, column_1L, O, I, BITS: tl.constexpr, GRID: tl.constexpr,
          GROUP: tl.constexpr):  # fmt: skip
    """Of each column's group, a and b such that its weights are a · (2^BITS + code) + b; both zero outside of the weight.

    One fused multiply-add a weight then stands for conversion, zero point and scale. It rounds by no more than float32 does
    at the top of the grid, scale · 2^BITS, which is far below the resolution of any grid.
    """
    groups = (I + GROUP - 1) // GROUP
    group_1L = column_1L // GROUP
    inside_1L = column_1L < I
    inside_RL = (row_R1 < O) & inside_1L
    at_RL = row_R1 * groups + group_1L
    if GRID == "by input" or GRID == "by input, symmetric":  # the rows of a tile share what each column has
        at_RL = tile_R1 * I + column_1L
        inside_RL = inside_1L
    if GRID == "two-level" or GRID == "two-level bytes":  # `scale` has the codes of both, in a byte or in two
        if GRID == "two-level bytes":
            c_RL = tl.load(scale + 2 * at_RL, mask=inside_RL, other=0).to(tl.float32)
            d_RL = tl.load(scale + 2 * at_RL + 1, mask=inside_RL, other=0).to(tl.float32)
        else:
            pair_RL = tl.load(scale + at_RL, mask=inside_RL, other=0).to(tl.int32)
            c_RL = _above(pair_RL & 15, 4) - 16.0
            d_RL = _above(pair_RL >> 4, 4) - 16.0
        at_second = second + (tile_R1 * groups + group_1L) * 4
        step = tl.load(at_second, mask=inside_1L, other=0.0).to(tl.float32)
        low = tl.load(at_second + 1, mask=inside_1L, other=0.0).to(tl.float32)
        zero_step = tl.load(at_second + 2, mask=inside_1L, other=0.0).to(tl.float32)
        zero_low = tl.load(at_second + 3, mask=inside_1L, other=0.0).to(tl.float32)
        a_RL = low + step * c_RL
        b_RL = -(zero_low + zero_step * d_RL + 2**BITS) * a_RL
    else:
        a_RL = tl.load(scale + at_RL, mask=inside_RL, other=0.0).to(tl.float32)
        if GRID == "uniform" or GRID == "by input":
            b_RL = -_above(tl.load(zero + at_RL, mask=inside_RL, other=0).to(tl.int32), BITS) * a_RL
        elif GRID == "level":  # zero points between codes
            b_RL = -(tl.load(zero + at_RL, mask=inside_RL, other=0.0) + 2**BITS) * a_RL
        else:
            b_RL = a_RL * -(2**BITS + 2 ** (BITS - 1))
    return a_RL, b_RL


@triton.jit
def _weight(word_RL, a_RL, b_RL, scale, zero, second, row_R1, tile_R1, column_1L, O, I, j: tl.constexpr,
            BITS: tl.constexpr, GRID: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """Column j of every word of codes, float32; zero outside of the weight."""
    code_RL = ((word_RL >> (BITS * j)) & ((1 << BITS) - 1)).to(tl.int32)
    if GRID == "table":
        inside_RL = (row_R1 < O) & (column_1L + j < I)
        w_RL = tl.load(scale + row_R1 * (1 << BITS) + code_RL, mask=inside_RL, other=0.0).to(tl.float32)
    else:
        if GROUP % 8 != 0:
            a_RL, b_RL = _line(scale, zero, second, row_R1, tile_R1, column_1L + j, O, I, BITS, GRID, GROUP)
        w_RL = tl.fma(_above(code_RL, BITS), a_RL, b_RL)
        if RAGGED:  # the last word goes on into the next row, and what stands there need not be a finite weight
            w_RL = tl.where(column_1L + j < I, w_RL, 0.0)
    return w_RL


@triton.jit
def coded_tile(codes_S, scale, zero, second, row, column, O, I, R: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr,
               GRID: tl.constexpr, GROUP: tl.constexpr, TILE_ROWS: tl.constexpr, RAGGED: tl.constexpr,
               kept_R=None):  # fmt: skip
    """Rows `row` to `row + R − 1` and columns `column` to `column + C − 1` of a weight in codes, float32, without outliers.

    `row` is a multiple of R, and `column` of 8. Where there is a mask of rows, no codes of the others are loaded, and they are
    anything that is finite.
    """
    L: tl.constexpr = C // 8
    row_R1 = (row + tl.arange(0, R)).to(tl.int64)[:, None]
    column_1L = (tl.arange(0, L) * 8 + column)[None, :]
    inside_RL = (row_R1 < O) & (column_1L < I)
    if kept_R is not None:
        inside_RL = inside_RL & kept_R[:, None]
    # The last word of the stream may end beyond it, and is why the stream is padded.
    at_RL = codes_S + row_R1 * ((I * BITS + 7) // 8) + column_1L // 8 * BITS
    if BITS <= 4:
        word_RL = tl.load(at_RL, mask=inside_RL, other=0).to(tl.uint32)
        for i in tl.static_range(1, BITS):
            word_RL |= tl.load(at_RL + i, mask=inside_RL, other=0).to(tl.uint32) << (8 * i)
    else:
        word_RL = tl.load(at_RL, mask=inside_RL, other=0).to(tl.uint64)
        for i in tl.static_range(1, BITS):
            word_RL |= tl.load(at_RL + i, mask=inside_RL, other=0).to(tl.uint64) << (8 * i)
    if TILE_ROWS % R == 0:  # noqa: SIM108 - the shapes differ
        # All in one tile: what it has is read once for all rows.
        tile_R1 = tl.full([1, 1], 0, tl.int64) + row // TILE_ROWS
    else:
        tile_R1 = tl.minimum(row_R1, O - 1) // TILE_ROWS
    a_RL, b_RL = 0.0, 0.0
    if GRID != "table" and GROUP % 8 == 0:
        a_RL, b_RL = _line(scale, zero, second, row_R1, tile_R1, column_1L, O, I, BITS, GRID, GROUP)
    # fmt: off
    w0 = _weight(word_RL, a_RL, b_RL, scale, zero, second, row_R1, tile_R1, column_1L, O, I, 0, BITS, GRID, GROUP, RAGGED)
    w1 = _weight(word_RL, a_RL, b_RL, scale, zero, second, row_R1, tile_R1, column_1L, O, I, 1, BITS, GRID, GROUP, RAGGED)
    w2 = _weight(word_RL, a_RL, b_RL, scale, zero, second, row_R1, tile_R1, column_1L, O, I, 2, BITS, GRID, GROUP, RAGGED)
    w3 = _weight(word_RL, a_RL, b_RL, scale, zero, second, row_R1, tile_R1, column_1L, O, I, 3, BITS, GRID, GROUP, RAGGED)
    w4 = _weight(word_RL, a_RL, b_RL, scale, zero, second, row_R1, tile_R1, column_1L, O, I, 4, BITS, GRID, GROUP, RAGGED)
    w5 = _weight(word_RL, a_RL, b_RL, scale, zero, second, row_R1, tile_R1, column_1L, O, I, 5, BITS, GRID, GROUP, RAGGED)
    w6 = _weight(word_RL, a_RL, b_RL, scale, zero, second, row_R1, tile_R1, column_1L, O, I, 6, BITS, GRID, GROUP, RAGGED)
    w7 = _weight(word_RL, a_RL, b_RL, scale, zero, second, row_R1, tile_R1, column_1L, O, I, 7, BITS, GRID, GROUP, RAGGED)
    # fmt: on
    return _columns(w0, w1, w2, w3, w4, w5, w6, w7, R, C)
