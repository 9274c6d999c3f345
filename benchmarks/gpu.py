"""Every figure of this project that needs a GPU, in one run.

    python -m benchmarks.gpu [--work FOLDER]

Needs torch with CUDA, transformers and what `pip install secateur` brings; no network, no data: weights are random, and the
text is the reference text that CPython carries. Results are printed as rows for benchmarks/gpu.md.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import secateur
from secateur.pipeline.source import open_source

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4},
    "1.5b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
}


def make_model(out: Path, shape: str, dtype: torch.dtype) -> None:
    """A random Llama with a byte tokenizer."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, max_position_embeddings=4096, tie_word_embeddings=False, **SHAPES[shape])
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.cpu().save_pretrained(out, max_shard_size="500MB")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(out)


def run(model: Path, out: Path, method: str, pattern: str, device: str, samples: int) -> tuple[float, float]:
    """Seconds and the most GPU memory in GiB of one `compress`."""
    sparsity = {"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern)}
    text = secateur.Calibration(source="docs", samples=samples, seq_len=512)
    recipe = secateur.Recipe(prune=method, calibration=text, **sparsity)
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    secateur.compress(str(model), out, recipe, device=device, overwrite=True)
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() / 2**30


def agreement(a: Path, b: Path) -> float:
    """Share of weights for which two checkpoints agree on whether they are zero."""
    first, second = open_source(str(a)).weights, open_source(str(b)).weights
    same = sum(((first[n] == 0) == (second[n] == 0)).sum().item() for n in first)
    return same / sum(first[n].numel() for n in first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-out/gpu"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    make_model(args.work / "tiny", "tiny", torch.float32)
    for method, pattern in (("wanda", "0.5"), ("sparsegpt", "0.5"), ("sparsegpt", "2:4")):
        for device in ("cpu", "cuda"):
            run(args.work / "tiny", args.work / device, method, pattern, device, 16)
        print(
            f"| {method} {pattern}: same mask on GPU and CPU | {agreement(args.work / 'cpu', args.work / 'cuda'):.4%} |"
        )
    make_model(args.work / "1.5b", "1.5b", torch.bfloat16)
    for method, pattern in (("wanda", "0.5"), ("sparsegpt", "0.5"), ("sparsegpt", "2:4")):
        seconds, memory = run(args.work / "1.5b", args.work / "out", method, pattern, "cuda", 128)
        print(f"| {method} {pattern}: 1.5 B, 128 × 512 tokens | {seconds:.1f} s, {memory:.2f} GiB of GPU memory |")
    shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
