"""Putting gates before the linears of a model, as the config of its folder says: which inputs they read while it writes.

O: output features, I: input features, R: ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError
from secateur.gates.running import Gate, Gates, gates_of, put_gates
from secateur.gates.section import LEFT, RIGHT, SCALE, Section
from secateur.plugin.names import block_of, spellings

# Gives a tensor that stands beside a linear's weight, by the linear's name in the model and the tensor's, if there is one.
_Find = Callable[[str, str], Tensor | None]


def put_in_place(
    model: Any, section: Section, stored: Mapping[str, Tensor], names_of: Callable[[str], Iterable[str]]
) -> None:
    """Have a model read its inputs through gates.

    Args:
        model: its linears in place, packed or not.
        section: of the config.
        stored: the tensors of the files.
        names_of: the names that a weight of the model may have there.

    Raises:
        CheckpointError: it names linears that the model has not, or that do not read the same, or a tensor is damaged.
    """

    def find(name: str, part: str) -> Tensor | None:
        names = (f"{weight}.{part}" for weight in names_of(f"{name}.weight"))
        return next((stored[each] for each in names if each in stored), None)

    gates = Gates(section)
    blocks = []
    for each in section.inputs:
        names = [_name_in(model, name) for name in each.linears]
        linears = [model.get_submodule(name) for name in names]
        shapes = [_shape(linear) for linear in linears]
        features = shapes[0][1]
        if any(features != I for _, I in shapes):
            raise CheckpointError(f"{names[0]} and {names[-1]} have one gate by config.json, but inputs of their own")
        scale_I = find(names[0], SCALE)
        if scale_I is not None:
            _check(names[0], SCALE, scale_I, (features,))
            scale_I = scale_I.float().clone()
        rank = sum(
            _put_rest(linear, name, shape, model.dtype, find)
            for linear, name, shape in zip(linears, names, shapes, strict=True)
        )
        gate = Gate(gates, names[0], each, features, sum(O for O, _ in shapes), scale_I, rank)
        gates.gates.append(gate)
        for linear in linears:
            linear.register_forward_pre_hook(gate.before)
            if LEFT in linear._buffers:
                linear.register_forward_hook(gate.after)
        blocks.append(block_of(names[0]))
    # Blocks run in the order of their numbers.
    first = min(filter(None, blocks), key=lambda name: int(name.rpartition(".")[2]), default=None)
    if first is not None:
        prefix = first.rpartition(".")[0]
        model.get_submodule(f"{prefix}.0").register_forward_pre_hook(gates.begin, with_kwargs=True)
    put_gates(model, gates)


def _name_in(model: Any, name: str) -> str:
    """What a linear is called in a model. Raises CheckpointError where it has none of that name."""
    for spelling in spellings(model, name):
        try:
            _shape(model.get_submodule(spelling))
        except AttributeError:
            continue
        return spelling
    raise CheckpointError(f"the activations of {name} are in config.json, but the model has no such linear")


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(O, I) of a linear. Raises AttributeError where it is none."""
    if hasattr(linear, "in_features"):
        return linear.out_features, linear.in_features  # type: ignore[return-value]
    return linear.nf, linear.nx  # type: ignore[return-value]


def _put_rest(linear: nn.Module, name: str, shape: tuple[int, int], dtype: torch.dtype, find: _Find) -> int:
    """Give a linear what stands for inputs that are not read, if there is such: weights that are read for each token."""
    left_OR, right_RI = find(name, LEFT), find(name, RIGHT)
    if left_OR is None or right_RI is None:
        return 0
    (O, I), R = shape, left_OR.shape[-1]
    for part, tensor, wanted in ((LEFT, left_OR, (O, R)), (RIGHT, right_RI, (R, I))):
        _check(name, part, tensor, wanted)
        linear.register_buffer(part, tensor.to(dtype, copy=True), persistent=False)
    return R * (O + I)


def _check(name: str, part: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
        raise CheckpointError(
            f"{name}.weight.{part} is {tensor.dtype} {list(tensor.shape)}, not finite numbers {list(shape)}"
        )


def parts_of_gates(model: Any) -> dict[str, Tensor]:
    """The tensors of a model's gates by the names that they have in its files."""
    gates = gates_of(model)
    if gates is None:
        return {}
    found = {f"{gate.name}.weight.{SCALE}": gate.scale_I for gate in gates.gates}
    for name, module in model.named_modules():
        found.update(
            {f"{name}.weight.{part}": module._buffers[part] for part in (LEFT, RIGHT) if part in module._buffers}
        )
    return {name: tensor for name, tensor in found.items() if tensor is not None}
