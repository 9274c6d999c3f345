"""Neurons that a prompt chooses, for what is written behind it: see `coreinfer`.

B: texts, T: tokens of each, I: input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.histogram import FIRST
from secateur.gates.section import OFTEN

# Which share of a token's inputs count as its largest: the authors' α.
_LARGEST = 0.4


class Prompt:
    """What a prompt says of the neurons of one linear.

    Args:
        rule: `often` or `norm`.

    Attributes:
        votes_BI: for each, how often it was among the largest of a token, or its square norm over tokens.
        kept_BI: those that are read from then on; None: no prompt was seen.
    """

    def __init__(self, rule: str) -> None:
        self._rule = rule
        self.votes_BI: Tensor | None = None
        self.kept_BI: Tensor | None = None

    def see(self, x: Tensor, positions_BT: Tensor | None, share: float) -> None:
        """Count a prompt, or a further part of one, in, and choose by it all but a share."""
        x_BTI = _by_text(x, positions_BT)
        seen_BT = torch.ones_like(x_BTI[..., 0], dtype=torch.bool)
        if positions_BT is not None:
            seen_BT = (positions_BT >= FIRST).expand(x_BTI.shape[:2])
        votes_BI, before_BI = self._votes(x_BTI, seen_BT), self.votes_BI
        if positions_BT is not None and before_BI is not None and before_BI.shape == votes_BI.shape:
            goes_on = positions_BT[0, 0] >= FIRST
            votes_BI = votes_BI + before_BI * goes_on
        self.votes_BI, self.kept_BI = votes_BI, _most(votes_BI, share)

    def choose(
        self, x: Tensor, positions_BT: Tensor | None, share: float, halves: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Which inputs are read, of the shape of x, and which tokens are dense all the same; None where no prompt was seen.

        Args:
            share: of inputs that are not read, where a text is a prompt itself.
            halves: whether x is a text as a whole, of which the first half is taken for the prompt.
        """
        x_BTI = _by_text(x, positions_BT)
        B, T, _ = x_BTI.shape
        if halves:
            behind_T = torch.arange(T, device=x.device) >= T // 2
            seen_BT = (~behind_T & (torch.arange(T, device=x.device) >= FIRST)).expand(B, T)
            kept_BI = _most(self._votes(x_BTI, seen_BT), share)
            prompt = (~behind_T).expand(B, T).reshape(x.shape[:-1])[..., None]
            return kept_BI[:, None].expand(x_BTI.shape).reshape(x.shape), prompt
        if self.kept_BI is None or B % len(self.kept_BI):
            return None
        if positions_BT is not None:  # a text that begins with so few tokens has no prompt to go by
            self.kept_BI = self.kept_BI | (positions_BT[0, 0] == 0)
        kept_BI = self.kept_BI.to(x.device).repeat_interleave(B // len(self.kept_BI), 0)
        return kept_BI[:, None].expand(x_BTI.shape).reshape(x.shape), None

    def _votes(self, x_BTI: Tensor, seen_BT: Tensor) -> Tensor:
        size_BTI = x_BTI.detach().float().abs() * seen_BT[..., None]
        unit_BTI = size_BTI / size_BTI.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        norm_BI = unit_BTI.square().sum(1)
        if self._rule != OFTEN:
            return norm_BI
        largest = size_BTI.topk(max(1, round(_LARGEST * x_BTI.shape[-1])), -1).indices
        votes_BTI = torch.zeros_like(size_BTI).scatter_(-1, largest, 1.0) * seen_BT[..., None]
        # Of those that are as often among the largest, the larger ones: norms are below 1 for each token.
        return votes_BTI.sum(1) + norm_BI / (norm_BI.amax(-1, keepdim=True) + 1)


def _most(votes_BI: Tensor, share: float) -> Tensor:
    """Those of most votes, but for a share; all where there are no votes."""
    keep = max(1, round((1 - share) * votes_BI.shape[-1]))
    kept_BI = torch.zeros_like(votes_BI, dtype=torch.bool).scatter_(-1, votes_BI.topk(keep, -1).indices, True)
    return kept_BI | (votes_BI.sum(-1, keepdim=True) == 0)


def _by_text(x: Tensor, positions_BT: Tensor | None) -> Tensor:
    """An input as `[B, T, I]`, whether its tokens lie in one row or not."""
    if x.ndim > 2:
        return x.reshape(-1, *x.shape[-2:])
    T = len(x) if positions_BT is None else positions_BT.shape[-1]
    return x.reshape(-1, T, x.shape[-1])
