"""The layout `nm`: N values for every M weights, and one bit per weight that says where they belong.

O: output features, I: input features, B: bytes of a row's mask, ⌈I/8⌉, G: groups of M weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from secateur.formats.layouts.layout import Layout, check_parts, layout, read_shape
from secateur.kernels.expand import expand_bitmap
from secateur.kernels.packed import FLOAT_DTYPES, SparseWeight, padded, unpadded


@layout
@dataclass(frozen=True)
class NMBits(Layout):
    """`compressed [O, I·N/M]`, `bitmask uint8 [O, B]` (least significant bit first), `shape int64 [2]`.

    Every group of M bits has exactly N set, so that row r's values start at r·I·N/M. Where fewer than N weights of a group
    are nonzero, the first of its zeros are stored as values.
    """

    n: int
    m: int

    name: ClassVar[str] = "nm"
    rounded: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ("compressed", "bitmask", "shape")

    def __post_init__(self) -> None:
        if not (type(self.n) is type(self.m) is int and 0 < self.n < self.m):
            raise ValueError(f"N:M is {self.n}:{self.m}")

    def pack(self, W_OI: Tensor) -> dict[str, Tensor]:
        O, I = W_OI.shape
        if I % self.m:
            raise ValueError(f"{I} input features do not divide into groups of {self.m}")
        # As bits, which keeps a NaN as it is, and subnormals where the FPU flushes them to zero.
        bits_dtype = {2: torch.int16, 4: torch.int32}[W_OI.element_size()]
        minus_zero = torch.iinfo(bits_dtype).min
        bits_GM = W_OI.view(bits_dtype).reshape(-1, self.m)
        set_GM = bits_GM & ~minus_zero != 0
        count_G = set_GM.sum(1)
        if count_G.max() > self.n:
            row = int(count_G.argmax()) // (I // self.m)
            raise ValueError(f"row {row} has a group of {self.m} with more than {self.n} nonzero weights")
        short_G = count_G < self.n
        if short_G.any():
            fill_SM = ~set_GM[short_G]
            fill_SM &= fill_SM.cumsum(1) <= (self.n - count_G[short_G])[:, None]
            set_GM[short_G] |= fill_SM
        values = bits_GM[set_GM]
        values = values.masked_fill_(values == minus_zero, 0).view(W_OI.dtype).view(O, I // self.m * self.n)
        bitmask_OB = np.packbits(set_GM.view(O, I).cpu().numpy(), axis=1, bitorder="little")
        return {"compressed": values, "bitmask": torch.from_numpy(bitmask_OB), "shape": torch.tensor(W_OI.shape)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        _, I = self._check(tensors)
        return expand_bitmap(tensors["compressed"].reshape(-1), tensors["bitmask"], I)

    def load(self, tensors: Mapping[str, Tensor]) -> SparseWeight:
        O, I = self._check(tensors)
        start_O1 = torch.arange(O + 1) * (I // self.m * self.n)
        values = padded(tensors["compressed"].reshape(-1))
        return SparseWeight((O, I), values, tensors["bitmask"].clone(), start_O1, (self.n, self.m))

    def values(self, weight: SparseWeight) -> list[Tensor]:
        return [unpadded(weight.values_V)]

    def ours(self, tensors: Mapping[str, Tensor]) -> tuple[Layout, dict[str, Tensor]]:
        return self, self.pack(self.unpack(tensors))

    def store(self, weight: SparseWeight) -> dict[str, Tensor]:
        values_OK = unpadded(weight.values_V).view(weight.shape[0], -1)
        return {"compressed": values_OK, "bitmask": weight.bitmask_OB, "shape": torch.tensor(weight.shape)}

    def _check(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(O, I), once the parts are known to fit together."""
        check_parts(
            tensors,
            {
                "compressed": lambda t: t.ndim == 2 and t.dtype in FLOAT_DTYPES,
                "bitmask": lambda t: t.ndim == 2 and t.dtype == torch.uint8,
                "shape": lambda t: t.numel() == 2,
            },
        )
        O, I = read_shape(tensors["shape"])
        if I % self.m:
            raise ValueError(f"its shape [{O}, {I}] does not divide into groups of {self.m}")
        wanted = {"compressed": [O, I // self.m * self.n], "bitmask": [O, (I + 7) // 8]}
        for part, shape in wanted.items():
            if list(tensors[part].shape) != shape:
                raise ValueError(
                    f"its {part} is {list(tensors[part].shape)}, but {self.n}:{self.m} of [{O}, {I}] has {shape}"
                )
        bitmask_OB = tensors["bitmask"]
        if not self._exact(bitmask_OB, O, I):
            raise ValueError(f"its bitmask has a group of {self.m} without exactly {self.n} bits set")
        return O, I

    def _exact(self, bitmask_OB: Tensor, O: int, I: int) -> bool:
        """Whether every group has N bits set."""
        if 8 % self.m == 0:
            # Groups do not straddle bytes: look the few byte values that are allowed up.
            counts = [[(byte >> s & (1 << self.m) - 1).bit_count() for s in range(0, 8, self.m)] for byte in range(256)]
            whole, rest = divmod(I, 8)
            full = torch.tensor([all(c == self.n for c in row) for row in counts], device=bitmask_OB.device)
            last = torch.tensor(
                [all(c == self.n for c in row[: rest // self.m]) and not any(row[rest // self.m :]) for row in counts],
                device=bitmask_OB.device,
            )
            fits = full[bitmask_OB[:, :whole].int()].all()
            return bool(fits) and (rest == 0 or bool(last[bitmask_OB[:, -1].int()].all()))
        bits_OI = np.unpackbits(bitmask_OB.cpu().numpy(), axis=1, count=I, bitorder="little")
        return bool((bits_OI.reshape(-1, self.m).sum(1) == self.n).all())

    def to_config(self) -> dict[str, Any]:
        return {"layout": self.name, "n": self.n, "m": self.m}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NMBits:
        return cls(config.get("n", 0), config.get("m", 0))
