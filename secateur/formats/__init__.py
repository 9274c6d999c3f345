"""How compressed weights lie on disk: one codec per layout, the checkpoint reader and writer, transformers' side of loading.

Each layout is a file of this folder and registers itself under the name that a checkpoint's config gives.
"""

from secateur.formats import bitmap, codebook, nm, packed_int, sparse_int, spqr
from secateur.formats.layout import LAYOUTS, Layout, layout_from_config

__all__ = ["LAYOUTS", "Layout", "bitmap", "codebook", "layout_from_config", "nm", "packed_int", "sparse_int", "spqr"]
