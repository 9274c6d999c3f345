"""What a text showed of the experts of one layer: sums over tokens, which add up, so that batches do not matter.

E: experts, T: tokens of a batch, or of a sample, R: tokens of one expert, H: hidden size, K: experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass
class LayerSeen:
    """Of an expert e and a token t that the router sends to it: c is the weight that the router gives it, f what it computes.

    Attributes:
        count_E: n, how many tokens each was sent.
        gate_E: Σc.
        norm_E: Σ‖f‖.
        gated_E: Σc‖f‖.
        square_E: Σ‖f‖².
        peak_E: max‖f‖.
        scores_E, scores_EE: the router's scores of all experts, less their mean for a token: their sums, and those of their
            products in pairs, over all tokens.
        tokens: of the text; `scored`: those whose scores are known.
        groups: of which the router chooses some first: neighbours, as many in each.
        change, changed: the sum of 1 − the cosine of what the block reads of a token and what it gives, and of how many tokens.
        sample: what all experts make of a few tokens, where a method asks for it.
    """

    count_E: Tensor
    gate_E: Tensor
    norm_E: Tensor
    gated_E: Tensor
    square_E: Tensor
    peak_E: Tensor
    scores_E: Tensor
    scores_EE: Tensor
    tokens: int = 0
    scored: int = 0
    groups: int = 1
    change: float = 0.0
    changed: int = 0
    sample: Sample | None = None

    @classmethod
    def empty(cls, experts: int, groups: int = 1) -> LayerSeen:
        """Of no text yet."""
        names = ("count_E", "gate_E", "norm_E", "gated_E", "square_E", "peak_E", "scores_E")
        sums: dict[str, Any] = {name: torch.zeros(experts, dtype=torch.float64) for name in names}
        return cls(**sums, scores_EE=torch.zeros(experts, experts, dtype=torch.float64), groups=groups)

    @property
    def experts(self) -> int:
        return len(self.count_E)

    def add_outputs(self, e: int, weight_R: Tensor, output_RH: Tensor, scaled: bool = False) -> None:
        """Count what an expert gives for the tokens that are sent to it; `scaled`: by the router's weight, already."""
        norm_R = output_RH.double().norm(dim=1).cpu()
        weight_R = weight_R.double().cpu()
        self.count_E[e] += len(norm_R)
        self.gate_E[e] += weight_R.sum()
        self.norm_E[e] += norm_R.sum()
        self.gated_E[e] += norm_R.sum() if scaled else weight_R @ norm_R
        self.square_E[e] += norm_R.square().sum()
        if len(norm_R):
            self.peak_E[e] = torch.maximum(self.peak_E[e], norm_R.max())

    def add_tokens(self, tokens: int, scores_TE: Tensor | None) -> None:
        """Count tokens, and what the router says of all experts for them, if it is known."""
        self.tokens += tokens
        if scores_TE is None:
            return
        scores_TE = scores_TE.double()
        # What is added to all scores of a token changes nothing.
        scores_TE = scores_TE - scores_TE.mean(1, keepdim=True)
        self.scored += len(scores_TE)
        self.scores_E += scores_TE.sum(0).cpu()
        self.scores_EE += (scores_TE.T @ scores_TE).cpu()

    def add_change(self, before: Tensor, after: Tensor) -> None:
        """Count what the block reads and gives, features last."""
        alike = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
        self.change += float((1 - alike).sum())
        self.changed += alike.numel()

    def __iadd__(self, other: LayerSeen) -> LayerSeen:
        """Both texts together."""
        for field in fields(self):
            if field.name == "peak_E":
                self.peak_E = torch.maximum(self.peak_E, other.peak_E)
            elif field.name not in ("groups", "sample"):
                setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self

    def mean(self, sum_E: Tensor) -> Tensor:
        """The mean over the tokens that each expert was sent; 0 for one that was sent none."""
        return sum_E / self.count_E.clamp(min=1)

    def alike_EE(self) -> Tensor:
        """The correlation of what the router says of each two experts: 0 where it tells nothing, and 1 of one with itself."""
        mean_E = self.scores_E / max(self.scored, 1)
        cov_EE = self.scores_EE / max(self.scored, 1) - mean_E[:, None] * mean_E
        scale_E = cov_EE.diagonal().clamp(min=0).sqrt()
        alike_EE = cov_EE / (scale_E[:, None] * scale_E).clamp(min=torch.finfo(torch.float64).tiny)
        return alike_EE.clamp(-1, 1).fill_diagonal_(1.0)


@dataclass(frozen=True)
class Sample:
    """What all experts of a layer make of a few tokens.

    Attributes:
        output_ETH: of each expert.
        routed: what the router makes of the same tokens where only some experts, given by number, are left: the weight of each
            of them for each token, `[T, experts left]`, zero where it is not sent there.
    """

    output_ETH: Tensor
    routed: Callable[[Sequence[int]], Tensor]

    def layer(self, kept: Sequence[int]) -> Tensor:
        """What the layer gives for the tokens with these experts alone, `[T, H]`."""
        weight_TE = self.routed(kept).to(self.output_ETH.dtype)
        return torch.einsum("te,eth->th", weight_TE, self.output_ETH[list(kept)])
