"""Peak resident memory of `compress` on a synthetic Llama of 1.5 billion parameters in bfloat16, sharded on disk.

    python -m benchmarks.memory --text wiki.test.raw

Counted above an interpreter that has imported everything, at 16 × 512 calibration tokens. Needs 6 GB of disk.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

from benchmarks.protocol import (
    arguments,
    compress_command,
    machine,
    plain_model,
    prepare,
    prune_options,
    sharded_llama,
    split_text,
    table,
)

LIMIT = 2.5 * 2**30


def interpreter_peak() -> int:
    """Peak memory of a process that imports what `compress` imports, and stops."""
    code = "import secateur.runs.compress; from secateur.memory.peak import peak_memory; print(peak_memory())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--methods", default="sparsegpt,wanda", help="comma-separated")
    parser.add_argument("--keep", action="store_true", help="leave the models on disk")
    args = parser.parse_args()
    if args.text is None:
        parser.error("--text is needed")
    prepare(args)
    small = plain_model(args.work)
    _, calibration = split_text(args.text, args.work, small)
    model = args.work / "synthetic-1.5b"
    parameters = sharded_llama(model, small, hidden=2048, inner=6144, blocks=28, heads=16, kv_heads=8)
    base = interpreter_peak()
    print(f"{machine()}\n{parameters / 1e9:.2f} billion parameters; interpreter with imports: {base / 2**20:.0f} MiB\n")
    rows = []
    for method in args.methods.split(","):
        # The text holds 32 windows; 16 of them are drawn.
        command = compress_command(model, args.work / "out-1.5b", prune_options(method, "0.5"), calibration, samples=16)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        report = json.loads(done.stdout)
        above = report["peak_bytes"] - base
        rows.append([method, f"{above / 2**30:.2f}", f"{LIMIT / 2**30:.2f}", f"{report['seconds']:.0f}"])
        print(rows[-1], flush=True)
    table(["", "GiB above the interpreter", "limit", "seconds"], rows)
    if not args.keep:
        shutil.rmtree(model)
        shutil.rmtree(args.work / "out-1.5b")


if __name__ == "__main__":
    main()
