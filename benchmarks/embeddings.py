"""What bits of the embeddings, and of a head, cost; and sizes that a search reaches with them. On the dithered SmolLM2.

`bits`: the table of embeddings alone, tied to the head, at several bits: perplexity and divergence from the dense model.
`grids`: the relative squared error of every 64th row of the table by bits, group and symmetry.
`size`: --target-size of the bfloat16 model, everything counted, by the methods that `--options` names; perplexity on two texts.
`rows`: how long it takes to look up rows of the packed table, of one token and of many.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.functional import embedding

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
from secateur.calibration.text import read_text
from secateur.evaluation.eval_text import Text
from secateur.evaluation.quality import evaluate
from secateur.formats.layouts.choose import layout_for
from secateur.kernels.chosen_rows import chosen_rows
from secateur.quant.grid import Grid
from secateur.quant.groups import fit_groups
from secateur.quant.table_codes import quantize_table
from secateur.speed.timing import time_in_turn

BITS = (8, 7, 6, 5, 4, 3)
SIZES = "0.35x,0.3x,0.25x"
# Forms of the table, and how many tokens are looked up at once.
FORMS, TOKENS = (8, 6, 4, "q8_0", "q5_1"), (1, 16, 512)


def main() -> None:
    """Print one table."""
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=("bits", "grids", "size", "rows"), default="bits")
    parser.add_argument("--options", default="", help="more options of `compress`, such as '--quantize gptq'")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    args = parser.parse_args()
    prepare(args)
    exact = plain_model(args.work, dithered=True)
    evaluation, calibration = split_text(args.text, args.work, exact)
    print(f"{machine()}\n")
    if args.part in ("grids", "rows"):
        (_grids if args.part == "grids" else _rows)(exact)
        return
    if args.part == "bits":
        rows = [_row(args, exact, evaluation, calibration, bits) for bits in BITS]
        table(["bits asked for", "bits a weight, with scales", "perplexity", "KL, nats a token"], rows)
        return
    model = plain_model(args.work, torch.bfloat16, dithered=True)
    docs = args.work / "docs.txt"
    docs.write_text("\n".join(read_text("docs", max_chars=8 * EVAL_WINDOWS * EVAL_SEQ_LEN)), encoding="utf-8")
    rows = []
    for size in args.sizes.split(","):

        def measure(size: str = size) -> dict[str, Any]:
            options = ["--target-size", size, *args.options.split()]
            report = compress(model, args.work / "out", options, calibration, args.threads)
            return {
                "bytes": report["bytes"],
                "bits": report["bits"],
                "embeddings": report["recipe"]["embeddings"],
                "seconds": report["seconds"],
                "perplexity": perplexity(args.work / "out", evaluation),
                "docs": perplexity(args.work / "out", docs),
            }

        found = measured_once(args, "embeddings", f"{size} {args.options}", measure)
        rows.append(
            [
                size,
                f"{found['bytes'] / 1e6:.2f} MB",
                str(found["embeddings"]),
                f"{found['bits']:.2f}",
                f"{found['perplexity']:.2f}",
                f"{found['docs']:.2f}",
                f"{found['seconds']:.0f} s",
            ]
        )
    table(["size", "files", "bits of embeddings", "bits of linears", "perplexity", "on docs", "time"], rows)


def _rows(model: Path) -> None:
    with safe_open(model / "model.safetensors", "pt") as file:
        W_VI = file.get_tensor("model.embed_tokens.weight").bfloat16()
    cpu = torch.device("cpu")
    rows = []
    for form in FORMS:
        weight = quantize_table(W_VI, form, torch.bfloat16, cpu)
        layout = layout_for(weight)
        packed = layout.load(layout.pack(weight))
        row = [str(form)]
        for count in TOKENS:
            ids_N = torch.randint(len(W_VI), (count,), generator=torch.Generator().manual_seed(0))
            calls = [[partial(chosen_rows, packed, ids_N)], [partial(embedding, ids_N, W_VI)]]
            medians = [1e6 * sorted(samples)[len(samples) // 2] for samples in time_in_turn(calls, cpu, 2.0)]
            row.append(f"{medians[0]:.0f} µs (dense {medians[1]:.0f})")
        rows.append(row)
    table(["table", *(f"{count} tokens" for count in TOKENS)], rows)


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
