"""What is to be expected of experts that no token reached while effects were measured.

Such an expert has no measured effect, but that is not none: the tokens that effects are measured on are few, and it may be sent
some of other texts. Left at nothing it would be squeezed to nothing. What a change of it does to a token that is sent to it is
taken to be what the same change of the layer's other experts did to theirs, in the mean over tokens; and how often it is sent
one is known from calibration, which runs many times as many tokens. Of n out of T the share is taken to be (n + 1) / (T + 2),
Laplace's rule of succession, so that an expert that calibration did not reach either has some effect still.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from secateur.errors import UsageError
from secateur.model.block_names import without_expert
from secateur.recipes.recipe import Choice
from secateur.search.candidates import Library


def expect_unreached(library: Library, reached: Mapping[str, int], shares: Mapping[str, float], tokens: int) -> Library:
    """The library with expected divergences in the place of those that could not be measured.

    Args:
        library: those are NaN.
        reached: on how many tokens each expert's linear was measured, by name.
        shares: of calibration tokens that each of them is sent.
        tokens: on which effects were measured.

    Raises:
        UsageError: none of a layer's experts that are compressed was reached.
    """
    kinds: dict[str, list[str]] = {}
    for name in reached:
        kinds.setdefault(without_expert(name), []).append(name)
    found = dict(library)
    for kind, names in kinds.items():
        # Of each choice, what it does to a token: summed over all experts that were sent any, and over their tokens.
        sums: dict[Choice, float] = {}
        rows: dict[Choice, int] = {}
        for name in names:
            for candidate in library[name] if reached[name] else []:
                sums[candidate.choice] = sums.get(candidate.choice, 0.0) + candidate.divergence * tokens
                rows[candidate.choice] = rows.get(candidate.choice, 0) + reached[name]
        for name in names:
            if not reached[name]:
                if any(candidate.choice not in rows for candidate in library[name]):
                    raise UsageError(
                        f"none of {tokens} tokens is sent to any of the experts {kind} that are to be compressed, so that a "
                        "search cannot compare them: give more text, or leave them alone with `ignore`"
                    )
                found[name] = [
                    replace(c, divergence=sums[c.choice] / rows[c.choice] * shares[name]) for c in library[name]
                ]
    assert not any(math.isnan(candidate.divergence) for each in found.values() for candidate in each)
    return found


def share_of(own: int, tokens: int) -> float:
    """Which share of tokens an expert is likely to be sent that was sent so many of some."""
    return (own + 1) / (tokens + 2)
