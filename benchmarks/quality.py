"""Perplexity of every method and pattern by the protocol, beside the figures of other people's code.

    python -m benchmarks.quality --text wiki.test.raw [--only wanda]
    python -m benchmarks.quality --text wiki.test.raw --calibration    # by the text of calibration: the protocol's, self, docs

What the model writes itself depends on the seed: with `--calibration` it is drawn for each of `--seeds`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.protocol import (
    arguments,
    compress,
    machine,
    perplexity,
    plain_model,
    prepare,
    prune_options,
    split_text,
    table,
)

# Whose code gave the reference figure, on the same model, text and windows.
LLMC, AUTHORS, FORMULA = "llm-compressor 0.14.0.1", "the authors' code", "the paper's formula"
CASES: list[tuple[str, str, float | None, str]] = [
    ("magnitude", "0.5", None, ""),
    ("magnitude", "2:4", None, ""),
    ("wanda", "0.5", 57.09, LLMC),
    ("wanda", "0.6", 153.5, FORMULA),
    ("wanda", "2:4", 173.08, LLMC),
    ("wanda", "4:8", None, ""),
    ("sparsegpt", "0.5", 49.73, AUTHORS),
    ("sparsegpt", "0.6", 93.36, AUTHORS),
    ("sparsegpt", "0.7", 239.7, AUTHORS),
    ("sparsegpt", "2:4", 88.48, AUTHORS),
    ("sparsegpt", "4:8", None, ""),
    ("alps", "0.5", None, ""),
    ("alps", "0.7", None, ""),
    ("alps", "2:4", None, ""),
    ("wanda+dsnot", "0.5", 62.08, AUTHORS),
    ("wanda+dsnot", "0.6", 180.5, AUTHORS),
    ("sparsegpt+dsnot", "0.5", None, ""),
    ("magnitude+dsnot", "0.5", None, ""),
    ("wanda+reconstruct", "0.5", None, ""),
]

# What is calibrated, and whether on the model with its 4-bit grid broken up.
BY_TEXT: dict[str, tuple[str, bool]] = {
    "SparseGPT 50 %": ("--prune sparsegpt --sparsity 0.5", False),
    "GPTQ 4 bits, groups of 64": ("--quantize gptq --bits 4 --group-size 64", True),
}


def by_calibration(args: argparse.Namespace) -> None:
    """Perplexity by the text of calibration: of the kind that is measured on, the model's own, and Python's documentation."""
    rows = []
    for method, (options, dithered) in BY_TEXT.items():
        model = plain_model(args.work, dithered=dithered)
        evaluation, calibration = split_text(args.text, args.work, model)
        print(f"{method}: dense {perplexity(model, evaluation):.3f}", flush=True)
        texts: list[tuple[str, Path | str, str]] = [("WikiText-2", calibration, "0"), ("docs", "docs", "0")]
        texts += [(f"self, seed {seed}", "self", seed) for seed in args.seeds.split(",")]
        for name, text, seed in texts:
            out = args.work / "out"
            report = compress(model, out, [*options.split(), "--seed", seed], text, args.threads)
            rows.append([method, name, f"{perplexity(out, evaluation):.2f}", f"{report['seconds']:.1f}"])
            print(rows[-1], flush=True)
    print(f"\n{machine()}\n")
    table(["method", "calibration", "perplexity, WikiText-2", "seconds"], rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--calibration", action="store_true", help="compare texts of calibration, and nothing else")
    parser.add_argument("--seeds", default="0,1,2", help="of the text that the model writes itself, with --calibration")
    parser.add_argument("--only", default="", help="only methods whose name begins so")
    args = parser.parse_args()
    if args.text is None:
        parser.error("--text is needed")
    prepare(args)
    if args.calibration:
        by_calibration(args)
        return
    model = plain_model(args.work)
    evaluation, calibration = split_text(args.text, args.work, model)
    print(f"{machine()}\n\ndense: {perplexity(model, evaluation):.3f}\n")
    rows = []
    for method, pattern, reference, whose in CASES:
        if not method.startswith(args.only):
            continue
        out = args.work / "out"
        report = compress(model, out, prune_options(method, pattern), calibration, args.threads)
        found = perplexity(out, evaluation)
        ratio = f"{found / reference - 1:+.2%}" if reference else ""
        known = f"{reference:g} ({whose})" if reference else ""
        rows.append([method, pattern, f"{found:.2f}", known, ratio, f"{report['seconds']:.1f}"])
        print(rows[-1], flush=True)
    table(["method", "pattern", "perplexity", "reference", "against it", "seconds"], rows)


if __name__ == "__main__":
    main()
