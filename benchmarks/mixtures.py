"""Mixtures of experts against llm-compressor, on the same model, text and tokens, in one run: quality, time and peak memory.

    python -m benchmarks.mixtures --text TEXT --model MOE --peer peer/bin/python

MOE is a folder of a mixture of experts with weights that mean something (SmolLM2 carved into one, say). Both are timed from
loading the model to the saved folder, in processes of their own. Ours runs with the floor of tokens (the default), without it,
and with all tokens for all experts, as the peer has it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.protocol import (
    arguments,
    compress,
    machine,
    measured_once,
    perplexity,
    prepare,
    run_peer,
    split_text,
    table,
)

# Name → the peer's arguments, ours.
CASES = {
    "GPTQ 4 bits, groups of 32": (["gptq", "4", "32"], "--quantize gptq --bits 4 --group-size 32"),
    "GPTQ 3 bits, groups of 32": (["gptq", "3", "32"], "--quantize gptq --bits 3 --group-size 32"),
    "Wanda 50 %": (["wanda", "0.5"], "--prune wanda --sparsity 0.5"),
    "SparseGPT 50 %": (["sparsegpt", "0.5"], "--prune sparsegpt --sparsity 0.5"),
}
WAYS = {
    "floor of tokens": [],
    "routed tokens": ["--expert-tokens", "0"],
    "all tokens": ["--expert-inputs", "all"],
}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peer", help="a python with llm-compressor")
    parser.add_argument("--cases", default="", help="only cases whose name begins so")
    parser.add_argument("--ways", default=",".join(WAYS), help="of ours, with commas between")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured")
    args = parser.parse_args()
    prepare(args)
    evaluation, calibration = split_text(args.text, args.work, args.model)
    print(machine())
    dense = measured_once(args, "mixtures", "dense", lambda: {"perplexity": perplexity(args.model, evaluation)})
    rows = [["–", "dense", f"{dense['perplexity']:.2f}", "", ""]]
    for case, (theirs, ours) in CASES.items():
        if not case.startswith(args.cases):
            continue
        ways = {way: WAYS[way] for way in args.ways.split(",")}
        runs = {way: _ours(args, [*ours.split(), *options], calibration, evaluation) for way, options in ways.items()}
        if args.peer:
            runs["llm-compressor"] = _theirs(args, theirs, calibration, evaluation)
        for way, found in runs.items():
            row = [f"{found['perplexity']:.2f}", f"{found['seconds']:.1f}", f"{found['peak_bytes'] / 2**20:.0f}"]
            rows.append([case, way, *row])
    table(["case", "by", "perplexity", "seconds", "peak MiB"], rows)
    return 0


def _ours(args: Any, options: list[str], calibration: Path, evaluation: Path) -> dict[str, Any]:
    def run() -> dict[str, Any]:
        out = args.work / "mixtures-out"
        report = compress(args.model, out, options, calibration, args.threads)
        found = {key: report[key] for key in ("seconds", "peak_bytes")}
        return {**found, "perplexity": perplexity(out, evaluation)}

    return measured_once(args, "mixtures", f"ours {options}", run)


def _theirs(args: Any, options: list[str], calibration: Path, evaluation: Path) -> dict[str, Any]:
    def run() -> dict[str, Any]:
        out = args.work / "mixtures-peer-out"
        shutil.rmtree(out, ignore_errors=True)
        found = run_peer(args, options[:2], args.model, calibration, out, *options[2:])
        return {**found, "perplexity": perplexity(out, evaluation)}

    return measured_once(args, "mixtures", f"peer {options}", run)


if __name__ == "__main__":
    raise SystemExit(main())
