"""Which backends work on this machine, and why others do not.

O: output features, I: input features, T: tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from secateur.core.quantized import Quantized
from secateur.errors import one_line
from secateur.formats.layouts.choose import layout_for
from secateur.formats.layouts.nm import NMBits
from secateur.formats.layouts.packed_int import Uniform
from secateur.kernels import BACKENDS
from secateur.kernels.packed import Packed

_SHAPE, _GROUP_SIZE = (64, 128), 64


def check_backends() -> dict[str, str]:
    """Of each backend with each kind of weight on each device: `works`, or why it does not."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    weights = _samples()
    return {
        f"{name}, {kind}, {device}": _try(backend, weight, torch.device(device))
        for name, backend in sorted(BACKENDS.items())
        for device in devices
        for kind, weight in weights.items()
    }


def _samples() -> dict[str, Packed]:
    """Small weights: of 4 bits, and of 2:4 in 16 bits."""
    O, I = _SHAPE
    code_OI = (torch.arange(O * I) % 16).view(O, I).to(torch.uint8)
    scale_OG = torch.full((O, I // _GROUP_SIZE), 0.01, dtype=torch.float16)
    coded = Quantized(Uniform(4, _GROUP_SIZE, code_OI, scale_OG, None), _SHAPE, torch.float32, None, None)
    W_OI = ((torch.arange(O * I) % 4 < 2) * 0.01).view(O, I).to(torch.bfloat16)
    layout, sparse = layout_for(coded), NMBits(2, 4)
    return {"4 bits": layout.load(layout.pack(coded)), "2:4": sparse.load(sparse.pack(W_OI))}


def _try(backend: Any, weight: Packed, device: torch.device) -> str:
    """`works`, what the backend says of itself, or the error that a small product ends in."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        problem = backend.why_not(weight, device, dtype)
        if problem is not None:
            return f"no: {problem}"
        x_TI = torch.ones(1, weight.shape[1], device=device, dtype=dtype)
        found_TO = backend.linear(backend.prepare(weight, device, dtype), x_TI, None).float().cpu()
        expected_TO = x_TI.float().cpu() @ weight.dense().float().cpu().T
        right = torch.allclose(found_TO, expected_TO, rtol=0.02, atol=0.02)
        return "works" if right else "BROKEN: it computes wrong values"
    except Exception as error:
        return f"BROKEN: {type(error).__name__}: {one_line(error)}"
