"""Codes of others on a grid that we have, too: the layout of ours that holds them, to the bit."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from secateur.core.quantized import Quantized
from secateur.formats.layouts.choose import layout_for
from secateur.formats.layouts.coded import HALF_DTYPES
from secateur.formats.layouts.layout import Layout
from secateur.formats.layouts.packed_int import Uniform


def as_ours(weight: Quantized, codes: Uniform) -> tuple[Layout, dict[str, Tensor]] | None:
    """The layout that stores a weight, and its tensors; None where no scales of ours are the same numbers.

    Ours have 16 bits, and are positive.

    Args:
        weight: to be stored.
        codes: its codes.
    """
    scale_OG = codes.scale_OG
    if not (scale_OG > 0).all():
        return None
    for dtype in HALF_DTYPES:
        half_OG = scale_OG.to(dtype)
        if torch.equal(half_OG.to(scale_OG.dtype), scale_OG):
            same = replace(weight, codes=replace(codes, scale_OG=half_OG))
            layout = layout_for(same)
            return layout, layout.pack(same)
    return None
