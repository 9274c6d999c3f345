"""Whole models on the GPU: compressed, foretold, evaluated, and brought to it as they run. Weights are random, and the text is
the reference text that CPython carries: no network, no data.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch

import secateur
from benchmarks.gpu_budget import Line
from benchmarks.protocol import random_llama
from secateur.checkpoint.export import export
from secateur.evaluation.eval_text import Text
from secateur.evaluation.perplexity import measure
from secateur.model.source import open_source
from secateur.walking import walker

TINY = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
LARGE = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
_SEQ_LEN = 512
# Of the GPU for models that are read as they run: less than codes of 4 bits take of the large one.
_GPU_SHARE = "512MiB"

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


@dataclass(frozen=True)
class Models:
    """Figures of whole models on a device. On the CPU, for a dry run, the large one is small.

    Attributes:
        device: cuda or cpu.
        work: folder for models, which are made when they are first wanted.
    """

    device: str
    work: Path

    def lines(self) -> list[Line]:
        """The most wanted first; each with the seconds that it may take."""
        dry = self.device == "cpu"
        of_large = "tiny" if dry else "1.5 B"
        cost = f"{of_large}, {self._samples(128)} × {_SEQ_LEN} tokens"
        fewer = f"{of_large}, {self._samples(32)} × {_SEQ_LEN} tokens"
        lines = [
            Line(f"{name}: same weights on GPU and CPU", 45, partial(self.same_weights, recipe))
            for name, recipe in RECIPES.items()
        ]
        lines.append(Line("nccl, one rank of torchrun: same weights as without", 60, self.one_rank))
        lines.append(Line(f"the large model is made: {of_large}", 60, self.made))
        first, *others = RECIPES
        lines.append(Line(f"{first}: {cost}", 90, partial(self.cost, RECIPES[first], 128)))
        ahead = partial(self.read_ahead, RECIPES["sparsegpt 50 %"])
        lines.append(Line(f"sparsegpt 50 %: next block read ahead, {fewer}", 90, ahead))
        lines += [Line(f"{name}: {cost}", 90, partial(self.cost, RECIPES[name], 128)) for name in others]
        for name in ("wanda 50 %", "sparsegpt 50 %"):
            lines.append(Line(f"{name}: `plan`, {cost}", 90, partial(self.foretold, RECIPES[name])))
        lines.append(Line(f"`eval`, {of_large}, {self._samples(64)} × 1024 tokens", 60, self.evaluation))
        for name in ("dense", "wanda 50 %", "gptq 4 bits"):
            lines.append(Line(f"read as it writes: {name}, {of_large}", 60, partial(self.brought, name)))
        lines += [Line(f"{name}: {fewer}", 120, partial(self.cost, recipe, 32)) for name, recipe in SEARCHES.items()]
        lines.append(Line("spqr_quant's kernel against our decoder", 90, self.decoded_by_spqr_quant))
        return lines

    def _samples(self, samples: int) -> int:
        return samples if self.device == "cuda" else 2

    def _model(self, name: str) -> Path:
        """A random Llama whose vocabulary are the bytes, made once."""
        out = self.work / name
        if not (out / "tokenizer.json").exists():  # which is written last
            large = name == "large" and self.device == "cuda"
            dtype = torch.bfloat16 if name == "large" else torch.float32
            sizes = LARGE if large else TINY
            random_llama(out, dtype, self.device, "500MB", vocab_size=256, max_position_embeddings=4096, **sizes)
        return out

    def _compress(
        self, model: Path, out: str, recipe: secateur.Recipe, device: str, samples: int
    ) -> tuple[float, float]:
        """Seconds and the most GPU memory in GiB of one `compress`."""
        text = secateur.Calibration(source="docs", samples=self._samples(samples), seq_len=_SEQ_LEN)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        recipe = replace(recipe, calibration=text)
        secateur.compress(str(model), self.work / out, recipe, device=device, overwrite=True)
        seconds = time.perf_counter() - began
        return seconds, torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0

    def made(self) -> str:
        began = time.perf_counter()
        self._model("large")
        return f"in {time.perf_counter() - began:.1f} s"

    def same_weights(self, recipe: secateur.Recipe) -> str:
        for device in ("cpu", self.device):
            self._compress(self._model("tiny"), f"same-{device}", recipe, device, 16)
        return f"{agreement(self.work / 'same-cpu', self.work / f'same-{self.device}'):.4%}"

    def one_rank(self) -> str:
        """What is exchanged goes through nccl, on a CPU through gloo, though there is nobody to exchange it with."""
        model, samples = self._model("tiny"), self._samples(16)
        self._compress(model, "alone", RECIPES["sparsegpt 50 %"], self.device, 16)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "secateur", "compress"]
        command += [str(model), str(self.work / "ranked"), "--prune", "sparsegpt", "--sparsity", "0.5"]
        command += ["--calibration", "docs", "--samples", str(samples), "--seq-len", str(_SEQ_LEN)]
        command += ["--device", self.device, "--overwrite"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(" ".join(done.stderr.split())[-300:])
        return f"{agreement(self.work / 'alone', self.work / 'ranked'):.4%}"

    def cost(self, recipe: secateur.Recipe, samples: int) -> str:
        seconds, memory = self._compress(self._model("large"), "out", recipe, self.device, samples)
        return f"{seconds:.1f} s, {memory:.2f} GiB of GPU memory"

    def read_ahead(self, recipe: secateur.Recipe) -> str:
        found = {}
        for ahead in ((), (self.device,)):
            walker._READ_AHEAD = ahead
            found[bool(ahead)] = min(
                self._compress(self._model("large"), "out", recipe, self.device, 32)[0] for _ in range(2)
            )
        return f"{found[True]:.1f} s, {found[False]:.1f} s without"

    def foretold(self, recipe: secateur.Recipe) -> str:
        text = secateur.Calibration(source="docs", samples=self._samples(128), seq_len=_SEQ_LEN)
        asked, model = replace(recipe, calibration=text), self._model("large")
        told = secateur.forecast(str(model), asked, out=self.work, device=self.device)
        seconds, memory = self._compress(model, "out", recipe, self.device, 128)
        before = f"{told.device / 2**30:.2f} GiB and {told.total_seconds:.1f} s foretold"
        return f"{before}, {memory:.2f} GiB and {seconds:.1f} s taken"

    def evaluation(self) -> str:
        """Seconds to measure a model on windows of 1024 tokens: one at a time, and as many as `eval` takes on a GPU."""
        model = self._model("large")
        windows = Text("docs", 1024, self._samples(64)).cut(open_source(str(model)).tokenizer()).ids_KS
        loaded = secateur.load(model, "dense", device=self.device)
        found = {}
        for tokens in (1024, None):
            began = time.perf_counter()
            found[tokens] = measure(loaded, windows, batch_tokens=tokens).perplexity, time.perf_counter() - began
        (one, one_seconds), (many, many_seconds) = found[1024], found[None]
        differ = abs(many / one - 1)
        return (
            f"{one_seconds:.1f} s one at a time, {many_seconds:.1f} s in batches; perplexities differ by {differ:.1e}"
        )

    def brought(self, name: str) -> str:
        """Seconds a token of a model that a GPU has no room for, from disk and from pinned memory; whether it is the same."""
        folder = self._model("large")
        if name != "dense":
            self._compress(folder, "out", RECIPES[name], self.device, 16)
            folder = self.work / "out"
        ids_NS = torch.arange(3, 40, device=self.device)[None]
        with torch.inference_mode():
            wanted_NSV = secateur.load(folder, device=self.device)(ids_NS).logits
        found = []
        for place, host in (("disk", psutil.Process().memory_info().rss + 2**30), ("pinned memory", 2**36)):
            limits = {"cuda": _GPU_SHARE, "cpu": host} if self.device == "cuda" else host
            with torch.inference_mode():
                same = torch.equal(secateur.load(folder, max_memory=limits)(ids_NS).logits, wanted_NSV)
            told = secateur.bench(str(folder), max_memory=limits, seconds=5)
            [step] = told.streamed
            disk, bus = told.shares(step)
            shares = f"{disk:.0%} of the disk's and {bus:.0%} of the bus' bandwidth"
            logits = "the same" if same else "DIFFER"
            found.append(f"{step.seconds:.3f} s a token from {place}, {shares}, logits {logits}")
        return "; ".join(found)

    def decoded_by_spqr_quant(self) -> str:
        """The largest difference between what the package's GPU kernel computes with an exported linear and what we decode."""
        from spqr_quant import QuantizedLinear

        recipe = replace(RECIPES["spqr 3 bits"], dtype="float16")
        self._compress(self._model("tiny"), "spqr", recipe, self.device, 16)
        export(str(self.work / "spqr"), self.work / "exported", "spqr", overwrite=True)
        source = open_source(str(self.work / "exported"))
        worst = 0.0
        for name, packed in source.weights.packed.items():
            parts = [
                source.weights.stored[packed.parts[part]]
                for part in ("dense_weights", "row_offsets", "col_vals", "in_perm")
            ]
            W_OI = source.weights[name].to(self.device)
            linear = QuantizedLinear(*W_OI.shape, 3, 16, 16, *parts).to(self.device)
            x_I = torch.randn(W_OI.shape[1], device=self.device, dtype=torch.float16)
            y_O = linear(x_I.view(1, 1, -1)).flatten().float()
            wanted_O = W_OI.float() @ x_I.float()
            worst = max(worst, ((y_O - wanted_O).abs().amax() / wanted_O.abs().amax()).item())
        return f"{worst:.2e} of the largest output"


def agreement(a: Path, b: Path) -> float:
    """Share of weights that two checkpoints agree on: which are zero in a pruned one, to half a per cent in a quantized one."""
    first, second = open_source(str(a)).weights, open_source(str(b)).weights
    same = total = 0.0
    for name in first:
        x, y = first[name].float(), second[name].float()
        same += (((x == 0) == (y == 0)) & ((x - y).abs() <= 0.005 * x.abs().amax())).sum().item()
        total += x.numel()
    return same / total
