"""Methods that split off a part of low rank, so that what is left is easier to prune or to quantize.

Each method is a file of this folder and registers itself under the name that the user types.
"""

from secateur.core.discovery import import_all

import_all(__name__, __path__)
