"""Structural pruning of SmolLM2 by the protocol: refit or none, and other methods by their papers' formulas.

python -m benchmarks.structured --text wiki.test.raw [--part neurons | shares | per-layer] [--share 0.25 …] [--other docs]
    [--only ROW …] [--again]

`neurons`: a quarter of the neurons of every block, 18.75 % of the blocks' weights. `shares`: what several kinds of units lose
together. `per-layer`: widths of each block by itself against blocks that are alike. Ours are runs of `secateur compress`; the
others are computed in memory on the same windows, with zeros in the place of what goes, which changes nothing in what is
predicted:

- Wanda-sp (An et al. 2023): Σ|W|·‖x‖, no refit.        - OBS: `sparsegpt`'s greedy choice, refit with λ = 0.01 as ZipLM's.
- FLAP (An et al. 2023): Var(x)·‖W‖², standardised in each block, ranked over all blocks, with bias.
- Týr-the-Pruner's local rule (Li et al. 2025): OBS and the term of first order, refit with λ = 0.01, no search.
- 2SSP (Sandri et al. 2025): neurons by the norm of what they give; whole attentions by perplexity.
- ShortGPT (Men et al. 2024): the blocks whose input and output are most alike.

O: output features, I: input features, N: windows, S: tokens of a window.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.protocol import (
    EVAL_SEQ_LEN,
    EVAL_WINDOWS,
    SAMPLES,
    SEQ_LEN,
    arguments,
    compress,
    machine,
    measured_once,
    plain_model,
    prepare,
    split_text,
    table,
)
from secateur.calibration.text import read_text
from secateur.calibration.tokens import Named, windows
from secateur.core.feature_units import Units
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.evaluation.perplexity import measure
from secateur.prune.unit_removal import remove_units
from secateur.recipes.methods import find

QUARTER = 0.1875
SHARES = (0.125, 0.2, 0.25, 0.375)
PER_LAYER_SHARES = (0.25, 0.375)
#: How widths are found: the same neurons of all blocks, the best shape that all blocks have, and those of each block.
WIDTHS = {
    "all alike, neurons": [],
    "all alike, neurons,heads,blocks": ["--units", "neurons,heads,blocks"],
    "per layer, neurons": ["--widths", "per-layer", "--allocation", "search", "--units", "neurons"],
    "per layer, neurons,heads,blocks": [
        "--widths",
        "per-layer",
        "--allocation",
        "search",
        "--units",
        "neurons,heads,blocks",
    ],
}
OURS = {
    "wanda, no refit": ["--prune", "wanda", "--no-refit"],
    "wanda": ["--prune", "wanda"],
    "sparsegpt": ["--prune", "sparsegpt"],
    "tyr": ["--prune", "tyr"],
    "flap": ["--prune", "flap"],
    "magnitude": ["--prune", "magnitude"],
}
#: Gives new weights of a linear, and a bias, where there is one.
Rule = Callable[[Stack, int], tuple[Tensor, Tensor | None]]


def wanda_sp(stack: Stack, keep: int) -> tuple[Tensor, None]:
    """Wanda-sp of FLAP's authors."""
    keep_I = find("prune", "wanda")().keep_units(stack, Units(1, stack.features, 1, keep))
    return stack.W_OI * keep_I, None


def with_fixed_damping(slope: bool) -> Rule:
    """The greedy choice, and a refit with λ = 0.01."""

    def rule(stack: Stack, keep: int) -> tuple[Tensor, None]:
        keep_I = remove_units(stack, Units(1, stack.features, 1, keep), 0.01, slope)
        kept, gone = keep_I.nonzero()[:, 0], (~keep_I).nonzero()[:, 0]
        gram_II = stack.stats.gram()
        damped_KK = gram_II[kept][:, kept]
        damped_KK.diagonal().add_(0.01 * gram_II.diagonal().mean())
        W_OI = stack.W_OI * keep_I
        pull_KO = gram_II[kept][:, gone] @ stack.W_OI[:, gone].T
        W_OI[:, kept] += torch.cholesky_solve(pull_KO, torch.linalg.cholesky(damped_KK)).T
        return W_OI, None

    return rule


def flap_score(stack: Stack) -> Tensor:
    """FLAP's, `[I]`."""
    return stack.W_OI.square().sum(0) * stack.stats.variance()


def flap(stack: Stack, keep: int) -> tuple[Tensor, Tensor]:
    """FLAP of one linear, with bias."""
    keep_I = torch.zeros(stack.features, dtype=torch.bool)
    keep_I[flap_score(stack).topk(keep).indices] = True
    return stack.W_OI * keep_I, (stack.W_OI * ~keep_I) @ stack.stats.mean()


def norm_of_neurons(stack: Stack, keep: int) -> tuple[Tensor, None]:
    """The first stage of 2SSP."""
    keep_I = torch.zeros(stack.features, dtype=torch.bool)
    keep_I[stack.stats.norm().topk(keep).indices] = True
    return stack.W_OI * keep_I, None


class InMemory:
    """SmolLM2 in memory, to be pruned in place."""

    def __init__(self, args: Any, model: Path, calibration: Path) -> None:
        self.args, self.folder = args, model
        tokenizer = AutoTokenizer.from_pretrained(model)
        text = calibration.read_text(encoding="utf-8")
        self.ids_NS = windows([text], tokenizer, SEQ_LEN, SAMPLES, seed=0, named=Named("calibration"))
        self.fresh()

    def fresh(self) -> None:
        """The dense model again."""
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @property
    def blocks(self) -> Any:
        return self.model.model.layers

    @torch.no_grad()
    def walk(self, look: Callable[[int, Stack], tuple[Tensor, Tensor | None] | None]) -> None:
        """Have each block's `down_proj` looked at and, maybe, replaced, on what the blocks before have become."""
        calls: list[Any] = []

        class Stop(Exception):  # noqa: N818 - ends a forward pass
            pass

        def catch(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append((args[0], kwargs))
            raise Stop

        handle = self.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
        for batch_NS in self.ids_NS.split(4):
            with suppress(Stop):
                self.model.model(batch_NS, use_cache=False)
        handle.remove()
        for number, block in enumerate(self.blocks):
            linear, inputs = block.mlp.down_proj, []
            stats = InputStats.empty(linear.in_features, Level.GRAM)
            hook = linear.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
            outputs = [block(hidden, **kwargs) for hidden, kwargs in calls]
            hook.remove()
            for x in inputs:
                stats.add(x.flatten(0, -2))
            before_OI = linear.weight.data
            found = look(number, Stack.of([before_OI], stats))
            if found is not None:
                linear.weight.data, bias = found
                linear.bias = None if bias is None else nn.Parameter(bias)
                moved = [x @ (found[0] - before_OI).T + (0 if bias is None else bias) for x in inputs]
                outputs = [out + more for out, more in zip(outputs, moved, strict=True)]
            calls = [(out, kwargs) for out, (_, kwargs) in zip(outputs, calls, strict=True)]

    def perplexity(self, texts: dict[str, Tensor]) -> dict[str, float]:
        """On each text."""
        return {name: measure(self.model, ids_KS).perplexity for name, ids_KS in texts.items()}


def by_rule(memory: InMemory, rule: Rule, share: float) -> None:
    """As many neurons of every block as make a share of all blocks' weights."""
    keep = round(1536 * (1 - share / 0.75))
    memory.walk(lambda _, stack: rule(stack, keep))


def flap_globally(memory: InMemory, share: float) -> None:
    """FLAP's ranking over all blocks of standardised scores, on dense inputs, as its authors' code does."""
    scores: list[Tensor] = []
    memory.walk(lambda _, stack: scores.append(flap_score(stack)))
    standard = torch.stack([(each - each.mean()) / each.std() for each in scores])
    least = standard.flatten().kthvalue(round(share / 0.75 * standard.numel())).values
    memory.fresh()
    memory.walk(lambda number, stack: flap(stack, max(1, int((standard[number] > least).sum()))))


def two_stages(memory: InMemory, share: float) -> None:
    """2SSP: attentions by perplexity on a calibration window, as many as its formula says, and neurons for the rest."""
    count = round(len(memory.blocks) * share ** (3 / 1.5))
    of_attention = 0.25 * count / len(memory.blocks)
    keep = round(1536 * (1 - (share - of_attention) / 0.75))
    memory.walk(lambda _, stack: norm_of_neurons(stack, keep))
    few = {"calibration": memory.ids_NS[:1]}
    gone: list[int] = []
    for _ in range(count):
        losses = {}
        for number, block in enumerate(memory.blocks):
            if number in gone:
                continue
            kept = block.self_attn.o_proj.weight.data
            block.self_attn.o_proj.weight.data = torch.zeros_like(kept)
            losses[number] = memory.perplexity(few)["calibration"]
            block.self_attn.o_proj.weight.data = kept
        gone.append(min(losses, key=losses.__getitem__))
        memory.blocks[gone[-1]].self_attn.o_proj.weight.data.zero_()


@torch.no_grad()
def short_gpt(memory: InMemory, share: float) -> None:
    """The blocks of least 1 − E cos(input, output)."""
    hidden = memory.model.model(memory.ids_NS[:8], output_hidden_states=True, use_cache=False).hidden_states
    cosines = [torch.cosine_similarity(before, after, dim=-1).mean().item() for before, after in pairwise(hidden)]
    gone = torch.tensor(cosines).topk(round(share * len(memory.blocks))).indices.tolist()
    for number in gone:
        block = memory.blocks[number]
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()


OTHERS: dict[str, Callable[[InMemory, float], None]] = {
    "Wanda-sp": lambda memory, share: by_rule(memory, wanda_sp, share),
    "FLAP, every block alike": lambda memory, share: by_rule(memory, flap, share),
    "FLAP": flap_globally,
    "OBS, λ = 0.01": lambda memory, share: by_rule(memory, with_fixed_damping(slope=False), share),
    "Týr's local rule": lambda memory, share: by_rule(memory, with_fixed_damping(slope=True), share),
    "2SSP": two_stages,
    "ShortGPT": short_gpt,
}


def texts_of(args: Any, model: Path, evaluation: Path) -> dict[str, Tensor]:
    """The windows of the protocol, and of another text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = evaluation.read_text(encoding="utf-8")
    found = {"protocol": windows([text], tokenizer, EVAL_SEQ_LEN, EVAL_WINDOWS, named=Named("evaluation"))}
    if args.other:
        other = read_text(args.other, "text", 10**6)
        found[args.other] = windows(other, tokenizer, EVAL_SEQ_LEN, EVAL_WINDOWS, named=Named(args.other))
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=["neurons", "shares", "per-layer"], default="neurons")
    parser.add_argument("--share", type=float, nargs="*")
    parser.add_argument("--only", nargs="*", help="rows to measure; all without")
    parser.add_argument("--other", help="another text to measure on, such as docs")
    parser.add_argument("--again", action="store_true", help="measure what was measured before, too")
    args = parser.parse_args()
    prepare(args)
    model = plain_model(args.work)
    evaluation, calibration = split_text(args.text, args.work, model)
    texts = texts_of(args, model, evaluation)
    memory = InMemory(args, model, calibration)

    def ours(name: str, options: list[str], share: float) -> dict[str, Any]:
        out = args.work / "structured"
        more = ["--pattern", "structured", "--sparsity", str(share), "--no-bos"]
        report = compress(model, out, [*options, *more], calibration, args.threads)
        memory.model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        before, after = report["structure"]["weights"]
        shape = {what: now for what, (_, now) in report["structure"].items() if what != "weights"}
        told = {"share": 1 - after / before, "seconds": report["seconds"], "shape": shape}
        return {**memory.perplexity(texts), **told}

    def other(name: str, share: float) -> dict[str, Any]:
        memory.fresh()
        began = time.monotonic()
        OTHERS[name](memory, share)
        seconds = time.monotonic() - began
        return {**memory.perplexity(texts), "share": share, "seconds": seconds, "shape": {}}

    asked: dict[str, Callable[[float], dict[str, Any]]] = {}
    if args.part == "neurons":
        shares = [QUARTER]
        asked |= {f"secateur, {name}": lambda s, n=name: ours(n, OURS[n], s) for name in OURS}
    elif args.part == "per-layer":
        shares = list(args.share or PER_LAYER_SHARES)
        for method in ("wanda", "sparsegpt"):
            asked |= {f"secateur, {method}, {how}": of_widths(ours, method, more) for how, more in WIDTHS.items()}
    else:
        shares = list(args.share or SHARES)
        for units in ("neurons", "neurons,heads", "neurons,blocks", "neurons,heads,blocks"):
            asked[f"secateur, wanda, {units}"] = lambda s, u=units: ours(u, ["--prune", "wanda", "--units", u], s)
    if args.part != "per-layer":
        asked |= {name: lambda s, n=name: other(n, s) for name in OTHERS}
    print(f"{machine()}; perplexity")
    rows = []
    for share in shares:
        for name, measure_it in asked.items():
            if args.only and name not in args.only:
                continue
            key = f"{name} {share} {args.other} {hash_of_text(calibration)}"
            found = measured_once(args, "structured", key, lambda m=measure_it, s=share: m(s))
            shape = ", ".join(f"{what} {now}" for what, now in found["shape"].items())
            figures = [f"{found[text]:.2f}" for text in texts]
            rows.append([f"{share:.2%}", name, f"{found['share']:.2%}", shape, *figures, f"{found['seconds']:.0f}"])
    table(["asked", "method", "gone", "what is left of a block", *texts, "seconds"], rows)


def of_widths(ours: Callable[..., dict[str, Any]], method: str, more: list[str]) -> Callable[[float], dict[str, Any]]:
    """A run whose widths are found in one way."""
    return lambda share: ours(method, ["--prune", method, *more], share)


def hash_of_text(file: Path) -> int:
    """Tells one calibration text from another."""
    return len(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
