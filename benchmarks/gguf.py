"""GGUF: codes solved for its grids against llama.cpp's own, our files in llama.cpp, and what an export takes.

    pip install gguf libgguf          # libgguf: ggml's own quantizers, with importance matrices
    python -m benchmarks.gguf --part linear
    python -m benchmarks.gguf --text wiki.test.raw --part quality
    python -m benchmarks.gguf --text wiki.test.raw --part llama --llama llama/bin/python
    python -m benchmarks.gguf --part time

`quality`: SmolLM2, dithered, its linears on a grid by GPTQ, and by ggml's quantizer with the same calibration tokens as
importance matrix: in the same pipeline, every tensor of the same type on both sides, so that files are of equal size. `llama`:
logits and perplexity of an exported file by llama.cpp against ours. `time`: seconds and memory of an export of 1.2 B.

O: output features, I: input features.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from transformers import AutoTokenizer

import secateur
from benchmarks.protocol import (
    EVAL_SEQ_LEN,
    EVAL_WINDOWS,
    SAMPLES,
    SEQ_LEN,
    arguments,
    plain_model,
    prepare,
    random_llama,
    split_text,
    table,
)
from benchmarks.revisions import measured_run
from secateur.calibration.tokens import Named, windows
from secateur.core.pruned import Pruned
from secateur.core.quantized import Quantized
from secateur.core.registry import quantizer
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.evaluation.perplexity import measure
from secateur.foreign.gguf_blocks import read_blocks
from secateur.formats.layouts.block_types import BLOCK_TYPES, type_for
from secateur.model.source import open_source
from secateur.quant.block_grid import grid_option
from secateur.quant.gptq import GPTQ
from secateur.quant.rtn import RTN

GRIDS = "q4_0,q4_k,q3_k,q2_k"
# Logits of so many tokens of each window are compared.
KEPT = 128
# TinyLlama's sizes, with SmolLM2's vocabulary.
SIZES = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 49152,
}  # fmt: skip

LLAMA = """
import json, math, sys
import numpy as np
from llama_cpp import Llama
length = int(sys.argv[3])
model = Llama(sys.argv[1], n_ctx=length, n_batch=length, logits_all=True, verbose=False, n_threads={threads})
windows = json.load(open(sys.argv[2]))
loss, kept = [], []
for tokens in windows:
    model.reset(); model.eval(tokens)
    logits = np.array(model.scores[: len(tokens)], dtype=np.float64)
    kept.append(logits[: {keep}])
    rest = logits[:-1] - logits[:-1].max(1, keepdims=True)
    log = rest - np.log(np.exp(rest).sum(1, keepdims=True))
    loss += [-log[i, token] for i, token in enumerate(tokens[1:])]
np.save(sys.argv[4], np.stack(kept).astype(np.float32))
print(json.dumps(math.exp(sum(loss) / len(loss))))
"""


@quantizer
@dataclass(frozen=True)
class Ggml:
    """ggml's own quantizers, with the squares of the inputs as importance matrix."""

    grid: str = grid_option()
    bits: int = 4

    name: ClassVar[str] = "ggml"
    paper: ClassVar[str] = ""
    all_bits: ClassVar[tuple[int, ...]] = (4,)
    level: ClassVar[Level] = Level.MOMENTS
    needs_fisher: ClassVar[bool] = False

    def quantize(self, stack: Stack, pruned: Pruned | None = None) -> list[Quantized]:
        """The blocks that `llama-quantize --imatrix` would write."""
        import libgguf

        form = type_for(self.grid.upper(), stack.features)
        assert form is not None
        importance_I = (stack.stats.square_I / max(stack.stats.tokens, 1)).numpy()
        found = []
        for W_OI in stack.split(stack.W_OI):
            raw = libgguf.quantize_rows(W_OI.contiguous().numpy(), form.number, importance_I)
            blocks = read_blocks(form.name, torch.from_numpy(raw.copy()).view(len(W_OI), -1))
            found.append(Quantized(blocks, (len(W_OI), stack.features), stack.dtype))
        return found


def compress(args: argparse.Namespace, method: str, grid: str) -> Path:
    """SmolLM2 on a grid, made once."""
    model = plain_model(args.work, torch.bfloat16, dithered=True)
    _, calibration = split_text(args.text, args.work, model)
    out = args.work / f"{method}-{grid}{f'-{args.blocks}' if args.blocks else ''}"
    targets = tuple(f"model.layers.{block}.*" for block in range(args.blocks))
    if not (out / "secateur.json").exists():
        text = secateur.Calibration(source=str(calibration), samples=args.samples, seq_len=SEQ_LEN, bos=False)
        recipe = secateur.Recipe(quantize=method, quantization={"grid": grid}, calibration=text, targets=targets)
        secateur.compress(str(model), out, recipe, overwrite=True)
    return out


def quality(args: argparse.Namespace) -> None:
    """Perplexity and divergence of both on every grid."""
    model = plain_model(args.work, torch.bfloat16, dithered=True)
    evaluation, _ = split_text(args.text, args.work, model)
    text = secateur.Text(str(evaluation), EVAL_SEQ_LEN, args.windows, bos=False)
    rows = []
    for grid in args.grids.split(","):
        for method in ("ggml", "gptq"):
            begin = time.process_time()
            out = compress(args, method, grid)
            seconds = time.process_time() - begin
            found = secateur.evaluate(str(out), str(model), text).quality
            bits = json.loads((out / "secateur.json").read_text())["bits"]
            rows.append([grid, method, f"{bits:.3f}", f"{found.perplexity:.2f}", f"{found.kl:.4f}", f"{seconds:.0f}"])
            print(rows[-1], flush=True)
    table(["grid", "method", "bits", "perplexity", "KL", "CPU s"], rows)


def in_llama(args: argparse.Namespace) -> None:
    """Perplexity and logits of the same weights by llama.cpp and by us, on the evaluation windows: dense, then each grid."""
    for grid in ("dense", *args.grids.split(",")):
        print(grid)
        dense = grid == "dense"
        _in_llama(args, plain_model(args.work, dithered=True) if dense else compress(args, args.method, grid))


def _in_llama(args: argparse.Namespace, out: Path) -> None:
    evaluation, _ = split_text(args.text, args.work, out)
    file = args.work / f"{out.name}.gguf"
    if not file.exists():
        begin = time.perf_counter()
        secateur.export(str(out), file, "gguf", like=open_source("demo").files[0])
        print(f"exported in {time.perf_counter() - begin:.1f} s, {file.stat().st_size / 2**20:.1f} MiB", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids_KS = windows([evaluation.read_text()], tokenizer, EVAL_SEQ_LEN, args.windows, named=Named("evaluation"))
    (args.work / "windows.json").write_text(json.dumps(ids_KS.tolist()))
    script = LLAMA.format(threads=args.threads, keep=KEPT)
    command = [args.llama, "-c", script, str(file), str(args.work / "windows.json"), str(EVAL_SEQ_LEN)]
    logits = args.work / "logits.npy"
    run = subprocess.run([*command, str(logits)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"llama.cpp failed: {run.stderr[-2000:]}")
    model = secateur.load(out, dtype=torch.float32)
    ours = measure(model, ids_KS).perplexity
    theirs = json.loads(run.stdout.strip().splitlines()[-1])
    print(f"perplexity: ours {ours:.4f}, llama.cpp {theirs:.4f}, {100 * (theirs / ours - 1):+.3f} %")
    with torch.no_grad():
        mine_KSV = torch.stack([model(ids_S[None, :KEPT]).logits[0] for ids_S in ids_KS])
    theirs_KSV = torch.from_numpy(np.load(logits))
    difference = (mine_KSV - theirs_KSV).square().mean().sqrt() / mine_KSV.std()
    same = (mine_KSV.argmax(2) == theirs_KSV.argmax(2)).float().mean()
    print(f"logits: root mean square difference {difference:.5f} of their spread, same first choice {100 * same:.2f} %")


def one_linear(args: argparse.Namespace) -> None:
    """The error of one random linear's output, relative to its square, by each way of rounding."""
    torch.manual_seed(0)
    I, O = 512, 192
    x_TI = torch.randn(2048, I) @ (torch.randn(I, I) * 0.1 + torch.eye(I)) * (1 + 3 * torch.rand(I).square())
    W_OI = torch.randn(O, I) * 0.02 * torch.rand(O, 1)
    stats = InputStats.empty(I, Level.GRAM)
    stats.add(x_TI)
    stack = Stack.of([W_OI], stats)
    whole = (x_TI @ W_OI.T).square().sum()
    rows = []
    for name, form in BLOCK_TYPES.items():
        grid = name.lower()
        methods = (Ggml(grid), RTN(grid=grid), GPTQ(grid=grid), GPTQ(grid=grid, order="natural"))
        errors = [
            (x_TI @ (method.quantize(stack)[0].dequantize() - W_OI).T).square().sum() / whole for method in methods
        ]
        rows.append([grid, f"{form.bits_per_weight:.2f}", *(f"{error:.2e}" for error in errors)])
    table(["grid", "bits", "ggml", "rtn", "gptq", "gptq, natural order"], rows)


def timed(args: argparse.Namespace) -> None:
    """Seconds and memory of exporting a random Llama of 1.2 B with 4 bits, with the converter."""
    folder = args.work / "llama-1.2b"
    if not (folder / "config.json").exists():
        random_llama(folder, torch.bfloat16, **SIZES)
        # A converter knows a tokenizer by what it makes of a text.
        AutoTokenizer.from_pretrained(plain_model(args.work, torch.bfloat16)).save_pretrained(folder)
    packed = args.work / "llama-1.2b-q4_0"
    if not (packed / "secateur.json").exists():
        # Codes that Q4_0 takes as they are.
        options = {"group_size": 32, "symmetric": True, "search_range": False}
        secateur.compress(str(folder), packed, secateur.Recipe(quantize="rtn", quantization=options))
    command = [
        "export",
        str(packed.resolve()),
        str((args.work / "llama-1.2b.gguf").resolve()),
        "--to",
        "gguf",
        "--overwrite",
    ]
    command += ["--converter", args.converter] if args.converter else []
    command += ["--like", args.like] if args.like else []
    seconds, peak = measured_run(command, Path(__file__).parents[1], args.threads)
    print(f"{seconds:.1f} s, {peak / 1024:.2f} GiB at most in one process")


def main() -> None:
    """Parse the arguments and run one part."""
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=["linear", "quality", "llama", "time"], required=True)
    parser.add_argument("--grids", default=GRIDS)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--windows", type=int, default=EVAL_WINDOWS)
    parser.add_argument("--blocks", type=int, default=0, help="compress only the first so many")
    parser.add_argument("--llama", help="Python with llama-cpp-python")
    parser.add_argument("--method", default="gptq", help="of the files that llama.cpp is given")
    parser.add_argument("--converter", help="llama.cpp's folder, or its converter")
    parser.add_argument("--like", help="GGUF file of the model of 1.2 B, in place of the converter")
    args = parser.parse_args()
    prepare(args)
    {"linear": one_linear, "quality": quality, "llama": in_llama, "time": timed}[args.part](args)


if __name__ == "__main__":
    main()
