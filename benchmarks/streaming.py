"""Models that memory does not hold: peak memory, bytes read and seconds a token, dense and packed, against accelerate.

    python -m benchmarks.streaming --text TEXT [--size 1.6b] [--max-memory 600MiB] [--forms dense,bitmap,packed-int]

A Llama with random weights is run under a limit, dense and packed, each in a process of its own, and so is a dense one that
accelerate offloads to disk. "read" are the bytes of its files that a token takes, "MB/s" the rate, "alone" that of the same
reader without computing. With `--resident` each form runs with so much more memory, too. With `--throttle 200MB`, which is for
sizes that memory holds, files give no more than that a second, and reading and computing alone are held against both at once.
Then `eval` under the same limit, and whole on SmolLM2. `--clean` removes the models in the end.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import secateur
from benchmarks.decode import FORMS, random_trellis
from benchmarks.protocol import arguments, machine, plain_model, prepare, sharded_llama, split_text, table
from secateur.units import parse_size

SIZES = {
    "0.4b": {"hidden": 1024, "inner": 2816, "blocks": 24, "heads": 16, "kv_heads": 4},
    "1.6b": {"hidden": 2048, "inner": 5632, "blocks": 32, "heads": 32, "kv_heads": 8},
    "7b": {"hidden": 4096, "inner": 11008, "blocks": 32, "heads": 32, "kv_heads": 32},
}
TOKENS = 6
TRELLIS = "trellis 3 bits"

BENCH = """
import json, sys, time
import torch
import secateur
from secateur.folder.extents import OpenFiles
from secateur.memory.peak import peak_memory
folder, limit, rate = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
whole = OpenFiles.read

def slowly(self, places):
    began = time.perf_counter()
    size = whole(self, places)
    time.sleep(max(0, size / rate - (time.perf_counter() - began)))
    return size

if rate:
    OpenFiles.read = slowly
found = secateur.bench(folder, max_memory=limit, threads={threads}, seconds=10)
[step] = found.streamed
print(json.dumps({{"seconds": step.seconds, "read": step.bytes_read, "alone": found.transfers.disk, "peak": peak_memory()}}))
"""

GENERATE = """
import json, sys, time
import torch, transformers
if sys.argv[1] == "secateur":
    import secateur
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads({threads})
from transformers.generation.streamers import BaseStreamer
import resource

class Clock(BaseStreamer):
    def __init__(self): self.at = []
    def put(self, value): self.at.append(time.perf_counter())
    def end(self): pass

_, how, folder, limit = sys.argv
places = dict(device_map="auto", max_memory={{"cpu": int(limit)}}, offload_folder=folder + "-offload") if int(limit) else {{}}
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **places)
ids = torch.arange(3, 11)[None]
clock = Clock()
with torch.inference_mode():
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens={tokens}, min_new_tokens={tokens}, do_sample=False,
                   pad_token_id=0, streamer=clock)
gaps = sorted(b - a for a, b in zip(clock.at[2:], clock.at[3:]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({{"seconds": gaps[len(gaps) // 2], "read": 0, "alone": 0, "peak": peak}}))
"""

EVAL = """
import json, os, sys, time
from pathlib import Path
import torch
import secateur
from secateur.evaluation.eval_text import Text
from secateur.evaluation.quality import Runner, evaluate
from secateur.memory.peak import peak_memory
torch.set_num_threads({threads})
folder, text, limit, windows = sys.argv[1:5]

def read():
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])

for file in Path(folder).glob("*.safetensors"):
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
before, began = read(), time.perf_counter()
found = evaluate(folder, text=Text(text, 512, int(windows)), runner=Runner(max_memory=int(limit) or None))
found = {{"seconds": time.perf_counter() - began, "loss": found.quality.loss, "peak": peak_memory(), "read": read() - before}}
print(json.dumps(found))
"""


def run(code: str, *args: Any, threads: int) -> dict[str, float]:
    """What a script tells, in a process of its own."""
    code = code.format(threads=threads, tokens=TOKENS)
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{args}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def size_of(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def models(work: Path, size: str, forms: list[str]) -> dict[str, Path]:
    """A dense Llama and what is made of it, by the names of the forms; made once."""
    small = plain_model(work, torch.bfloat16)
    dense = work / f"llama-{size}"
    if not (dense / "config.json").exists():
        sharded_llama(dense, small, **SIZES[size])
    found = {}
    for name, recipe in {**FORMS, TRELLIS: None}.items():
        if name.split()[0] not in forms:
            continue
        folder = found[name] = dense if name == "dense" else work / f"llama-{size}-{name.split()[0]}"
        if recipe is not None and not folder.exists():
            secateur.compress(str(dense), folder, recipe)
        if name == TRELLIS:
            random_trellis(dense, folder)
    return found


def throttled(folders: dict[str, Path], limit: int, rate: int, threads: int) -> None:
    """Print seconds a token of reading alone, computing alone, and both at once."""
    rows = []
    for name, folder in folders.items():
        found = run(BENCH, folder, limit, rate, threads=threads)
        reads = found["read"] / rate
        computes = run(GENERATE, "secateur", folder, 0, threads=threads)["seconds"]
        share = found["seconds"] / max(reads, computes)
        rows.append([name, f"{reads:.2f}", f"{computes:.2f}", f"{found['seconds']:.2f}", f"{share:.2f}"])
    table(["", "reads, s a token", "computes", "both at once", "of the longer"], rows)
    print()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", choices=SIZES, default="1.6b")
    parser.add_argument("--max-memory", default="600MiB")
    parser.add_argument("--resident", default="0", help="more memory, for a second round")
    parser.add_argument("--forms", default="dense,bitmap,packed-int", help="of dense, bitmap, packed-int, trellis")
    parser.add_argument("--throttle", help="bytes a second that files give at most, such as 200MB")
    parser.add_argument("--part", choices=("generate", "eval", "all"), default="all")
    parser.add_argument("--windows", type=int, default=12, help="of 512 tokens, for `eval`")
    parser.add_argument("--eval-memory", help="limit of `eval`, where it is another")
    parser.add_argument("--clean", action="store_true", help="remove the models in the end")
    args = parser.parse_args()
    prepare(args)
    limit, more = parse_size(args.max_memory, "--max-memory"), parse_size(args.resident, "--resident")
    folders = models(args.work, args.size, args.forms.split(","))
    print(f"{machine()}\n\n{args.size}, --max-memory {args.max_memory}\n")
    if args.throttle:
        throttled(folders, limit, parse_size(args.throttle, "--throttle"), args.threads)
    if args.part != "eval":
        generation(args, folders, limit, more)
    if args.text is not None and args.part != "generate":
        evaluations(args, folders, parse_size(args.eval_memory, "--eval-memory") if args.eval_memory else limit)
    if args.clean:
        for folder in {*folders.values(), args.work / f"llama-{args.size}"}:
            shutil.rmtree(folder)
            shutil.rmtree(f"{folder}-offload", ignore_errors=True)


def generation(args: Any, folders: dict[str, Path], limit: int, more: int) -> None:
    """Print what a token takes."""
    rows = []
    for name, folder in folders.items():
        for extra in sorted({0, more}):
            found = run(BENCH, folder, limit + extra, 0, threads=args.threads)
            rows.append(_row(f"{name}{', more in memory' if extra else ''}", folder, found))
        if name != "dense":
            found = run(GENERATE, "secateur", folder, limit, threads=args.threads)
            rows.append(_row(f"{name}, device_map", folder, found))
    dense = args.work / f"llama-{args.size}"
    rows.append(_row("dense, accelerate", dense, run(GENERATE, "accelerate", dense, limit, threads=args.threads)))
    table(["", "files, MB", "s a token", "read a token, MB", "MB/s", "alone, MB/s", "peak MiB"], rows)
    print()


def evaluations(args: Any, folders: dict[str, Path], limit: int) -> None:
    """Print what `eval` takes, of SmolLM2 whole and by block, and of the others under the limit."""
    small = plain_model(args.work, torch.bfloat16)
    _, evaluation = split_text(args.text, args.work, small)
    rows = []
    wanted = {("SmolLM2, whole", small, 0), ("SmolLM2, by block", small, 2**30)}
    for name, folder, bound in [*sorted(wanted, reverse=True), *((n, f, limit) for n, f in folders.items())]:
        try:
            found = run(EVAL, folder, evaluation, bound, args.windows, threads=args.threads)
        except SystemExit as stop:  # the limit is too little: it says how much would do
            rows.append([name, str(stop).splitlines()[-1], "", "", "", ""])
            continue
        figures = [f"{found['seconds']:.1f}", f"{found['loss']:.5f}", f"{found['peak'] / 2**20:.0f}"]
        rows.append([name, *figures, f"{found['read'] / 1e6:.0f}", f"{size_of(folder) / 1e6:.0f}"])
    table([f"eval, {args.windows} × 512 tokens", "s", "loss", "peak MiB", "read from disk, MB", "files, MB"], rows)


def _row(name: str, folder: Path, found: dict[str, float]) -> list[str]:
    rate = found["read"] / found["seconds"] / 1e6
    numbers = [f"{size_of(folder) / 1e6:.0f}", f"{found['seconds']:.2f}"]
    read = (
        [f"{found['read'] / 1e6:.0f}", f"{rate:.0f}", f"{found['alone'] / 1e6:.0f}"] if found["read"] else ["", "", ""]
    )
    return [name, *numbers, *read, f"{found['peak'] / 2**20:.0f}"]


if __name__ == "__main__":
    main()
