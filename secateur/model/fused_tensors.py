"""Experts on their way back into the tensors that checkpoints of their family keep them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from secateur.errors import CheckpointError
from secateur.mixture.experts import Piece, module_of
from secateur.mixture.unfuse import experts_in, merges_experts
from secateur.model.weights import ModelWeights


class FusedTensors:
    """Collects the weights of experts, where checkpoints of the family hold a layer's in one tensor, until they are complete.

    They are written together if all of them are dense, as every tool reads them; each under its own name if some are packed.

    Args:
        weights: of the source.
        model: of whose modules they are.
    """

    def __init__(self, weights: ModelWeights, model: Any) -> None:
        self._weights, self._model = weights, model
        self._experts = {} if merges_experts(model) else experts_in(model)
        self._waiting: dict[str, dict[str, Tensor | None]] = {}

    def __contains__(self, name: str) -> bool:
        module, weight = _split(name)
        return module in self._experts and weight in self._experts[module].pieces

    def add(self, name: str, tensor: Tensor | None) -> dict[str, Tensor]:
        """Take the weight of an expert (None: it is packed, and written); what is to be written now, by its name."""
        module, weight = _split(name)
        waiting = self._waiting.setdefault(module, {})
        waiting[weight] = tensor
        if len(waiting) < len(self._experts[module].pieces):
            return {}
        del self._waiting[module]
        dense = {weight: tensor for weight, tensor in waiting.items() if tensor is not None}
        if len(dense) == len(waiting):
            return self._together(module, dense)
        return {self._weights.name_to_write(f"{module}.{weight}"): tensor for weight, tensor in dense.items()}

    def part(self, name: str, stored: Mapping[str, Tensor]) -> Tensor:
        """The dense weight of an expert out of what was written."""
        module, weight = _split(name)
        piece = self._experts[module].pieces[weight]
        if name in self._weights.pieces:
            return self._of(module, weight, stored[self._weights.stored_name(name)])
        whole = torch.empty(self._experts[module].fused_shapes[piece.parameter], device="meta")
        for found, tensor in revert_weight_conversion(self._model, {f"{module}.{piece.parameter}": whole}).items():
            if found in stored and tensor.shape == whole.shape:
                return self._of(module, weight, stored[found])
        raise CheckpointError(
            f"{name} was written in a form of which it cannot be read again: begin anew, with `overwrite`"
        )

    def _of(self, module: str, weight: str, fused: Tensor) -> Tensor:
        """A weight out of what was written, of experts that may be narrower than the model's."""
        experts = self._experts[module]
        inner = experts.inner_size(experts.pieces[weight].parameter, tuple(fused.shape))
        return experts.narrowed(inner)[1][weight].of(fused)

    def _together(self, module: str, dense: dict[str, Tensor]) -> dict[str, Tensor]:
        experts = self._experts[module]
        shapes, pieces = experts.narrowed(dense[f"0.{experts.last}.weight"].shape[1])
        fused: dict[str, Tensor] = {}
        for weight, tensor in dense.items():
            piece: Piece = pieces[weight]
            # As in the source, or for transformers to say.
            own = f"{module}.{weight}" in self._weights.pieces
            name = self._weights.stored_name(f"{module}.{weight}") if own else f"{module}.{piece.parameter}"
            if name not in fused:
                fused[name] = tensor.new_empty(shapes[piece.parameter])
            piece.of(fused[name]).copy_(tensor)
        in_source = any(f"{module}.{weight}" in self._weights.pieces for weight in dense)
        return fused if in_source else revert_weight_conversion(self._model, fused)


def _split(name: str) -> tuple[str, str]:
    """The name of a weight of an expert as that of the module of all experts, and the rest."""
    module = module_of(name)
    return module, name.removeprefix(f"{module}.")
