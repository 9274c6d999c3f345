"""Perplexity of the quantizers by the protocol, on the dithered model: against other people's code, from 2 to 8 bits, and with
pruning at the same bytes.

    python -m benchmarks.quantize --text wiki.test.raw --part reference
    python -m benchmarks.quantize --text wiki.test.raw --part curve --plot docs/quantization.svg
    python -m benchmarks.quantize --text wiki.test.raw --part sparse
    python -m benchmarks.quantize --text wiki.test.raw --part trellis
    python -m benchmarks.quantize --part encode

Bits are those of the linears with everything on disk counted. What was measured once is kept in the work folder by its options
(--again measures anew), so a run that was stopped goes on.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

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
from secateur.solvers.trellis import encode

LLMC, AUTHORS = "llm-compressor 0.14.0.1", "the authors' code"
SPQR = "--quantize spqr --bits 3 --group-size 16 --outlier-threshold 0.2 --no-search-range"
# Options, the reference figure of the same setting, and whose code gave it.
REFERENCE: list[tuple[str, float, str]] = [
    ("--quantize gptq --bits 4 --group-size 64 --no-search-range", 32.78, LLMC),
    ("--quantize gptq --bits 4 --group-size 64", 32.78, LLMC),
    ("--quantize gptq --bits 3 --group-size 64 --no-search-range", 66.98, LLMC),
    ("--quantize gptq --bits 3 --group-size 64", 66.98, LLMC),
    (f"{SPQR} --order natural --damping 1", 35.17, AUTHORS),
    (f"{SPQR} --order permuted --damping 1", 34.20, AUTHORS),
    (f"{SPQR} --order permuted --damping 0.01", 34.28, AUTHORS),
    ("--quantize spqr --bits 3 --group-size 16 --outlier-threshold 0.2", 34.28, AUTHORS),
]
CURVE: dict[str, list[str]] = {
    "RTN, groups of 64": [f"--quantize rtn --bits {bits} --group-size 64" for bits in (2, 3, 4, 8)],
    "GPTQ, groups of 64": [f"--quantize gptq --bits {bits} --group-size 64" for bits in (2, 3, 4, 8)],
    "GPTQ, groups of 128, symmetric": ["--quantize gptq --bits 4 --group-size 128 --symmetric"],
    "SpQR": [
        f"--quantize spqr --bits {bits} --group-size {group} {outliers}"
        for bits, group, outliers in (
            (2, 32, "--outlier-share 0"),
            (2, 16, "--outlier-threshold 1"),
            (3, 64, "--outlier-threshold 1"),
            (3, 32, "--outlier-share 0"),
            (3, 32, "--outlier-threshold 0.5"),
            (3, 16, "--outlier-threshold 0.5"),
            (3, 16, "--outlier-threshold 0.2"),
            (4, 128, "--outlier-share 0"),
            (4, 64, "--outlier-share 0"),
            (4, 64, "--outlier-threshold 0.3"),
            (4, 64, "--outlier-threshold 0.2"),
            (4, 32, "--outlier-threshold 0.2"),
        )
    ],
    "SqueezeLLM": [
        *(f"--quantize squeezellm --bits {bits}" for bits in (2, 3, 4)),
        "--quantize squeezellm --bits 3 --outlier-share 0 --sensitive-share 0",
        "--quantize squeezellm --bits 4 --sensitivity hessian",
    ],
    "Trellis": [f"--quantize trellis --bits {bits}" for bits in (2, 3, 4)],
}
SPARSE: list[str] = [
    "--prune sparsegpt --sparsity 0.5 --quantize gptq --bits 3 --group-size 64",
    "--prune sparsegpt --sparsity 0.5 --quantize gptq --bits 4 --group-size 64",
    "--prune sparsegpt --pattern 2:4 --quantize gptq --bits 4 --group-size 64",
    "--prune sparsegpt --sparsity 0.3 --quantize gptq --bits 4 --group-size 64",
    "--prune sparsegpt --sparsity 0.3 --quantize spqr --bits 3 --group-size 32 --outlier-threshold 0.5",
    "--prune wanda --sparsity 0.5 --quantize rtn --bits 4 --group-size 64",
]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=("reference", "curve", "sparse", "trellis", "encode"), required=True)
    parser.add_argument("--plot", type=Path, help="where the curve goes, as SVG or PNG")
    parser.add_argument("--again", action="store_true", help="measure what is known already, too")
    args = parser.parse_args()
    prepare(args)
    if args.part == "encode":
        print(f"{machine()}\n")
        return table(["bits", "states", "million weights a second"], list(_encoding()))
    if args.text is None:
        parser.error("--text is needed")
    model = plain_model(args.work, dithered=True)
    evaluation, calibration = split_text(args.text, args.work, model)

    def measured(options: str) -> dict[str, Any]:
        """Bits, perplexity, seconds, and how much larger than its bits the files are."""
        return measured_once(args, "quantize", options, lambda: measure(options))

    def measure(options: str) -> dict[str, Any]:
        out = args.work / "out"
        report = compress(model, out, shlex.split(options), calibration, args.threads)
        linears = sum(linear["bytes"] for linear in report["linears"])
        weights = sum(linear["shape"][0] * linear["shape"][1] for linear in report["linears"])
        plain = 4 * (report["parameters"] - weights)
        return {
            "options": options,
            "bits": report["bits"],
            "outliers": sum(n["outliers"] * n["shape"][0] * n["shape"][1] for n in report["linears"]) / weights,
            "sparsity": report["sparsity"],
            "perplexity": perplexity(out, evaluation),
            "seconds": report["seconds"],
            "over": report["bytes"] / (linears + plain) - 1,
            "over_linears": (report["bytes"] - plain) / linears - 1,
        }

    print(f"{machine()}\n\ndense: {perplexity(model, evaluation):.3f}\n")
    if args.part == "reference":
        rows = []
        for options, reference, whose in REFERENCE:
            found = measured(options)
            against = f"{found['perplexity'] / reference - 1:+.2%}"
            rows.append([*_cells(found), f"{reference:g} ({whose})", against, f"{found['over_linears']:+.2%}"])
        table(["setting", "bits", "outliers", "perplexity", "reference", "against it", "files over the bits"], rows)
    elif args.part == "curve":
        curves = {name: [measured(options) for options in settings] for name, settings in CURVE.items()}
        table(["setting", "bits", "outliers", "perplexity"], [_cells(f) for found in curves.values() for f in found])
        if args.plot:
            _plot(curves, perplexity(model, evaluation), args.plot)
    elif args.part == "trellis":
        rows = [[*_cells(f), f"{f['seconds']:.0f}"] for f in map(measured, CURVE["Trellis"])]
        table(["setting", "bits", "outliers", "perplexity", "seconds"], rows)
    else:
        found = sorted(map(measured, SPARSE + CURVE["SpQR"] + CURVE["GPTQ, groups of 64"]), key=lambda f: f["bits"])
        table(
            ["setting", "bits", "outliers", "perplexity", "removed"],
            [[*_cells(f), f"{f['sparsity']:.0%}" if f["sparsity"] else "–"] for f in found],
        )


def _encoding() -> Iterator[list[str]]:
    """How fast symbols are found for weights in rings of 256, the best of five runs."""
    for bits, state_bits in ((2, 12), (3, 12), (4, 12), (3, 8), (3, 10), (3, 14), (3, 16)):
        x_NT = torch.randn(2 ** (21 - state_bits), 256, generator=torch.Generator().manual_seed(0))
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            encode(x_NT, bits, state_bits)
            seconds.append(time.perf_counter() - start)
        yield [str(bits), str(2**state_bits), f"{x_NT.numel() / min(seconds) / 1e6:.2f}"]


def _cells(found: dict[str, Any]) -> list[str]:
    outliers = f"{found['outliers']:.2%}" if found["outliers"] else "–"
    return [f"`{found['options']}`", f"{found['bits']:.2f}", outliers, f"{found['perplexity']:.2f}"]


def _plot(curves: dict[str, list[dict[str, Any]]], dense: float, file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for marker, (name, points) in zip("soDv^*", curves.items(), strict=False):
        points = sorted(points, key=lambda f: f["bits"])
        axes.plot([f["bits"] for f in points], [f["perplexity"] for f in points], marker, label=name, linestyle=":")
    axes.axhline(dense, color="grey", linewidth=1)
    axes.annotate("dense", (8.2, dense), va="bottom", ha="right", color="grey")
    axes.set(xlabel="bits per weight of the linears, everything on disk counted", ylabel="perplexity", yscale="log")
    axes.set_title("SmolLM2-135M-Instruct, dithered, WikiText-2, 12 × 1024 tokens")
    axes.set_ylim(dense * 0.95, 300)
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
