"""secateur prunes and quantizes Hugging Face causal language models without training, and writes smaller checkpoints that load.

Importing it registers its quantizer with transformers, so that `from_pretrained` reads what it wrote.
"""

from secateur._version import __version__
from secateur.errors import CheckpointError, SecateurError, UsageError
from secateur.formats.hf import backend
from secateur.formats.hf import register as _register
from secateur.formats.manifest import Problem
from secateur.pipeline.compress import compress
from secateur.pipeline.forecast import Forecast, forecast
from secateur.pipeline.load import load
from secateur.pipeline.report import Progress, Report
from secateur.pipeline.verify import verify
from secateur.recipe import Calibration, Choice, Quantization, Recipe

_register()

__all__ = [
    "Calibration",
    "CheckpointError",
    "Choice",
    "Forecast",
    "Problem",
    "Progress",
    "Quantization",
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
