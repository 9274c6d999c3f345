"""Pruning methods: functions of a weight matrix, its input statistics and a sparsity pattern.

Each method is a file of this folder and registers itself under the name that the user types.
"""

import importlib
import pkgutil

from secateur.prune.registry import PRUNERS, REFINERS, Pruned, Pruner, Refiner

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["PRUNERS", "REFINERS", "Pruned", "Pruner", "Refiner"]
