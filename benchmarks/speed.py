"""`compress` against llm-compressor, in turn in one run: from loading the model to the saved folder, imports not counted.

    python -m venv peer && peer/bin/pip install torch==2.13.0 && peer/bin/pip install llmcompressor==0.14.0.1
    python -m benchmarks.speed --text wiki.test.raw --peer peer/bin/python

The machine must be otherwise idle: both use every core that they are given.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks.protocol import (
    arguments,
    compress,
    machine,
    perplexity,
    plain_model,
    prepare,
    prune_options,
    run_peer,
    split_text,
    table,
)

# What the peer is told, what we are told, and the goal. Quantizers are measured on the dithered model.
CASES: dict[str, tuple[list[str], list[str], float | None]] = {
    "wanda 0.5": (["wanda", "0.5"], prune_options("wanda", "0.5"), 2.0),
    "sparsegpt 0.5": (["sparsegpt", "0.5"], prune_options("sparsegpt", "0.5"), 2.4),
    "wanda 2:4": (["wanda", "2:4"], prune_options("wanda", "2:4"), None),
    "sparsegpt 2:4": (["sparsegpt", "2:4"], prune_options("sparsegpt", "2:4"), None),
    "gptq 4 bits": (["gptq", "4"], ["--quantize", "gptq", "--bits", "4", "--group-size", "64"], 1.8),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--peer", required=True, help="Python of an environment with llmcompressor 0.14.0.1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default="wanda 0.5,sparsegpt 0.5,gptq 4 bits", help="comma-separated")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model, for both")
    args = parser.parse_args()
    if args.text is None:
        parser.error("--text is needed")
    prepare(args)
    dtype = getattr(torch, args.dtype)
    evaluation, calibration = split_text(args.text, args.work, plain_model(args.work, dtype))
    print(f"{machine()}; model in {args.dtype}; median of {args.rounds} rounds\n")
    rows = []
    for case in args.cases.split(","):
        told, options, goal = CASES[case]
        model = plain_model(args.work, dtype, dithered=told[0] == "gptq")
        theirs, ours, peaks = [], [], []
        for _ in range(args.rounds):
            peer = run_peer(args, told, model, calibration, args.work / "peer")
            report = compress(model, args.work / "out", options, calibration, args.threads)
            theirs.append(peer["seconds"])
            ours.append(report["seconds"])
            peaks.append((peer["peak_bytes"], report["peak_bytes"]))
            print(f"{case}: theirs {theirs[-1]:.1f} s, ours {ours[-1]:.1f} s", flush=True)
        ratio = statistics.median(theirs) / statistics.median(ours)
        peer_ppl = perplexity(args.work / "peer", evaluation)
        rows.append(
            [
                case,
                f"{statistics.median(theirs):.1f}",
                f"{statistics.median(ours):.1f}",
                f"{ratio:.2f}×",
                f"{goal}×" if goal else "",
                f"{max(p for p, _ in peaks) / 2**20:.0f}",
                f"{max(p for _, p in peaks) / 2**20:.0f}",
                f"{peer_ppl:.2f}",
                f"{perplexity(args.work / 'out', evaluation):.2f}",
            ]
        )
    table(
        [
            "",
            "llm-compressor, s",
            "secateur, s",
            "faster",
            "goal",
            "its peak MiB",
            "our peak MiB",
            "its perplexity",
            "ours",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
