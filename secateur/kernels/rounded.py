"""Products of float32 tensors whose factors are rounded to bfloat16, with sums in float32: half the time, or less, where the
processor has instructions for that.

T: tokens, I: input features, O: output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.core.stats import add_products
from secateur.kernels.cpu.cpu_backend import missing

# Features that the kernel for Gram matrices takes together.
_GROUP = 16


def _instructions() -> str:
    """What the compiled kernels multiply bfloat16 by: `AMX`, `AVX-512 BF16`, or `torch` where they do not."""
    return "torch" if missing() is not None else str(torch.ops.secateur.products())


@contextmanager
def rounded_linears() -> Iterator[None]:
    """Within the context the factors of linears of float32 on the CPU are rounded, where that is faster, and maybe others."""
    backends: Any = torch.backends.mkldnn  # of whose attributes torch says no types
    precision = backends.matmul
    before = precision.fp32_precision
    # Told to, torch does it itself where there are tiles, and only there.
    with _Linears() if _instructions() == "AVX-512 BF16" else nullcontext():
        try:
            precision.fp32_precision = "bf16"
            yield
        finally:
            precision.fp32_precision = before


class _Linears(TorchFunctionMode):
    """Within the context linears are computed by the compiled kernels."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (_linear if func is nn.functional.linear else func)(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.is_grad_enabled() or not (_fits(input) and _fits(weight)):
        return nn.functional.linear(input, weight, bias)
    x_TI = input.reshape(input.shape[:-1].numel(), input.shape[-1])
    y_TO: Tensor = torch.ops.secateur.rounded_linear(x_TI, weight.contiguous(), bias)
    return y_TO.view(*input.shape[:-1], len(weight))


def products_of_rounded() -> Callable[[Tensor, Tensor], None]:
    """What adds Σxᵀx of inputs to a Gram matrix, as `InputStats.add` takes it: of rounded inputs, where that is faster."""
    return add_products if _instructions() == "torch" else _add_rounded


def _add_rounded(upper_II: Tensor, x_TI: Tensor) -> None:
    if x_TI.shape[1] % _GROUP == 0 and _fits(upper_II) and _fits(x_TI):
        torch.ops.secateur.add_gram(upper_II, x_TI)
    else:
        add_products(upper_II, x_TI)


def _fits(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype is torch.float32
