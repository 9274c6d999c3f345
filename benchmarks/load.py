"""Size of a 50 % bitmap checkpoint, and the time to load it unpacked, against the same model saved dense (warm page cache).

    python -m benchmarks.load

transformers maps a dense file into memory and reads nothing until a weight is used, so two times are taken of each: of the
call alone, and of the call and one pass over every weight, which is when the model is really in memory. How long packed
weights take to load, up to the first token, is told by `benchmarks.decode`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import secateur
from benchmarks.protocol import arguments, machine, plain_model, prepare, table
from secateur.checkpoint.inspect import inspect
from secateur.model.source import open_source

CODE = """
import json, sys, time, torch
import secateur
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
torch.set_num_threads({threads})
how, path = sys.argv[1:3]
load = secateur.load if how == "secateur.load" else AutoModelForCausalLM.from_pretrained
times = []
for _ in range(7):
    start = time.perf_counter()
    with secateur.backend("dense"):
        model = load(path)
    loaded = time.perf_counter()
    total = sum(p.view(torch.int16).amax().item() for p in model.parameters())
    times.append((loaded - start, time.perf_counter() - start))
    del model
print(json.dumps(times[2:]))
"""


def times(how: str, path: Path, threads: int) -> tuple[float, float]:
    """Median seconds of loading, and of loading and touching every weight."""
    code = CODE.format(threads=threads)
    done = subprocess.run([sys.executable, "-c", code, how, str(path)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return statistics.median(t[0] for t in found), statistics.median(t[1] for t in found)


def main() -> None:
    args = arguments(__doc__).parse_args()
    prepare(args)
    model = plain_model(args.work, torch.bfloat16)
    packed, dense = args.work / "bitmap-50", args.work / "dense-50"
    for out, form in ((packed, "auto"), (dense, "dense")):
        secateur.compress(
            str(model), out, secateur.Recipe(prune="magnitude", sparsity=0.5, format=form), overwrite=True
        )
    found = inspect(open_source(str(packed)))
    rest = found.parameters - found.linear_weights
    bound = (found.linear_weights * ((1 - found.sparsity) * 16 + 1) + rest * 16) / 8
    print(f"{machine()}\n")
    linears = 8 * found.linear_bytes / found.linear_weights
    print(
        f"linears: {linears:.4f} bits a weight, {linears / ((1 - found.sparsity) * 16 + 1) - 1:+.3%} over density·16 + 1"
    )
    print(
        f"files: {found.weight_bytes} bytes, {found.weight_bytes / bound - 1:+.3%} over the same with 16 bits for the rest\n"
    )
    rows = []
    for name, how, path in (
        ("dense, transformers", "from_pretrained", dense),
        ("bitmap, transformers", "from_pretrained", packed),
        ("bitmap, secateur.load", "secateur.load", packed),
    ):
        loaded, touched = times(how, path, args.threads)
        rows.append([name, f"{loaded * 1e3:.0f}", f"{touched * 1e3:.0f}"])
    table(["", "call, ms", "call and every weight read, ms"], rows)


if __name__ == "__main__":
    main()
