"""Every figure of this project that needs a GPU, in one run.

    python -m benchmarks.gpu [--work FOLDER]

Needs torch with CUDA, transformers and what `pip install secateur` brings; no network, no data: weights are random, and the
text is the reference text that CPython carries. Results are printed as rows for benchmarks/gpu.md.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import torch

import secateur
from benchmarks import gpu_kernels
from benchmarks.protocol import random_llama
from secateur.checkpoint.export import export
from secateur.errors import one_line
from secateur.evaluation.eval_text import Text
from secateur.evaluation.perplexity import measure
from secateur.model.source import open_source
from secateur.pipeline import run as compress_run

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4},
    "1.5b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
}


def make_model(out: Path, shape: str, dtype: torch.dtype) -> None:
    """A random Llama whose vocabulary are the bytes."""
    random_llama(out, dtype, "cuda", "500MB", vocab_size=256, max_position_embeddings=4096, **SHAPES[shape])


RECIPES = {
    "wanda 50 %": secateur.Recipe(prune="wanda", sparsity=0.5),
    "sparsegpt 50 %": secateur.Recipe(prune="sparsegpt", sparsity=0.5),
    "sparsegpt 2:4": secateur.Recipe(prune="sparsegpt", pattern="2:4"),
    "gptq 4 bits": secateur.Recipe(quantize="gptq"),
    "spqr 3 bits": secateur.Recipe(quantize="spqr"),
    "squeezellm 4 bits": secateur.Recipe(quantize="squeezellm"),
    "sparsegpt 50 % and gptq 4 bits": secateur.Recipe(prune="sparsegpt", sparsity=0.5, quantize="gptq"),
}
# These look for what is best for each linear.
SEARCHES = {
    "sparsegpt 50 %, searched": secateur.Recipe(prune="sparsegpt", sparsity=0.5, allocation="search"),
    "target size 0.35x": secateur.Recipe(target_size="0.35x"),
}


def run(model: Path, out: Path, recipe: secateur.Recipe, device: str, samples: int) -> tuple[float, float]:
    """Seconds and the most GPU memory in GiB of one `compress`."""
    text = secateur.Calibration(source="docs", samples=samples, seq_len=512)
    recipe = replace(recipe, calibration=text)
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    secateur.compress(str(model), out, recipe, device=device, overwrite=True)
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() / 2**30


def agreement(a: Path, b: Path) -> float:
    """Share of weights that two checkpoints agree on: which are zero in a pruned one, to half a per cent in a quantized one."""
    first, second = open_source(str(a)).weights, open_source(str(b)).weights
    same = total = 0.0
    for name in first:
        x, y = first[name].float(), second[name].float()
        same += (((x == 0) == (y == 0)) & ((x - y).abs() <= 0.005 * x.abs().amax())).sum().item()
        total += x.numel()
    return same / total


def decoded_by_spqr_quant(model: Path, work: Path) -> str:
    """The largest difference between what the package's GPU kernel computes with an exported linear and what we decode."""
    try:
        from spqr_quant import QuantizedLinear
    except ImportError as error:
        return f"spqr_quant is not installed here: {error}"
    secateur.compress(str(model), work / "spqr", replace(RECIPES["spqr 3 bits"], dtype="float16"), overwrite=True)
    export(str(work / "spqr"), work / "exported", "spqr", overwrite=True)
    source = open_source(str(work / "exported"))
    worst = 0.0
    for name, packed in source.weights.packed.items():
        parts = [
            source.weights.stored[packed.parts[part]]
            for part in ("dense_weights", "row_offsets", "col_vals", "in_perm")
        ]
        W_OI = source.weights[name].cuda()
        linear = QuantizedLinear(*W_OI.shape, 3, 16, 16, *parts).cuda()
        x_I = torch.randn(W_OI.shape[1], device="cuda", dtype=torch.float16)
        y_O = linear(x_I.view(1, 1, -1)).flatten().float()
        wanted_O = W_OI.float() @ x_I.float()
        worst = max(worst, ((y_O - wanted_O).abs().amax() / wanted_O.abs().amax()).item())
    return f"{worst:.2e} of the largest output"


def evaluation(model: Path) -> str:
    """Seconds to measure a model on 64 windows of 1024 tokens: one at a time, and as many as `eval` takes on a GPU."""
    windows = Text("docs", 1024, 64).cut(open_source(str(model)).tokenizer()).ids_KS
    loaded = secateur.load(model, "dense", device="cuda")
    found = {}
    for tokens in (1024, None):
        began = time.perf_counter()
        found[tokens] = measure(loaded, windows, batch_tokens=tokens).perplexity, time.perf_counter() - began
    (one, one_seconds), (many, many_seconds) = found[1024], found[None]
    differ = abs(many / one - 1)
    return f"{one_seconds:.1f} s one at a time, {many_seconds:.1f} s in batches; perplexities differ by {differ:.1e}"


def brought(folder: Path) -> str:
    """Seconds a token of a model that a GPU has no room for, from disk and from pinned memory; whether it computes the same."""
    ids_NS = torch.arange(3, 40, device="cuda")[None]
    with torch.inference_mode():
        wanted_NSV = secateur.load(folder, device="cuda")(ids_NS).logits
    found = []
    for place, host in (("disk", psutil.Process().memory_info().rss + 2**30), ("pinned memory", 2**36)):
        limits = {"cuda": "1GiB", "cpu": host}
        with torch.inference_mode():
            same = torch.equal(secateur.load(folder, max_memory=limits)(ids_NS).logits, wanted_NSV)
        told = secateur.bench(str(folder), max_memory=limits, seconds=5)
        [step] = told.streamed
        disk, bus = told.shares(step)
        shares = f"{disk:.0%} of the disk's and {bus:.0%} of the bus' bandwidth"
        found.append(f"{step.seconds:.3f} s a token from {place}, {shares}, logits {'the same' if same else 'DIFFER'}")
    return "; ".join(found)


def report(name: str, figure: Callable[[], str]) -> None:
    """Print one figure as a row; where it cannot be had, why, for the others are worth having."""
    try:
        found = figure()
    except Exception as error:
        found = f"failed: {one_line(error)}"
    print(f"| {name} | {found} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-out/gpu"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    tiny, large = args.work / "tiny", args.work / "1.5b"

    def same_weights(recipe: secateur.Recipe) -> str:
        for device in ("cpu", "cuda"):
            run(tiny, args.work / device, recipe, device, 16)
        return f"{agreement(args.work / 'cpu', args.work / 'cuda'):.4%}"

    def cost(recipe: secateur.Recipe, samples: int = 128) -> str:
        seconds, memory = run(large, args.work / "out", recipe, "cuda", samples)
        return f"{seconds:.1f} s, {memory:.2f} GiB of GPU memory"

    def read_ahead(recipe: secateur.Recipe) -> str:
        found = {}
        for ahead in ((), ("cuda",)):
            compress_run._READ_AHEAD = ahead
            found[bool(ahead)] = min(run(large, args.work / "out", recipe, "cuda", 32)[0] for _ in range(3))
        return f"{found[True]:.1f} s, {found[False]:.1f} s without"

    def foretold(recipe: secateur.Recipe) -> str:
        text = secateur.Calibration(source="docs", samples=128, seq_len=512)
        told = secateur.forecast(str(large), replace(recipe, calibration=text), out=args.work, device="cuda")
        seconds, memory = run(large, args.work / "out", recipe, "cuda", 128)
        before = f"{told.device / 2**30:.2f} GiB and {told.total_seconds:.1f} s foretold"
        return f"{before}, {memory:.2f} GiB and {seconds:.1f} s taken"

    make_model(tiny, "tiny", torch.float32)
    for name, recipe in RECIPES.items():
        report(f"{name}: same weights on GPU and CPU", lambda recipe=recipe: same_weights(recipe))
    report("spqr_quant's kernel against our decoder", lambda: decoded_by_spqr_quant(tiny, args.work))
    make_model(large, "1.5b", torch.bfloat16)
    for name, recipe in RECIPES.items():
        report(f"{name}: 1.5 B, 128 × 512 tokens", lambda recipe=recipe: cost(recipe))
    for name, recipe in SEARCHES.items():
        report(f"{name}: 1.5 B, 32 × 512 tokens", lambda recipe=recipe: cost(recipe, 32))
    report(
        "sparsegpt 50 %: the next block read ahead, 1.5 B, 32 × 512 tokens",
        lambda: read_ahead(RECIPES["sparsegpt 50 %"]),
    )
    for name in ("wanda 50 %", "sparsegpt 50 %"):
        report(f"{name}: `plan`, 1.5 B, 128 × 512 tokens", lambda name=name: foretold(RECIPES[name]))
    report("`eval`, 1.5 B, 64 × 1024 tokens", lambda: evaluation(large))
    report("read as it writes: dense, 1.5 B", lambda: brought(large))
    for name in ("wanda 50 %", "gptq 4 bits"):

        def streamed(name: str = name) -> str:
            run(large, args.work / "out", RECIPES[name], "cuda", 16)
            return brought(args.work / "out")

        report(f"read as it writes: {name}, 1.5 B", streamed)
    shutil.rmtree(args.work)
    gpu_kernels.main()


if __name__ == "__main__":
    main()
