"""The layout `low-rank`: another layout, and two thin factors whose product is added to what it holds.

O: output features, I: input features, R: rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn

from torch import Tensor

from secateur.core.factors import WithFactors
from secateur.formats.layouts.coded import HALF_DTYPES, check_finite
from secateur.formats.layouts.layout import LAYOUTS, Layout, Stored, all_finite, check_parts, layout
from secateur.kernels.low_rank_weight import LowRankWeight

_FACTORS = ("low_out", "low_in")


@layout
@dataclass(frozen=True)
class LowRank(Layout):
    """`low_out [O, R]`, `low_in [R, I]`, both of 16 bits, and the parts of another layout.

    The weight is the sum of what the other layout holds, and of the product of the factors, computed in float32 and rounded to
    the dtype of the other.
    """

    main: Layout

    name: ClassVar[str] = "low-rank"
    rounded: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = _FACTORS

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", (*_FACTORS, *self.main.parts))

    def pack(self, weight: WithFactors) -> dict[str, Tensor]:
        return {"low_out": weight.out_OR, "low_in": weight.in_RI, **self.main.pack(weight.main)}

    def load(self, tensors: Mapping[str, Tensor]) -> LowRankWeight:
        main = self.main.load(tensors)
        (O, I), rank = main.shape, _rank(tensors)
        check_parts(
            tensors,
            {
                "low_out": lambda t: t.shape == (O, rank) and t.dtype in HALF_DTYPES,
                "low_in": lambda t: t.shape == (rank, I) and t.dtype == tensors["low_out"].dtype,
            },
        )
        check_finite(tensors, *_FACTORS)
        return LowRankWeight(main, *(tensors[part].clone() for part in _FACTORS))

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.load(tensors).dense()  # in one product, as whoever makes it dense later has it

    def describe(self, tensors: Mapping[str, Tensor]) -> Stored:
        """What is kept is told of the other layout: with the product no weight is zero."""
        finite = all(all_finite(W_RI) for _, W_RI in self.load(tensors).dense_rows())
        return replace(self.main.describe(tensors), layout=self.name, finite=finite)

    def read(self, tensors: Mapping[str, Tensor]) -> NoReturn:
        raise ValueError("it has a part of low rank besides its codes, which only layout 'low-rank' stores")

    def store(self, weight: LowRankWeight) -> dict[str, Tensor]:
        return {"low_out": weight.out_OR, "low_in": weight.in_RI, **self.main.store(weight.main)}

    def to_config(self) -> dict[str, Any]:
        return {"layout": self.name, "main": self.main.to_config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LowRank:
        main = config.get("main")
        main = main if isinstance(main, Mapping) else {}
        name = main.get("layout")
        if not isinstance(name, str) or name not in LAYOUTS or name == cls.name:
            raise ValueError(f"the part of low rank is said to be beside layout {name!r}")
        return cls(LAYOUTS[name].from_config(main))


def _rank(tensors: Mapping[str, Tensor]) -> int:
    """R. Raises ValueError where a factor is missing, or is no matrix."""
    check_parts(tensors, {part: lambda t: t.ndim == 2 and t.numel() > 0 for part in _FACTORS})
    return tensors["low_in"].shape[0]
