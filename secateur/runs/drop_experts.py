"""Finding which experts of a mixture stay, and a job on a model that has no others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from secateur.calibration.kept_windows import SELF, is_kept
from secateur.calibration.tokens import hash_of
from secateur.errors import UsageError
from secateur.experts.by_score import best, super_experts
from secateur.experts.kept_experts import KeptExperts
from secateur.experts.layer_seen import LayerSeen
from secateur.folder.manifest import hash_of_values
from secateur.folder.writer import write_whole
from secateur.model.source import Source
from secateur.model.structure import build_skeleton
from secateur.pipeline.calibrate import Windows, windows_of
from secateur.pipeline.job import Job
from secateur.pipeline.prepared import Prepared, prepare
from secateur.pipeline.run import versions
from secateur.pipeline.shared import Shared
from secateur.recipes.plan import Plan
from secateur.recipes.recipe import Recipe
from secateur.structured.fewer_experts import Fewer, experts_of, experts_of_a_token, fewer, groups_of
from secateur.structured.merged_experts import merged
from secateur.walking.clock import Clock
from secateur.walking.see_experts import see_experts

# Super experts that a note names; and windows by which it is told how long all take.
_NAMED, _TIMED = 3, 2


def with_fewer_experts(job: Job, folder: Path, clock: Clock) -> Job:
    """A job on the source without the experts that its recipe drops, which are found by the dense model where it does not say.

    Args:
        folder: of the unfinished run; what was found is kept there, for one that is resumed.

    Raises:
        UsageError: the model is dense, or cannot do with so few experts.
    """
    method = job.plan.expert_score
    if method is None:
        return job
    with clock("searching"):
        skeleton = build_skeleton(job.source, torch.float32)
        count = experts_left(job.source, skeleton, job.recipe.drop_experts or 0.0)
        job = replace(job, text=job.shared or Shared(job.source, folder))
        kept, notes = dict(job.recipe.experts), list[str]()
        if not kept:
            said = job.ranks.share(_chosen(job.alone(), method, count, folder) if job.ranks.first else None)
            kept = {name: KeptExperts.from_dict(each, name) for name, each in said["experts"].items()}
            notes += said["notes"]
            job = replace(job, recipe=replace(job.recipe, calibration=Recipe.from_dict(said["recipe"]).calibration))
        less = fewer(job.source, skeleton, kept)
        given = len(next(iter(kept.values())).kept)
        if given != count:
            raise UsageError(
                f"the recipe keeps {given} experts of a layer, and `drop_experts` leaves {count}: leave `experts` out, or give "
                "what fits"
            )
        source = _merged(job, less, kept, method, folder) if method.merges else less.written
    whole = next(iter(experts_of(job.source, skeleton).values())).count
    what = f"{whole - count} of the {whole} experts of each of {len(kept)} layers are dropped, by {method.name}"
    recipe = replace(job.recipe, expert_score=method.name, experts=kept)
    vars(source)["hashes"] = job.source.hashes  # of the same files, which are not read again for it
    return replace(job, source=source, recipe=recipe, notes=(what, *notes, *less.notes))


def _merged(job: Job, less: Fewer, kept: Mapping[str, KeptExperts], method: Any, folder: Path) -> Source:
    """The source whose experts have taken something over: the first process makes them, and then the others open them."""
    place = folder if job.shared is None else job.shared.folder
    key = hash_of_values([{name: each.to_dict() for name, each in kept.items()}, repr(method), job.source.hashes])

    def say(done: int, total: int) -> None:
        job.say(f"merging experts: {done} of {total} layers")

    found = less.written
    for first in (True, False):
        if job.ranks.first == first:
            found = merged(less, kept, method, place / f"experts-{key[:32]}", job.device, say, first)
        job.ranks.share(None)
    return found


def provisionally(job: Job, folder: Path) -> tuple[Job, float]:
    """A job on the source without any of its experts, as many as its recipe drops, and how long it would take to find which."""
    method = job.plan.expert_score
    if method is None or job.recipe.experts:
        return with_fewer_experts(job, folder, Clock(job.device)), 0.0
    skeleton = build_skeleton(job.source, torch.float32)
    count, groups = experts_left(job.source, skeleton, job.recipe.drop_experts or 0.0), groups_of(job.source, skeleton)
    plain, prepared = looking(job)
    ids_NS = windows_of(plain).ids_NS
    number = next(i for i in range(len(prepared.blocks)) if prepared.has_experts(i))
    few_NS = ids_NS[:_TIMED]
    clock = see_experts(
        plain, prepared, few_NS, folder, lambda *_: None, groups=groups, sampled=method.sampled, last=number
    )
    spent = sum(seconds for phase, seconds in clock.seconds.items() if phase not in ("opening", "reading"))
    seconds = (
        (clock.seconds.get("reading", 0.0) + spent * len(ids_NS) / len(few_NS)) * len(prepared.blocks) / (number + 1)
    )
    kept = {
        name: KeptExperts(best(torch.zeros(experts.count), count, groups))
        for name, experts in experts_of(job.source, skeleton).items()
    }
    text = replace(job, text=job.shared or Shared(job.source, folder))
    recipe = replace(job.recipe, expert_score=method.name, experts=kept)
    return replace(text, source=fewer(job.source, skeleton, kept).written, recipe=recipe), seconds


def experts_left(source: Source, skeleton: Any, share: float) -> int:
    """How many experts of a layer stay where a share of them goes. Raises UsageError where that is not possible."""
    experts = next(iter(experts_of(source, skeleton).values())).count
    groups, top = groups_of(source, skeleton), experts_of_a_token(source, skeleton)
    gone = int(share * experts + 0.5)
    count = experts - gone
    if gone % groups:
        steps = sorted({max(gone // groups, 1), gone // groups + 1} & set(range(1, experts // groups)))
        instead = " or ".join(f"{100 * groups * step / experts:g}%" for step in steps)
        raise UsageError(
            f"`drop_experts` {share:g} takes {gone} of {experts} experts, and the router's {groups} groups of "
            f"{experts // groups} have to stay even: "
            + (f"give {instead}" if steps else "they are too small for any to go")
        )
    if not gone:
        raise UsageError(f"`drop_experts` {share:g} takes none of {experts} experts: give at least {1 / experts:.3g}")
    if count < top:
        raise UsageError(
            f"`drop_experts` {share:g} leaves {count} of {experts} experts, and every token of {source.name} is sent to {top}: "
            f"drop {1 - top / experts:.4g} at most"
        )
    return count


def looking(job: Job) -> tuple[Job, Prepared]:
    """A job that only looks at the dense model of another, in one process, and that model.

    Raises:
        UsageError: its text cannot be had within the memory.
    """
    plain = replace(
        job.alone(), recipe=Recipe(calibration=job.recipe.calibration), plan=Plan(None, None, None, False, None)
    )
    prepared = prepare(plain.source, plain.recipe, plain.plan, plain.device)
    text = plain.recipe.calibration
    if text.source == SELF and not is_kept(plain.source, text, plain.device):
        plain.room.check(prepared.whole_memory, "`calibration` self", "`calibration` docs or a file of text")
    return plain, prepared


def _chosen(job: Job, method: Any, count: int, folder: Path) -> dict[str, Any]:
    """Which experts stay, what a user should know of it, and the recipe with the numbers of its text; kept in the folder."""
    plain, prepared = looking(job)
    windows = windows_of(plain)
    recipe = replace(job.recipe, calibration=windows.settings)
    key = hash_of_values(
        [recipe.to_dict(), job.source.hashes, hash_of(windows.ids_NS), versions(), torch.get_num_threads()]
    )
    file = folder / "experts.json"
    if file.exists():
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if known["key"] == key:
            return known
    kept, notes = _choose(plain, prepared, windows, method, count, folder)
    experts = {name: each.to_dict() for name, each in kept.items()}
    found = {"key": key, "recipe": recipe.to_dict(), "experts": experts, "notes": notes}
    write_whole(file, lambda new: new.write_text(json.dumps(found), encoding="utf-8"))
    return found


def _choose(
    job: Job, prepared: Prepared, windows: Windows, method: Any, count: int, folder: Path
) -> tuple[dict[str, KeptExperts], list[str]]:
    layers: dict[str, LayerSeen] = {}
    kept: dict[str, KeptExperts] = {}

    def look(name: str, seen: LayerSeen) -> None:
        layers[name] = seen
        if method.sampled:
            kept[name] = method.choose(seen, count)
            seen.sample = None

    groups = groups_of(job.source, prepared.model)
    see_experts(job, prepared, windows.ids_NS, folder, look, groups=groups, sampled=method.sampled)
    notes = unused(layers)
    if not method.sampled:
        held = dict(zip(layers, super_experts([seen.peak_E for seen in layers.values()]), strict=True))
        kept = {name: method.choose(seen, count, held[name]) for name, seen in layers.items()}
        named = [f"{name}.{e}" for name, numbers in held.items() for e in sorted(numbers)]
        if named:
            more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
            notes.append(
                f"kept whatever their score, as their outputs are far above all others': {', '.join(named[:_NAMED])}{more}"
            )
    return kept, notes


def unused(layers: Mapping[str, LayerSeen]) -> list[str]:
    """A note where the text told nothing of some experts."""
    none = [f"{name}.{e}" for name, seen in layers.items() for e in (seen.count_E == 0).nonzero()[:, 0].tolist()]
    return [f"the text does not reach {len(none)} experts, such as {none[0]}: they go first"] if none else []
