"""The backend `cpu`: compiled kernels that compute on packed weights as they lie in memory.

O: output features, T: tokens.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.kernels.backends import OPERATORS, backend
from secateur.kernels.packed import Packed, map_tensors
from secateur.kernels.torch_backend import times_rows

# What the library is compiled for: see setup.py.
_OLDEST_TORCH = (2, 10)
_VERSION = torch.__version__


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why the compiled kernels cannot be used; None if they are loaded."""
    if tuple(map(int, _VERSION.split(".")[:2])) < _OLDEST_TORCH:
        return f"its compiled kernels need torch 2.10 or later, and this is {_VERSION}: pip install -U torch"
    found = [file for ending in ("so", "pyd") for file in sorted(Path(__file__).parents[1].glob(f"_cpu.*{ending}"))]
    if not found:
        how = "install a wheel, or build one with a C++ compiler, by pip install --no-build-isolation"
        return f"its compiled kernels are not installed: {how}"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"its compiled kernels cannot be loaded ({str(error).splitlines()[0]}): reinstall secateur"
    _register_fakes()
    return None


def _register_fakes() -> None:
    """What the operators return, for `torch.compile` and `torch.export`."""

    def fake_sparse(x: Tensor, *parts: Tensor | None) -> Tensor:
        start = parts[2]
        assert start is not None
        return fake(x, *parts, outputs=start.shape[0] - 1)

    def fake_coded(x: Tensor, bits: int, codes: Tensor, start: Tensor, *parts: Any) -> Tensor:
        return fake(x, codes, start, *parts, outputs=start.shape[0] - 1)

    def fake_trellis(x: Tensor, *operands: Any) -> Tensor:
        return fake(x, *operands, outputs=operands[6].shape[0])

    def fake_columns(x: Tensor, outputs: int, *operands: Any) -> Tensor:
        return fake(x, *operands, outputs=outputs)

    def fake_ternary(x: Tensor, *operands: Any) -> Tensor:
        return fake(x, *operands, outputs=operands[3].shape[0])

    def fake_decode(features: int, codes: Tensor, offset: Tensor, low: Tensor, *rest: Tensor) -> Tensor:
        return rest[-1].new_empty(low.shape[0], features)

    def fake(x: Tensor, *parts: Any, outputs: Any) -> Tensor:
        # One real tensor among fake ones would otherwise be given memory that nobody fills.
        for part in parts:
            torch._check(
                not isinstance(part, Tensor) or part.device == x.device, lambda: "secateur: parts on other devices"
            )
        return x.new_empty(x.shape[0], outputs)

    # For tensors without memory, which is what fake ones are in here.
    OPERATORS.impl("sparse_linear", fake_sparse, "Meta")
    OPERATORS.impl("coded_linear", fake_coded, "Meta")
    OPERATORS.impl("trellis_linear", fake_trellis, "Meta")
    OPERATORS.impl("columns_linear", fake_columns, "Meta")
    OPERATORS.impl("ternary_linear", fake_ternary, "Meta")
    OPERATORS.impl("ternary_decode", fake_decode, "Meta")


@backend
class Cpu:
    """Up to eight tokens take one pass over the packed weight; for more, tiles of rows are unpacked, and torch multiplies."""

    name: ClassVar[str] = "cpu"
    first_on: ClassVar[dict[str, int]] = {"cpu": 1}

    def why_not(self, weight: Packed, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it computes on the CPU, not on {device.type}: use triton, cuda-2:4 or dense"
        if not weight.kernels:
            return "it has no kernel for this layout, which backends 'dense' and 'torch' take"
        problem = missing()
        return None if problem is None else f"{problem}; until then use dense"

    def prepare(self, weight: Packed, device: torch.device, dtype: torch.dtype) -> Packed:
        return map_tensors(weight, lambda tensor: tensor.to(device).contiguous())

    def linear(self, weight: Any, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        found: Tensor = weight.compiled(x_TI, bias_O)
        return found

    def linear_kept(self, weight: Any, x_TI: Tensor, kept_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        if weight.kernels != "columns":
            return self.linear(weight, x_TI.masked_fill(~kept_TI, 0), bias_O)
        found: Tensor = torch.ops.secateur.columns_linear(x_TI, *weight.operands(), bias_O, kept_TI)
        return found

    def gradient(self, weight: Any, grad_TO: Tensor) -> Tensor:
        return times_rows(grad_TO, weight.shape[1], weight.dense_rows())

    def packed(self, weight: Any) -> Packed:
        found: Packed = weight
        return found
