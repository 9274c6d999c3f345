"""The layout `blocks`: codes on the grids that GGUF files know, with scales that may be codes themselves.

O: output features, I: input features, G: groups of a row, Γ: groups of all rows, N: blocks of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.quantized import Quantized
from secateur.formats.layouts.block_types import BLOCK_TYPES, BlockType
from secateur.formats.layouts.coded import QuantizedLayout, check_finite
from secateur.formats.layouts.layout import check_parts, layout
from secateur.formats.layouts.rows import Rows, is_stream, pack_stream, unpack_stream
from secateur.kernels.packed import Grid, GridOperands, largest


def block_values(
    form: BlockType,
    code_OI: Tensor,
    scale_OB: Tensor,
    offset_OB: Tensor | None,
    c_OG: Tensor | None,
    m_OG: Tensor | None,
) -> Tensor:
    """What codes stand for, `[O, I]` float32, rounded in the same places as all who read such files do it.

    Args:
        form: the type.
        code_OI: uint8.
        scale_OB, offset_OB: of blocks, float16.
        c_OG, m_OG: codes of the groups' scales and offsets, uint8.
    """
    scale_OG, offset_OG = group_scales(form, scale_OB, offset_OB, c_OG, m_OG)
    scale_OI = scale_OG.repeat_interleave(form.group_size, 1)
    if form.levels:
        level_C = torch.tensor(form.levels, dtype=torch.float32, device=code_OI.device)
        return scale_OI * level_C[code_OI.int()]
    if offset_OG is None:
        return (code_OI.float() - 2 ** (form.bits - 1)) * scale_OI
    return scale_OI * code_OI - offset_OG.repeat_interleave(form.group_size, 1)


def group_scales(
    form: BlockType, scale_OB: Tensor, offset_OB: Tensor | None, c_OG: Tensor | None, m_OG: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets of groups, float32: those of blocks, or those times codes, which float32 holds exactly."""

    def times(x_OB: Tensor, code_OG: Tensor | None, zero: int) -> Tensor:
        if code_OG is None:
            return x_OB.float()
        return x_OB.float().repeat_interleave(form.groups, -1) * (code_OG.float() - zero)

    return times(scale_OB, c_OG, form.scale_zero), None if offset_OB is None else times(offset_OB, m_OG, 0)


@dataclass(frozen=True)
class Blocks:
    """Codes in blocks of a type (see `BlockType`); rows are whole blocks.

    Attributes:
        type: its name.
        code_OI: uint8.
        scale_OB: float16.
        offset_OB: float16; None for a type without.
        scale_code_OG, offset_code_OG: uint8; None for a type without.
    """

    type: str
    code_OI: Tensor
    scale_OB: Tensor
    offset_OB: Tensor | None = None
    scale_code_OG: Tensor | None = None
    offset_code_OG: Tensor | None = None

    @property
    def bits(self) -> int:
        """Of a code."""
        return BLOCK_TYPES[self.type].bits

    def values(self) -> Tensor:
        """The weights `[O, I]`, float32."""
        form = BLOCK_TYPES[self.type]
        return block_values(form, self.code_OI, self.scale_OB, self.offset_OB, self.scale_code_OG, self.offset_code_OG)

    def layout(self, dtype: torch.dtype) -> BlocksLayout:
        return BlocksLayout(self.type, dtype)


@dataclass(frozen=True)
class BlockGrid(Grid):
    """The same, as kernels take it.

    Attributes:
        type: its name.
        group_size: weights that share a scale.
        scale_N, offset_N, c_Γ, m_Γ: as in `Blocks`, blocks and groups row after row.
        kernel_scale_Γ, kernel_zero_Γ: float32, scales and zero points of groups for the compiled kernels; None where those of
            the blocks serve, and for grids that they do not know.
    """

    type: str
    group_size: int
    scale_N: Tensor
    offset_N: Tensor | None
    c_Γ: Tensor | None
    m_Γ: Tensor | None
    kernel_scale_Γ: Tensor | None = None
    kernel_zero_Γ: Tensor | None = None

    @classmethod
    def of(
        cls, form: BlockType, scale_N: Tensor, offset_N: Tensor | None, c_Γ: Tensor | None, m_Γ: Tensor | None
    ) -> BlockGrid:
        """A grid whose tensors were checked."""
        found = cls(form.name, form.group_size, scale_N, offset_N, c_Γ, m_Γ)
        if form.levels:
            return found
        scale_Γ, offset_Γ = group_scales(form, scale_N, offset_N, c_Γ, m_Γ)
        zero_Γ = None
        if offset_Γ is not None:
            # A group of equal weights may have an offset and no scale: (code − zero) · scale is none of its grid.
            zero_Γ = torch.where(offset_Γ == 0, 0, offset_Γ / scale_Γ)
            if not torch.isfinite(zero_Γ).all():
                return found
        return replace(found, kernel_scale_Γ=None if c_Γ is None else scale_Γ, kernel_zero_Γ=zero_Γ)

    def values(self, code_OK: Tensor, at_OG: Tensor | None, bits: int) -> Tensor:
        assert at_OG is not None
        form = BLOCK_TYPES[self.type]
        at_OB = at_OG[:, :: form.groups] // form.groups
        offset_OB = None if self.offset_N is None else self.offset_N[at_OB]
        c_OG, m_OG = (None if x_Γ is None else x_Γ[at_OG] for x_Γ in (self.c_Γ, self.m_Γ))
        return block_values(form, code_OK, self.scale_N[at_OB], offset_OB, c_OG, m_OG)

    def rows(self, start: int, end: int) -> BlockGrid:
        return self

    def bound(self, bits: int) -> float:
        form = BLOCK_TYPES[self.type]
        level = max(map(abs, form.levels)) if form.levels else 2**bits
        code = 2**form.scale_bits  # at least 1
        offset = 0.0 if self.offset_N is None else largest(self.offset_N)
        return (largest(self.scale_N) * level + offset) * code

    def operands(self) -> GridOperands | None:
        form = BLOCK_TYPES[self.type]
        if form.levels or (form.has_offset and self.kernel_zero_Γ is None):
            return None
        scale_Γ = self.scale_N if self.kernel_scale_Γ is None else self.kernel_scale_Γ
        return GridOperands(self.group_size, scale_Γ, self.kernel_zero_Γ)


@layout
@dataclass(frozen=True)
class BlocksLayout(QuantizedLayout):
    """`codes uint8` (each row starts at a byte), `scale float16 [N]`, `offset float16 [N]`, `scale_codes uint8`, `offset_codes
    uint8` (streams of Γ codes each), `shape int64 [2]`; a type has those that it needs.
    """

    type: str
    dtype: torch.dtype

    name: ClassVar[str] = "blocks"
    parts: ClassVar[tuple[str, ...]] = ("codes", "scale", "offset", "scale_codes", "offset_codes", "shape")
    has_outliers: ClassVar[bool] = False
    choices: ClassVar[Mapping[str, Sequence[Any]]] = {"type": tuple(BLOCK_TYPES)}

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Of a code."""
        return self.block.bits

    @property
    def block(self) -> BlockType:
        """What the type is."""
        return BLOCK_TYPES[self.type]

    def pack(self, weight: Quantized) -> dict[str, Tensor]:
        if weight.order_I is not None:
            raise ValueError(f"its columns are in an order of their own, which layout {self.name!r} does not store")
        return super().pack(weight)

    def pack_codes(self, codes: Blocks, rows: Rows) -> dict[str, Tensor]:
        parts = {"codes": rows.pack(codes.code_OI, self.bits), "scale": codes.scale_OB.reshape(-1).contiguous()}
        if codes.offset_OB is not None:
            parts["offset"] = codes.offset_OB.reshape(-1).contiguous()
        for part, code_OG in (("scale_codes", codes.scale_code_OG), ("offset_codes", codes.offset_code_OG)):
            if code_OG is not None:
                parts[part] = pack_stream(code_OG.reshape(-1), self.block.scale_bits)
        return parts

    def unpack_codes(self, grid: BlockGrid, code_OK: Tensor, rows: Rows) -> Blocks:
        offset_OB, c_OG, m_OG = (
            None if x is None else x.view(rows.shape[0], -1) for x in (grid.offset_N, grid.c_Γ, grid.m_Γ)
        )
        return Blocks(self.type, code_OK, grid.scale_N.view(rows.shape[0], -1), offset_OB, c_OG, m_OG)

    def read_grid(self, tensors: Mapping[str, Tensor], rows: Rows) -> BlockGrid:
        form = self.block
        O, I = rows.shape
        if I % form.block_size:
            raise ValueError(f"its rows of {I} weights are not whole blocks of {form.block_size}")
        self._check_parts(tensors)
        halves = {}
        for part in ("scale", "offset")[: 1 + form.has_offset]:
            check_parts(tensors, {part: lambda t: t.ndim == 1 and t.dtype == torch.float16})
            if tensors[part].numel() != O * I // form.block_size:
                raise ValueError(f"its {part} has {tensors[part].numel()} values for {O * I // form.block_size} blocks")
            check_finite(tensors, part)
            halves[part] = tensors[part].clone()
        codes: dict[str, Tensor] = {}
        for part in ("scale_codes", "offset_codes")[: (1 + form.has_offset) * bool(form.scale_bits)]:
            check_parts(tensors, {part: is_stream})
            codes[part] = unpack_stream(tensors[part], form.scale_bits, O * I // form.group_size, part)
        c_Γ, m_Γ = codes.get("scale_codes"), codes.get("offset_codes")
        return BlockGrid.of(form, halves["scale"], halves.get("offset"), c_Γ, m_Γ)

    def _check_parts(self, tensors: Mapping[str, Tensor]) -> None:
        unknown: dict[str, Any] = {
            "order": False,
            "offset": self.block.has_offset,
            "scale_codes": self.block.scale_bits,
        }
        unknown["offset_codes"] = self.block.has_offset and self.block.scale_bits
        for part, wanted in unknown.items():
            if part in tensors and not wanted:
                raise ValueError(f"it has a part {part!r}, which type {self.type} does not")

    def store_grid(self, grid: BlockGrid) -> dict[str, Tensor]:
        parts = {"scale": grid.scale_N}
        if grid.offset_N is not None:
            parts["offset"] = grid.offset_N
        for part, code_Γ in (("scale_codes", grid.c_Γ), ("offset_codes", grid.m_Γ)):
            if code_Γ is not None:
                parts[part] = pack_stream(code_Γ, self.block.scale_bits)
        return parts
