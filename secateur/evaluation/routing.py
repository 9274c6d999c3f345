"""To which experts a mixture sends the tokens of a text, and whether two models send them to the same.

P: predictions of one window, S: tokens of one window, W: windows of one batch, T: their tokens, E: experts of a layer,
K: experts of a token, R: experts of which log-probabilities are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.evaluation.kl import kl, log_rest
from secateur.mixture.expert_rows import chosen_by, scores_in
from secateur.mixture.experts import DOWN
from secateur.mixture.unfuse import experts_in, fused_in

#: Of a router's log-probabilities of a token, as many are kept of a reference: several times what any model chooses.
KEPT_EXPERTS = 32
_LEAST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class LayerRouting:
    """Where the experts of one layer are sent tokens from: those after which the P predictions of a window are made.

    Attributes:
        experts: how many the layer has.
        chosen_PK: the numbers of the experts of each token, int16; −1 is none.
        log_p_PR: what the router makes of them: log-probabilities, the softmax of its scores; None where it cannot be told.
        expert_PR: which experts `log_p_PR` is of; None: of all in their order.
        log_rest_P: log-probability of all others together; None where there are none.
    """

    experts: int
    chosen_PK: Tensor
    log_p_PR: Tensor | None = None
    expert_PR: Tensor | None = None
    log_rest_P: Tensor | None = None

    def shortened(self) -> LayerRouting:
        """With the likeliest experts alone, if there are many."""
        if self.log_p_PR is None or self.log_p_PR.shape[1] <= KEPT_EXPERTS:
            return self
        top = self.log_p_PR.topk(KEPT_EXPERTS, dim=1)
        rest_P = log_rest(self.log_p_PR, top.indices)
        return replace(self, log_p_PR=top.values, expert_PR=top.indices.short(), log_rest_P=rest_P)

    def sent(self) -> Tensor:
        """Which experts each token is sent to, `[P, E]`."""
        none_PK = torch.where(self.chosen_PK < 0, self.experts, self.chosen_PK).long()
        sent_PE = torch.zeros(len(none_PK), self.experts + 1, dtype=torch.bool, device=none_PK.device)
        return sent_PE.scatter_(1, none_PK, True)[:, :-1]


Routing = tuple[LayerRouting, ...]


def counts_of(model: nn.Module) -> dict[str, int]:
    """How many experts each module of experts in a model has, by name: transformers' own modules and ours."""
    fused = {name: len(getattr(model.get_submodule(name), DOWN)) for name in fused_in(model)}
    return fused | {name: module.count for name, module in experts_in(model).items()}


@dataclass(frozen=True)
class Call:
    """One call of a module of experts.

    Attributes:
        name: of the module.
        count: of its experts.
        given: what it is called with.
        scores_TE: what a module beside it says of all experts: the router.
    """

    name: str
    count: int
    given: tuple[Any, ...]
    scores_TE: Tensor | None

    def chosen(self) -> Tensor:
        """See `chosen_by`."""
        return chosen_by(self.count, self.given)


@contextmanager
def watched(model: nn.Module, routers: bool = True) -> Iterator[list[Call]]:
    """Within the context, a list to which every call of experts is added, in order.

    Args:
        routers: whether to listen to what the modules beside them say.
    """
    calls: list[Call] = []
    with ExitStack() as hooks:
        for name, count in counts_of(model).items():
            parent, experts = model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name)
            said: list[Tensor] = []

            def listen(_: Any, __: Any, output: Any, count: int = count, said: list[Tensor] = said) -> None:
                scores_TE = scores_in(count, output)
                if scores_TE is not None:
                    said[:] = [scores_TE]

            def note(
                _: Any, args: Any, kwargs: Any, name: str = name, count: int = count, said: list[Tensor] = said
            ) -> None:
                calls.append(Call(name, count, (*args, *kwargs.values()), said.pop() if said else None))

            for sibling in parent.children():
                if routers and sibling is not experts:
                    hooks.callback(sibling.register_forward_hook(listen).remove)
            hooks.callback(experts.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield calls


def routing_of(calls: Sequence[Call], W: int, S: int, scored: Sequence[int]) -> list[Routing]:
    """The routing of each window of a batch, by the calls that were watched.

    Args:
        scored: how many predictions of each window are wanted, the last ones.
    """
    whole = [(call.count, call.chosen(), _log_p(call.scores_TE)) for call in calls]
    whole = [each for each in whole if len(each[1]) == W * S]
    found = []
    for w, count in enumerate(scored):
        rows = slice((w + 1) * S - 1 - count, (w + 1) * S - 1)
        layers = [
            LayerRouting(
                experts, chosen_TK[rows], None if log_p_TE is None or len(log_p_TE) < W * S else log_p_TE[rows]
            )
            for experts, chosen_TK, log_p_TE in whole
        ]
        found.append(tuple(layers))
    return found


def _log_p(scores_TE: Tensor | None) -> Tensor | None:
    if scores_TE is None:
        return None
    score_TE = scores_TE.float()
    # Some routers return probabilities already.
    if bool((score_TE >= 0).all()) and bool(((score_TE.sum(1) - 1).abs() < 1e-3).all()):
        return score_TE.clamp_min(_LEAST).log()
    return score_TE.log_softmax(1).clamp_min(torch.tensor(_LEAST).log().item())


def compare_routing(own: Routing, reference: Routing) -> list[Tensor] | None:
    """How alike two models route the tokens of a window; None where their layers are not the same.

    Returns:
        For each prediction, in the mean over layers: 1 where the sets of experts are equal, else 0; the share |A∩B| / k of
        experts that both choose; and, unless no router's scores are known, KL(reference ‖ model) of their distributions.
    """
    if not own or [layer.experts for layer in own] != [layer.experts for layer in reference]:
        return None
    equal, overlap, divergence = [], [], []
    for mine, other in zip(own, reference, strict=True):
        device = mine.chosen_PK.device
        a_PE, b_PE = mine.sent(), other.sent().to(device)
        most_P = torch.maximum(a_PE.sum(1), b_PE.sum(1))
        equal.append((a_PE == b_PE).all(1).float())
        overlap.append(torch.where(most_P > 0, (a_PE & b_PE).sum(1) / most_P.clamp(min=1), 1.0))
        kept = other.shortened()
        if mine.log_p_PR is not None and kept.log_p_PR is not None:
            expert_PR = None if kept.expert_PR is None else kept.expert_PR.to(device).long()
            rest_P = None if kept.log_rest_P is None else kept.log_rest_P.to(device)
            divergence.append(kl(kept.log_p_PR.to(device), mine.log_p_PR, expert_PR, rest_P))
    return [torch.stack(each).mean(0).float().cpu() for each in (equal, overlap, divergence) if each]
