"""Experts in a model that transformers loads: taken apart while weights are packed, whole again where they are dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.core_model_loading import dot_natural_key

from secateur.errors import CheckpointError, UsageError
from secateur.kernels.module import PackedLinear
from secateur.mixture.experts import Experts, Piece, module_of
from secateur.mixture.unfuse import experts_in, fused_in, unfuse
from secateur.plugin.names import spellings, stored_as
from secateur.plugin.packed_modules import place_of


def packed_experts(model: nn.Module, packed: Iterable[str]) -> dict[str, Experts]:
    """The experts of a model of which some weights are packed, taken apart; by name.

    Args:
        packed: the names of packed weights, in the files and as transformers calls them.
    """
    owners = set(map(module_of, packed))
    fused = [name for name in fused_in(model) if owners.intersection(spellings(model, name))]
    unfuse(model, fused)
    return {n: module for n, module in experts_in(model).items() if owners.intersection(spellings(model, n))}


def check_names_sort(experts: Mapping[str, Experts]) -> None:
    """Raise UsageError where the installed transformers sorts the names in files, and cannot sort those of these experts."""
    if not any(module.has_bias for module in experts.values()):
        return
    try:
        sorted(["experts.down_proj_bias", "experts.0.down_proj"], key=dot_natural_key)
    except TypeError as error:
        raise UsageError(
            f"transformers {transformers.__version__} cannot load packed experts that have biases: "
            "load them by secateur.load, or install a newer transformers"
        ) from error


def hide_weights(experts: Mapping[str, Experts]) -> None:
    """Let linears of experts that are not packed have no weight while transformers loads, which would miss it in the files."""
    for _, linear, _ in _linears(experts):
        if not isinstance(linear, PackedLinear):
            linear._parameters["weight"] = None


def fill_weights(experts: Mapping[str, Experts], read: Callable[[str, Piece], Tensor], model: Any) -> None:
    """Give such linears their weights."""
    for name, linear, piece in _linears(experts):
        if not isinstance(linear, PackedLinear) and linear._parameters["weight"] is None:
            dtype = experts[module_of(name)].dtype
            W_OI = read(name, piece).to(place_of(model, name), dtype)
            linear._parameters["weight"] = nn.Parameter(W_OI.contiguous(), requires_grad=False)


def fuse_again(model: Any, experts: Mapping[str, Experts], read: Callable[[str, Piece], Tensor] | None = None) -> None:
    """Put the modules of transformers back, with the weights that the linears have, or that are read; they let go of them."""
    for name, module in experts.items():

        def weight_of(weight: str, piece: Piece, name: str = name, module: Experts = module) -> Tensor:
            owner = module.get_submodule(weight.removesuffix(".weight"))
            own = owner._parameters["weight"]
            if own is not None:
                owner._parameters["weight"] = None
                return own.detach()
            assert read is not None
            return read(f"{name}.{weight}", piece)

        model.set_submodule(name, module.fused(weight_of, place_of(model, name)))


def read_dense(model: Any, stored: Mapping[str, Tensor], known: dict[str, str], name: str, piece: Piece) -> Tensor:
    """The dense weight of an expert's linear from the files. Raises CheckpointError when they do not have it.

    Args:
        stored: the tensors in the files.
        known: of their names, those that transformers gives others.
    """
    found = stored_as(model, name, stored, known)
    if found is not None:
        return stored[found]
    fused = stored_as(model, f"{module_of(name)}.{piece.parameter}", stored, known)
    if fused is None:
        raise CheckpointError(f"{name} is missing in the files")
    return piece.of(stored[fused])


def names_apart(model: nn.Module, experts: Mapping[str, Experts]) -> list[str]:
    """The names of a model's tensors, and those that whole experts would have if they were apart."""
    return [*model.state_dict(), *(f"{name}.{weight}" for name, module in experts.items() for weight in module.pieces)]


def taken_apart(model: nn.Module, experts: Mapping[str, Experts]) -> dict[str, Tensor]:
    """The state dict of a model with whole experts as if they were apart."""
    state = dict(model.state_dict())
    for name, module in experts.items():
        for weight, piece in module.pieces.items():
            fused = state.get(f"{name}.{piece.parameter}")
            if fused is not None:
                state[f"{name}.{weight}"] = piece.of(fused).contiguous()
        for leaf in module.fused_shapes:
            state.pop(f"{name}.{leaf}", None)
    return state


def _linears(experts: Mapping[str, Experts]) -> Iterator[tuple[str, nn.Module, Piece]]:
    """The linears of experts: the name of the weight, the module, and where it lies in the fused parameter."""
    for name, module in experts.items():
        for weight, piece in module.pieces.items():
            yield f"{name}.{weight}", module.get_submodule(weight.removesuffix(".weight")), piece
