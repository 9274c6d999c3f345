"""Streams of small codes: b bits each, the first code in the least significant bits of the first byte.

R: rows, K: codes of a row, B: bytes of a row, ⌈K·b/8⌉.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# Eight codes of b bits are b whole bytes.
_CODES = 8


def bytes_of(count: int, bits: int) -> int:
    """How many bytes so many codes take."""
    return -(-count * bits // 8)


def pack_bits(code_RK: Tensor, bits: int) -> Tensor:
    """Pack codes of 1 to 8 bits row by row; a row starts at a byte, and the bits after its last code are zero.

    Args:
        code_RK: uint8, each below 2^bits.
        bits: of one code.

    Returns:
        stream_RB: uint8.
    """
    R, K = code_RK.shape
    if bits == 8:
        return code_RK.contiguous()
    code_RW8 = pad(code_RK, (0, -K % _CODES)).view(R, -1, _CODES)
    word_RW = torch.zeros(code_RW8.shape[:2], dtype=torch.int64, device=code_RK.device)
    for i in range(_CODES):
        word_RW |= code_RW8[:, :, i].long() << (bits * i)
    byte_RWb = torch.stack([(word_RW >> (8 * i) & 255).to(torch.uint8) for i in range(bits)], 2)
    return byte_RWb.view(R, -1)[:, : bytes_of(K, bits)].contiguous()


def unpack_bits(stream_RB: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row, as uint8: the reverse of `pack_bits`."""
    if bits == 8:
        return stream_RB[:, :count].contiguous()
    R, B = stream_RB.shape
    if _CODES % bits == 0:  # no code lies in two bytes
        byte_RB = stream_RB[:, : bytes_of(count, bits)]
        code_RBC = byte_RB.new_empty(*byte_RB.shape, _CODES // bits)
        for i in range(_CODES // bits):
            code_RBC[:, :, i] = byte_RB >> (bits * i)
        return code_RBC.bitwise_and_(2**bits - 1).flatten(1)[:, :count]
    words = -(-count // _CODES)
    byte_RWb = pad(stream_RB, (0, words * bits - B)).view(R, words, bits)
    word_RW = torch.zeros((R, words), dtype=torch.int64, device=stream_RB.device)
    for i in range(bits):
        word_RW |= byte_RWb[:, :, i].long() << (8 * i)
    code_RW8 = torch.stack([(word_RW >> (bits * i)).to(torch.uint8) for i in range(_CODES)], 2)
    return code_RW8.view(R, -1)[:, :count].bitwise_and_(2**bits - 1)
