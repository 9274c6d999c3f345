"""What a layout must be able to do, and the names under which layouts are found.

O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.kernels.packed import FLOAT_DTYPES, Packed

LAYOUT_VERSION = 1
#: The dtypes of weights by the names that configs and users give them.
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


class Layout(Protocol):
    """A codec: turns a pruned or quantized weight `[O, I]` into named tensors and back, exact to the bit.

    `parts` are the names of the tensors; in a file each stands behind the name of the weight, as in
    `model.layers.0.mlp.up_proj.weight.bitmask`.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]

    def pack(self, weight: Any) -> dict[str, Tensor]:
        """The tensors of a contiguous `[O, I]` tensor, or of a `Quantized` where the layout is one of codes.

        Raises ValueError when the layout cannot hold it.
        """
        ...

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight `[O, I]`. Everything is checked before it is used: raises ValueError, saying what is wrong."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> Packed:
        """The weight as kernels compute on it, in memory of its own. Everything is checked as by `unpack`."""
        ...

    def store(self, weight: Any) -> dict[str, Tensor]:
        """The tensors that `load` made such a weight of, in numbers of any width (see `packed.StoredForm`)."""
        ...

    def to_config(self) -> dict[str, Any]:
        """What `config.json` has to say about a weight in this layout."""
        ...

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Layout:
        """The layout that `to_config` described. Raises ValueError when a parameter is missing or makes no sense."""
        ...


LAYOUTS: dict[str, type[Layout]] = {}


def layout(cls: type[Layout]) -> type[Layout]:
    """Register a layout under its name."""
    LAYOUTS[cls.name] = cls
    return cls


def layout_from_config(config: Any) -> Layout:
    """The layout that an entry of a checkpoint's `quantization_config` names.

    Raises:
        CheckpointError: it is unknown or its parameters make no sense.
    """
    name = config.get("layout") if isinstance(config, Mapping) else None
    if not isinstance(name, str) or name not in LAYOUTS:
        raise CheckpointError(
            f"layout {name!r} is not known to this version of secateur (it knows {', '.join(sorted(LAYOUTS))})"
        )
    try:
        return LAYOUTS[name].from_config(config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"layout {name!r} with parameters that make no sense: {error}") from error


def check_parts(tensors: Mapping[str, Tensor], wanted: Mapping[str, Callable[[Tensor], bool]]) -> None:
    """Raise ValueError unless each named tensor is there and of the form that its test asks for."""
    for part, fits in wanted.items():
        if part not in tensors:
            raise ValueError(f"its tensor {part!r} is missing")
        tensor = tensors[part]
        if not fits(tensor):
            raise ValueError(f"its tensor {part!r} has dtype {tensor.dtype} and shape {list(tensor.shape)}")


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: both show in the extremes, which one pass without a copy finds."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(widened(tensor)))).all())


def widened(tensor: Tensor) -> Tensor:
    """The same values in a dtype that torch computes with: it has few operations for floats of eight bits."""
    return tensor.half() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def read_shape(shape: Tensor) -> tuple[int, int]:
    """(O, I) from the stored tensor `shape`, which must hold two positive integers.

    A limit of 2³¹ on each keeps products of the two within int64.
    """
    if shape.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"its tensor 'shape' has dtype {shape.dtype}, not an integer's")
    values = shape.flatten().tolist()
    if len(values) != 2 or not all(0 < v < 2**31 for v in values):
        raise ValueError(f"its tensor 'shape' is {values}, not two positive sizes")
    return values[0], values[1]
