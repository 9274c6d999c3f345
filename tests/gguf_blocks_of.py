"""Random blocks of every type, and what they stand for in float64 by the plainest reading of a block."""

import numpy as np
import torch

from secateur.formats.layouts.block_codes import Blocks
from secateur.formats.layouts.block_types import BLOCK_TYPES

TYPES = tuple(BLOCK_TYPES)


def random_blocks(name, O, blocks, seed=0, largest=2.0):
    """Codes that use all that they may, and scales of either sign, some of them zero."""
    form, draw = BLOCK_TYPES[name], torch.Generator().manual_seed(seed)
    I = blocks * form.block_size

    def codes(bits, *shape):
        return torch.randint(0, 2**bits, shape, generator=draw, dtype=torch.uint8)

    def halves():
        x = (torch.rand(O, blocks, generator=draw) * 2 - 1) * largest
        return torch.where(torch.rand(O, blocks, generator=draw) < 0.1, 0, x).half()

    coded = form.scale_bits > 0
    G = blocks * form.groups
    return Blocks(
        name,
        codes(form.bits, O, I),
        halves(),
        halves() if form.has_offset else None,
        codes(form.scale_bits, O, G) if coded else None,
        codes(form.scale_bits, O, G) if coded and form.has_offset else None,
    )


def slowly(blocks):
    """Weight by weight, in float64, of which float32 holds every product and difference here but the last."""
    form = BLOCK_TYPES[blocks.type]
    O, I = blocks.code_OI.shape
    W = np.zeros((O, I))
    for o in range(O):
        for i in range(I):
            b, g, q = i // form.block_size, i // form.group_size, int(blocks.code_OI[o, i])
            scale = float(blocks.scale_OB[o, b])
            offset = 0.0 if blocks.offset_OB is None else float(blocks.offset_OB[o, b])
            if form.scale_bits:
                scale *= int(blocks.scale_code_OG[o, g]) - form.scale_zero
                offset *= 0 if blocks.offset_code_OG is None else int(blocks.offset_code_OG[o, g])
            level = form.levels[q] if form.levels else q if form.has_offset else q - 2 ** (form.bits - 1)
            W[o, i] = np.float32(scale * level) - np.float32(offset)
    return W
