"""Dictionaries of sparse codes against SVD and structural pruning, and SQ-format against GPTQ and SpQR, at equal bytes.

    python -m benchmarks.factorize --text wiki.test.raw --part dictionary [--sizes 0.7] [--targets "*.1[0-4].*"]
    python -m benchmarks.factorize --text wiki.test.raw --part sq
    python -m benchmarks.factorize --text wiki.test.raw --part inputs

By the protocol on the dithered SmolLM2. `--targets` compresses the linears that it matches and leaves the others dense, for all
methods alike: the whole model takes CoSpaDi long. `--samples` and `--windows`
calibrate and measure on fewer windows. `inputs` measures what inputs in two precisions cost, which are emulated: quantized, and
multiplied in float32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import secateur
from benchmarks import protocol
from benchmarks.protocol import (
    arguments,
    machine,
    measured_once,
    perplexity,
    plain_model,
    prepare,
    split_text,
    table,
)
from secateur.calibration.tokens import Named, windows
from secateur.evaluation.perplexity import measure
from secateur.plugin.packed_modules import packed_linears
from secateur.quant.sq_format import emulated_inputs
from secateur.recipes.recipe import Calibration, Recipe
from secateur.recipes.strings import parse_recipes

DICTIONARY = {
    "SVD": "svd:{size}",
    "CoSpaDi": "cospadi:{size}",
    "CoSpaDi, a dictionary for two blocks": "cospadi:{size}(dictionary_blocks=2)",
    "CoSpaDi, factors in 8 and 6 bits": "cospadi:{size}(dictionary_bits=8, coefficient_bits=6)",
}
STATIC = "sq(high_share=0.03125, static_mask=true)"
SQ = [
    "sq(high_share=0.03125)",
    "sq(high_share=0.125)",
    STATIC,
    "gptq:4(group_size=64)",
    "gptq:4(group_size=32)",
    "spqr:4(group_size=64, outlier_threshold=0.15)",
]
#: Shares of inputs in 8 bits, the others in 4.
SHARES = (0.0, 0.125, 0.25, 0.5, 1.0)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=("dictionary", "sq", "inputs"), required=True)
    parser.add_argument("--sizes", default="0.8,0.7,0.6")
    parser.add_argument("--targets", default="")
    parser.add_argument("--samples", type=int, default=protocol.SAMPLES)
    parser.add_argument("--windows", type=int, default=protocol.EVAL_WINDOWS)
    parser.add_argument("--again", action="store_true", help="measure what is known already, too")
    args = parser.parse_args()
    prepare(args)
    if args.text is None:
        parser.error("--text is needed")
    protocol.EVAL_WINDOWS = args.windows
    model = plain_model(args.work, dithered=True)
    evaluation, calibration = split_text(args.text, args.work, model)
    text = Calibration(str(calibration), args.samples, protocol.SEQ_LEN)

    def measured(name: str, recipe: Recipe) -> dict[str, Any]:
        """Bits, error, perplexity and seconds."""

        def run() -> dict[str, Any]:
            report = secateur.compress(str(model), args.work / "out", replace(recipe, calibration=text), overwrite=True)
            told = {
                "bits": report.bits,
                "seconds": report.seconds,
                "perplexity": perplexity(args.work / "out", evaluation),
            }
            return told | {"error": sum(linear.error for linear in report.linears) / len(report.linears)}

        return measured_once(args, "factorize", f"{name} {args.targets} {args.samples} {args.windows}", run)

    def row(name: str, recipe: Recipe, bits: float | None = None) -> list[str]:
        found = measured(name, recipe)
        figures = f"{bits or found['bits']:.2f}", f"{found['error']:.4f}", f"{found['perplexity']:.2f}"
        return [name, *figures, f"{found['seconds']:.0f}"]

    def recipe_of(words: str) -> Recipe:
        return replace(parse_recipes(words)[0][1], targets=(args.targets,) if args.targets else ())

    headings = ["method", "bits", "mean error", "perplexity", "seconds"]
    print(f"{machine()}\n\ndense: {perplexity(model, evaluation):.3f}\n")
    if args.part == "dictionary":
        rows = []
        for size in map(float, args.sizes.split(",")):
            settings = {name: words.format(size=size) for name, words in DICTIONARY.items()}
            rows += [row(f"{name}, {size:g}", recipe_of(words)) for name, words in settings.items()]
            if not args.targets:
                less = Recipe("sparsegpt", round(1 - size, 4), "structured", units="neurons,heads,blocks")
                rows.append(row(f"structural pruning, {size:g} of the weights", less, 16 * size))
        table(headings, rows)
    elif args.part == "sq":
        table(headings, [row(f"`{words}`", recipe_of(words)) for words in SQ])
    else:
        secateur.compress(str(model), args.work / "out", replace(recipe_of(STATIC), calibration=text), overwrite=True)
        rows = [[f"{share:g}", f"{_with_inputs(args.work / 'out', share, evaluation):.2f}"] for share in SHARES]
        table(["inputs in 8 bits, the others in 4 (emulated)", "perplexity"], rows)


def _with_inputs(folder: Path, share: float, evaluation: Path) -> float:
    """Perplexity where the inputs of all linears are quantized, the first ones by the static mask in 8 bits."""
    with secateur.backend("torch"):
        model = secateur.load(folder, dtype=torch.float32)
    weights: dict[str, Any] = {name: module.packed() for name, module in packed_linears(model)}
    orders = {name: weight.low.order_I.long() for name, weight in weights.items()}

    def hook(order_I: torch.Tensor) -> Any:
        def quantize(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x_TI = inputs[0].flatten(0, -2)
            return (emulated_inputs(x_TI, order_I, share, (8, 4), 64).view_as(inputs[0]), *inputs[1:])

        return quantize

    for name, order_I in orders.items():
        model.get_submodule(name).register_forward_pre_hook(hook(order_I))
    words = evaluation.read_text(encoding="utf-8")
    ids_KS = windows(
        [words],
        AutoTokenizer.from_pretrained(folder),
        protocol.EVAL_SEQ_LEN,
        protocol.EVAL_WINDOWS,
        named=Named("evaluation"),
    )
    return measure(model, ids_KS).perplexity


if __name__ == "__main__":
    main()
