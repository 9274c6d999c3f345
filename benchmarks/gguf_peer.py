"""llama.cpp's own quantization with an importance matrix against ours at equal size: whole files, mixtures of types and all.

    python -m benchmarks.gguf_peer --text wiki.test.raw --llama llama/bin/python
    python -m benchmarks.gguf_peer --text wiki.test.raw --llama llama/bin/python --model gemma --like gemma.gguf --bos

`--llama`: a Python with llama-cpp-python, whose library makes a file of each kind of the dense one, with the mean squares of
every linear's inputs in the dense model on the calibration windows. `types`: the same types tensor by tensor, by GPTQ
(embeddings and head by rounding), from the same windows. `search`: a search's types at the size of that. Perplexity and
divergence by the same program for all. A model that is given is dithered as SmolLM2 is. What was measured once is kept in the
work folder.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from benchmarks.protocol import (
    EVAL_SEQ_LEN,
    EVAL_WINDOWS,
    SAMPLES,
    SEQ_LEN,
    arguments,
    dither,
    machine,
    measured_once,
    plain_model,
    prepare,
    split_text,
    table,
)
from secateur.calibration.kept_windows import calibration_ids
from secateur.foreign.gguf_file import GGUFFile
from secateur.formats.layouts.block_types import BLOCK_TYPES
from secateur.model.source import open_source

#: By the numbers that llama.cpp has for them.
KINDS = {"Q4_0": 2, "Q4_K_M": 15, "Q3_K_M": 12, "Q2_K": 10}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
QUANTIZE = """
import ctypes, sys
import numpy as np
from llama_cpp import llama_cpp as lib
source, out, kind, matrix, threads = sys.argv[1:]
found = np.load(matrix)
entries = (lib.llama_model_imatrix_data * (len(found.files) + 1))()
kept = []
for entry, name in zip(entries, found.files):
    values = np.ascontiguousarray(found[name], dtype=np.float32)
    kept.append(values)
    entry.name, entry.size = name.encode(), values.size
    entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
options = lib.llama_model_quantize_default_params()
options.nthread, options.ftype, options.imatrix, options.allow_requantize = int(threads), int(kind), entries, True
sys.exit(lib.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(options)))
"""


def main() -> None:
    """Print one table."""
    parser = arguments(__doc__)
    parser.add_argument("--llama", required=True, help="Python with llama-cpp-python")
    parser.add_argument("--model", type=Path, help="folder of another model than SmolLM2")
    parser.add_argument("--like", type=Path, help="GGUF file of that model")
    parser.add_argument("--bos", action="store_true", help="windows begin with BOS")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--ways", default="types,search")
    parser.add_argument("--windows", type=int, default=EVAL_WINDOWS)
    parser.add_argument("--again", action="store_true", help="measure what is known already, too")
    args = parser.parse_args()
    prepare(args)
    model, like = _dense(args)
    evaluation, calibration = _texts(args, model)
    text = secateur.Calibration(source=str(calibration), samples=SAMPLES, seq_len=SEQ_LEN, bos=args.bos)
    base = args.work / f"{model.name}.gguf"
    if not base.exists():
        secateur.export(str(model), base, "gguf", like=like)
    matrix = args.work / f"{model.name}-matrix.npz"
    if not matrix.exists():
        np.savez(matrix, **_importance(model, text))
    print(f"{machine()}\n")
    shown = secateur.Text(str(evaluation), EVAL_SEQ_LEN, args.windows, bos=args.bos)
    rows = []
    for kind in args.kinds.split(","):
        theirs = args.work / f"{model.name}-{kind}.gguf"
        if not theirs.exists():
            command = [
                args.llama,
                "-c",
                QUANTIZE,
                str(base),
                str(theirs),
                str(KINDS[kind]),
                str(matrix),
                str(args.threads),
            ]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise SystemExit(f"llama.cpp failed: {run.stderr[-2000:]}")
        size = sum(GGUFFile(theirs).rows(name).numel() for name in GGUFFile(theirs))
        for way in ("llama.cpp", *args.ways.split(",")):

            def measure(way: str = way, theirs: Path = theirs, size: int = size) -> dict[str, Any]:
                made, bytes_of = theirs, size
                if way != "llama.cpp":
                    recipe = _recipe(way, theirs, model, text, size)
                    made = args.work / "peer-out"
                    secateur.compress(str(model), made, recipe, overwrite=True)
                    bytes_of = sum(file.stat().st_size for file in made.glob("*.safetensors"))
                found = secateur.evaluate(str(made), str(model), shown, cache=args.work / "cache").quality
                return {"bytes": bytes_of, "perplexity": found.perplexity, "kl": found.kl}

            what = f"peer {model.name} {kind} {way} {args.windows}"
            found = measured_once(args, "gguf", what, measure)
            rows.append([kind, way, f"{found['bytes'] / 1e6:.2f}", f"{found['perplexity']:.2f}", f"{found['kl']:.4f}"])
            first = float(next(row for row in rows if row[0] == kind)[4])
            rows[-1].append(f"{100 * (found['kl'] / first - 1):+.1f} %")
    table(["kind", "by", "MB of tensors", "perplexity", "KL", "against llama.cpp"], rows)


def _dense(args: argparse.Namespace) -> tuple[Path, Path]:
    """A dithered model in bfloat16, and a GGUF file of the one that it was."""
    if args.model is None:
        return plain_model(args.work, torch.bfloat16, dithered=True), open_source("demo").files[0]
    out = args.work / f"{args.model.resolve().name}-dithered"
    if not (out / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
        dither(model)
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(args.model).save_pretrained(out)
    return out, args.like


def _texts(args: argparse.Namespace, model: Path) -> tuple[Path, Path]:
    if args.model is None:
        return split_text(args.text, args.work, model)
    raw = args.text.read_text(encoding="utf-8")
    cut = int(len(raw) * 0.6)
    places = args.work / "evaluation.txt", args.work / "calibration-whole.txt"
    for place, part in zip(places, (raw[:cut], raw[cut:]), strict=True):
        place.write_text(part, encoding="utf-8")
    return places


@torch.no_grad()
def _importance(folder: Path, text: secateur.Calibration) -> dict[str, np.ndarray]:
    """The mean square of every input of every linear in the dense model, by llama.cpp's names."""
    ids_NS, *_ = calibration_ids(open_source(str(folder)), text, torch.device("cpu"), lambda _: None)
    model = secateur.load(folder, dtype=torch.float32)
    found: dict[str, torch.Tensor] = {}
    for module, linear in model.named_modules():
        name = _name(module)
        if name is not None:

            def note(_: Any, inputs: tuple[torch.Tensor], name: str = name) -> None:
                square_I = inputs[0].flatten(0, -2).square().sum(0)
                found[name] = found.get(name, 0) + square_I / ids_NS.numel()

            linear.register_forward_pre_hook(note)
    for ids_S in ids_NS:
        model.model(ids_S[None])
    return {name: square_I.numpy() for name, square_I in found.items()}


def _name(module: str) -> str | None:
    """What llama.cpp calls a linear."""
    parts = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    return f"blk.{parts[1]}.{NAMES[parts[2]]}.weight" if parts is not None and parts[2] in NAMES else None


def _recipe(way: str, theirs: Path, model: Path, text: secateur.Calibration, size: int) -> secateur.Recipe:
    """With the types of a file, or those of a search for its size."""
    common: dict[str, Any] = {"quantize": "gptq", "quantization": {"grid": "gguf"}, "calibration": text}
    if way == "search":
        return secateur.Recipe(**common, target_size=str(size))
    file = GGUFFile(theirs)
    types = {}
    for weight in open_source(str(model)).weights:
        module = weight.removesuffix(".weight")
        name = _name(module)
        if name is not None:
            types[module] = secateur.Choice(grid=file.type(name).lower())
    tables = {"embeddings": "token_embd.weight", "head": "output.weight"}
    kinds = {role: file.type(name).lower() for role, name in tables.items() if name in list(file)}
    assert all(kind.upper() in BLOCK_TYPES for kind in kinds.values())
    return secateur.Recipe(**common, linears=types, **kinds)


if __name__ == "__main__":
    main()
