"""How one weight lies on disk: a codec a layout, and where weights are codes, the family that they are of.

Each layout is a file of this folder, or of `composite_layouts`, and registers itself under the name that a checkpoint's config
gives; those of other packages are modules that the entry points of `layout.GROUP` name.
"""

import secateur.composite_layouts  # noqa: F401 - they register themselves
from secateur.core.registry import import_all, import_others
from secateur.formats.layouts.layout import GROUP, LAYOUTS, Layout, layout_from_config

import_all(__name__, __path__)
import_others(GROUP, "layouts")

__all__ = ["LAYOUTS", "Layout", "layout_from_config"]
