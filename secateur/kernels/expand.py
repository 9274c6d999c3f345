"""Bit masks and values to dense weights, and back.

A pruned linear is stored as the values that were kept, row by row, and one bit per weight that says where they go.
O: output features (rows), I: input features, B: ceil(I / 8) bytes of a mask row, least significant bit first, with
the bits beyond I zero.

The C kernel serves 16-bit and 32-bit floats on the CPU; plain torch serves everything else, and is the reference.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from secateur.solvers.pieces import run_pieces

_native: Any
try:
    _native = importlib.import_module("secateur.kernels._expand")
except ImportError:  # installed without a compiler
    _native = None

HAVE_NATIVE: bool = _native is not None

# Which instructions the kernel uses: 0 plain C, 1 AVX2, 2 AVX-512. Tests lower it.
_isa: int = _native.BEST_ISA if HAVE_NATIVE else 0

_EXPAND, _PACK, _MASK, _COUNT = range(4)
_NATIVE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The formats in which a sign bit alone is minus zero. In the others (float8 "fnuz", integers) it is a value.
_SIGNED_ZERO = (*_NATIVE_DTYPES, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
_BITS_DTYPE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Threads share the work in pieces of at least so many dense bytes, some 250 µs each. An idle thread takes 100 µs to wake,
# so two threads were slower than one on anything smaller than two such pieces.
_BYTES_PER_PIECE = 1 << 21
_PIECES_PER_THREAD = 8


def expand_bitmap(values: Tensor, bitmask_OB: Tensor, in_features: int) -> Tensor:
    """Dense weights [O, I] of the dtype of `values`: the next value where a bit is set, zero elsewhere.

    Args:
        values: [nnz], of any dtype of 1, 2, 4 or 8 bytes.
        bitmask_OB: [O, ceil(I / 8)] uint8, on the device of `values`.
        in_features: I.

    Raises:
        ValueError: wrong shapes or dtypes, not contiguous, two devices, a bit set beyond I, or not exactly as many bits
            set as there are values.
    """
    if not _use_native(values):
        return expand_bitmap_torch(values, bitmask_OB, in_features)
    _check_values(values, bitmask_OB)
    counts_O = count_rows(bitmask_OB, in_features)
    _check_total(counts_O, values)
    W_OI = torch.empty(bitmask_OB.shape[0], in_features, dtype=values.dtype)
    _run_rows(_EXPAND, values, bitmask_OB, W_OI, counts_O)
    return W_OI


def compress_bitmap(W_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `expand_bitmap`: `(values [nnz], bitmask_OB)` of dense weights [O, I].

    Minus zero counts as zero; every other value, NaN included, is kept bit for bit.

    Raises:
        ValueError: not a contiguous matrix, or elements of more than 8 bytes.
    """
    if not _use_native(W_OI):
        return compress_bitmap_torch(W_OI)
    _check_dense(W_OI)
    O, I = W_OI.shape
    bitmask_OB = torch.empty(O, math.ceil(I / 8), dtype=torch.uint8)
    _run_rows(_MASK, None, bitmask_OB, W_OI, None)
    counts_O = count_rows(bitmask_OB, I)
    values = torch.empty(int(counts_O.sum()), dtype=W_OI.dtype)
    _run_rows(_PACK, values, bitmask_OB, W_OI, counts_O)
    return values, bitmask_OB


def count_rows(bitmask_OB: Tensor, in_features: int) -> Tensor:
    """How many bits are set in each row: [O] int64, on the device of the mask.

    Raises:
        ValueError: not a contiguous uint8 matrix of ceil(I / 8) columns, or a bit set beyond I.
    """
    _check_mask(bitmask_OB, in_features)
    if HAVE_NATIVE and bitmask_OB.device.type == "cpu":
        counts_O = torch.empty(bitmask_OB.shape[0], dtype=torch.int64)
        addresses = (0, bitmask_OB.data_ptr(), 0, counts_O.data_ptr())
        # One thread: a mask is a sixteenth of the dense bytes or less, and is read faster than a thread wakes.
        padding_set = bool(_native.run(_COUNT, _isa, addresses, (0, counts_O.numel(), in_features, 2), (0, 0)))
    else:
        bits_OBx8 = _unpack_bits(bitmask_OB)
        counts_O = bits_OBx8.sum(1, dtype=torch.int64)
        padding_set = bool(bits_OBx8[:, in_features:].any())
    if padding_set:
        raise ValueError(f"the bit mask has bits set beyond the last of its {in_features} columns")
    return counts_O


def expand_bitmap_torch(values: Tensor, bitmask_OB: Tensor, in_features: int) -> Tensor:
    """`expand_bitmap` in plain torch, on any device."""
    _check_values(values, bitmask_OB)
    _check_total(count_rows(bitmask_OB, in_features), values)
    mask_OI = unpack_mask(bitmask_OB, in_features)
    # As integers: torch does not index every float8 dtype.
    bits_dtype = _BITS_DTYPE[values.element_size()]
    W_OI = torch.zeros(mask_OI.shape, dtype=bits_dtype, device=values.device)
    return W_OI.masked_scatter_(mask_OI, values.detach().view(bits_dtype)).view(values.dtype)


def compress_bitmap_torch(W_OI: Tensor) -> tuple[Tensor, Tensor]:
    """`compress_bitmap` in plain torch, on any device."""
    _check_dense(W_OI)
    bits_dtype = _BITS_DTYPE[W_OI.element_size()]
    bits_OI = W_OI.detach().view(bits_dtype)
    # Compared as bits, so that subnormals stay even where the FPU flushes them to zero.
    mask_OI = (bits_OI & torch.iinfo(bits_dtype).max if W_OI.dtype in _SIGNED_ZERO else bits_OI) != 0
    return bits_OI[mask_OI].view(W_OI.dtype), pack_mask(mask_OI)


def unpack_mask(bitmask_OB: Tensor, in_features: int) -> Tensor:
    """A bit mask as bool `[O, I]`, in plain torch, on any device."""
    return _unpack_bits(bitmask_OB)[:, :in_features].bool()


def _unpack_bits(bitmask_OB: Tensor) -> Tensor:
    """[O, B] uint8 to [O, B·8] uint8 of zeros and ones."""
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=bitmask_OB.device)
    return (bitmask_OB[:, :, None].bitwise_right_shift(shifts_8) & 1).flatten(1)


def pack_mask(mask_OI: Tensor) -> Tensor:
    """The reverse of `unpack_mask`: bool `[O, I]` to uint8 `[O, ceil(I / 8)]`."""
    padded_OBx8 = torch.nn.functional.pad(mask_OI.to(torch.uint8), (0, -mask_OI.shape[1] % 8))
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=mask_OI.device)
    return (padded_OBx8.unflatten(1, (-1, 8)) << shifts_8).sum(2, dtype=torch.uint8)


def _use_native(tensor: Tensor) -> bool:
    return HAVE_NATIVE and tensor.device.type == "cpu" and tensor.dtype in _NATIVE_DTYPES


def _check_mask(bitmask_OB: Tensor, in_features: int) -> None:
    if bitmask_OB.dtype != torch.uint8:
        raise ValueError(f"a bit mask is uint8, not {bitmask_OB.dtype}")
    if in_features < 0 or bitmask_OB.ndim != 2 or bitmask_OB.shape[1] != (in_features + 7) // 8:
        shape = list(bitmask_OB.shape)
        raise ValueError(f"a bit mask of {in_features} columns is [rows, ceil({in_features} / 8)], not {shape}")
    if not bitmask_OB.is_contiguous():
        raise ValueError("the bit mask is not contiguous")


def _check_values(values: Tensor, bitmask_OB: Tensor) -> None:
    if values.ndim != 1 or not values.is_contiguous():
        raise ValueError(f"values are a contiguous vector, not {list(values.shape)} with strides {values.stride()}")
    if values.element_size() not in _BITS_DTYPE:
        raise ValueError(f"values of {values.dtype} cannot be stored under a bit mask")
    if values.device != bitmask_OB.device:
        raise ValueError(f"the values are on {values.device} but the bit mask is on {bitmask_OB.device}")


def _check_total(counts_O: Tensor, values: Tensor) -> None:
    if (total := int(counts_O.sum())) != values.numel():
        raise ValueError(f"the bit mask has {total} bits set but there are {values.numel()} values")


def _check_dense(W_OI: Tensor) -> None:
    if W_OI.ndim != 2 or not W_OI.is_contiguous():
        raise ValueError(f"weights are a contiguous matrix, not {list(W_OI.shape)} with strides {W_OI.stride()}")
    if W_OI.element_size() not in _BITS_DTYPE:
        raise ValueError(f"weights of {W_OI.dtype} cannot be stored under a bit mask")


def _run_rows(step: int, values: Tensor | None, bitmask_OB: Tensor, W_OI: Tensor, counts_O: Tensor | None) -> None:
    """Run one step of the kernel over all rows, split over threads where that pays: the kernel releases the GIL."""
    O, I = W_OI.shape
    size = W_OI.element_size()
    addresses = (0 if values is None else values.data_ptr(), bitmask_OB.data_ptr(), W_OI.data_ptr(), 0)
    threads = torch.get_num_threads()
    pieces = max(1, min(O, O * I * size // _BYTES_PER_PIECE, threads * _PIECES_PER_THREAD)) if threads > 1 else 1
    rows = [O * i // pieces for i in range(pieces + 1)]
    # Where each piece starts in `values`.
    starts = [0] * (pieces + 1)
    if counts_O is not None:
        ends_O = counts_O.numpy().cumsum()
        starts[1:] = [int(ends_O[row - 1]) if row else 0 for row in rows[1:]]

    def run(i: int) -> bool:
        reached = _native.run(step, _isa, addresses, (rows[i], rows[i + 1], I, size), (starts[i], starts[i + 1]))
        return step == _MASK or bool(reached == starts[i + 1])

    if not run_pieces(run, pieces, min(threads, pieces)):
        # Counted just now: only a file that is memory-mapped and being written to gets here.
        raise ValueError("the bit mask changed while it was being read")
