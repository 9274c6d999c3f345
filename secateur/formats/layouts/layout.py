"""What a layout must be able to do, and the names under which layouts are found.

O: output features, I: input features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from secateur.core.discovery import Table
from secateur.core.quantized import Quantized
from secateur.errors import CheckpointError
from secateur.kernels.packed import FLOAT_DTYPES, Packed

LAYOUT_VERSION = 1
#: The dtypes of weights by the names that configs and users give them.
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
#: Entry points of this group are modules of other packages, which register layouts as ours do.
GROUP = "secateur.layouts"


@dataclass(frozen=True)
class Stored:
    """What the tensors of a weight tell of it.

    Attributes:
        layout: its name.
        shape: (O, I).
        count: weights with a value or a code of their own; the others are zero.
        outliers: those that something is added to.
        bytes: of all tensors.
        finite: whether no value is NaN or infinite.
    """

    layout: str
    shape: tuple[int, ...]
    count: int
    outliers: int
    bytes: int
    finite: bool


def describe_dense(tensor: Tensor) -> Stored:
    """What a weight tells that is not packed."""
    return Stored("dense", tuple(tensor.shape), count_nonzero(tensor), 0, tensor.nbytes, all_finite(tensor))


class Decoder(ABC):
    """Reads what weights of one form are stored as, whoever wrote it.

    Attributes:
        name: of the form.
        rounded: whether weights are codes, of which a zero is one like any other, and not just without their zeros.
        parts: the names of the tensors; in a file each stands behind the name of the weight, as in
            `model.layers.0.mlp.up_proj.weight.bitmask`.
        made: the dtype that weights are decoded to where their tensors do not tell it; None where they do.
    """

    name: ClassVar[str]
    rounded: ClassVar[bool]
    parts: ClassVar[tuple[str, ...]]
    made: torch.dtype | None = None

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight `[O, I]`. Everything is checked before it is used: raises ValueError, saying what is wrong."""

    def unpack_expert(self, tensors: Mapping[str, Tensor], expert: int) -> Tensor:
        """The matrix of one expert, of those that `unpack` gives as one tensor, with strides of any kind. Checked as by it."""
        return self.unpack(tensors)[expert]

    def form(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of what `unpack` gives."""
        dense = self.unpack(tensors)
        return tuple(dense.shape), dense.dtype

    def describe(self, tensors: Mapping[str, Tensor]) -> Stored:
        """What the tensors tell. Everything is checked as by `unpack`."""
        dense = describe_dense(self.unpack(tensors))
        count = math.prod(dense.shape) if self.rounded else dense.count
        return replace(dense, layout=self.name, count=count, bytes=bytes_of(tensors))

    def read(self, tensors: Mapping[str, Tensor]) -> Quantized:
        """The codes, checked as by `unpack`. Raises ValueError where it has none that are known here."""
        raise ValueError(f"layout {self.name!r} has no codes")

    def ours(self, tensors: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]] | None:
        """The layout of ours that holds the same weight to the bit, and its tensors; None where there is none."""
        return None


class Layout(Decoder):
    """A codec: turns a pruned or quantized weight `[O, I]` into named tensors and back, exact to the bit.

    Attributes:
        by_inputs: whether what belongs to an input feature lies in one piece, and can be passed over.
    """

    by_inputs: ClassVar[bool] = False

    @abstractmethod
    def pack(self, weight: Any) -> dict[str, Tensor]:
        """The tensors of a contiguous `[O, I]` tensor, or of a `Quantized` where the layout is one of codes.

        Raises ValueError when the layout cannot hold it.
        """

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> Packed:
        """The weight as kernels compute on it. Everything is checked as by `unpack`.

        Values and codes, which may be anything, may stay where the tensors are, see `packed.padded`; what kernels go by, such
        as masks, is copied: nobody who writes to the file later can lead them elsewhere.
        """

    @abstractmethod
    def store(self, weight: Any) -> dict[str, Tensor]:
        """The tensors that `load` made such a weight of, in numbers of any width (see `packed.StoredForm`)."""

    def to_config(self) -> dict[str, Any]:
        """What `config.json` has to say about a weight in this layout."""
        return {"layout": self.name}

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Layout:
        """The layout that `to_config` described. Raises ValueError when a parameter is missing or makes no sense."""

    def lender_of(self, weight: str) -> str | None:
        """The weight, by its name in the files, that some parts of the one of this name lie with; None: all are its own."""
        return None

    def own(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Of the parts of a weight, or of anything else by their names, those that lie with the weight itself."""
        return dict(parts)

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = self.load(tensors)
        W_OI = torch.empty(weight.shape, dtype=weight.dtype)
        for start, W_RI in weight.dense_rows():  # what a piece takes on its way is many times its size
            W_OI[start : start + len(W_RI)] = W_RI
        return W_OI

    def describe(self, tensors: Mapping[str, Tensor]) -> Stored:
        weight = self.load(tensors)
        outliers = 0 if weight.outliers is None else weight.outliers.value_N.numel()
        finite = all(all_finite(part) for part in self.values(weight))
        return Stored(self.name, weight.shape, weight.count(), outliers, bytes_of(self.own(tensors)), finite)

    def values(self, weight: Any) -> Iterable[Tensor]:
        """Tensors that have every value of a loaded weight: those that may not be finite."""
        return (W_RI for _, W_RI in weight.dense_rows())

    def ours(self, tensors: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]] | None:
        return self, {part: tensor.clone() for part, tensor in tensors.items()}


_HERE, _COMPOSITE = "secateur.formats.layouts", "secateur.composite_layouts"
LAYOUTS: Table[type[Layout]] = Table(
    [_HERE, _COMPOSITE],
    GROUP,
    "layouts",
    {
        "bitmap": f"{_HERE}.bitmap",
        "blocks": f"{_HERE}.block_codes",
        "codebook": f"{_HERE}.codebook",
        "columns": f"{_HERE}.columns",
        "columns-bitmap": f"{_HERE}.columns_bitmap",
        "columns-int": f"{_HERE}.columns_int",
        "dictionary": f"{_COMPOSITE}.dictionary",
        "low-rank": f"{_COMPOSITE}.low_rank",
        "nm": f"{_HERE}.nm",
        "packed-int": f"{_HERE}.packed_int",
        "sparse-int": f"{_HERE}.sparse_int",
        "spqr": f"{_HERE}.two_level_int",
        "sq": f"{_HERE}.two_precisions",
        "ternary-dict": f"{_HERE}.ternary_dict",
        "trellis": f"{_HERE}.trellis_rings",
    },
)
_L = TypeVar("_L", bound=type[Layout])


def layout(cls: _L) -> _L:
    """Register a layout under its name."""
    LAYOUTS[cls.name] = cls
    return cls


def part_names() -> set[str]:
    """The parts of all layouts."""
    return {part for layout in LAYOUTS.values() for part in layout.parts}


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
    return tensor.numel() == 0 or all(math.isfinite(extreme) for extreme in torch.aminmax(widened(tensor)))


def only_finite(tensor: Tensor) -> Tensor:
    """A decoded weight as it is. Raises ValueError where a value is NaN or infinite."""
    if not all_finite(tensor):
        raise ValueError("it stands for values that are not finite")
    return tensor


def count_nonzero(tensor: Tensor) -> int:
    """How many values are not zero."""
    return int(torch.count_nonzero(widened(tensor)))


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors.values())


def dtype_name(dtype: torch.dtype) -> str:
    """What configs call a dtype."""
    return str(dtype).removeprefix("torch.")


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
