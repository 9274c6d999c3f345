"""Which layout stores a weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from secateur.core.quantized import Quantized
from secateur.formats.layouts.columns import Columns
from secateur.formats.layouts.columns_bitmap import ColumnsBitmap
from secateur.formats.layouts.columns_int import ColumnsInt
from secateur.formats.layouts.layout import Layout
from secateur.formats.layouts.packed_int import PackedInt
from secateur.formats.layouts.sparse_int import SparseInt


def layout_for(weight: Quantized) -> Layout:
    """The layout that stores a weight with codes of its family; `sparse-int` around it where only some weights are kept."""
    layout: Any = weight.codes.layout(weight.dtype)
    return layout if weight.keep_OI is None else SparseInt(layout)


def layout_by_inputs(weight: Any, sparse: bool = False) -> Layout:
    """The layout that stores a weight by input feature.

    Args:
        weight: a dense tensor `[O, I]` or a `Quantized`.
        sparse: whether a dense tensor is stored without its zeros.

    Raises:
        ValueError: there is none: half a sentence with what is in the way and what to do.
    """
    if isinstance(weight, Tensor):
        return ColumnsBitmap() if sparse else Columns()
    if weight.order_I is not None:
        raise ValueError(
            "its columns are stored in another order, which has no form by input feature: quantize with `order` activation"
        )
    layout: Any = layout_for(weight)
    if weight.outliers is not None or layout.name != PackedInt.name:
        outliers = " with outliers" if weight.outliers is not None else ""
        raise ValueError(
            f"layout {layout.name!r}{outliers} has no form by input feature: prune or quantize alone, with the "
            "uniform grid of rtn or gptq"
        )
    return ColumnsInt(layout.bits, layout.group_size, layout.symmetric, layout.dtype)
