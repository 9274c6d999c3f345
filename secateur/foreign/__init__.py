"""What others write: each format is a file of this folder and registers itself under what configs call it.

Those of other packages are modules that the entry points of `format.GROUP` name.
"""

from secateur.core.registry import import_all, import_others
from secateur.foreign.format import FOREIGN, GROUP

import_all(__name__, __path__)
import_others(GROUP, "formats")

__all__ = ["FOREIGN"]
