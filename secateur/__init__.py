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
    from secateur.checkpoint.export import export
    from secateur.checkpoint.inspect import Inspection, inspect
    from secateur.checkpoint.verify import verify
    from secateur.errors import CheckpointError, SecateurError, UsageError
    from secateur.evaluation.eval_text import Text
    from secateur.evaluation.gate.baseline import Baseline, write_baseline
    from secateur.evaluation.gate.gate import GateResult, gate
    from secateur.evaluation.gate.tolerances import Tolerances
    from secateur.evaluation.quality import Evaluation, Runner, evaluate
    from secateur.experts.use_of_experts import ExpertUse
    from secateur.folder.manifest import Problem
    from secateur.gates.running import activations
    from secateur.model.load import load
    from secateur.pipeline.outcome import Progress, Report
    from secateur.plugin.quantizer import backend
    from secateur.recipes.built_in import recipe
    from secateur.recipes.recipe import Calibration, Choice, Recipe
    from secateur.recipes.strings import parse_recipes
    from secateur.report.sweep_result import SweepResult
    from secateur.runs.compress import compress
    from secateur.runs.expert_use import expert_use
    from secateur.runs.forecast import Forecast, forecast
    from secateur.runs.generate import generate
    from secateur.runs.sweep import Sweep, sweep
    from secateur.search.probe import BlockProbe, ProbeResult, probe
    from secateur.speed.bench import bench
    from secateur.speed.bench_result import Bench

__all__ = [
    "Baseline",
    "Bench",
    "BlockProbe",
    "Calibration",
    "CheckpointError",
    "Choice",
    "Evaluation",
    "ExpertUse",
    "Forecast",
    "GateResult",
    "Inspection",
    "ProbeResult",
    "Problem",
    "Progress",
    "Recipe",
    "Report",
    "Runner",
    "SecateurError",
    "Sweep",
    "SweepResult",
    "Text",
    "Tolerances",
    "UsageError",
    "__version__",
    "activations",
    "backend",
    "bench",
    "compress",
    "evaluate",
    "expert_use",
    "export",
    "forecast",
    "gate",
    "generate",
    "inspect",
    "load",
    "parse_recipes",
    "probe",
    "recipe",
    "sweep",
    "verify",
    "write_baseline",
]
_HOMES = {
    "checkpoint.export": ["export"],
    "checkpoint.inspect": ["Inspection", "inspect"],
    "checkpoint.verify": ["verify"],
    "experts.use_of_experts": ["ExpertUse"],
    "errors": ["CheckpointError", "SecateurError", "UsageError"],
    "speed.bench": ["bench"],
    "speed.bench_result": ["Bench"],
    "evaluation.eval_text": ["Text"],
    "evaluation.gate.baseline": ["Baseline", "write_baseline"],
    "evaluation.gate.gate": ["GateResult", "gate"],
    "evaluation.gate.tolerances": ["Tolerances"],
    "evaluation.quality": ["Evaluation", "Runner", "evaluate"],
    "folder.manifest": ["Problem"],
    "gates.running": ["activations"],
    "model.load": ["load"],
    "plugin.quantizer": ["backend"],
    "pipeline.outcome": ["Progress", "Report"],
    "recipes.built_in": ["recipe"],
    "recipes.recipe": ["Calibration", "Choice", "Recipe"],
    "recipes.strings": ["parse_recipes"],
    "report.sweep_result": ["SweepResult"],
    "runs.compress": ["compress"],
    "runs.expert_use": ["expert_use"],
    "runs.forecast": ["Forecast", "forecast"],
    "runs.generate": ["generate"],
    "runs.sweep": ["Sweep", "sweep"],
    "search.probe": ["BlockProbe", "ProbeResult", "probe"],
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
