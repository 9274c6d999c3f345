"""Pruning methods: functions of a weight matrix, its input statistics and a sparsity pattern.

Each method is a file of this folder and registers itself under the name that the user types.
"""

from secateur.core.discovery import import_all

import_all(__name__, __path__)
