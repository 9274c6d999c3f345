"""How compressed weights lie on disk: one codec per layout, the checkpoint reader and writer, transformers' side of loading.

Each layout is a file of this folder and registers itself under the name that a checkpoint's config gives.
"""

from secateur.formats.layouts import bitmap, codebook, nm, packed_int, sparse_int
from secateur.formats.layouts import two_level_int as spqr
from secateur.formats.layouts.layout import LAYOUTS, Layout, layout_from_config

__all__ = ["LAYOUTS", "Layout", "bitmap", "codebook", "layout_from_config", "nm", "packed_int", "sparse_int", "spqr"]
