"""Which rows each expert of a mixture reads: the tokens that its router sends to it, and those that it borrows.

T: tokens, H: hidden size, E: experts, K: experts of a token, R: tokens of one expert, N: windows, S: tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

# What the router last said of all experts, in the batch (each has a context of its own) that runs: `[T, E]`.
_router_scores: ContextVar[Tensor | None] = ContextVar("router_scores", default=None)


class Routed:
    """Tokens as a router sends them; an index beyond the experts is nobody's."""

    def __init__(self, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, experts: int) -> None:
        self.hidden_TH, self.weight_TK = hidden_TH, weight_TK
        # All rows by expert at once: looking for each expert's would take longer than a step of decoding.
        flat = index_TK.flatten()
        order = flat.argsort(stable=True)
        self._token, self._k = order // index_TK.shape[1], order % index_TK.shape[1]
        counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
        self._end = list(accumulate(counts))
        self.hit = [e for e in range(experts) if counts[e]]

    def rows(self, e: int) -> tuple[Tensor, Tensor]:
        rows = slice(self._end[e - 1] if e else 0, self._end[e])
        return self._token[rows], self._k[rows]

    def inputs(self, e: int) -> Tensor:
        return self.hidden_TH[self.rows(e)[0]]

    def tokens(self, which_R: Tensor, e: int) -> Tensor:
        return self.hidden_TH[which_R]

    def weights(self, e: int) -> Tensor:
        return self.weight_TK[self.rows(e)]

    @property
    def count(self) -> int:
        return len(self.hidden_TH)


class Copied:
    """Tokens of which every expert has a copy, scaled by the router: zeros are not sent to it."""

    def __init__(self, copies_ETH: Tensor) -> None:
        self.copies_ETH = copies_ETH
        self._rows = [sent_T.nonzero()[:, 0] for sent_T in copies_ETH.any(-1)]
        self.hit = [e for e, token_R in enumerate(self._rows) if len(token_R)]

    def rows(self, e: int) -> tuple[Tensor]:
        return (self._rows[e],)

    def inputs(self, e: int) -> Tensor:
        return self.copies_ETH[e, self.rows(e)[0]]

    def tokens(self, which_R: Tensor, e: int) -> Tensor:
        # The expert's own copy is zero there: the largest of the copies is the one of an expert that it was sent to.
        copies_ERH = self.copies_ETH[:, which_R]
        owner_R = copies_ERH.abs().sum(-1).argmax(0)
        return copies_ERH[owner_R, torch.arange(len(which_R), device=which_R.device)]

    def weights(self, e: int) -> Tensor:
        return self.inputs(e).new_ones(len(self.rows(e)[0]))  # they are scaled already

    @property
    def count(self) -> int:
        return self.copies_ETH.shape[1]


def chosen_by(count: int, given: tuple[Any, ...]) -> Tensor:
    """The numbers of the experts that each token is sent to, int16 `[T, K]`; −1 is none.

    Args:
        count: how many experts there are.
        given: what a module of them is called with, transformers' own or ours.
    """
    if len(given) > 1:
        index_TK: Tensor = given[1]
        return torch.where(index_TK < count, index_TK, -1).short()
    # Experts that have a copy of a token each, which is zero where it is not sent to them.
    sent_TE = given[0].view(count, -1, given[0].shape[-1]).any(-1).T
    top = sent_TE.byte().topk(max(1, int(sent_TE.sum(1).max())), dim=1)
    return torch.where(top.values > 0, top.indices, -1).short()


def borrowed(e: int, routed: Routed | Copied, scores_TE: Tensor | None, window: int, quota: int) -> Tensor:
    """Which tokens that were sent elsewhere an expert sees while it is calibrated, `[R]`.

    Of each window so many that the expert has its quota, so that batches and processes do not matter.
    """
    T = routed.count
    own_T = torch.zeros(T, dtype=torch.bool)
    own_T[routed.rows(e)[0].cpu()] = True
    if not quota:
        return own_T.new_zeros(0, dtype=torch.long)
    # Without scores, tokens that lie evenly over the window.
    score_T = (torch.arange(T) * 0.6180339887) % 1 if scores_TE is None else scores_TE[:, e].float().cpu()
    S = window if T % window == 0 else T
    lacking_N = (quota - own_T.view(-1, S).sum(1)).clamp(min=0)
    order_NS = score_T.masked_fill(own_T, -torch.inf).view(-1, S).argsort(dim=1, descending=True, stable=True)
    chosen_NS = torch.zeros_like(order_NS, dtype=torch.bool)
    chosen_NS.scatter_(1, order_NS, torch.arange(S).expand_as(order_NS) < lacking_N[:, None])
    return (chosen_NS.view(-1) & ~own_T).nonzero()[:, 0]


def scores_of(count: int, routed: Routed | Copied) -> Tensor | None:
    scores_TE = _router_scores.get()
    return scores_TE if scores_TE is not None and scores_TE.shape == (routed.count, count) else None


def scores_in(count: int, output: Any) -> Tensor | None:
    """The scores of so many experts in what a module returns, `[T, E]`; None where there are none."""
    found = output if isinstance(output, tuple | list) else [output]
    scores = [t for t in found if isinstance(t, Tensor) and t.is_floating_point() and t.shape[-1] == count]
    if not scores:
        return None
    # Where there are several, some are of the chosen experts alone.
    best = max(scores, key=lambda t: torch.count_nonzero(t).item())
    return best.detach().reshape(-1, count)


def note_scores(count: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        scores_TE = scores_in(count, output)
        if scores_TE is not None:
            _router_scores.set(scores_TE)

    return hook
