"""Computing with packed weights: `prepare` one for a backend, and `linear` multiplies by it.

Each backend is a file that is called `…_backend`, here or a folder below, and registers itself under the name that the user
types; those of other packages are modules that the entry points of `backends.GROUP` name.
"""

from secateur.core.discovery import import_all, import_others
from secateur.kernels.backends import AUTO, BACKENDS, GROUP, Prepared, check_backend, choose, linear, prepare

import_all(__name__, __path__, "_backend")
import_others(GROUP, "backends")

__all__ = ["AUTO", "BACKENDS", "Prepared", "check_backend", "choose", "linear", "prepare"]
