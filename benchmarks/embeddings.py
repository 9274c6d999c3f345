"""What bits of the embeddings, and of a head, cost; and sizes that a search reaches with them. On the dithered SmolLM2.

`bits`: the table of embeddings alone, tied to the head, at several bits: perplexity and divergence from the dense model.
`grids`: the relative squared error of every 64th row of the table by bits, group and symmetry.
`size`: --target-size of the bfloat16 model, everything counted.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.protocol import (
    EVAL_SEQ_LEN,
    EVAL_WINDOWS,
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
from secateur.evaluation.eval_text import Text
from secateur.evaluation.quality import evaluate
from secateur.quant.grid import Grid
from secateur.quant.groups import fit_groups

BITS = (8, 7, 6, 5, 4, 3)
SIZES = ("0.35x", "0.3x", "0.25x")


def main() -> None:
    """Print one table."""
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=("bits", "grids", "size"), default="bits")
    parser.add_argument("--options", default="", help="more options of `compress`, such as '--quantize gptq'")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    args = parser.parse_args()
    prepare(args)
    exact = plain_model(args.work, dithered=True)
    evaluation, calibration = split_text(args.text, args.work, exact)
    print(f"{machine()}\n")
    if args.part == "grids":
        _grids(exact)
        return
    if args.part == "bits":
        rows = [_row(args, exact, evaluation, calibration, bits) for bits in BITS]
        table(["bits asked for", "bits a weight, with scales", "perplexity", "KL, nats a token"], rows)
        return
    model = plain_model(args.work, torch.bfloat16, dithered=True)
    rows = []
    for size in SIZES:

        def measure(size: str = size) -> dict[str, Any]:
            options = ["--target-size", size, *args.options.split()]
            report = compress(model, args.work / "out", options, calibration, args.threads)
            return {
                "bytes": report["bytes"],
                "bits": report["bits"],
                "embeddings": report["recipe"]["embeddings"],
                "seconds": report["seconds"],
                "perplexity": perplexity(args.work / "out", evaluation),
            }

        found = measured_once(args, "embeddings", f"{size} {args.options}", measure)
        rows.append(
            [
                size,
                f"{found['bytes'] / 1e6:.2f} MB",
                str(found["embeddings"]),
                f"{found['bits']:.2f}",
                f"{found['perplexity']:.2f}",
                f"{found['seconds']:.0f} s",
            ]
        )
    table(["size", "files", "bits of embeddings", "bits of linears", "perplexity", "time"], rows)


def _grids(model: Path) -> None:
    with safe_open(model / "model.safetensors", "pt") as file:
        W_VI = file.get_slice("model.embed_tokens.weight")[::64].float()
    rows = []
    for bits, size in itertools.product((8, 6, 5, 4), (32, 64, 128)):
        row = [str(bits), str(size)]
        for symmetric in (False, True):
            grid = Grid(bits, size, symmetric, True, torch.bfloat16)
            codes = grid.assemble(fit_groups(grid.fit, size, W_VI, None), W_VI, 0, len(W_VI))
            error = (codes.values() - W_VI).square().mean() / W_VI.square().mean()
            row.append(f"{error:.2e} at {bits + (16 + (0 if symmetric else bits)) / size:.2f}")
        rows.append(row)
    table(["bits", "groups of", "error at bits a weight, zero points", "symmetric"], rows)


def _row(args: argparse.Namespace, model: Path, evaluation: Path, calibration: Path, bits: int) -> list[str]:
    def measure() -> dict[str, Any]:
        out = args.work / "out"
        report = compress(model, out, ["--embeddings", str(bits)], calibration, args.threads)
        text = Text(str(evaluation), EVAL_SEQ_LEN, EVAL_WINDOWS, bos=False)
        quality = evaluate(str(out), str(model), text).quality
        [packed] = report["tables"]
        return {"bits": packed["bits"], "perplexity": quality.perplexity, "kl": quality.kl}

    found = measured_once(args, "embeddings", f"{bits} bits", measure)
    return [str(bits), f"{found['bits']:.2f}", f"{found['perplexity']:.3f}", f"{found['kl']:.5f}"]


if __name__ == "__main__":
    main()
