"""How a model uses its experts on a text: what each is worth by every score, which are alike, and which it hangs on.

E: experts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.core.ranks import Ranks
from secateur.core.registry import EXPERT_SCORES
from secateur.errors import UsageError
from secateur.experts.bit_rules import FEW, MORE, OTHERS, outlier_score
from secateur.experts.by_score import super_experts
from secateur.experts.layer_seen import LayerSeen
from secateur.experts.use_of_experts import ExpertUse, LayerUse
from secateur.memory.room import limit_memory
from secateur.model.load import open_device
from secateur.model.source import open_source, with_revision
from secateur.pipeline.calibrate import windows_of
from secateur.pipeline.job import Job
from secateur.pipeline.outcome import Progress
from secateur.pipeline.prepared import Prepared
from secateur.recipes.methods import find
from secateur.recipes.plan import Plan
from secateur.recipes.recipe import Calibration, Choice, Recipe
from secateur.runs.drop_experts import looking
from secateur.structured.fewer_experts import experts_of, experts_of_a_token, groups_of
from secateur.walking.see_experts import see_experts


def expert_use(
    model: str,
    calibration: Calibration,
    *,
    scores: Sequence[str] | None = None,
    device: str = "cpu",
    max_memory: str | int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> ExpertUse:
    """Take a text through a mixture of experts, block by block, and tell how it uses them.

    Args:
        model, device, max_memory, revision, trust_remote_code, progress: see `compress`.
        calibration: the text.
        scores: names of scores; None: all that come from one pass of the text and merge nothing.

    Raises:
        SecateurError: with one line for the user; `UsageError` where the model is dense.
    """
    wanted = default_scores() if scores is None else list(scores)
    methods: dict[str, Any] = {name: find("expert_score", name)() for name in wanted}
    limit = limit_memory(max_memory)
    progress(Progress("opening the model"))
    source = open_source(with_revision(model, revision), trust_remote_code)
    plan = Plan(None, None, None, False, None)
    job = Job(source, Recipe(calibration=calibration), plan, Ranks(open_device(device)), None, limit, progress)
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder, torch.no_grad():
        job, prepared = looking(job)
        experts_of(source, prepared.model)
        ids_NS = windows_of(job).ids_NS
        groups, top = groups_of(source, prepared.model), experts_of_a_token(source, prepared.model)
        found: dict[str, tuple[LayerSeen, dict[str, list[float]]]] = {}
        outliers: dict[str, list[float]] = {}

        def look(name: str, seen: LayerSeen) -> None:
            found[name] = seen, {key: method.scores(seen).tolist() for key, method in methods.items()}
            outliers[name] = _outliers(prepared, name)
            seen.sample = None

        sampled = max((method.sampled for method in methods.values()), default=0)
        see_experts(job, prepared, ids_NS, Path(folder), look, groups=groups, sampled=sampled)
    supers = super_experts([seen.peak_E for seen, _ in found.values()])
    layers = [
        LayerUse(
            name,
            (seen.count_E / max(seen.tokens, 1)).tolist(),
            each,
            sorted(own),
            seen.alike_EE().tolist(),
            seen.change / max(seen.changed, 1),
            outliers[name],
            [*prepared.experts[name].firsts, prepared.experts[name].last],
        )
        for (name, (seen, each)), own in zip(found.items(), supers, strict=True)
    ]
    return ExpertUse(source.name, ids_NS.numel(), top, groups, layers)


def _outliers(prepared: Prepared, layer: str) -> list[float]:
    """Of each expert of a layer the greatest score of its linears."""
    module = prepared.experts[layer]
    linears = [*module.firsts, module.last]
    return [
        max(outlier_score(prepared.problem(f"{layer}.{e}.{linear}", None).W_OI) for linear in linears)
        for e in range(module.count)
    ]


def recipe_of_rules(found: ExpertUse, bits: float) -> Recipe:
    """GPTQ with bits of experts by the rules of QuantMoE-Bench.

    Raises:
        UsageError: bits that experts cannot have in the mean.
    """
    if not FEW <= bits <= MORE:
        raise UsageError(f"`bits` {bits:g}: by the rules, experts have {FEW} to {MORE} bits in the mean")
    linears = {name: Choice(None, each) for name, each in found.bits(bits).items()}
    return Recipe(quantize="gptq", quantization={"bits": OTHERS}, linears=linears)


def default_scores() -> list[str]:
    """The names of the scores that one pass of a text gives, but for those of methods that merge."""
    methods: dict[str, Any] = EXPERT_SCORES
    return sorted(name for name, method in methods.items() if not method.sampled and not method.merges)
