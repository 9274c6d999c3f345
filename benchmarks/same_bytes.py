"""Whether a change of the code left every byte of the compressed weights as it was: a guard for work that must change none.

python -m benchmarks.same_bytes --record     before the first change
python -m benchmarks.same_bytes              after each

Compares the SHA-256 of the safetensors files of runs with each pruner, quantizer, refinement, allocation and target, resumed,
in two processes, and of `demo`. Bytes depend on the processor, the number of threads and the version of torch, so a record
is of the machine that it was made on: `bench-out/same_bytes.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from benchmarks.protocol import arguments, plain_model, prepare
from secateur.folder.manifest import sha256

TEXT = Path("tests/fixtures/text/calibration.txt")
_WINDOWS = ["--calibration", str(TEXT), "--samples", "8", "--seq-len", "128"]
_BLOCKS, _HIDDEN = 4, 64
RUNS: dict[str, tuple[str, str]] = {
    "magnitude": ("blocks", "--prune magnitude --sparsity 0.5"),
    "wanda": ("blocks", "--prune wanda --pattern 2:4"),
    "dsnot": ("blocks", "--prune wanda --sparsity 0.5 --refine dsnot"),
    "sparsegpt": ("blocks", "--prune sparsegpt --sparsity 0.5"),
    "sparsegpt 2:4": ("blocks", "--prune sparsegpt --pattern 2:4 --format dense --dtype float32"),
    "alps": ("blocks", "--prune alps --sparsity 0.6"),
    "reconstruct": ("blocks", "--prune wanda --sparsity 0.5 --reconstruct"),
    "rtn": ("blocks", "--quantize rtn --bits 4"),
    "gptq": ("blocks", "--quantize gptq --bits 3 --group-size 64 --order permuted"),
    "spqr": ("blocks", "--quantize spqr --bits 3 --group-size 16"),
    "squeezellm": ("blocks", "--quantize squeezellm --bits 3"),
    "sparsegpt and gptq": ("blocks", "--prune sparsegpt --sparsity 0.5 --quantize gptq --bits 4"),
    "owl": ("blocks", "--prune wanda --sparsity 0.6 --allocation owl"),
    "search": ("blocks", "--prune sparsegpt --sparsity 0.6 --allocation search"),
    "target": ("blocks", "--target-size 0.85x"),
    "transposed": ("gpt2", "--prune sparsegpt --sparsity 0.5 --quantize spqr --bits 3"),
    "bounded memory": ("blocks", "--prune sparsegpt --sparsity 0.5 --max-memory 2GiB --batch-tokens 128"),
    "resumed": ("blocks", "--quantize gptq --bits 4"),
    "two processes": ("blocks", "--prune sparsegpt --sparsity 0.5"),
    "demo": ("demo", "--prune sparsegpt --sparsity 0.5"),
}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--record", action="store_true", help="keep the hashes instead of comparing them")
    parser.add_argument("--only", default="", help="only runs whose name begins so")
    args = parser.parse_args()
    prepare(args)
    record = args.work / "same_bytes.json"
    machine = {
        "torch": torch.__version__,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "threads": args.threads,
    }
    before = {} if args.record else json.loads(record.read_text())
    if before and before["machine"] != machine:
        print(f"the record is of {before['machine']}, and this is {machine}: make one here", file=sys.stderr)
        return 2
    models = {"blocks": few_blocks(args.work), "gpt2": transposed(args.work), "demo": "demo"}
    found, different = {}, []
    for name, (model, options) in RUNS.items():
        if not name.startswith(args.only):
            continue
        found[name] = hashes(name, str(models[model]), options.split(), args.work / "same-bytes", args.threads)
        if before and found[name] != before["runs"].get(name):
            different.append(name)
        if args.record:
            record.write_text(json.dumps({"machine": machine, "runs": found}, indent=2) + "\n")
        print(f"{name}: {'different' if name in different else 'recorded' if args.record else 'the same'}", flush=True)
    return int(bool(different))


def few_blocks(work: Path) -> Path:
    """The first blocks of SmolLM2, in bfloat16."""
    out = work / "smollm2-few-blocks"
    if not (out / "config.json").exists():
        source = plain_model(work, torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=_BLOCKS, dtype=torch.bfloat16)
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return out


def transposed(work: Path) -> Path:
    """A random GPT-2, whose linears keep their weights the other way round."""
    out = work / "gpt2-random"
    if not (out / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(plain_model(work, torch.bfloat16))
        config = GPT2Config(n_embd=_HIDDEN, n_layer=2, n_head=4, n_positions=256, vocab_size=len(tokenizer))
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(out)
        tokenizer.save_pretrained(out)
    return out


def hashes(name: str, model: str, options: list[str], out: Path, threads: int) -> dict[str, str]:
    """SHA-256 of the weight files that a run writes, by their names."""
    shutil.rmtree(out, ignore_errors=True)
    arguments = ["secateur", "compress", model, str(out), *options, *_WINDOWS]
    if name == "two processes":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", *arguments]
        run(command, 1)
    elif name == "resumed":
        command = [sys.executable, "-m", *arguments]
        run(command, threads, lambda line: line.startswith("block 2 "))
        run([*command, "--resume"], threads)
    else:
        run([sys.executable, "-m", *arguments], threads)
    found = {file.name: sha256(file) for file in sorted(out.glob("*.safetensors"))}
    shutil.rmtree(out)
    return found


def run(command: list[str], threads: int, stop: Callable[[str], bool] | None = None) -> None:
    """Run a command; interrupt it once it says what `stop` waits for."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    said = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if stop is not None and stop(line):
                process.send_signal(signal.SIGINT)
                stop = None
    if process.returncode not in (0, 130 if stop is None else 0):
        raise SystemExit(f"{' '.join(command)} failed:\n{''.join(said)}")


if __name__ == "__main__":
    sys.exit(main())
