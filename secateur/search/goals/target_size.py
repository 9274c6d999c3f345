"""A size of the weight files, or bits of a weight, reached with the least change of the model's predictions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from secateur.errors import UsageError
from secateur.model.structure import weight_matrix
from secateur.pipeline.calibrate import Windows
from secateur.recipes.recipe import Choice, Recipe
from secateur.search.candidates import NEAR, bytes_of, cheapest, divergence_of, is_both
from secateur.search.goal import goal
from secateur.search.searcher import Searcher
from secateur.search.target import check_target, with_dense
from secateur.shares import parse_share
from secateur.units import parse_size, words

# Of tables, where it is guessed what is left for linears.
_LIKELY_BITS = 6


@goal
@dataclass(frozen=True)
class TargetSize:
    """A share of the dense model's files, bytes, or bits of a weight.

    Attributes:
        text: as the user wrote it.
        share: of the dense model's.
        bytes: of the files.
        bits: in the mean over all weights that bits are found for, with all that is stored of them.
    """

    text: str
    share: float | None = None
    bytes: int | None = None
    bits: float | None = None
    name: ClassVar[str] = "target_size"
    models: ClassVar[int] = 0

    @classmethod
    def of(cls, recipe: Recipe) -> TargetSize:
        found = parse_target(recipe.target_size or "")
        check_target(recipe, cls.name)
        return found

    def in_bytes(self, dense_bytes: int) -> int:
        """The size for a dense model of so many bytes, where bits are not what is given."""
        return int(self.share * dense_bytes) if self.share is not None else int(self.bytes or 0)

    def size(self, searcher: Searcher) -> int:
        """Of all files, in bytes."""
        prepared = searcher.prepared
        if self.bits is None:
            return self.in_bytes(prepared.dense_bytes())
        weights = [
            *searcher.weights.values(),
            *(weight_matrix(prepared.linear(name)).numel() for name in searcher.tables),
        ]
        return searcher.kept_bytes() + int(self.bits * sum(weights) / 8)

    def room(self, searcher: Searcher) -> int:
        """What there is for linears and tables; what else is written is taken off. Raises UsageError where nothing is left."""
        dense, outside = searcher.prepared.dense_bytes(), searcher.kept_bytes()
        target = self.size(searcher)
        if target <= outside:
            which = "norms and the like" if searcher.tables else "embeddings, norms and the head"
            raise UsageError(
                f"`target_size` {self.text} is {words(target)}, but {words(outside)} ({outside / dense:.3f}x) are not "
                f"compressed further ({which}): give more"
            )
        return target - outside

    def check(self, searcher: Searcher) -> None:
        searcher.check_memory()
        self.room(searcher)

    def tried(self, searcher: Searcher) -> list[Choice]:
        every = searcher.for_a_target
        both = [choice for choice in every if is_both(choice)]
        return [choice for choice in every if choice not in both[2 * NEAR :]]

    def result_bytes(self, searcher: Searcher) -> int | None:
        return self.size(searcher)

    def choose(self, searcher: Searcher, windows: Windows) -> dict[str, Choice]:
        dense, room = searcher.prepared.dense_bytes(), self.room(searcher)
        target = self.size(searcher)
        if target >= dense:
            raise UsageError(
                f"`target_size` {self.text} is {words(target)}, which the dense model of {words(dense)} does not exceed"
            )
        tried = searcher.for_a_target
        of_tables = sum(searcher.prepared.table_bytes(name, _LIKELY_BITS) for name in searcher.tables)
        solved = searcher.library(windows, tried, room - of_tables)
        library = searcher.shared.library(with_dense(searcher, solved))
        least = sum(min(c.bytes for c in each) for each in library.values())
        if least > room:
            smallest = target - room + least
            raise UsageError(
                f"`target_size` {self.text} is {words(target)}: the smallest that these methods reach is "
                f"{words(smallest)} ({smallest / dense:.3f}x), of which {words(target - room)} is not compressed"
            )
        return searcher.shared.spread(cheapest(library, divergence_of, bytes_of, room))


def parse_target(text: str) -> TargetSize:
    """The size behind `0.35x`, `35%`, bytes in words such as `100MB`, or `2.5bit` of a weight.

    Raises:
        UsageError: it is neither, or not positive.
    """
    bits = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*bits?\s*", text)
    if bits:
        if not 0 < float(bits[1]) < 16:
            raise UsageError(f"`target_size` {text} is no number of bits to reach: give one like 2.5bit")
        return TargetSize(text, bits=float(bits[1]))
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*[x×]\s*", text)
    if match or text.rstrip().endswith("%"):
        share = float(match[1]) if match else parse_share(text, "`target_size`")
        if not 0 < share < 1:
            raise UsageError(
                f"`target_size` {text} is not between 0 and 1 times the dense model: give one like 0.35x or 35%"
            )
        return TargetSize(text, share=share)
    try:
        size = parse_size(text, "`target_size`")
    except UsageError as error:
        raise UsageError(
            f"`target_size` {text!r} is not a size: write it like 0.35x or 35% (of the dense model), 100MB, or 2.5bit (of a "
            "weight)"
        ) from error
    if size <= 0:
        raise UsageError(f"`target_size` {text} is no size to reach: give one like 0.35x, 35% or 100MB")
    return TargetSize(text, bytes=size)
