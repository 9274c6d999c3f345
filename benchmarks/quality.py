"""Perplexity of every method and pattern by the protocol, beside the figures of other people's code.

python -m benchmarks.quality --text wiki.test.raw [--only wanda]
"""

from __future__ import annotations

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


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", help="only methods whose name begins so")
    args = parser.parse_args()
    if args.text is None:
        parser.error("--text is needed")
    prepare(args)
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
