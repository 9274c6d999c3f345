"""Dropping experts: every score against random draws, on texts of several domains and on one of them.

    python -m benchmarks.experts --model MOE --texts FOLDER [--domain python] [--keep 6,4]
    python -m benchmarks.experts --model MOE --text TEXT [--keep 6,4]

FOLDER has a text for each domain; of each the first half of its windows scores experts and the second half measures. Of one
TEXT the last 40 % of its characters score and the first 60 % measure, as in the protocol. What is told is the rise of the loss
in nats a token over the whole model's, on all domains and, with --domain, on that one, by scores of all and by its own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import secateur
from benchmarks.protocol import arguments, machine, measured_once, prepare, table
from secateur.core.ranks import Ranks
from secateur.experts.by_score import super_experts
from secateur.experts.kept_experts import KeptExperts
from secateur.experts.layer_seen import LayerSeen
from secateur.model.load import load_source
from secateur.model.source import Source, open_source
from secateur.pipeline.job import Job
from secateur.recipes.methods import find
from secateur.recipes.plan import Plan
from secateur.recipes.recipe import Recipe
from secateur.runs.drop_experts import looking
from secateur.structured.fewer_experts import fewer, groups_of
from secateur.structured.merged_experts import merged
from secateur.walking.see_experts import see_experts

RANDOM = 4


class Bench:
    """A model that is open, and what is measured on it."""

    def __init__(self, model: Path) -> None:
        self.source: Source = open_source(str(model))
        job = Job(self.source, Recipe(), Plan(None, None, None, False, None), Ranks(torch.device("cpu")))
        self.job, self.prepared = looking(job)

    def seen(self, ids_NS: Tensor, sampled: int) -> dict[str, LayerSeen]:
        """What windows show of the experts."""
        found: dict[str, LayerSeen] = {}
        with tempfile.TemporaryDirectory() as folder:
            see_experts(
                self.job,
                self.prepared,
                ids_NS,
                Path(folder),
                found.__setitem__,
                groups=groups_of(self.source, self.prepared.model),
                sampled=sampled,
            )
        return found

    def loss(self, kept: dict[str, KeptExperts] | None, method: Any, ids: dict[str, Tensor]) -> dict[str, float]:
        """Nats a token on each text, of the model with the experts that stay."""
        source = self.source
        with tempfile.TemporaryDirectory() as folder:
            if kept is not None:
                less = fewer(source, self.prepared.model, kept)
                source = less.written
                if method is not None and method.merges:
                    source = merged(less, kept, method, Path(folder), torch.device("cpu"), lambda *_: None, True)
            model = load_source(source, torch.float32, torch.device("cpu"))
            return {name: _loss(model, ids_NS) for name, ids_NS in ids.items()}


@torch.no_grad()
def _loss(model: Any, ids_NS: Tensor) -> float:
    total = 0.0
    for ids_1S in ids_NS.split(1):
        logits_SV = model(ids_1S, use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits_SV, ids_1S[0, 1:], reduction="sum").item()
    return total / (ids_NS.shape[0] * (ids_NS.shape[1] - 1))


def kept_by(name: str, seen: dict[str, LayerSeen], count: int) -> tuple[dict[str, KeptExperts], Any]:
    """Which experts stay by a score, and the score."""
    method = find("expert_score", name)()
    held = super_experts([layer.peak_E for layer in seen.values()])
    return {layer: method.choose(own, count, held[i]) for i, (layer, own) in enumerate(seen.items())}, method


def drawn(seen: dict[str, LayerSeen], count: int, seed: int) -> dict[str, KeptExperts]:
    """A random choice."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: KeptExperts(tuple(sorted(torch.randperm(layer.experts, generator=draw)[:count].tolist())))
        for name, layer in seen.items()
    }


def texts(args: Any, source: Source) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Windows for scores and for measuring, by domain."""
    tokenizer, S = source.tokenizer(), args.seq_len

    def cut(text: str) -> Tensor:
        ids = tokenizer(text, verbose=False)["input_ids"]
        return torch.tensor(ids[: len(ids) // S * S]).view(-1, S)

    if args.texts is None:
        raw = args.text.read_text(encoding="utf-8")
        at = int(0.6 * len(raw))
        return {"all": cut(raw[at:])[: args.windows]}, {"all": cut(raw[:at])[: args.windows]}
    both: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for file in sorted(args.texts.glob("*.txt")):
        ids_NS = cut(file.read_text(encoding="utf-8"))
        for half, part_NS in zip(both, ids_NS.tensor_split([(len(ids_NS) + 1) // 2]), strict=True):
            half[file.stem] = part_NS[: args.windows]
    return both


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, help="folder of texts by domain")
    parser.add_argument("--domain", help="one of them, for scores of its own")
    parser.add_argument("--keep", default="6,4", help="how many experts stay, with commas")
    parser.add_argument("--scores", default="frequency,gate,reap,ean,man,msan,naee,dern,uncurl")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8, help="of each text, and of each half")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured")
    args = parser.parse_args()
    prepare(args)
    bench = Bench(args.model)
    scored, measured = texts(args, bench.source)
    print(machine(), {name: len(ids_NS) for name, ids_NS in measured.items()})
    settings = (args.model.resolve().name, args.seq_len, args.windows, secateur.__version__)
    whole = measured_once(args, "experts", f"{settings} whole", lambda: bench.loss(None, None, measured))
    sources = {"all": torch.cat(list(scored.values())), **({args.domain: scored[args.domain]} if args.domain else {})}
    seen = {name: bench.seen(ids_NS, 256) for name, ids_NS in sources.items()}
    rows = []
    for count in map(int, args.keep.split(",")):
        for by, layers in seen.items():
            for score in args.scores.split(","):
                kept, method = kept_by(score, layers, count)

                def measure(kept: Any = kept, method: Any = method) -> dict[str, float]:
                    return bench.loss(kept, method, measured)

                found = measured_once(args, "experts", f"{settings} {count} {by} {score}", measure)
                rows.append(_row(str(count), score, by, found, whole, args.domain))
        for seed in range(RANDOM):
            kept = drawn(seen["all"], count, seed)

            def measure(kept: Any = kept) -> dict[str, float]:
                return bench.loss(kept, None, measured)

            found = measured_once(args, "experts", f"{settings} {count} random {seed}", measure)
            rows.append(_row(str(count), f"random {seed}", "–", found, whole, args.domain))
    own = [f"rise on {args.domain}"] if args.domain else []
    table(["keep", "score", "text of the scores", "rise on all", *own], rows)
    return 0


def _row(
    count: str, score: str, by: str, found: dict[str, float], whole: dict[str, float], domain: str | None
) -> list[str]:
    rise = {name: found[name] - whole[name] for name in whole}
    own = [f"{rise[domain]:.3f}"] if domain else []
    return [count, score, by, f"{sum(rise.values()) / len(rise):.3f}", *own]


if __name__ == "__main__":
    raise SystemExit(main())
