"""The layout for a quantized weight."""

from __future__ import annotations

from typing import Any

from secateur.core.quantized import Quantized
from secateur.formats.layouts.layout import Layout
from secateur.formats.layouts.sparse_int import SparseInt


def layout_for(weight: Quantized) -> Layout:
    """The layout that stores a weight with codes of its family; `sparse-int` around it where only some weights are kept."""
    layout: Any = weight.codes.layout(weight.dtype)
    return layout if weight.keep_OI is None else SparseInt(layout)
