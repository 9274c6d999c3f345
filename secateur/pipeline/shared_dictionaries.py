"""Dictionaries that linears of several blocks share: learned where the first of these blocks is about to be solved.

The windows are taken ahead through those blocks as they are, and what is gathered of their inputs is added up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.composite_layouts.dictionary import Factor
from secateur.core.stats import InputStats
from secateur.model.block_names import split_name
from secateur.model.weights import release
from secateur.pipeline.prepared import Prepared
from secateur.pipeline.recorder import Recorder
from secateur.pipeline.solve import stacked
from secateur.walking.walk import Gathered
from secateur.walking.walker import Journey


def ready_dictionaries(journey: Journey, recorder: Recorder, number: int) -> None:
    """Have those dictionaries at hand that linears of a block share, which is in place and about to be solved."""
    missing = recall_dictionaries(recorder, number)
    if missing:
        number_of, owners = recorder.number_of, recorder.prepared.sharing
        last = max(number_of[name] for names in missing.values() for name in names)
        sums = _look_ahead(journey, range(number, last + 1), {n: o for n, o in owners.items() if o in missing})
        _learn(journey, missing, sums)


def recall_dictionaries(recorder: Recorder, number: int) -> dict[str, list[str]]:
    """Have those recorded dictionaries at hand that linears of a block share, and none that only others do: each is read
    once for all blocks that come one after the other.

    Returns:
        The linears that share those that are not recorded yet, by the one that they will be stored with.
    """
    number_of, found = recorder.number_of, recorder.prepared.dictionaries
    members: dict[str, list[str]] = {}
    for name, owner in recorder.prepared.sharing.items():
        members.setdefault(owner, []).append(name)
    wanted = {
        owner: names
        for owner, names in members.items()
        if number_of[owner] <= number <= max(number_of[name] for name in names)
    }
    for owner in set(found) - set(wanted):
        del found[owner]
    missing = {owner: names for owner, names in wanted.items() if owner not in found}
    for owner in [owner for owner in missing if owner in recorder.entries]:  # of a run that goes on
        found[owner] = recorder.stored_atoms(owner)
        del missing[owner]
    return missing


def _look_ahead(journey: Journey, numbers: range, owners: Mapping[str, str]) -> dict[tuple[str, ...], InputStats]:
    """The sum of the statistics of inputs over some blocks, by what the linears that read one share.

    Args:
        owners: of the linears that are looked at, by name.
    """
    sums: dict[tuple[str, ...], InputStats] = {}

    def take(gathered: list[Gathered]) -> None:
        for names, stats in gathered:
            key = tuple(owners[name] for name in names)
            assert stats is not None
            sums[key] = sums[key] + stats if key in sums else stats

    walker, ahead = journey.walker, replace(journey, hiddens=journey.hiddens.twin(), beside=None)
    for number in numbers:
        walker.read(number)
        linears = {name: linear for name, linear in walker.prepared.chosen_in(number).items() if name in owners}
        outputs = ahead.waiting(number + 1) if number + 1 < numbers.stop else None
        ahead.walk_block(number, linears, outputs, walker.prepared.plan.level, take)
        ahead.go_on(number, outputs)
        if number != numbers.start:
            release(walker.prepared.blocks[number])
    return sums


def _learn(journey: Journey, members: Mapping[str, Sequence[str]], sums: Mapping[tuple[str, ...], InputStats]) -> None:
    """Learn dictionaries, each process some of them, and have them in all."""
    walker, ranks, found = journey.walker, journey.walker.ranks, journey.walker.prepared.dictionaries
    with walker.clock("solving"):
        for i, (owner, names) in enumerate(members.items()):
            if i % ranks.size == ranks.rank:
                found[owner] = _learned(walker.prepared, names, [sums[key] for key in sums if owner in key])
    with walker.clock("exchange"):
        for i, owner in enumerate(members):
            said, tensors = None, []
            if owner in found:
                own = found[owner]
                said, tensors = [own.layout.to_config(), list(own.parts)], list(own.parts.values())
            (config, parts), tensors = ranks.share_with_tensors(said, tensors, i % ranks.size)
            found[owner] = Factor.of_parts(config, dict(zip(parts, tensors, strict=True)))


def _learned(prepared: Prepared, names: Sequence[str], parts: Sequence[InputStats]) -> Factor:
    first, *others = parts
    stats = sum(others, first)
    method: Any = prepared.plan.factorizer
    problems = [prepared.problem(name, None) for name in names]
    learned: Factor = method.learn(stacked(prepared.plan, problems, stats.or_isotropic()))
    prepared.weights.release()
    return learned


def all_dictionaries(recorder: Recorder, blocks: Mapping[int, float]) -> tuple[float, float]:
    """How many times those that are recorded all shared dictionaries are, and how many more bytes all of them take than they do
    with recorded blocks, by number, each of which stands for so many.
    """
    prepared, number_of = recorder.prepared, recorder.number_of
    rests = {owner: split_name(owner, prepared.lists)[1] for owner in set(prepared.sharing.values())}
    learned = Counter(rests[owner] for owner in rests if owner in recorder.entries)
    more = 0.0
    for owner, rest in rests.items():
        if owner in recorder.entries:
            size = sum(part.nbytes for part in recorder.stored_atoms(owner).parts.values())
            more += size * (list(rests.values()).count(rest) / learned[rest] - blocks[number_of[owner]])
    return len(rests) / max(learned.total(), 1), more
