"""Models that memory does not hold: peak memory, bytes read and seconds a token, dense and packed, against accelerate.

    python -m benchmarks.streaming --text TEXT [--size 1.6b] [--max-memory 600MiB]

A Llama with random weights is run under a limit, dense and packed, each in a process of its own, and so is a
dense one that accelerate offloads to disk. "read" are the bytes of its files that a token takes, "MB/s" the rate. With
`--resident` each form runs with so much more memory, too. Then `eval` under the same limit, and whole on SmolLM2.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import secateur
from benchmarks.decode import FORMS
from benchmarks.protocol import arguments, machine, plain_model, prepare, sharded_llama, split_text, table
from secateur.units import parse_size

SIZES = {
    "0.4b": {"hidden": 1024, "inner": 2816, "blocks": 24, "heads": 16, "kv_heads": 4},
    "1.6b": {"hidden": 2048, "inner": 5632, "blocks": 32, "heads": 32, "kv_heads": 8},
    "7b": {"hidden": 4096, "inner": 11008, "blocks": 32, "heads": 32, "kv_heads": 32},
}
TOKENS = 6

CODE = """
import json, sys, time
import torch, transformers
import secateur
from secateur.memory.peak import peak_memory
from transformers.generation.streamers import BaseStreamer
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads({threads})

class Clock(BaseStreamer):
    def __init__(self): self.at = []
    def put(self, value): self.at.append((time.perf_counter(), read()))
    def end(self): pass

def read():
    streamer = getattr(model, "streamer", None)
    return 0 if streamer is None else streamer.bytes_read

how, folder, limit = sys.argv[1:4]
if how == "accelerate":
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={{"cpu": int(limit)}}, offload_folder=folder + "-offload", dtype=torch.bfloat16
    )
else:
    model = secateur.load(folder, max_memory=int(limit))
ids = torch.arange(3, 11)[None]
clock = Clock()
with torch.inference_mode():
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens={tokens}, min_new_tokens={tokens}, do_sample=False,
                   pad_token_id=0, streamer=clock)
gaps = sorted((b[0] - a[0], b[1] - a[1]) for a, b in zip(clock.at[2:], clock.at[3:]))
seconds, size = gaps[len(gaps) // 2]
print(json.dumps({{"seconds": seconds, "read": size, "peak": peak_memory()}}))
"""

EVAL = """
import json, sys, time
import torch
import secateur
from secateur.evaluation.eval_text import Text
from secateur.evaluation.quality import Runner, evaluate
from secateur.memory.peak import peak_memory
torch.set_num_threads({threads})
folder, text, limit = sys.argv[1:4]
began = time.perf_counter()
found = evaluate(folder, text=Text(text, 512, 12), runner=Runner(max_memory=int(limit) or None))
print(json.dumps({{"seconds": time.perf_counter() - began, "loss": found.quality.loss, "peak": peak_memory()}}))
"""


def run(code: str, *args: Any, threads: int) -> dict[str, float]:
    """What a script tells, in a process of its own."""
    code = code.format(threads=threads, tokens=TOKENS)
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def size_of(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", choices=SIZES, default="1.6b")
    parser.add_argument("--max-memory", default="600MiB")
    parser.add_argument("--resident", default="0", help="more memory, for a second round")
    args = parser.parse_args()
    prepare(args)
    limit, more = parse_size(args.max_memory, "--max-memory"), parse_size(args.resident, "--resident")
    small = plain_model(args.work, torch.bfloat16)
    _, evaluation = split_text(args.text, args.work, small)
    dense = args.work / f"llama-{args.size}"
    if not (dense / "config.json").exists():
        sharded_llama(dense, small, **SIZES[args.size])
    rows = []
    for name, recipe in FORMS.items():
        folder = dense if recipe is None else args.work / f"llama-{args.size}-{name.split()[0]}"
        if recipe is not None and not folder.exists():
            secateur.compress(str(dense), folder, recipe)
        for extra in sorted({0, more}):
            found = run(CODE, "secateur", folder, limit + extra, threads=args.threads)
            rows.append(_row(f"{name}{', more in memory' if extra else ''}", folder, found))
    rows.append(_row("dense, accelerate", dense, run(CODE, "accelerate", dense, limit, threads=args.threads)))
    print(f"{machine()}\n\n{args.size}, --max-memory {args.max_memory}\n")
    table(["", "files, MB", "s a token", "read a token, MB", "MB/s", "peak MiB"], rows)
    rows = []
    for name, folder, bound in (
        ("SmolLM2, whole", small, 0),
        ("SmolLM2, by block", small, 2**30),
        (dense.name, dense, limit),
    ):
        found = run(EVAL, folder, evaluation, bound, threads=args.threads)
        rows.append([name, f"{found['seconds']:.1f}", f"{found['loss']:.5f}", f"{found['peak'] / 2**20:.0f}"])
    print()
    table(["eval, 12 × 512 tokens", "s", "loss", "peak MiB"], rows)


def _row(name: str, folder: Path, found: dict[str, float]) -> list[str]:
    rate = found["read"] / found["seconds"] / 1e6
    numbers = [f"{found['seconds']:.2f}", f"{found['read'] / 1e6:.0f}", f"{rate:.0f}", f"{found['peak'] / 2**20:.0f}"]
    return [name, f"{size_of(folder) / 1e6:.0f}", *numbers]


if __name__ == "__main__":
    main()
