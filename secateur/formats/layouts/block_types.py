"""The types of blocks that GGUF files know: how many bits codes, scales and offsets have, and how many weights share them.

Every block of a row has a scale, and some types an offset, in float16. Where a type has codes of scales, a block has several
groups, each with a scale of its own: that of the block times a code.
"""

from __future__ import annotations

from dataclasses import dataclass

# The levels of the types with "NL" or "XS" in their names, which are not evenly spaced.
_UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockType:
    """One type: w = scale · (code − 2^(bits − 1)), scale · code − offset, or scale · level[code].

    Attributes:
        name: as GGUF has it.
        number: by which files name it.
        bits: of a code.
        group_size: weights that share a scale.
        block_size: weights that share what is stored in float16; rows are whole blocks.
        scale_bits: of the code of a group's scale; 0: the scale is that of the block.
        scale_zero: the code of a scale that is zero.
        has_offset: whether an offset is taken away, the block's times a code of `scale_bits` bits; else the grid has zero in
            its middle.
        levels: what codes stand for before they are scaled, where they are not evenly spaced.
        fallback: the type that takes its place where it does not divide a row, as llama.cpp's quantizer does it.
    """

    name: str
    number: int
    bits: int
    group_size: int
    block_size: int
    scale_bits: int = 0
    scale_zero: int = 0
    has_offset: bool = False
    levels: tuple[int, ...] = ()
    fallback: str = ""

    @property
    def groups(self) -> int:
        """Of a block."""
        return self.block_size // self.group_size

    @property
    def nbytes(self) -> int:
        """Of a block."""
        codes = self.bits * self.block_size + self.scale_bits * self.groups * (1 + self.has_offset)
        return codes // 8 + 2 * (1 + self.has_offset)

    @property
    def bits_per_weight(self) -> float:
        """All that is stored."""
        return 8 * self.nbytes / self.block_size


BLOCK_TYPES = {
    each.name: each
    for each in (
        BlockType("Q4_0", 2, 4, 32, 32),
        BlockType("Q4_1", 3, 4, 32, 32, has_offset=True),
        BlockType("Q5_0", 6, 5, 32, 32),
        BlockType("Q5_1", 7, 5, 32, 32, has_offset=True),
        BlockType("Q8_0", 8, 8, 32, 32),
        BlockType("Q2_K", 10, 2, 16, 256, 4, has_offset=True, fallback="IQ4_NL"),
        BlockType("Q3_K", 11, 3, 16, 256, 6, 32, fallback="IQ4_NL"),
        BlockType("Q4_K", 12, 4, 32, 256, 6, has_offset=True, fallback="Q5_0"),
        BlockType("Q5_K", 13, 5, 32, 256, 6, has_offset=True, fallback="Q5_1"),
        BlockType("Q6_K", 14, 6, 16, 256, 8, 128, fallback="Q8_0"),
        BlockType("IQ4_NL", 20, 4, 32, 32, levels=_UNEVEN),
        BlockType("IQ4_XS", 23, 4, 32, 256, 6, 32, levels=_UNEVEN, fallback="IQ4_NL"),
    )
}


def type_for(name: str, features: int) -> BlockType | None:
    """The type for rows of so many weights: the one of that name, or that which takes its place; None where none fits."""
    found = BLOCK_TYPES[name]
    if features % found.block_size and found.fallback:
        found = BLOCK_TYPES[found.fallback]
    return None if features % found.block_size else found
