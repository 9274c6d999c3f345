"""Memory under a limit, what `plan` foretells, what it costs to resume, and two processes against one.

    python -m benchmarks.scale bounded --text wiki.test.raw          # 7 B under 4 GiB; 13 GB of disk, half an hour
    python -m benchmarks.scale bounded --text wiki.test.raw --size mixture --methods wanda --max-memory 3GiB
    python -m benchmarks.scale plan --text wiki.test.raw             # foretold against measured, three sizes
    python -m benchmarks.scale plan --text wiki.test.raw --sizes few,wide --methods wanda,gptq,sparsegpt --threads 1
    python -m benchmarks.scale resume --text wiki.test.raw           # SmolLM2, killed in five places
    python -m benchmarks.scale ranks --text wiki.test.raw            # SmolLM2, two processes of one thread, one of two
    python -m benchmarks.scale verify --text wiki.test.raw           # `verify` and its hashes against reading the files

The machine must be otherwise idle. What is written goes to the folder that --work names.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.protocol import (
    arguments,
    compress_command,
    machine,
    perplexity,
    plain_model,
    prepare,
    prune_options,
    sharded_llama,
    sharded_mixture,
    split_text,
    table,
)

SIZES = {
    "few": {"hidden": 1024, "inner": 2816, "blocks": 3, "heads": 16, "kv_heads": 8},
    "wide": {"hidden": 768, "inner": 6144, "blocks": 3, "heads": 12, "kv_heads": 4},
    "0.3b": {"hidden": 1024, "inner": 2816, "blocks": 16, "heads": 16, "kv_heads": 8},
    "1.5b": {"hidden": 2048, "inner": 6144, "blocks": 28, "heads": 16, "kv_heads": 8},
    "7b": {"hidden": 4096, "inner": 11008, "blocks": 32, "heads": 32, "kv_heads": 32},
}
# Its block is 8 GB in float32.
MIXTURES = {"mixture": {"hidden": 2048, "inner": 2048, "blocks": 2, "experts": 160, "chosen": 8}}
METHOD = prune_options("sparsegpt", "0.5")


def model_of(args: argparse.Namespace, size: str) -> Path:
    """SmolLM2, or a Llama of that size with random weights, made once."""
    small = plain_model(args.work, torch.bfloat16)
    if size == "smollm2":
        return small
    out = args.work / f"llama-{size}"
    if not (out / "model.safetensors.index.json").exists():
        if size in MIXTURES:
            sharded_mixture(out, small, **MIXTURES[size])
        else:
            sharded_llama(out, small, **SIZES[size])
    return out


def environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def run(command: list[str], threads: int) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, env=environment(threads), check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
    return json.loads(done.stdout)


def bounded(args: argparse.Namespace, calibration: Path) -> None:
    rows = []
    for method in args.methods.split(","):
        model, out = model_of(args, args.size), args.work / f"out-{args.size}"
        command = compress_command(model, out, prune_options(method, "0.5"), calibration, samples=16)
        report = run([*command, "--max-memory", args.max_memory], args.threads)
        phases = report["phases"]
        blocks = (SIZES | MIXTURES)[args.size]["blocks"]
        within = sum(seconds for phase, seconds in phases.items() if phase not in ("opening", "ending"))
        rows.append(
            [
                method,
                f"{report['parameters'] / 1e9:.2f}",
                args.max_memory,
                f"{report['peak_bytes'] / 2**30:.2f}",
                f"{report['seconds']:.0f}",
                f"{within / blocks:.1f}",
                ", ".join(
                    f"{phase} {seconds / blocks:.1f}" for phase, seconds in phases.items() if seconds > blocks / 20
                ),
            ]
        )
        shutil.rmtree(out)
    table(["", "10⁹ parameters", "limit", "peak, GiB", "seconds", "a block, s", "of which"], rows)
    if not args.keep:
        shutil.rmtree(model)


def plan(args: argparse.Namespace, calibration: Path) -> None:
    rows = []
    for size in args.sizes.split(","):
        model, out = model_of(args, size), args.work / f"out-{size}"
        for method in args.methods.split(","):
            options = ["--quantize", "gptq"] if method == "gptq" else prune_options(method, "0.5")
            command = compress_command(model, out, options, calibration, samples=args.samples)
            limit = ["--max-memory", args.max_memory] if args.max_memory else []
            asked = [part for part in command if part != "--overwrite"]
            asked[asked.index("compress") : asked.index("compress") + 3] = ["plan", str(model), "--out", str(args.work)]
            began = time.perf_counter()
            told = run([*asked, *limit], args.threads)
            took = time.perf_counter() - began
            found = run([*command, *limit], args.threads)
            shutil.rmtree(out)

            def against(foretold: float, measured: float, unit: float, digits: int) -> str:
                return f"{foretold / unit:.{digits}f} / {measured / unit:.{digits}f} ({foretold / measured - 1:+.0%})"

            rows.append(
                [
                    size,
                    method,
                    against(told["host"], found["peak_bytes"], 2**30, 2),
                    against(told["total_seconds"], found["seconds"], 1, 0),
                    against(told["disk"], found["bytes"], 1e6, 0),
                    f"{took:.0f}",
                ]
            )
            print(rows[-1], flush=True)
    print("\nforetold / measured\n")
    table(["", "", "memory, GiB", "seconds", "checkpoint, MB", "`plan` took, s"], rows)


def resume(args: argparse.Namespace, calibration: Path) -> None:
    model, out = model_of(args, "smollm2"), args.work / "out-resume"
    command = compress_command(model, out, METHOD, calibration)
    began = time.perf_counter()
    run(command, args.threads)
    whole = time.perf_counter() - began
    wanted = {file.name: file.read_bytes() for file in out.iterdir()}
    shutil.rmtree(out)
    rows = []
    for blocks in map(int, args.kills.split(",")):
        begun = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment(args.threads))
        began = time.perf_counter()
        journal = out.with_name(f"{out.name}.partial") / "journal.json"
        while not journal.exists() or len(json.loads(journal.read_text())["records"]) <= blocks:
            time.sleep(0.02)
        time.sleep(0.5)
        begun.send_signal(signal.SIGKILL)
        begun.wait()
        before = time.perf_counter() - began
        began = time.perf_counter()
        run([*[part for part in command if part != "--overwrite"], "--resume"], args.threads)
        after = time.perf_counter() - began
        same = {file.name: file.read_bytes() for file in out.iterdir()} == wanted
        shutil.rmtree(out)
        cost = before + after - whole
        rows.append([str(blocks), f"{before:.1f}", f"{after:.1f}", f"{cost:+.1f}", "yes" if same else "NO"])
    print(f"uninterrupted: {whole:.1f} s, {whole / 30:.1f} s a block\n")
    table(["killed in block", "until then, s", "resumed, s", "cost, s", "same bytes"], rows)


def ranks(args: argparse.Namespace, calibration: Path) -> None:
    model, out = model_of(args, "smollm2"), args.work / "out-ranks"
    evaluation = args.work / "evaluation.txt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
    for method in args.methods.split(","):
        alone = compress_command(model, out, prune_options(method, "0.5"), calibration)
        cases = {"one process, two threads": (alone, 2), "one process, one thread": (alone, 1)}
        for size in map(int, args.processes.split(",")):
            cases[f"{size} processes, one thread each"] = ([*launch, str(size), *alone[1:]], 1)
        found: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
        masks: dict[str, dict[str, torch.Tensor]] = {}
        quality: dict[str, float] = {}
        for _ in range(args.rounds):
            for case, (command, threads) in cases.items():
                found[case].append(run(command, threads))
                if case not in masks:
                    masks[case] = {k: v for k, v in load_file(out / "model.safetensors").items() if "bitmask" in k}
                    quality[case] = perplexity(out, evaluation)
        first = next(iter(cases))
        base = statistics.median(report["seconds"] for report in found[first])
        phases = list(found[first][0]["phases"])
        rows = []
        for case, reports in found.items():
            seconds = statistics.median(report["seconds"] for report in reports)
            same = total = 0
            for name, mask in masks[case].items():
                different = torch.bitwise_xor(mask, masks[first][name])
                same += mask.numel() * 8 - int(sum((different >> bit & 1).sum() for bit in range(8)))
                total += mask.numel() * 8
            each = [f"{statistics.median(r['phases'].get(phase, 0) for r in reports):.1f}" for phase in phases]
            rows.append(
                [case, f"{seconds:.1f}", f"{base / seconds:.2f}×", *each, f"{same / total:.4%}", f"{quality[case]:.3f}"]
            )
        print(f"\n{method} at 50 %, medians of {args.rounds}\n")
        table(["", "seconds", "as fast", *phases, "same mask", "perplexity"], rows)


def verify(args: argparse.Namespace, calibration: Path) -> None:
    import secateur
    from secateur.folder.writer import sha256

    model, out = model_of(args, args.sizes.split(",")[-1]), args.work / "out-verify"
    run([*compress_command(model, out, prune_options("magnitude", "0.5"), calibration)], args.threads)
    files = [file for file in sorted(out.iterdir()) if file.is_file()]
    size = sum(file.stat().st_size for file in files)

    def read() -> None:
        for file in files:
            with file.open("rb", buffering=0) as stream:
                buffer = bytearray(2**20)
                while stream.readinto(buffer):
                    pass

    def hashes() -> None:
        for file in files:
            sha256(file)

    rows = []
    for what, work in (("reading", read), ("hashes", hashes), ("verify", lambda: secateur.verify(out))):
        times = []
        for _ in range(args.rounds):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        seconds = statistics.median(times)
        rows.append([what, f"{seconds:.2f}", f"{size / seconds / 1e6:.0f}"])
    print(f"{size / 1e6:.0f} MB in {len(files)} files, in the page cache\n")
    table(["", "seconds", "MB/s"], rows)
    shutil.rmtree(out)


PARTS = {"bounded": bounded, "plan": plan, "resume": resume, "ranks": ranks, "verify": verify}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--size", default="7b", choices=[*SIZES, *MIXTURES])
    parser.add_argument("--sizes", default="smollm2,0.3b,1.5b", help="comma-separated")
    parser.add_argument("--methods", default="sparsegpt", help="comma-separated")
    parser.add_argument("--max-memory", default="", help="of bounded: 4GiB")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", default="2,4", help="comma-separated")
    parser.add_argument("--kills", default="2,10,15,20,28", help="blocks, comma-separated")
    parser.add_argument("--keep", action="store_true", help="leave the model on disk")
    args = parser.parse_args()
    if args.text is None:
        parser.error("--text is needed")
    if args.part == "bounded":
        args.max_memory = args.max_memory or "4GiB"
    prepare(args)
    _, calibration = split_text(args.text, args.work, plain_model(args.work))
    print(f"{machine()}\n")
    PARTS[args.part](args, calibration)


if __name__ == "__main__":
    main()
