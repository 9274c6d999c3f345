"""secateur prunes and quantizes Hugging Face causal language models without training, and writes smaller checkpoints that load.

Importing it registers its quantizer with transformers, so that `from_pretrained` reads what it wrote. Neither transformers nor
torch is imported before something is used that needs it.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from secateur._version import __version__
from secateur.registration import register_later as _register_later

if TYPE_CHECKING:
    from secateur.checkpoint.verify import verify
    from secateur.errors import CheckpointError, SecateurError, UsageError
    from secateur.folder.manifest import Problem
    from secateur.model.load import load
    from secateur.model.transformers.quantizer import backend
    from secateur.pipeline.outcome import Progress, Report
    from secateur.recipes.recipe import Calibration, Choice, Recipe
    from secateur.runs.compress import compress
    from secateur.runs.forecast import Forecast, forecast

__all__ = [
    "Calibration",
    "CheckpointError",
    "Choice",
    "Forecast",
    "Problem",
    "Progress",
    "Recipe",
    "Report",
    "SecateurError",
    "UsageError",
    "__version__",
    "backend",
    "compress",
    "forecast",
    "load",
    "verify",
]
_HOMES = {
    "checkpoint.verify": ["verify"],
    "errors": ["CheckpointError", "SecateurError", "UsageError"],
    "folder.manifest": ["Problem"],
    "model.transformers.quantizer": ["backend"],
    "model.load": ["load"],
    "pipeline.outcome": ["Progress", "Report"],
    "recipes.recipe": ["Calibration", "Choice", "Recipe"],
    "runs.compress": ["compress"],
    "runs.forecast": ["Forecast", "forecast"],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

_register_later()
# What is logged is for programs that ask for it: Python would print warnings otherwise.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
