"""What a model computes and no file holds: rotary frequencies, say."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def compute_buffers(model: Any) -> None:
    """Compute the buffers of a model anew, as `from_pretrained` does, in float32.

    While a model is made, the dtype of its weights is torch's default, in which positions above a few hundred and their sines
    are rounded. Parameters, which have no memory, are passed over: drawing nothing takes torch a millisecond for each. So are
    modules without buffers in them, of which there are hundreds.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    around = {""}
    for name, _ in model.named_buffers():
        while name := name.rpartition(".")[0]:
            around.add(name)
    for name, module in model.named_modules():
        module._is_hf_initialized = name not in around
    with torch.no_grad():
        model.initialize_weights()


def buffers_from_nothing(model: Any) -> bool:
    """Compute the buffers of a model on the meta device; whether all could be, which saves making the model once more.

    That of a rotary embedding can be, as transformers does where files lack it; what a class computes only as it is made
    cannot.
    """
    for module in model.modules():
        if any(isinstance(value, Tensor) and value.is_meta for value in vars(module).values()):
            return False
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if not buffer.is_floating_point() or name not in module._non_persistent_buffers_set:
                return False
            module._buffers[name] = torch.full_like(buffer, math.nan, device="cpu")
    compute_buffers(model)
    return not any(buffer.isnan().any() for buffer in model.buffers())
