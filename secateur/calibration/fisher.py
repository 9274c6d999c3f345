"""How much each weight matters to the loss: the diagonal of the empirical Fisher information.

N: windows, S: tokens of one window, P: predictions of one window, S − 1, V: vocabulary, O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.calibration.tokens import is_one_of
from secateur.errors import SecateurError, UsageError

_NOT_SCORED = -100  # no token


def fisher(
    model: Any,
    ids_NS: Tensor,
    wanted: Iterable[str],
    progress: Callable[[int, int], None] | None = None,
    bos: Sequence[int] = (),
) -> dict[str, Tensor]:
    """The mean over windows of the squared gradient of a window's loss, for every weight of some linears.

    The loss is the mean negative log-likelihood of the next token. Each window is a forward and a backward pass, with one
    gradient at a time in memory. The model is put into evaluation mode; which parameters require a gradient stays as it was.

    Args:
        model: a causal language model of transformers, on any device.
        ids_NS: the windows, of at least 2 tokens each.
        wanted: names of linears in the model.
        progress: called with (windows done, windows in total) after each window.
        bos: tokens that texts begin with: no text leads up to them, and they are not predicted.

    Returns:
        fisher_OI of each linear by name: float32, on the CPU.

    Raises:
        UsageError: the windows hold no prediction.
        SecateurError: a gradient is not finite.
    """
    N, S = ids_NS.shape
    if N < 1 or S < 2:
        raise UsageError(f"{N} windows of {S} tokens hold no prediction: `samples` starts at 1 and `seq_len` at 2")
    linears = {name: model.get_submodule(name) for name in wanted}
    sums = {name: torch.zeros(linear.weight.shape, device=linear.weight.device) for name, linear in linears.items()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    handles = []
    try:
        for name, linear in linears.items():
            linear.weight.requires_grad_(True).grad = None
            handles.append(linear.weight.register_post_accumulate_grad_hook(_adder(name, sums[name])))
        for n, ids_S in enumerate(ids_NS.to(model.device)):
            target_P = ids_S[1:].masked_fill(is_one_of(ids_S[1:], bos), _NOT_SCORED)
            with torch.enable_grad():
                logits_PV = model(input_ids=ids_S[None], use_cache=False).logits[0, :-1]
                nn.functional.cross_entropy(logits_PV.float(), target_P, ignore_index=_NOT_SCORED).backward()
            if progress is not None:
                progress(n + 1, N)
    finally:
        for handle in handles:
            handle.remove()
        for parameter, before in required.items():
            parameter.requires_grad_(before)
    return {name: _as_rows(linears[name], sums.pop(name).div_(N)).cpu() for name in linears}


def _adder(name: str, sum_OI: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds the square of a weight's gradient to a sum, and lets the gradient go."""

    def add(weight: Tensor) -> None:
        assert weight.grad is not None
        gradient, weight.grad = weight.grad.float(), None
        sum_OI.addcmul_(gradient, gradient)
        if not torch.isfinite(sum_OI).all():
            raise SecateurError(
                f"the gradient of {name} is not finite: the model overflows on the calibration text, "
                "or its weights are damaged"
            )

    return add


def _as_rows(linear: nn.Module, x: Tensor) -> Tensor:
    """`[O, I]`; a Conv1D keeps its weight the other way round."""
    return x.T.contiguous() if isinstance(linear, Conv1D) else x
