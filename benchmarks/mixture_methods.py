"""What methods that only mixtures of experts allow are worth: bits for each expert, calibration, experts skipped, ternary rows.

    python -m benchmarks.mixture_methods --model MOE --text TEXT --part bits
    python -m benchmarks.mixture_methods --model MOE --text TEXT --part calibration
    python -m benchmarks.mixture_methods --model MOE --text TEXT --part skipping
    python -m benchmarks.mixture_methods --model MOE --text TEXT --part ternary

MOE is a folder with weights that mean something; TEXT a file, or a folder of them, of each of which the first half (of a
file alone: 60 %) is for evaluation, in windows of 512 tokens. `bits`: at about 2.5 bits a weight, the same for all linears,
shared out by measured divergences, by MC#'s programme, and by QuantMoE-Bench's rules. `calibration`: GPTQ at 3 bits by routed
tokens, by the router's weights, on text of the model's own, balanced or not, and with smoothed experts. `skipping`: 4 bits, and
shares of weaker experts left out. `ternary`: rows of three values. What was measured once is kept in the work
folder (--again measures anew).
"""

from __future__ import annotations

import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from benchmarks.protocol import (
    EVAL_WINDOWS,
    SAMPLES,
    SEQ_LEN,
    arguments,
    compress,
    machine,
    measured_once,
    prepare,
    table,
)
from secateur.calibration.tokens import Named, windows
from secateur.evaluation.perplexity import measure
from secateur.experts.smoothing import smooth_experts
from secateur.recipes.recipe import Calibration
from secateur.runs.expert_use import recipe_of_rules

_TWO = "--quantize gptq --bits 2 --group-size 36"  # 2 + 18/36 bits
_THREE = "--quantize gptq --bits 3 --group-size 32"
_SHARED = "--quantize gptq --target-size 2.5bit --embeddings 16 --head 16 --group-size"
BITS = {
    "uniform, 2 bits in groups of 36": _TWO,
    "by measured divergences, groups of 64": f"{_SHARED} 64",
    "by measured divergences, one choice an expert": f"{_SHARED} 64 --share-choice expert",
    "by measured divergences, one choice a layer": f"{_SHARED} 64 --share-choice layer",
    "3 bits, by measured divergences, one choice an expert": f"{_SHARED} 64 --share-choice expert".replace("2.5", "3"),
    "3 bits, by MC#'s programme, others 4 bits": f"{_SHARED} 64 --allocation mc".replace("2.5", "3"),
    "experts of 2.4 bits by QuantMoE-Bench's rules, others 4 bits": "--group-size 64 RULES 2.4",
    "experts of 3 bits by the same rules": "--group-size 64 RULES 3",
}
CALIBRATION = {
    "routed tokens": _THREE,
    "the router's weights (AGQ)": f"{_THREE} --expert-inputs gate",
    "smoothed experts (EAQuant)": f"{_THREE} SMOOTHED",
    "text of the model's own": f"{_THREE} --calibration self",
    "the same, balanced (1 of 4 windows)": f"{_THREE} --calibration self --expert-balance 4",
}
SKIPPING = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)
TERNARY = {
    "the paper's: least and greatest weight": "--quantize ternary",
    "the same, columns by activation": "--quantize ternary --order activation",
    "values by squared error": "--quantize ternary --search-range --order activation",
    "the paper's, experts alone": "--quantize ternary --targets *.experts.*",
    "GPTQ, 2 bits, groups of 64": "--quantize gptq --bits 2 --group-size 64",
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--part", choices=("bits", "calibration", "skipping", "ternary"), required=True)
    parser.add_argument("--windows", type=int, default=2 * EVAL_WINDOWS, help="of evaluation text")
    parser.add_argument("--cases", default="", help="only cases whose name begins so")
    parser.add_argument("--again", action="store_true", help="measure what is known already, too")
    args = parser.parse_args()
    if args.text is None:
        parser.error("--text is needed")
    prepare(args)
    evaluation, calibration = _texts(args)
    print(machine())
    run = partial(_run, args, evaluation, calibration)
    rows = [
        ["dense", "–", f"{_measured(args, str(args.model), lambda: _perplexity(args, args.model, evaluation)):.2f}"]
    ]
    if args.part == "skipping":
        rows += _skipping(args, run, evaluation)
    else:
        cases = {"bits": BITS, "calibration": CALIBRATION, "ternary": TERNARY}[args.part]
        for name, options in cases.items():
            if name.startswith(args.cases):
                found = measured_once(
                    args, "mixture-methods", f"{args.model} {args.windows} {options}", partial(run, options)
                )
                rows.append([name, f"{found['bits']:.2f}", f"{found['perplexity']:.2f}"])
    table(["case", "bits", "perplexity"], rows)


def _texts(args: Any) -> tuple[list[str], Path]:
    """Texts to measure on, and a file with the rest of them all."""
    files = sorted(args.text.glob("*.txt")) if args.text.is_dir() else [args.text]
    texts = [file.read_text(encoding="utf-8") for file in files]
    calibration = args.work / f"calibration-{args.text.stem}.txt"
    part, most = (0.5 if args.text.is_dir() else 0.6), 12_000_000 // len(texts)
    calibration.write_text("\n\n".join(text[int(len(text) * part) :][:most] for text in texts), encoding="utf-8")
    return [text[: int(len(text) * part)] for text in texts], calibration


def _measured(args: Any, what: str, perplexity: Any) -> float:
    found = measured_once(args, "mixture-methods", f"{what} {args.windows}", lambda: {"perplexity": perplexity()})
    return found["perplexity"]


def _perplexity(args: Any, folder: Path, texts: list[str], **how: Any) -> float:
    """Over all texts, of each as many windows as the others."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = max(1, args.windows // len(texts))
    ids = [windows([text], tokenizer, SEQ_LEN, count, named=Named("evaluation")) for text in texts]
    return measure(secateur.load(folder, dtype=torch.float32, **how), torch.cat(ids)).perplexity


def _run(args: Any, texts: list[str], calibration: Path, options: str) -> dict[str, Any]:
    model, out = args.model, args.work / "mixture-methods-out"
    if options.endswith(" SMOOTHED"):
        model, options = _smoothed(args, calibration), options.removesuffix(" SMOOTHED")
    options, _, bits = options.partition(" RULES ")
    if bits:
        seen = Calibration(str(calibration), SAMPLES, SEQ_LEN)
        file = args.work / "mixture-methods-rules.yaml"
        file.write_text(recipe_of_rules(secateur.expert_use(str(model), seen), float(bits)).to_yaml(), encoding="utf-8")
        options += f" --recipe {file}"
    own = [] if "--calibration" in options else ["--calibration", str(calibration)]
    text = "self" if not own else calibration
    report = compress(model, out, shlex.split(options.replace("--calibration self", "")), text, args.threads)
    return {"bits": report["bits"], "perplexity": _perplexity(args, out, texts)}


def _smoothed(args: Any, calibration: Path) -> Path:
    out = args.work / "mixture-methods-smoothed"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids_NS = windows(
        [calibration.read_text(encoding="utf-8")], tokenizer, SEQ_LEN, SAMPLES, seed=0, named=Named("text")
    )
    vectors = smooth_experts(model, list(ids_NS))
    print("smoothing vectors from", min(float(s.min()) for s in vectors), "to", max(float(s.max()) for s in vectors))
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _skipping(args: Any, run: Any, texts: list[str]) -> list[list[str]]:
    options = "--quantize gptq --bits 4 --group-size 32 --expert-skip 0.3"
    known = [f"{args.model} {options} {share}" for share in SKIPPING]
    out = args.work / "mixture-methods-out"
    made: list[Any] = []

    def at(share: float) -> float:
        made.append(made or run(options))
        return _perplexity(args, out, texts, expert_skip=share)

    return [
        [f"{share:.0%} of the weaker experts skipped", "", f"{_measured(args, what, partial(at, share)):.2f}"]
        for share, what in zip(SKIPPING, known, strict=True)
    ]


if __name__ == "__main__":
    main()
