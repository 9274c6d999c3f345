"""Quantization methods: functions of a weight matrix, its input statistics and a grid or table.

Each method is a file of this folder and registers itself under the name that the user types.
"""

import importlib
import pkgutil

from secateur.quant.registry import QUANTIZERS, Quantizer

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["QUANTIZERS", "Quantizer"]
