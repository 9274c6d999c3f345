"""How much worse than its baseline a checkpoint may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from secateur.errors import UsageError
from secateur.shares import parse_share

_SHARES = ("perplexity_rise", "size_rise", "min_agreement", "min_routing_agreement", "confidence")


@dataclass(frozen=True)
class Tolerances:
    """How much worse a checkpoint may be than its baseline.

    Attributes:
        perplexity_rise: as a share of the baseline's.
        size_rise: of the weight files, as a share of the baseline's.
        max_kl: the KL divergence from the dense model that is allowed, in nats a token; None: any.
        min_agreement: the share of predictions with the dense model's most likely token that there must be; None: any.
        min_routing_agreement: of a mixture of experts, the share of a token's experts that must be those of the dense model;
            None: any.
        confidence: with which a rise must be more than chance to count.
    """

    perplexity_rise: float = 0.01
    size_rise: float = 0.005
    max_kl: float | None = None
    min_agreement: float | None = None
    min_routing_agreement: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name, value in (("perplexity_rise", self.perplexity_rise), ("size_rise", self.size_rise)):
            if not 0 <= value < math.inf:
                raise UsageError(f"`{name}` {value} is not a rise: give 0 or more, such as 1%")
        if self.max_kl is not None and not self.max_kl >= 0:
            raise UsageError(f"`max_kl` {self.max_kl} is not a divergence: give 0 or more")
        for name in ("min_agreement", "min_routing_agreement"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise UsageError(f"`{name}` {share} is not a share: give 0 to 1, or a percentage")
        # Of many windows only some signs are flipped: `p_of_rise` then never goes below 1.5e-5.
        if not 0.5 <= self.confidence <= 0.9999:
            raise UsageError(f"`confidence` {self.confidence} cannot be had: give 50% to 99.99%")

    @classmethod
    def of(cls, **limits: Any) -> Tolerances:
        """The tolerances that a person gave, shares as text (`1%` or `0.01`) or as numbers: see `parse_share`."""
        for name in _SHARES:
            if limits.get(name) is not None:
                limits[name] = parse_share(limits[name], f"`{name}`")
        return cls(**limits)

    @property
    def needs_reference(self) -> bool:
        return self.max_kl is not None or self.min_agreement is not None
