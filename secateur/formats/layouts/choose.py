"""The layout for a quantized weight."""

from __future__ import annotations

from secateur.core.quantized import Quantized, TwoLevel, Uniform
from secateur.formats.layouts.codebook import Codebook
from secateur.formats.layouts.coded import QuantizedLayout
from secateur.formats.layouts.layout import Layout
from secateur.formats.layouts.packed_int import PackedInt
from secateur.formats.layouts.sparse_int import SparseInt
from secateur.formats.layouts.two_level_int import SpQRLayout


def layout_for(weight: Quantized) -> Layout:
    """The layout that stores a weight with codes of its kind; `sparse-int` around it where only some weights are kept."""
    codes = weight.codes
    layout: QuantizedLayout
    if isinstance(codes, Uniform):
        layout = PackedInt(codes.bits, codes.group_size, codes.zero_OG is None, weight.dtype)
    elif isinstance(codes, TwoLevel):
        layout = SpQRLayout(codes.bits, codes.group_size, codes.scale_bits, codes.tile_rows, weight.dtype)
    else:
        layout = Codebook(codes.bits, weight.dtype)
    return layout if weight.keep_OI is None else SparseInt(layout)
