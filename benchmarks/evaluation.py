"""The gate and the cache of the reference's predictions, on SmolLM2: time, alarms, and what is lost by keeping few tokens.

python -m benchmarks.evaluation --text TEXT [--part time|alarms|tokens]
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

import secateur
from benchmarks.protocol import arguments, compress, machine, plain_model, prepare, split_text, table
from secateur.calibration.tokens import hash_of
from secateur.evaluation.distributions import divergence, predict, shortened
from secateur.evaluation.eval_text import Text
from secateur.evaluation.gate.baseline import Baseline, figures_of
from secateur.evaluation.gate.checks import FAILED, compare
from secateur.evaluation.gate.tolerances import Tolerances
from secateur.evaluation.perplexity import Quality, Scores, measure
from secateur.evaluation.quality import Evaluation, Runner, Size
from secateur.model.source import open_source

WINDOWS, SEQ_LEN = 16, 512
DRAWS = 20
RISE = 0.02


def gate_time(model: Path, dense: Path, evaluation: Path, work: Path, threads: int) -> None:
    """Seconds of whole processes, from the command line."""
    baseline = work / "baseline.json"
    command = [sys.executable, "-m", "secateur", "gate", str(model), "--baseline", str(baseline), "--quiet"]
    cache = ["--reference", str(dense), "--reference-cache", str(work / "reference-cache")]
    text = ["--data", str(evaluation), "--seq-len", str(SEQ_LEN), "--windows", str(WINDOWS)]
    runs = {
        "--write": [*command, "--write", "--overwrite", *text],
        "compare": command,
        "compare, with the reference": [*command, "--reference", str(dense)],
        "the same, reference kept": [*command, *cache],
    }
    rows = []
    for name, arguments_of_run in runs.items():
        if name.startswith("the same"):
            subprocess.run(arguments_of_run, check=True)  # fills the cache
        began = time.perf_counter()
        subprocess.run(arguments_of_run, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        rows.append([name, f"{time.perf_counter() - began:.1f}"])
    table(["gate", "s"], rows)


@torch.no_grad()
def plant(model: torch.nn.Module, ids_KS: torch.Tensor, loss: float) -> None:
    """Add noise to the kept weights of the blocks until perplexity has risen by `RISE`."""
    draw = torch.Generator().manual_seed(0)
    weights = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    kept = [p.clone() for p in weights]
    noise = [torch.randn(p.shape, generator=draw) * p.std() * (p != 0) for p in weights]
    low, high = 0.0, 0.1
    for _ in range(7):
        share = (low + high) / 2
        for p, before, n in zip(weights, kept, noise, strict=True):
            p.copy_(before + share * n)
        rise = measure(model, ids_KS).loss - loss
        low, high = (low, share) if rise > math.log1p(RISE) else (share, high)


def alarms(folder: Path, evaluation: Path, threads: int) -> None:
    """The gate on many draws of windows: of a model with a planted rise, and of the same weights run by one thread less."""
    source = open_source(str(folder))
    text = Text(str(evaluation), SEQ_LEN, DRAWS * WINDOWS)
    ids_KS = text.cut(source.tokenizer()).ids_KS
    ids_KS = ids_KS[torch.randperm(len(ids_KS), generator=torch.Generator().manual_seed(0))]
    model = secateur.load(folder, "dense", dtype=torch.float32)
    then = measure(model, ids_KS).scores
    torch.set_num_threads(1)
    again = measure(model, ids_KS).scores
    torch.set_num_threads(threads)
    few_KS = ids_KS[::8]
    plant(model, few_KS, measure(model, few_KS).loss)
    now = measure(model, ids_KS).scores
    rise = math.expm1((now.loss_KP.double().mean() - then.loss_KP.double().mean()).item())

    def evaluation_of(scores: Scores, rows: slice) -> Evaluation:
        quality = Quality.of(Scores(scores.loss_KP[rows]))
        described = {
            **dataclasses.asdict(dataclasses.replace(text, windows=WINDOWS)),
            "sha256": hash_of(ids_KS[rows]),
        }
        return Evaluation(str(folder), None, described, quality, 1.0, Size(1, 1), None, None, 0.0)

    found = {"planted": 0, "unchanged": 0}
    for draw in range(DRAWS):
        rows = slice(draw * WINDOWS, (draw + 1) * WINDOWS)
        baseline = Baseline(Path("-"), figures_of(evaluation_of(then, rows), Runner()))
        for name, scores in (("planted", now), ("unchanged", again)):
            checks = compare(evaluation_of(scores, rows), baseline, Tolerances())
            found[name] += any(check.verdict == FAILED for check in checks)
    table(
        ["", f"alarms in {DRAWS} draws of {WINDOWS} × {SEQ_LEN} tokens"],
        [
            [f"perplexity raised by {rise:.2%} over all windows", str(found["planted"])],
            ["unchanged weights, one thread instead of two", str(found["unchanged"])],
        ],
    )


@torch.no_grad()
def kept_tokens(folder: Path, dense: Path, evaluation: Path) -> None:
    """KL divergence by how many of the reference's tokens are kept."""
    ids_KS = Text(str(evaluation), SEQ_LEN, 4).cut(open_source(str(dense)).tokenizer()).ids_KS
    models = [secateur.load(each, "dense", dtype=torch.float32) for each in (folder, dense)]
    counts = (16, 64, 256, 1024)
    sums = torch.zeros(len(counts) + 1, dtype=torch.float64)
    predictions = 0
    for ids_S in ids_KS:
        own, other = (predict(model, ids_S[None], [SEQ_LEN - 1])[0] for model in models)
        for chunk in own.chunks():
            q, p = own.rows(chunk), other.rows(chunk)
            for i, few in enumerate([p, *(shortened(p, count) for count in counts)]):
                sums[i] += divergence(few, q).double().sum()
        predictions += own.count
    whole = (sums[0] / predictions).item()
    rows = [["all", f"{whole:.5f}", ""]]
    for count, total in zip(counts, sums[1:].tolist(), strict=True):
        kl = total / predictions
        rows.append([str(count), f"{kl:.5f}", f"{kl / whole - 1:+.2%}"])
    table(["tokens kept", "KL, nats a token", "against all"], rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=["time", "alarms", "tokens"], help="default: all")
    args = parser.parse_args()
    prepare(args)
    dense = plain_model(args.work)
    evaluation, calibration = split_text(args.text, args.work, dense)
    pruned = args.work / "sparsegpt-50"
    if not pruned.exists():
        compress(dense, pruned, ["--prune", "sparsegpt", "--sparsity", "0.5"], calibration, args.threads)
    whole = args.work / "whole.txt"
    whole.write_bytes(args.text.read_bytes())
    print(machine())
    parts = {
        "time": lambda: gate_time(pruned, dense, evaluation, args.work, args.threads),
        "alarms": lambda: alarms(pruned, whole, args.threads),
        "tokens": lambda: kept_tokens(pruned, dense, evaluation),
    }
    for name, part in parts.items():
        if args.part in (None, name):
            part()


if __name__ == "__main__":
    main()
