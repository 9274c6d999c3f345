"""Blocks as the bytes of GGUF files hold them, to and from ours: the same codes and scales in another order of bits.

N: blocks, Q: weights of a block, G: its groups, B: its bytes, O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.formats.layouts.block_codes import Blocks
from secateur.formats.layouts.block_types import BLOCK_TYPES, BlockType


@dataclass(frozen=True)
class _Plane:
    """Some bits of every code of a block: of each `chunk` of bytes the lowest come first, then those above them.

    Attributes:
        bits: of each code.
        chunk: bytes.
    """

    bits: int
    chunk: int

    @property
    def _shifts(self) -> range:
        return range(0, 8, self.bits)

    def read(self, bytes_NB: Tensor) -> Tensor:
        """The bits of the codes, `[N, Q]`."""
        chunks = bytes_NB.view(len(bytes_NB), -1, 1, self.chunk)
        shift_S1 = torch.tensor(list(self._shifts), dtype=torch.uint8)[:, None]
        return ((chunks >> shift_S1) & (2**self.bits - 1)).flatten(1)

    def write(self, code_NQ: Tensor) -> Tensor:
        """The reverse."""
        part = (code_NQ & (2**self.bits - 1)).view(len(code_NQ), -1, len(self._shifts), self.chunk)
        whole = torch.zeros_like(part[:, :, 0])
        for i, shift in enumerate(self._shifts):
            whole |= part[:, :, i] << shift
        return whole.flatten(1)


# Codes of scales, and of offsets, of a block: 16 or 8 of each.


def _read_nibbles(bytes_NB: Tensor) -> tuple[Tensor, Tensor | None]:
    return bytes_NB & 15, bytes_NB >> 4


def _write_nibbles(c_NG: Tensor, m_NG: Tensor | None) -> Tensor:
    assert m_NG is not None
    return c_NG | m_NG << 4


def _read_bytes(bytes_NB: Tensor) -> tuple[Tensor, Tensor | None]:
    return bytes_NB ^ 128, None  # with a sign in the file


def _write_bytes(c_NG: Tensor, m_NG: Tensor | None) -> Tensor:
    return c_NG ^ 128


def _read_sixteen(bytes_NB: Tensor) -> tuple[Tensor, Tensor | None]:
    """16 codes of six bits: eight bytes of their lower four bits, four bytes of their upper two."""
    return _Plane(4, 8).read(bytes_NB[:, :8].contiguous()) | _Plane(2, 4).read(bytes_NB[:, 8:].contiguous()) << 4, None


def _write_sixteen(c_NG: Tensor, m_NG: Tensor | None) -> Tensor:
    return torch.cat([_Plane(4, 8).write(c_NG & 15), _Plane(2, 4).write(c_NG >> 4)], 1)


def _read_pairs(bytes_NB: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eight scales and eight offsets of six bits. The first four of each are the lower bits of eight bytes, whose upper two
    bits go on top of the other four's, of which four more bytes have the rest."""
    first_N4, second_N4, rest_N4 = bytes_NB.view(-1, 3, 4).unbind(1)
    c_NG = torch.cat([first_N4 & 63, (rest_N4 & 15) | (first_N4 >> 6 << 4)], 1)
    m_NG = torch.cat([second_N4 & 63, (rest_N4 >> 4) | (second_N4 >> 6 << 4)], 1)
    return c_NG, m_NG


def _write_pairs(c_NG: Tensor, m_NG: Tensor | None) -> Tensor:
    assert m_NG is not None
    first_N4 = c_NG[:, :4] | c_NG[:, 4:] >> 4 << 6
    second_N4 = m_NG[:, :4] | m_NG[:, 4:] >> 4 << 6
    return torch.cat([first_N4, second_N4, c_NG[:, 4:] & 15 | m_NG[:, 4:] << 4], 1)


def _read_eight(bytes_NB: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eight codes of six bits: two bytes of their upper two bits, four of their lower four, in both the lowest first."""
    return _Plane(4, 1).read(bytes_NB[:, 2:].contiguous()) | _Plane(2, 1).read(bytes_NB[:, :2].contiguous()) << 4, None


def _write_eight(c_NG: Tensor, m_NG: Tensor | None) -> Tensor:
    return torch.cat([_Plane(2, 1).write(c_NG >> 4), _Plane(4, 1).write(c_NG & 15)], 1)


_Reader = Callable[[Tensor], tuple[Tensor, Tensor | None]]
_Writer = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class _Form:
    """Where a block of a type has what.

    Attributes:
        order: its parts: `scale` and `offset` (float16), `codes` (of scales), `low` and `high` (bits of the codes).
        low, high: the planes.
        codes: how codes of scales are read, how they are written, and their bytes.
    """

    order: tuple[str, ...]
    low: _Plane
    high: _Plane | None = None
    codes: tuple[_Reader, _Writer, int] | None = None

    def sizes(self, form: BlockType) -> list[int]:
        """Bytes of each part."""
        found = {"scale": 2, "offset": 2, "low": form.block_size * self.low.bits // 8}
        if self.high is not None:
            found["high"] = form.block_size * self.high.bits // 8
        if self.codes is not None:
            found["codes"] = self.codes[2]
        return [found[part] for part in self.order]


_PAIRS = (_read_pairs, _write_pairs, 12)
_FORMS = {
    "Q4_0": _Form(("scale", "low"), _Plane(4, 16)),
    "Q4_1": _Form(("scale", "offset", "low"), _Plane(4, 16)),
    "Q5_0": _Form(("scale", "high", "low"), _Plane(4, 16), _Plane(1, 1)),
    "Q5_1": _Form(("scale", "offset", "high", "low"), _Plane(4, 16), _Plane(1, 1)),
    "Q8_0": _Form(("scale", "low"), _Plane(8, 1)),
    "Q2_K": _Form(
        ("codes", "low", "scale", "offset"), _Plane(2, 32), codes=(_read_nibbles, _write_nibbles, 16)
    ),
    "Q3_K": _Form(
        ("high", "low", "codes", "scale"), _Plane(2, 32), _Plane(1, 32), (_read_sixteen, _write_sixteen, 12)
    ),
    "Q4_K": _Form(("scale", "offset", "codes", "low"), _Plane(4, 32), codes=_PAIRS),
    "Q5_K": _Form(("scale", "offset", "codes", "high", "low"), _Plane(4, 32), _Plane(1, 32), _PAIRS),
    "Q6_K": _Form(("low", "high", "codes", "scale"), _Plane(4, 64), _Plane(2, 32), (_read_bytes, _write_bytes, 16)),
    "IQ4_NL": _Form(("scale", "low"), _Plane(4, 16)),
    "IQ4_XS": _Form(("scale", "codes", "low"), _Plane(4, 16), codes=(_read_eight, _write_eight, 6)),
}  # fmt: skip
# Types whose offset is added in the file and taken away here, and whose codes have a sign there.
_ADDED, _SIGNED = ("Q4_1", "Q5_1"), ("Q8_0",)


def read_blocks(name: str, bytes_OB: Tensor) -> Blocks:
    """What rows of bytes hold.

    Args:
        name: of the type.
        bytes_OB: uint8, each row whole blocks.
    """
    form, where = BLOCK_TYPES[name], _FORMS[name]
    O = len(bytes_OB)
    pieces = bytes_OB.reshape(-1, form.nbytes).split(where.sizes(form), 1)
    part = {key: piece.contiguous() for key, piece in zip(where.order, pieces, strict=True)}
    code_NQ = where.low.read(part["low"])
    if where.high is not None:
        code_NQ = code_NQ | where.high.read(part["high"]) << where.low.bits
    if name in _SIGNED:
        code_NQ = code_NQ ^ 128
    scale_OB = part["scale"].view(torch.float16).view(O, -1)
    offset_OB = part["offset"].view(torch.float16).view(O, -1) if form.has_offset else None
    if offset_OB is not None and name in _ADDED:
        offset_OB = -offset_OB
    c_NG, m_NG = where.codes[0](part["codes"]) if where.codes is not None else (None, None)
    c_OG, m_OG = (None if x_NG is None else x_NG.reshape(O, -1) for x_NG in (c_NG, m_NG))
    return Blocks(name, code_NQ.view(O, -1), scale_OB, offset_OB, c_OG, m_OG)


def write_blocks(blocks: Blocks) -> Tensor:
    """The reverse: rows of bytes, `[O, B]`."""
    form, where = BLOCK_TYPES[blocks.type], _FORMS[blocks.type]
    O = len(blocks.code_OI)
    code_NQ = blocks.code_OI.reshape(-1, form.block_size)
    if blocks.type in _SIGNED:
        code_NQ = code_NQ ^ 128
    part = {"low": where.low.write(code_NQ), "scale": _bytes(blocks.scale_OB)}
    if where.high is not None:
        part["high"] = where.high.write(code_NQ >> where.low.bits)
    if blocks.offset_OB is not None:
        part["offset"] = _bytes(-blocks.offset_OB if blocks.type in _ADDED else blocks.offset_OB)
    if where.codes is not None:
        assert blocks.scale_code_OG is not None
        m_NG = None if blocks.offset_code_OG is None else blocks.offset_code_OG.reshape(-1, form.groups)
        part["codes"] = where.codes[1](blocks.scale_code_OG.reshape(-1, form.groups), m_NG)
    return torch.cat([part[key] for key in where.order], 1).view(O, -1)


def _bytes(half_OB: Tensor) -> Tensor:
    return half_OB.contiguous().view(torch.uint8).reshape(-1, 2)
