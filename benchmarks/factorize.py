"""Dictionaries of sparse codes against SVD and structural pruning, and SQ-format against GPTQ and SpQR, at equal bytes.

    python -m benchmarks.factorize --text wiki.test.raw --part dictionary [--sizes 0.7] [--targets "*.1[0-4].*"]
    python -m benchmarks.factorize --text wiki.test.raw --part sq
    python -m benchmarks.factorize --text wiki.test.raw --part inputs

By the protocol on the dithered SmolLM2. `--targets` compresses the linears that it matches and leaves the others dense, for all
methods alike: the whole model by CoSpaDi takes a quarter of an hour at each size on one core. `--windows` measures on fewer
windows. `inputs` measures what inputs in two precisions cost, which are emulated: quantized, and multiplied in float32.
"""

from __future__ import annotations

import shlex
from typing import Any

import torch

import secateur
from benchmarks import protocol
from benchmarks.protocol import (
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
from secateur.evaluation.perplexity import measure
from secateur.plugin.packed_modules import packed_linears
from secateur.quant.sq_format import emulated_inputs

DICTIONARY = {
    "CoSpaDi": "--factorize cospadi --size {size}",
    "CoSpaDi, factors in 8 and 6 bits": "--factorize cospadi --size {size} --dictionary-bits 8 --coefficient-bits 6",
    "SVD": "--factorize svd --size {size}",
}
STRUCTURED = "--prune sparsegpt --pattern structured --units neurons,heads,blocks --sparsity {gone}"
SQ = [
    "--quantize sq --high-bits 8 --low-bits 4 --high-share 0.03125 --bank 64",
    "--quantize sq --high-bits 8 --low-bits 4 --high-share 0.125 --bank 64",
    "--quantize gptq --bits 4 --group-size 64",
    "--quantize gptq --bits 4 --group-size 32",
    "--quantize spqr --bits 4 --group-size 64 --outlier-threshold 0.15",
]
#: Shares of inputs in 8 bits, the others in 4.
SHARES = (0.0, 0.125, 0.25, 0.5, 1.0)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=("dictionary", "sq", "inputs"), required=True)
    parser.add_argument("--sizes", default="0.8,0.7,0.6")
    parser.add_argument("--targets", default="")
    parser.add_argument("--windows", type=int, default=protocol.EVAL_WINDOWS)
    parser.add_argument("--again", action="store_true", help="measure what is known already, too")
    args = parser.parse_args()
    prepare(args)
    if args.text is None:
        parser.error("--text is needed")
    protocol.EVAL_WINDOWS = args.windows
    model = plain_model(args.work, dithered=True)
    evaluation, calibration = split_text(args.text, args.work, model)
    targets = ["--targets", args.targets] if args.targets else []

    def measured(options: str, plain: bool = False) -> dict[str, Any]:
        """Bits, error, perplexity and seconds; `plain`: of all linears, whatever is said of targets."""
        words = shlex.split(options) + ([] if plain else targets)

        def run() -> dict[str, Any]:
            out = args.work / "out"
            report = compress(model, out, words, calibration, args.threads)
            told = {"bits": report["bits"], "seconds": report["seconds"], "perplexity": perplexity(out, evaluation)}
            return told | {"error": sum(linear["error"] for linear in report["linears"]) / len(report["linears"])}

        return measured_once(args, "factorize", f"{words} {args.windows}", run)

    print(f"{machine()}\n\ndense: {perplexity(model, evaluation):.3f}\n")
    if args.part == "dictionary":
        rows = []
        for size in map(float, args.sizes.split(",")):
            settings = {name: options.format(size=size) for name, options in DICTIONARY.items()}
            rows += [_row(f"{name}, {size:g}", measured(options)) for name, options in settings.items()]
            if not targets:
                structured = measured(STRUCTURED.format(gone=round(1 - size, 4)), plain=True)
                rows.append(_row(f"structural pruning, {size:g} of the weights", {**structured, "bits": 16 * size}))
        table(["method", "bits", "mean error", "perplexity", "seconds"], rows)
    elif args.part == "sq":
        table(["setting", "bits", "mean error", "perplexity", "seconds"], [_row(o, measured(o)) for o in SQ])
    else:
        out = args.work / "static"
        compress(model, out, shlex.split(f"{SQ[0]} --static-mask") + targets, calibration, args.threads)
        ids_KS = windows([evaluation.read_text(encoding="utf-8")], _tokenizer(out), protocol.EVAL_SEQ_LEN,
                         args.windows, named=Named("evaluation"))  # fmt: skip
        rows = [[f"{share:g}", f"{_with_inputs(out, share, ids_KS):.2f}"] for share in SHARES]
        table(["inputs in 8 bits, the others in 4 (emulated)", "perplexity"], rows)


def _row(name: str, found: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{found['bits']:.2f}",
        f"{found['error']:.4f}",
        f"{found['perplexity']:.2f}",
        f"{found['seconds']:.0f}",
    ]


def _tokenizer(folder: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _with_inputs(folder: Any, share: float, ids_KS: torch.Tensor) -> float:
    """Perplexity where the inputs of all linears are quantized, the first ones by the static mask in 8 bits."""
    with secateur.backend("torch"):
        model = secateur.load(folder, dtype=torch.float32)
    weights: dict[str, Any] = {name: module.packed() for name, module in packed_linears(model).items()}
    orders = {name: weight.low.order_I.long() for name, weight in weights.items()}

    def hook(order_I: torch.Tensor) -> Any:
        def quantize(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x_TI = inputs[0].flatten(0, -2)
            return (emulated_inputs(x_TI, order_I, share, (8, 4), 64).view_as(inputs[0]), *inputs[1:])

        return quantize

    for name, order_I in orders.items():
        model.get_submodule(name).register_forward_pre_hook(hook(order_I))
    return measure(model, ids_KS).perplexity


if __name__ == "__main__":
    main()
