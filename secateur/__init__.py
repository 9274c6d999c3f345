"""secateur prunes and quantizes Hugging Face causal language models without training, and writes smaller checkpoints that load.

Importing it registers its quantizer with transformers, so that `from_pretrained` reads what it wrote.
"""

from secateur._version import __version__
from secateur.checkpoint.verify import verify
from secateur.errors import CheckpointError, SecateurError, UsageError
from secateur.folder.manifest import Problem
from secateur.model.load import load
from secateur.model.transformers.quantizer import backend
from secateur.model.transformers.quantizer import register as _register
from secateur.pipeline.outcome import Progress, Report
from secateur.recipes.recipe import Calibration, Choice, Recipe
from secateur.runs.compress import compress
from secateur.runs.forecast import Forecast, forecast

_register()

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
