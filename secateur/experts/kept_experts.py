"""Which experts of a layer stay, as a recipe holds it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from secateur.errors import UsageError


@dataclass(frozen=True)
class KeptExperts:
    """Of one layer.

    Attributes:
        kept: the numbers of the experts that stay, rising.
        groups: for each expert of the layer the place in `kept` of the one that it is merged into; none: nothing is merged, or
            by something else than whole experts.
        weights: what each expert of the layer counts where some are merged.
    """

    kept: tuple[int, ...]
    groups: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, list[Any]]:
        """Plain values, without what is not given."""
        content: dict[str, list[Any]] = {
            "kept": list(self.kept),
            "groups": list(self.groups),
            "weights": list(self.weights),
        }
        return {key: value for key, value in content.items() if value}

    @classmethod
    def from_dict(cls, content: Any, what: str) -> KeptExperts:
        """The same behind plain values. Raises UsageError, calling it `what`, where they are something else."""
        known = {"kept": int, "groups": int, "weights": float}
        if not isinstance(content, dict) or not set(content) <= set(known) or not content.get("kept"):
            raise UsageError(
                f"{what} must be a mapping with the list 'kept', and 'groups' and 'weights' where experts merge"
            )
        values: dict[str, tuple[Any, ...]] = {}
        for key, kind in known.items():
            given = content.get(key, [])
            fits = isinstance(given, list) and all(type(each) is int or type(each) is kind for each in given)
            if not fits or any(each < 0 for each in given):
                raise UsageError(f"{what}: {key!r} must be a list of numbers of at least 0")
            values[key] = tuple(kind(each) for each in given)
        kept = values["kept"]
        if any(later <= earlier for earlier, later in pairwise(kept)):
            raise UsageError(f"{what}: 'kept' must be rising numbers of experts, each once")
        if any(group >= len(kept) for group in values["groups"]):
            raise UsageError(f"{what}: 'groups' must be places in 'kept', which has {len(kept)} experts")
        return cls(**values)

    def check(self, experts: int, what: str) -> None:
        """Raise UsageError where a layer of so many experts has none of these, or values are not of all of them."""
        if self.kept[-1] >= experts:
            raise UsageError(
                f"{what} keeps expert {self.kept[-1]}, and there are {experts}: is the recipe of another model?"
            )
        for key in ("groups", "weights"):
            if len(getattr(self, key)) not in (0, experts):
                raise UsageError(f"{what}: {key!r} must have a value for each of the {experts} experts")
