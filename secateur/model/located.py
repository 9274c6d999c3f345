"""Where the tensors of a model lie in its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError
from secateur.formats.layouts.packed_weight import DecodedWeights
from secateur.mixture.experts import Piece
from secateur.mixture.unfuse import experts_in
from secateur.plugin.names import renamed, stored_as


@dataclass(frozen=True)
class Located:
    """Where the tensors of a model's state dict are stored.

    Attributes:
        stored: the name in the files of each that is there, by its name in the model.
        pieces: of experts that lie in a tensor with others, where in it.
        missing: names of those that are nowhere, and are not tied to another.
    """

    stored: dict[str, str]
    pieces: dict[str, Piece]
    missing: list[str]


def locate(weights: Mapping[str, Tensor], model: nn.Module) -> Located:
    """Find the tensors of a model."""
    stored, missing = stored_names(weights, model)
    of_experts = _pieces_of(model) if missing else {}
    fused, _ = stored_names(weights, model, {parameter for parameter, _ in of_experts.values()})
    pieces = {}
    for name in missing:
        parameter, piece = of_experts.get(name, ("", None))
        if piece is not None and parameter in fused:
            stored[name], pieces[name] = fused[parameter], piece
    return Located(stored, pieces, [name for name in missing if name not in stored])


def _pieces_of(model: nn.Module) -> dict[str, tuple[str, Piece]]:
    """The weights of a model's experts: each name → what the parameter that held it would be called, and where it lay in it."""
    return {
        f"{name}.{weight}": (f"{name}.{piece.parameter}", piece)
        for name, experts in experts_in(model).items()
        for weight, piece in experts.pieces.items()
    }


def part_of(weights: DecodedWeights, stored: str, piece: Piece | None) -> Tensor:
    """A stored tensor, or what of it belongs to one expert. Raises CheckpointError when it has no such expert."""
    if piece is None:
        return weights[stored]
    shape, _ = weights.form(stored)
    if len(shape) != 3 or piece.expert >= shape[0]:
        raise CheckpointError(f"{stored} is {list(shape)} in the checkpoint, and has no expert {piece.expert}")
    return piece.within(weights.expert(stored, piece.expert))


def stored_names(
    weights: Mapping[str, Tensor], model: nn.Module, names: Iterable[str] | None = None
) -> tuple[dict[str, str], list[str]]:
    """Under which names the tensors of a model's state dict, or those of other names, are stored.

    Returns:
        The name in the files of each that is there, by its name in the model; and the names of those that are missing and are
        not tied to another.
    """
    # Those that may be tied are no help: whether they are is up to the config.
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    known = renamed(weights, model)
    found, missing = {}, []
    for name in model.state_dict() if names is None else names:
        stored = stored_as(model, name, weights, known)
        if stored is not None:
            found[name] = stored
        elif name not in tied:
            missing.append(name)
    return found, missing


def conflicts(weights: Mapping[str, Tensor], stored: Mapping[str, str], model: Any) -> dict[str, str]:
    """Tensors that the config ties to others but the files hold as different ones: name in the model → that of the other.

    Args:
        weights: of the checkpoint.
        stored: as `stored_names` finds them.
        model: tied as its config says.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        name: other
        for name, other in tied.items()
        if name in stored and other in stored and not _same(weights, stored[name], stored[other])
    }


def _same(weights: Mapping[str, Tensor], name: str, other: str) -> bool:
    packed = getattr(weights, "packed", {})
    if name == other or name in packed or other in packed:  # a table of embeddings is never packed
        return name == other
    one, two = weights[name], weights[other]
    dtype = torch.promote_types(one.dtype, two.dtype)
    return one.shape == two.shape and torch.equal(one.to(dtype), two.to(dtype))
