"""Peak resident memory of `compress` on a synthetic Llama of 1.5 billion parameters in bfloat16, sharded on disk.

    python -m benchmarks.memory --text wiki.test.raw

Counted above an interpreter that has imported everything, at 16 × 512 calibration tokens. Needs 6 GB of disk.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from benchmarks.protocol import (
    arguments,
    compress_command,
    machine,
    plain_model,
    prepare,
    prune_options,
    split_text,
    table,
)

LIMIT = 2.5 * 2**30
HIDDEN, INNER, BLOCKS, HEADS, KV_HEADS = 2048, 6144, 28, 16, 8


def make_model(out: Path, tokenizer_from: Path) -> int:
    """Random weights of a plausible scale, a shard for every four blocks; the number of parameters."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    tokenizer.save_pretrained(out)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(out)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(0.02).bfloat16()

    kv = HIDDEN // HEADS * KV_HEADS
    shards = [
        {"model.embed_tokens.weight": random(len(tokenizer), HIDDEN)},
        {"lm_head.weight": random(len(tokenizer), HIDDEN)},
    ]
    shards[0]["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    weight_map: dict[str, str] = {}
    count = 0

    def write(tensors: dict[str, torch.Tensor], number: int) -> int:
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        return sum(t.numel() for t in tensors.values())

    for number, tensors in enumerate(shards):
        count += write(tensors, number)
    for first in range(0, BLOCKS, 4):
        tensors = {}
        for i in range(first, min(first + 4, BLOCKS)):
            shapes = {
                "self_attn.q_proj": (HIDDEN, HIDDEN),
                "self_attn.k_proj": (kv, HIDDEN),
                "self_attn.v_proj": (kv, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HIDDEN),
                "mlp.gate_proj": (INNER, HIDDEN),
                "mlp.up_proj": (INNER, HIDDEN),
                "mlp.down_proj": (HIDDEN, INNER),
            }
            for name, shape in shapes.items():
                tensors[f"model.layers.{i}.{name}.weight"] = random(*shape)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        count += write(tensors, 2 + first // 4)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return count


def interpreter_peak() -> int:
    """Peak memory of a process that imports what `compress` imports, and stops."""
    code = (
        "import secateur.cli, secateur, torch; from secateur.pipeline.report import peak_memory; print(peak_memory())"
    )
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
    parameters = make_model(model, small)
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
