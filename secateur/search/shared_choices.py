"""Linears that take one choice together: those of an expert of a mixture, or of all experts of a layer.

What runs mixtures of experts often wants one scheme for all experts of a layer: vLLM looks it up for the first one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from secateur.errors import UsageError
from secateur.pipeline.prepared import Prepared
from secateur.recipes.recipe import Choice
from secateur.search.candidates import Candidate, Library


@dataclass(frozen=True)
class SharedChoices:
    """Which linears of a model take one choice together.

    Attributes:
        groups: their names, by the first one of each; every linear to compress is in one group.
    """

    groups: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, prepared: Prepared, within: str | None, tables: Iterable[str] = ()) -> SharedChoices:
        """Those within an `expert`, or within the experts of a `layer`. Raises UsageError where none are compressed.

        Args:
            tables: names of others that something is chosen for, each by itself.
        """
        names = [*(name for name in prepared.names if name in prepared.chosen), *tables]
        if within is None:
            return cls({name: [name] for name in names})
        owner_of = {
            f"{experts}.{linear}": experts if within == "layer" else f"{experts}.{linear.partition('.')[0]}"
            for experts, module in prepared.experts.items()
            for linear in module.linears
        }
        if prepared.chosen.isdisjoint(owner_of):
            raise UsageError(
                f"`share_choice` {within} is for experts of a mixture, and {prepared.source.name} has none that are "
                "compressed: leave it out"
            )
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(owner_of.get(name, name), []).append(name)
        return cls({members[0]: members for members in groups.values()})

    def library(self, library: Library) -> Library:
        """What each group may become: bytes and divergences of its linears added up, by the first one's name."""
        return {first: _together([library[name] for name in members]) for first, members in self.groups.items()}

    def weights(self, weights: Mapping[str, int]) -> dict[str, int]:
        """How many weights each group has."""
        return {first: sum(weights[name] for name in members) for first, members in self.groups.items()}

    def spread(self, choices: Mapping[str, Choice]) -> dict[str, Choice]:
        """What is chosen for each group, as what is chosen for each linear."""
        return {name: choices[first] for first, members in self.groups.items() for name in members}


def _together(members: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """Linears as one: only what was tried for all of them."""
    if len(members) == 1:
        return list(members[0])
    by_choice = [{candidate.choice: candidate for candidate in each} for each in members]
    return [
        Candidate(choice, sum(of[choice].bytes for of in by_choice), sum(of[choice].divergence for of in by_choice))
        for choice in by_choice[0]
        if all(choice in each for each in by_choice)
    ]
