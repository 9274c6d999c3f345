"""Time and peak memory of `compress`, `--version` and `--help` at an earlier revision and in this tree, in turn in one run.

    python -m benchmarks.revisions 2946a9e --text TEXT --rounds 3

The earlier revision is checked out beside the models; both run with this environment's packages. Peaks are the largest
resident set of the process (`ru_maxrss`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.protocol import SAMPLES, SEQ_LEN, arguments, machine, plain_model, prepare, split_text

CASES = {
    "Wanda 50 %": "--prune wanda --sparsity 0.5",
    "SparseGPT 50 %": "--prune sparsegpt --sparsity 0.5",
    "GPTQ 4 bits": "--quantize gptq --bits 4",
}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("revision")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    prepare(args)
    if args.text is None:
        parser.error("--text is needed")
    model = plain_model(args.work)
    _, calibration = split_text(args.text, args.work, model)
    trees = {args.revision: _checked_out(args.revision, args.work), "now": Path.cwd()}
    print(machine())
    windows = ["--calibration", str(calibration.resolve()), "--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN)]
    out = (args.work / "revisions-out").resolve()
    for name, options in CASES.items():
        command = ["compress", str(model.resolve()), str(out), *options.split(), *windows, "--overwrite", "--quiet"]
        _in_turn(name, command, trees, args)
    for option in ("--version", "--help"):
        _in_turn(option, [option], trees, args)
    shutil.rmtree(out)
    return 0


def _checked_out(revision: str, work: Path) -> Path:
    tree = work / f"tree-{revision}"
    if not tree.exists():
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), revision], check=True, capture_output=True)
    return tree.resolve()


def _in_turn(name: str, command: list[str], trees: dict[str, Path], args: argparse.Namespace) -> None:
    seen: dict[str, list[tuple[float, float]]] = {tree: [] for tree in trees}
    for _ in range(args.rounds):
        for tree, folder in trees.items():
            seen[tree].append(measured_run(command, folder, args.threads))
    for tree, runs in seen.items():
        seconds = ", ".join(f"{took:.2f}" for took, _ in runs)
        peak = ", ".join(f"{peak:.0f}" for _, peak in runs)
        median = statistics.median(took for took, _ in runs)
        print(f"{name:<16} {tree:<8} {seconds} s (median {median:.2f}), {peak} MiB", flush=True)


# In a small process: a child's peak is never told as less than what its parent had in memory.
_MEASURED = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen([sys.executable, "-m", "secateur", *sys.argv[1:]], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([status, time.perf_counter() - start, usage.ru_maxrss / 1024]))
"""


def measured_run(command: list[str], tree: Path, threads: int) -> tuple[float, float]:
    """Seconds of one run of a tree's own code, and MiB at most in any of its processes."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
    measured = [sys.executable, "-c", _MEASURED, *command]
    told = subprocess.run(measured, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    status, seconds, peak = json.loads(told)
    if status:
        raise SystemExit(f"secateur {' '.join(command)} failed in {tree}")
    return seconds, peak


if __name__ == "__main__":
    raise SystemExit(main())
