"""Putting what is outside a model's blocks in place, and weights that several blocks share.

V: vocabulary, I: features of a row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.formats.layouts.layout import all_finite
from secateur.model.weights import ModelWeights, place


def keep_mapped(model: nn.Module, name: str, weights: ModelWeights, dtype: torch.dtype, device: torch.device) -> bool:
    """Leave a table of embeddings in its file, of which few rows are wanted; whether that is possible."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    # A subclass may compute with its rows, in their dtype.
    if type(owner) is not nn.Embedding or device.type != "cpu" or name not in weights:
        return False
    W_VI = weights[name]
    if W_VI.shape != owner.weight.shape or not all_finite(W_VI):
        return False  # for `materialise` to say so
    if weights.packed(name) is None:  # mapped anew, without the pages that were looked at
        del W_VI
        weights.release()
        W_VI = weights[name]
    keep_rows(owner, leaf, W_VI, dtype)
    return True


def keep_rows(owner: nn.Module, leaf: str, W_VI: Tensor, dtype: torch.dtype) -> None:
    """Put a table of embeddings in place in the dtype that it has, and have its rows in the one that is computed in."""
    place(owner, leaf, W_VI)
    owner.register_forward_hook(lambda _, __, rows: rows.to(dtype))


def read_shared(
    block: nn.Module,
    prefix: str,
    names: Iterable[str],
    weights: ModelWeights,
    twins: Mapping[str, Collection[str]],
    device: torch.device,
) -> None:
    """Give a block the weights that it shares with another and that are stored under the other's name."""
    for name in names:
        twin = next((twin for twin in twins.get(f"{prefix}.{name}", ()) if twin in weights), None)
        if twin is not None and f"{prefix}.{name}" not in weights:
            owner = block.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            tensor = weights.checked(twin, owner.get_parameter(leaf))
            place(owner, leaf, tensor.to(device, owner.get_parameter(leaf).dtype))


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move what a model has computed itself to a device."""
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                place(module, leaf, buffer.to(device))


def only_in_head(model: Any, name: str) -> bool:
    """Whether a parameter is of the head alone, which computes logits."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner is model.get_output_embeddings() and owner is not model.get_input_embeddings()
