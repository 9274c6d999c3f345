"""The layout `dictionary`: a weight as the product of two matrices, few atoms and what each output takes of them.

O: output features, I: input features, K: atoms.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from secateur.core.quantized import Quantized
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.coded import read_choice, read_stored_shape
from secateur.formats.layouts.layout import DTYPES, Layout, all_finite, check_parts, dtype_name, layout
from secateur.formats.layouts.packed_int import PackedInt
from secateur.formats.layouts.sparse_int import SparseInt
from secateur.kernels.factored_weight import FactoredWeight, full
from secateur.kernels.packed import FLOAT_DTYPES, Packed, SparseWeight, largest, unpadded

ATOMS, COEFFICIENTS = "atoms", "coefficients"
#: What a config calls the number of the block with whose linear of the same name the atoms lie.
LENDER = "atoms_block"

_T = TypeVar("_T")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Plain(Layout):
    """`values [rows, columns]`: a matrix as it is. No layout of a weight, which would just be dense, but of a factor."""

    name: ClassVar[str] = "dense"
    rounded: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("values",)

    def pack(self, W_OI: Tensor) -> dict[str, Tensor]:
        return {"values": W_OI.contiguous()}

    def load(self, tensors: Mapping[str, Tensor]) -> SparseWeight:
        check_parts(tensors, {"values": lambda t: t.ndim == 2 and t.numel() > 0 and t.dtype in FLOAT_DTYPES})
        return full(tensors["values"])

    def values(self, weight: SparseWeight) -> list[Tensor]:
        return [unpadded(weight.values_V)]

    def store(self, weight: SparseWeight) -> dict[str, Tensor]:
        return {"values": unpadded(weight.values_V)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Plain:
        return cls()


#: What factors may be stored as, by the names that configs have for it.
_FACTORS: dict[str, type[Layout]] = {each.name: each for each in (Plain, PackedInt, Bitmap, SparseInt)}


@dataclass(frozen=True)
class Factor:
    """One of the two matrices, packed.

    Attributes:
        layout: one of `_FACTORS`.
        parts: its tensors, on the CPU.
    """

    layout: Layout
    parts: dict[str, Tensor]

    @classmethod
    def of(cls, layout: Layout, matrix: Any) -> Factor:
        """Of what the layout packs."""
        return cls(layout, layout.pack(matrix))

    @classmethod
    def of_parts(cls, config: Mapping[str, Any], parts: dict[str, Tensor]) -> Factor:
        """Of its parts, and what a config says of it."""
        return cls(_FACTORS[config["layout"]].from_config(config), parts)

    def load(self) -> Packed:
        """As kernels compute on it."""
        return self.layout.load(self.parts)

    def values(self) -> Tensor:
        """Float32."""
        return self.layout.unpack(self.parts).float()


@dataclass(frozen=True)
class Shared:
    """What a linear has in common with linears of other blocks.

    Attributes:
        atoms: of all of them.
        lender: the number of the block with whose linear they are stored; None: with this linear.
    """

    atoms: Factor
    lender: int | None


@dataclass(frozen=True)
class Factors:
    """What a weight is the product of.

    Attributes:
        atoms: `[K, I]`.
        coefficients: `[O, K]`.
        lender: see `Shared`.
    """

    atoms: Factor
    coefficients: Factor
    lender: int | None = None

    @property
    def bits(self) -> int:
        """Of a coefficient."""
        return getattr(self.coefficients.layout, "bits", 16)

    def values(self) -> Tensor:
        """The weight `[O, I]`, float32."""
        atoms, coefficients = self.atoms.load(), self.coefficients.load()
        return FactoredWeight((coefficients.shape[0], atoms.shape[1]), torch.float32, atoms, coefficients).dense()

    def layout(self, dtype: torch.dtype) -> Dictionary:
        return Dictionary(self.atoms.layout, self.coefficients.layout, dtype, self.lender)


@layout
@dataclass(frozen=True)
class Dictionary(Layout):
    """`shape int64 [2]`, and the parts of two other layouts: `atoms_…` of a matrix `[K, I]`, `coefficients_…` of one `[O, K]`.
    The weight is the product of the second and the first.

    Attributes:
        atoms, coefficients: those layouts: a dense matrix, `packed-int`, and of coefficients also `bitmap`, and `sparse-int`
            around `packed-int`.
        dtype: of the dense weight.
        lender: the number of the block with whose linear of the same name the atoms lie; None: with this one.
    """

    atoms: Layout
    coefficients: Layout
    dtype: torch.dtype
    lender: int | None = None

    name: ClassVar[str] = "dictionary"
    rounded: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = (
        "shape",
        *(f"{ATOMS}_{part}" for part in dict.fromkeys((*Plain.parts, *PackedInt.parts))),
        *(
            f"{COEFFICIENTS}_{part}"
            for part in dict.fromkeys((*Plain.parts, *PackedInt.parts, *Bitmap.parts, *SparseInt.parts))
        ),
    )

    def pack(self, weight: Quantized) -> dict[str, Tensor]:
        factors: Any = weight.codes
        own = factors.layout(weight.dtype)
        if own != self:
            raise ValueError(f"its factors are stored as {own.to_config()}, and this layout is {self.to_config()}")
        if weight.keep_OI is not None or weight.order_I is not None or weight.outliers is not None:
            raise ValueError("it has a mask, an order or outliers, which layout 'dictionary' does not store")
        parts = {"shape": torch.tensor(weight.shape)}
        for prefix, factor in ((ATOMS, factors.atoms), (COEFFICIENTS, factors.coefficients)):
            parts |= {f"{prefix}_{part}": tensor for part, tensor in factor.parts.items()}
        return parts

    def load(self, tensors: Mapping[str, Tensor]) -> FactoredWeight:
        O, I = read_stored_shape(tensors)
        atoms, coefficients = self._factor(tensors, ATOMS), self._factor(tensors, COEFFICIENTS)
        if atoms.shape[1] != I or coefficients.shape != (O, atoms.shape[0]):
            raise ValueError(
                f"its atoms are {list(atoms.shape)} and its coefficients {list(coefficients.shape)}, whose product is no "
                f"[{O}, {I}]"
            )
        weight = FactoredWeight((O, I), self.dtype, atoms, coefficients)
        # A bound that holds for any two rows and columns is enough nearly always.
        bounds = (max((largest(W) for _, W in each.dense_rows()), default=0.0) for each in (atoms, coefficients))
        surely = atoms.shape[0] * next(bounds) * next(bounds) < torch.finfo(self.dtype).max / 2
        if not surely and not all(all_finite(W) for _, W in weight.dense_rows()):
            raise ValueError(f"its factors stand for values beyond {self.dtype}")
        return weight

    def _factor(self, tensors: Mapping[str, Tensor], prefix: str) -> Packed:
        factor: Layout = getattr(self, prefix)
        parts = {part: tensors[f"{prefix}_{part}"] for part in factor.parts if f"{prefix}_{part}" in tensors}
        try:
            found = factor.load(parts)
        except ValueError as error:
            raise ValueError(f"{error} ({prefix})") from error
        if not all(all_finite(part) for part in factor.values(found)):
            raise ValueError(f"its {prefix} hold values that are not finite")
        return found

    def lender_of(self, weight: str) -> str | None:
        return None if self.lender is None else _NUMBER.sub(str(self.lender), weight, count=1)

    def own(self, parts: Mapping[str, _T]) -> dict[str, _T]:
        lent = self.lender is not None
        return {part: value for part, value in parts.items() if not (lent and part.startswith(f"{ATOMS}_"))}

    def values(self, weight: FactoredWeight) -> Iterable[Tensor]:
        return ()  # looked at already

    def store(self, weight: FactoredWeight) -> dict[str, Tensor]:
        parts = {"shape": torch.tensor(weight.shape)}
        for prefix, factor in ((ATOMS, weight.atoms), (COEFFICIENTS, weight.coefficients)):
            stored = getattr(self, prefix).store(factor)
            parts |= {f"{prefix}_{part}": tensor for part, tensor in stored.items()}
        return parts

    def to_config(self) -> dict[str, Any]:
        own = {ATOMS: self.atoms.to_config(), COEFFICIENTS: self.coefficients.to_config()}
        lent = {} if self.lender is None else {LENDER: self.lender}
        return {"layout": self.name, **own, "dtype": dtype_name(self.dtype), **lent}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Dictionary:
        atoms = _factor_layout(config, ATOMS, (Plain.name, PackedInt.name))
        coefficients = _factor_layout(config, COEFFICIENTS, tuple(_FACTORS))
        lender = config.get(LENDER)
        if lender is not None and (type(lender) is not int or lender < 0):
            raise ValueError(f"{LENDER} is {lender!r}")
        return cls(atoms, coefficients, DTYPES[read_choice(config, "dtype", list(DTYPES))], lender)


def _factor_layout(config: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> Layout:
    own = config.get(key)
    if not isinstance(own, Mapping):
        raise ValueError(f"{key} is {own!r}")
    found = _FACTORS[read_choice(own, "layout", allowed)].from_config(own)
    codes: Any = getattr(found, "codes", None)  # of those that a mask keeps
    if codes is not None and codes.name != PackedInt.name:
        raise ValueError(f"the kept {key} are said to have layout {codes.name!r}")
    return found
