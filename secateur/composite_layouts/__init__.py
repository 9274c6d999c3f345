"""Layouts that are made of other layouts: a file each, which registers itself as those in `formats/layouts` do."""

from secateur.core.registry import import_all

import_all(__name__, __path__)
