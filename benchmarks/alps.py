"""ALPS against SparseGPT and the authors' code: error on the calibration inputs, and time, linear by linear.

python -m benchmarks.alps --text wiki.test.raw [--peer ALPS] [--threads 1]

The inputs are those of three blocks of the dense model (first, middle, last), on the protocol's calibration windows. The
peer is a checkout of github.com/mazumder-lab/ALPS; it names CUDA as its device, in place of which it gets the CPU. It solves
each linear by itself, ours those of one input together. The two take turns, so that both have the same machine.

O: output features, I: input features, N: windows, S: tokens of a window.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.protocol import SAMPLES, SEQ_LEN, arguments, machine, plain_model, prepare, split_text, table
from secateur.calibration.tokens import Named, windows
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.registry import PRUNERS
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level

PATTERNS: dict[str, Pattern] = {"50 %": Unstructured(0.5), "70 %": Unstructured(0.7), "2:4": NM(2, 4)}
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@torch.no_grad()
def gather(model: Path, calibration: Path) -> dict[tuple[int, tuple[str, ...]], tuple[InputStats, list[Tensor]]]:
    """The statistics and the weights of each group of linears in three blocks, by block and names."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = calibration.read_text(encoding="utf-8")
    ids_NS = windows([text], tokenizer, SEQ_LEN, SAMPLES, seed=0, named=Named("calibration"))
    blocks, found = dense.model.layers, {}
    for number in (0, len(blocks) // 2, len(blocks) - 1):
        for names in GROUPS:
            linears = [blocks[number].get_submodule(name) for name in names]
            stats = InputStats.empty(linears[0].in_features, Level.GRAM)
            linears[0].register_forward_pre_hook(lambda _, args, stats=stats: stats.add(args[0].flatten(0, -2)))
            found[number, names] = stats, [linear.weight.data for linear in linears]
    for batch_NS in ids_NS.split(4):
        dense.model(batch_NS)
    return found


def authors(checkout: Path) -> Callable[[Tensor, Tensor, Pattern], Tensor]:
    """What the authors' code makes of one linear and its Gram matrix, on the CPU."""
    code = (checkout / "alps.py").read_text(encoding="utf-8").replace("cuda:0", "cpu")
    module = types.ModuleType("peer_alps")
    exec(compile(code, "alps.py", "exec"), module.__dict__)
    torch.cuda.synchronize = lambda *_: None

    def prune(W_OI: Tensor, gram_II: Tensor, pattern: Pattern) -> Tensor:
        linear = nn.Linear(W_OI.shape[1], W_OI.shape[0], bias=False)
        linear.weight.data = W_OI.clone()
        peer = module.ALPS_prune(linear, SAMPLES, SEQ_LEN)
        peer.XtX = gram_II.clone()
        peer.ALPS_admm(pattern.sparsity, *((pattern.n, pattern.m) if isinstance(pattern, NM) else (0, 0)))
        return linear.weight.data

    return prune


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--peer", type=Path, help="a checkout of github.com/mazumder-lab/ALPS")
    args = parser.parse_args()
    if args.text is None:
        parser.error("--text is needed")
    prepare(args)
    model = plain_model(args.work)
    _, calibration = split_text(args.text, args.work, model)
    groups = gather(model, calibration)
    peer = authors(args.peer) if args.peer is not None else None
    print(f"{machine()}\n")
    rows, sums = [], []
    for label, pattern in PATTERNS.items():
        worst, taken = {"sparsegpt": 0.0, "peer": 0.0}, {"sparsegpt": 0.0, "alps": 0.0, "peer": 0.0}
        for (number, names), (stats, weights) in groups.items():
            sizes = [len(W_OI) for W_OI in weights]
            errors: dict[str, list[float]] = {}
            for method in ("sparsegpt", "alps"):
                stats.forget()
                begun = time.perf_counter()
                pruned = PRUNERS[method]().prune(Stack.of(weights, stats), pattern)
                taken[method] += time.perf_counter() - begun
                errors[method] = _errors(weights, list(pruned.W_OI.split(sizes)), stats)
            if peer is not None:
                gram_II = stats.gram()
                begun = time.perf_counter()
                theirs = [peer(W_OI, gram_II, pattern) for W_OI in weights]
                taken["peer"] += time.perf_counter() - begun
                errors["peer"] = _errors(weights, theirs, stats)
            for i, name in enumerate(names):
                found = {method: of[i] for method, of in errors.items()}
                ratios = {method: found["alps"] / found[method] for method in found if method != "alps"}
                worst |= {method: max(worst[method], ratio) for method, ratio in ratios.items()}
                row = [label, f"{number}.{name}", f"{found['sparsegpt']:.5f}", f"{found['alps']:.5f}"]
                row.append(f"{ratios['sparsegpt']:.3f}")
                rows.append(row + ([f"{found['peer']:.5f}", f"{ratios['peer']:.4f}"] if peer is not None else ["", ""]))
                print(rows[-1], flush=True)
        sums.append([label, f"{worst['sparsegpt']:.3f}", f"{taken['sparsegpt']:.1f}", f"{taken['alps']:.1f}"])
        if peer is not None:
            sums[-1] += [f"{worst['peer']:.4f}", f"{taken['peer']:.1f}", f"{taken['alps'] / taken['peer']:.2f}×"]
    table(["pattern", "linear", "SparseGPT", "ALPS", "ratio", "the authors' code", "ratio"], rows)
    print()
    headings = ["pattern", "largest ratio to SparseGPT", "SparseGPT, s", "ALPS, s"]
    table(headings + ["largest ratio to the authors", "theirs, s", "time"] * (peer is not None), sums)


def _errors(weights: list[Tensor], new: list[Tensor], stats: InputStats) -> list[float]:
    """‖X(Ŵ−W)ᵀ‖² / ‖XWᵀ‖² of each linear, in float64."""
    gram_II = stats.gram().double()
    found = []
    for W_OI, new_OI in zip(weights, new, strict=True):
        away_OI, W_OI = new_OI.double() - W_OI.double(), W_OI.double()
        found.append((((away_OI @ gram_II) * away_OI).sum() / ((W_OI @ gram_II) * W_OI).sum()).item())
    return found


if __name__ == "__main__":
    main()
