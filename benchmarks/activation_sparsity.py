"""What leaving inputs unread costs: perplexity of SmolLM2 by each method, uniform and searched, at 40 and 50 %, on two texts.

    python -m benchmarks.activation_sparsity --text TEXT [--methods teal,wina] [--windows 2]

Each row is a folder that `compress` made and `evaluate` opened: all tokens of a window but the first 8 are treated as if they
were being written (with `coreinfer` the second half of a window, by the first half). Calibrated on the text's last 40 % by the
protocol's windows, of which there are few here.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from typing import Any

from benchmarks.protocol import arguments, plain_model, prepare, split_text
from secateur.evaluation.eval_text import Text
from secateur.evaluation.quality import Runner, evaluate
from secateur.recipes.recipe import Calibration, Recipe
from secateur.runs.compress import compress

LEVELS = (0.4, 0.5)
METHODS: dict[str, dict[str, Any]] = {
    "teal": {},
    "wina": {},
    "wina-threshold": {"keep": "threshold"},
    "rsparse": {},
    "coreinfer": {},
    "griffin": {"neurons": "norm"},
}
NAMES = {"wina-threshold": "wina", "griffin": "coreinfer"}
BY_PROMPT = ("coreinfer", "griffin")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--methods", default="teal,wina,rsparse,coreinfer")
    parser.add_argument("--windows", type=int, default=2, help="of evaluation")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=8, help="windows of calibration")
    args = parser.parse_args()
    if args.text is None:
        parser.error("--text is needed")
    prepare(args)
    model = plain_model(args.work)
    held, calibration = split_text(args.text, args.work, model)
    texts = {"text": str(held), "docs": "docs"}

    def measured(folder: str, level: float | None) -> tuple[list[float], float]:
        found = [
            evaluate(
                folder,
                text=Text(text, args.seq_len, args.windows, bos=False),
                runner=Runner("float32"),
                activation_sparsity=level,
            )
            for text in texts.values()
        ]
        said = found[0].activations
        return [each.quality.perplexity for each in found], 1.0 if said is None else said["share_read"]

    print("| method | allocation | level | read | perplexity | on `docs` | s |\n|---|---|---|---|---|---|---|")
    row("dense", "", 0, 1.0, measured(str(model), None)[0], 0)
    for name in args.methods.split(","):
        recipe = Recipe(
            activations=NAMES.get(name, name),
            gating=METHODS[name],
            calibration=Calibration(str(calibration), args.samples, 512, bos=False),
        )
        for allocation in ("uniform",) if name in BY_PROMPT else ("uniform", "search"):
            out = args.work / f"activations-{name}-{allocation}"
            shutil.rmtree(out, ignore_errors=True)
            began = time.monotonic()
            compress(str(model), out, replace(recipe, allocation=allocation))
            took = time.monotonic() - began
            for level in LEVELS:
                perplexities, read = measured(str(out), level)
                row(name, allocation, level, read, perplexities, took)


def row(name: str, allocation: str, level: float, read: float, perplexities: list[float], seconds: float) -> None:
    first, second = perplexities
    print(
        f"| {name} | {allocation} | {level:.0%} | {read:.1%} | {first:.2f} | {second:.2f} | {seconds:.0f} |", flush=True
    )


if __name__ == "__main__":
    main()
