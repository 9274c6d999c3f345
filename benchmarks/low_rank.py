"""What a part of low rank is worth beside 2:4 and beside codes, at equal bytes.

python -m benchmarks.low_rank --text wiki.test.raw [--part layers|models] [--threads 1]

`layers`: the error of linears of three blocks of the dense model, on the protocol's calibration windows and on text that
nothing was calibrated on, relative to what the pruner or quantizer leaves alone; factors take 0.5 bits a weight, or 1.
`models`: perplexity by the protocol, and bits with everything counted; the model as it is where it is pruned, the dithered one
where it is quantized.

O: output features, I: input features, N: windows, S: tokens of a window.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.alps import GROUPS
from benchmarks.protocol import (
    SAMPLES,
    SEQ_LEN,
    arguments,
    compress,
    machine,
    measured_once,
    perplexity,
    plain_model,
    prepare,
    split_text,
    table,
)
from secateur.calibration.tokens import Named, windows
from secateur.core.patterns import NM
from secateur.core.registry import LOW_RANKERS
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.lowrank.fitting import fit_factors
from secateur.recipes.low_rank_part import LowRankPart
from secateur.recipes.methods import make

SHARES = (1 / 32, 1 / 16)  # half a bit and a bit a weight, in factors of 16 bits
PATTERN = NM(2, 4)
RUNS: dict[str, tuple[bool, list[str]]] = {
    "ALPS 2:4": (False, ["--prune", "alps", "--pattern", "2:4"]),
    **{
        f"ALPS 2:4, {100 * share:g} % by {method}": (
            False,
            ["--prune", "alps", "--pattern", "2:4", "--low-rank", str(share), "--low-rank-method", method],
        )
        for share in SHARES
        for method in ("admm", "eora")
    },
    "GPTQ 3 bits, groups of 64": (True, ["--quantize", "gptq", "--bits", "3"]),
    "the same, 1.8 % by eora": (True, ["--quantize", "gptq", "--bits", "3", "--low-rank", "0.018"]),
    "GPTQ 3 bits, groups of 32": (True, ["--quantize", "gptq", "--bits", "3", "--group-size", "32"]),
    "GPTQ 3 bits, groups of 64, 6 % by eora": (True, ["--quantize", "gptq", "--bits", "3", "--low-rank", "0.06"]),
    "GPTQ 4 bits, groups of 64": (True, ["--quantize", "gptq", "--bits", "4"]),
}


@torch.no_grad()
def gather(model: Path, texts: list[Path]) -> dict[str, tuple[list[InputStats], list[Tensor]]]:
    """The statistics on each text, and the weights, of groups of linears of three blocks."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    blocks, found = dense.model.layers, {}
    counted: list[InputStats] = []
    for number in (len(blocks) // 5, len(blocks) // 2, len(blocks) * 4 // 5):
        for names in GROUPS:
            linears = [blocks[number].get_submodule(name) for name in names]
            each = [InputStats.empty(linears[0].in_features, Level.GRAM) for _ in texts]

            def add(_: Any, args: Any, each: list[InputStats] = each) -> None:
                each[len(counted)].add(args[0].flatten(0, -2))

            linears[0].register_forward_pre_hook(add)
            found[f"{number}.{names[0]}"] = each, [linear.weight.data for linear in linears]
    for text in texts:
        ids_NS = windows(
            [text.read_text(encoding="utf-8")], tokenizer, SEQ_LEN, SAMPLES, seed=0, named=Named(text.name)
        )
        for batch_NS in ids_NS.split(4):
            dense.model(batch_NS)
        counted.append(next(iter(found.values()))[0][0])
    return found


def layers(args: Any, model: Path, calibration: Path, evaluation: Path) -> None:
    """The table of linears."""
    ways: dict[str, tuple[Callable[[Stack], Tensor], tuple[str, ...]]] = {
        "ALPS 2:4": (lambda stack: make("prune", "alps", {}).prune(stack, PATTERN).W_OI, ("eora", "admm")),
        "Wanda 2:4": (lambda stack: make("prune", "wanda", {}).prune(stack, PATTERN).W_OI, ("eora", "admm")),
        "GPTQ 3 bits": (
            lambda stack: torch.cat([w.dequantize() for w in make("quantize", "gptq", {"bits": 3}).quantize(stack)]),
            ("eora",),
        ),
    }
    rows = []
    for name, (stats, weights) in gather(model, [calibration, evaluation]).items():
        stack = Stack.of(weights, stats[0])
        for way, (solve, methods) in ways.items():
            alone_OI = solve(stack)
            for share in SHARES:
                for method in methods:
                    begun = time.perf_counter()
                    part = LowRankPart(LOW_RANKERS[method](), share, None)
                    ranks = [part.rank_of(O, stack.features) for O in stack.rows]
                    rest = replace(stack, W_OI=stack.W_OI - part.split(stack, ranks, PATTERN))
                    main_OI = alone_OI if method == "eora" else solve(rest)
                    factors = fit_factors(stack, main_OI, ranks)
                    found_OI = main_OI + torch.cat([out.float() @ inner.float() for out, inner in factors])
                    seconds = time.perf_counter() - begun
                    ratios = [
                        (each.energy(found_OI - stack.W_OI).sum() / each.energy(alone_OI - stack.W_OI).sum()).item()
                        for each in stats
                    ]
                    row = [way, name, f"{16 * share:g}", method, "/".join(map(str, ranks))]
                    rows.append([*row, *(f"{ratio:.3f}" for ratio in ratios), f"{seconds:.1f}"])
                    print(rows[-1], flush=True)
    table(["", "linears", "bits more", "method", "ranks", "error", "on other text", "s"], rows)


def models(args: Any, calibration: Path, evaluation: Path) -> None:
    """The table of models."""
    rows = []
    for label, (dithered, options) in RUNS.items():
        if args.only not in label:
            continue
        model = plain_model(args.work, dithered=dithered)

        def measure(model: Path = model, options: list[str] = options) -> dict[str, Any]:
            out = args.work / "low-rank-out"
            report = compress(model, out, [*options, "--no-bos", "--dtype", "bfloat16"], calibration, args.threads)
            return {"bits": report["bits"], "perplexity": perplexity(out, evaluation)}

        found = measured_once(args, "low-rank", f"{dithered} {options}", measure)
        rows.append([label, f"{found['bits']:.2f}", f"{found['perplexity']:.2f}"])
    table(["", "bits", "perplexity"], rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=("layers", "models"), default="layers")
    parser.add_argument("--only", default="", help="only models whose name has this")
    parser.add_argument("--again", action="store_true", help="measure anew what is in the work folder")
    args = parser.parse_args()
    if args.text is None:
        parser.error("--text is needed")
    prepare(args)
    model = plain_model(args.work)
    evaluation, calibration = split_text(args.text, args.work, model)
    print(f"{machine()}\n")
    if args.part == "layers":
        with torch.no_grad():
            layers(args, model, calibration, evaluation)
    else:
        models(args, calibration, evaluation)


if __name__ == "__main__":
    main()
