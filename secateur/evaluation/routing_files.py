"""The routing of one window among the predictions of a reference that are kept on disk.

P: predictions of one window, K: experts of a token, R: experts of which log-probabilities are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secateur.evaluation.routing import LayerRouting, Routing

ROUTING_PREFIX = "routing."


def kept_routing(routing: Routing) -> dict[str, Tensor]:
    """The tensors of a window's routing by their names in its file: `routing.LAYER.` and `chosen` [P, K], and, where the
    router's scores are known, `log_p` [P, R], with `expert` [P, R] and `log_rest` [P] where they are not of all experts.
    """
    found = {}
    for number, layer in enumerate(each.shortened() for each in routing):
        parts = {
            "chosen": layer.chosen_PK,
            "log_p": layer.log_p_PR,
            "expert": layer.expert_PR,
            "log_rest": layer.log_rest_P,
        }
        for name, tensor in parts.items():
            if tensor is not None:
                found[f"{ROUTING_PREFIX}{number}.{name}"] = tensor.cpu().contiguous()
    return found


def layers_of(routing: Routing) -> list[tuple[int, int]]:
    """Of each layer how many experts it has, and of how many log-probabilities are kept."""
    shortened = [layer.shortened() for layer in routing]
    return [(each.experts, 0 if each.log_p_PR is None else each.log_p_PR.shape[1]) for each in shortened]


def read_routing(kept: Mapping[str, Tensor], layers: Sequence[tuple[int, int]], count: int) -> Routing | None:
    """The routing of a window of so many predictions; None where the tensors are not what they should be."""
    found = []
    names: set[str] = set()
    for number, (experts, R) in enumerate(layers):
        own = {name: kept.get(f"{ROUTING_PREFIX}{number}.{name}") for name in ("chosen", "log_p", "expert", "log_rest")}
        given = {name: tensor for name, tensor in own.items() if tensor is not None}
        names.update(f"{ROUTING_PREFIX}{number}.{name}" for name in given)
        if not _fits(given, experts, R, count):
            return None
        found.append(LayerRouting(experts, given["chosen"], own["log_p"], own["expert"], own["log_rest"]))
    return tuple(found) if names == set(kept) else None


def _fits(given: Mapping[str, Tensor], experts: int, R: int, count: int) -> bool:
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if R:
        wanted["log_p"] = ((count, R), torch.float32)
    if 0 < R < experts:
        wanted |= {"expert": ((count, R), torch.int16), "log_rest": ((count,), torch.float32)}
    chosen = given.get("chosen")
    if chosen is None or chosen.ndim != 2 or len(chosen) != count or chosen.dtype != torch.int16 or not chosen.numel():
        return False
    others = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in given.items() if name != "chosen"}
    if others != wanted or not -1 <= int(chosen.min()) <= int(chosen.max()) < experts:
        return False
    expert = given.get("expert")
    return expert is None or 0 <= int(expert.min()) <= int(expert.max()) < experts
