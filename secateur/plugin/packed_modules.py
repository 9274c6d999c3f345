"""Putting modules that compute on packed weights in the place of a model's linears, and dense ones back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.errors import CheckpointError
from secateur.formats.layouts.packed_weight import StoredForm
from secateur.kernels.backends import choose
from secateur.kernels.embedding import PackedEmbedding
from secateur.kernels.module import PackedLinear
from secateur.kernels.packed import Packed

#: The device maps that share a model out between the devices that there are.
SHARED_OUT = ("auto", "balanced", "balanced_low_0", "sequential")


class PackedPlainLinear(PackedLinear, nn.Linear):  # type: ignore[misc, override]
    """In place of an `nn.Linear`, which it is to those that look for them: what puts adapters on linears, say."""

    transposed = False


class PackedConv1D(PackedLinear, Conv1D):
    """In place of transformers' `Conv1D`."""

    transposed = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.nf, self.nx = self.out_features, self.in_features

    __repr__ = nn.Module.__repr__


def replace_linears(
    model: nn.Module,
    weights: Mapping[str, Callable[[], tuple[Packed, StoredForm]]],
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    at_hand: bool,
) -> list[str]:
    """Let the linears of a model, which may be on the meta device, compute on packed weights.

    They have yet to be placed on their device: see `place_linears`. A linear stays as it is, to be given a dense weight, where
    `dense` is the backend, and where it is of a class of its own, which may do more than multiply.

    Args:
        model: to be changed.
        weights: module name → what reads its weight, and how that is stored.
        backend: `auto` or a name.
        device: where most of the model will be.
        dtype: of the inputs.
        at_hand: whether the files are in memory, see `Tensors.at_hand`. Reading is checking, a hundred microseconds of Python
            a weight, for which threads would only wait for each other; where a disk has to be waited for, they read several
            weights at once.

    Returns:
        The names of the modules that were replaced.

    Raises:
        CheckpointError: a weight is damaged, or of another shape than the module's.
        UsageError: there is no such backend, or it cannot be used.
    """
    replaced = []
    modules = dict(model.named_modules(remove_duplicate=False))
    plain = [name for name in weights if type(modules[name]) in (nn.Linear, Conv1D)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = (map if at_hand else pool.map)(lambda name: weights[name](), plain)
        for name, (weight, form) in zip(plain, found, strict=True):
            module = modules[name]
            transposed = isinstance(module, Conv1D)
            shape = module._parameters["weight"].shape
            wanted = (shape[1], shape[0]) if transposed else tuple(shape)
            if weight.shape != wanted:
                raise CheckpointError(
                    f"{name}.weight is {list(weight.shape)} in the file, but {list(wanted)} in the model"
                )
            if choose(weight, backend, device, dtype).name == "dense":
                continue
            cls = PackedConv1D if transposed else PackedPlainLinear
            packed = cls(weight, module._parameters.get("bias"), backend, dtype, form)
            model.set_submodule(name, packed.train(module.training))
            replaced.append(name)
    return replaced


def place_linears(model: Any) -> None:
    """Make packed linears ready where the model's `hf_device_map` has them; without one, where the rest of the model is.

    Those that are read when they run are passed over. Others that belong to parts on disk stay in the CPU's memory, and compute
    there: accelerate offloads parameters, and they are none.

    Raises:
        UsageError: a backend cannot be used there.
    """
    places = _places(model)
    several = len(set(places.values())) > 1
    kept = []
    for name, module in packed_linears(model):
        if module.away and module.prepared is not None:
            continue
        place = _place_in(places, name)
        if place == "disk":
            kept.append(module.nbytes)
        module.place(_computing(place), fetch=several)
    if kept:
        warnings.warn(
            f"{len(kept)} packed linears, {sum(kept) / 1e6:.1f} MB, stay in memory: it is blocks that are read when they run",
            stacklevel=2,
        )


def place_of(model: Any, name: str) -> torch.device:
    """Where a module of a model computes; what is offloaded to disk, in the CPU's memory."""
    return _computing(place_named(model, name))


def _computing(place: Any) -> torch.device:
    return torch.device("cpu" if place == "disk" else place)


def place_named(model: Any, name: str) -> Any:
    """Where the model's `hf_device_map` has a module; without one, where the model is."""
    return _place_in(_places(model), name)


def _places(model: Any) -> dict[str, Any]:
    return getattr(model, "hf_device_map", None) or {"": model.device}


def _place_in(places: Mapping[str, Any], name: str) -> Any:
    parents = [name.rsplit(".", i)[0] for i in range(name.count(".") + 1)]
    return next((places[parent] for parent in [*parents, ""] if parent in places), "cpu")


def main_device(device_map: Any) -> torch.device:
    """Where most of a model computes, of what transformers takes as a `device_map`."""
    if isinstance(device_map, dict):
        places = list(device_map.values())
        device_map = next((place for place in places if place not in ("cpu", "disk")), "cpu" if places else None)
    if device_map is None:
        return torch.get_default_device()
    if isinstance(device_map, str) and device_map in SHARED_OUT:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device_map)


def show_sizes(model: nn.Module) -> list[nn.Module]:
    """Let packed modules have a parameter, without memory, of their size: what shares a model out between devices counts those.

    Returns:
        The modules, for `hide_sizes`.
    """
    modules = {name: linear.nbytes for name, linear in packed_linears(model)}
    for name, count in modules.items():
        size = torch.empty(count, dtype=torch.uint8, device="meta")
        model.get_submodule(name).register_parameter("size", nn.Parameter(size, requires_grad=False))
    return [model.get_submodule(name) for name in modules]


def hide_sizes(modules: Iterable[nn.Module]) -> None:
    """Take that away again."""
    for module in modules:
        module._parameters.pop("size", None)


def packed_linears(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """What computes on packed weights in a model, by name: those of tables of embeddings first, by the names of the tables.

    A head that reads the weight of a table is none besides.
    """
    seen: set[int] = set()
    modules = dict(model.named_modules())
    tables = {name: module.linear for name, module in modules.items() if isinstance(module, PackedEmbedding)}
    linears = {name: module for name, module in modules.items() if isinstance(module, PackedLinear)}
    for name, linear in {**tables, **linears}.items():
        if id(linear) not in seen:
            seen.add(id(linear))
            yield name, linear


def densify(model: nn.Module) -> None:
    """Put ordinary linears with dense weights back."""
    for name, packed in list(packed_linears(model)):
        W_OI = packed.dense()
        if packed.transposed:
            linear: Any = Conv1D(packed.out_features, packed.in_features)
            W_OI = W_OI.T.contiguous()
        else:
            with torch.device("meta"):
                linear = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None)
        linear.weight = nn.Parameter(W_OI.to(packed.dtype), requires_grad=False)
        linear.bias = packed.bias
        model.set_submodule(name, linear.train(packed.training))


def memory_footprint(model: Any, return_buffers: bool = True) -> int:
    """`model.get_memory_footprint`, with packed weights, which are no parameters."""
    dense: int = type(model).get_memory_footprint(model, return_buffers)
    return dense + sum(linear.nbytes for _, linear in packed_linears(model))


def ignore_in_files(model: Any, pattern: str) -> None:
    """Have transformers not complain of tensors that it finds no place for."""
    known = model._keys_to_ignore_on_load_unexpected
    # A list or nothing in early releases of transformers 5, a set later.
    model._keys_to_ignore_on_load_unexpected = (
        {*known, pattern} if isinstance(known, set) else [*(known or ()), pattern]
    )
