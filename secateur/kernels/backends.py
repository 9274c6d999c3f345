"""The door to all backends: `prepare` a packed weight for one, and `linear` computes with it.

A backend is one file that registers itself; `auto` takes the best for a device that can be used.

O: output features, I: input features, T: tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from secateur.errors import UsageError
from secateur.kernels.packed import FLOAT_DTYPES, Packed

AUTO = "auto"
#: Entry points of this group are modules of other packages, which register backends as ours do.
GROUP = "secateur.backends"
#: With more tokens than these there is hardly an input that none of them keeps.
KEPT_TOKENS = 4


class Backend(Protocol):
    """A way to compute with packed weights.

    It may have a method `linear_kept(weight, x_TI, kept_TI, bias_O)`, too: as `linear` for up to `KEPT_TOKENS` tokens, but that
    what the mask does not keep counts as zero, whatever it is.

    Attributes:
        name: what the user calls it.
        first_on: types of devices where `auto` tries it, each with a rank: the highest goes first, and last of all weights are
            made dense.
    """

    name: ClassVar[str]
    first_on: ClassVar[dict[str, int]]

    def why_not(self, weight: Packed, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot compute with this weight on this device with inputs of this dtype, in half a sentence that names what
        can; None if it can."""
        ...

    def prepare(self, weight: Packed, device: torch.device, dtype: torch.dtype) -> Any:
        """The weight in the form that `linear` computes on: the weight itself, moved, or something made of it."""
        ...

    def linear(self, weight: Any, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """x W^T + bias, `[T, O]` in the dtype of x, for a contiguous x of the device and of a dtype that were prepared for."""
        ...

    def gradient(self, weight: Any, grad_TO: Tensor) -> Tensor:
        """The gradient `[T, I]` with respect to x, in the dtype of that with respect to the output: grad W."""
        ...

    def packed(self, weight: Any) -> Packed | None:
        """The weight that `prepare` was given, on the device and, where `prepare` changed it, in the dtype that it was prepared
        for; None where that is lost."""
        ...


BACKENDS: dict[str, Backend] = {}


def backend(cls: type[Backend]) -> type[Backend]:
    """Register a backend under its name."""
    BACKENDS[cls.name] = cls()
    return cls


# Those that are alive, by their numbers: what `torch.compile` is not to look into is told a weight by a number.
_PREPARED: WeakValueDictionary[int, Prepared] = WeakValueDictionary()
_numbers = count()


@dataclass(frozen=True, eq=False)
class Prepared:
    """A weight that a backend is ready to compute with. It is never changed, so that copies of a model share it.

    Attributes:
        backend: that was chosen.
        weight: what its `prepare` made.
        shape: (O, I).
        device: where it lies.
        number: of this one, in this process.
    """

    backend: Backend
    weight: Any
    shape: tuple[int, int]
    device: torch.device
    number: int = field(default_factory=_numbers.__next__, init=False, repr=False)

    def __post_init__(self) -> None:
        _PREPARED[self.number] = self

    def __deepcopy__(self, memo: Any) -> Prepared:
        return self


def check_backend(name: str) -> None:
    """Raise UsageError when there is no backend of that name."""
    if name not in (AUTO, *BACKENDS):
        raise UsageError(f"backend {name!r} is not known: it can be {', '.join((AUTO, *sorted(BACKENDS)))}")


def choose(weight: Packed, name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of that name, or for `auto` the best that can be used.

    Raises:
        UsageError: there is none of that name, or it cannot be used with this weight, device and dtype.
    """
    check_backend(name)
    if dtype not in FLOAT_DTYPES:
        raise UsageError(f"no backend computes in {dtype}: it can be float32, bfloat16 or float16")
    if name == AUTO:
        ranked = [b for b in BACKENDS.values() if device.type in b.first_on]
        ranked.sort(key=lambda b: -b.first_on[device.type])
        fits = next((b for b in ranked if b.why_not(weight.bare, device, dtype) is None), BACKENDS["dense"])
        found: Backend = weight.beside(fits)
        return found
    problem = why_not(name, weight, device, dtype)
    if problem is not None:
        raise UsageError(f"backend {name!r} cannot be used: {problem}")
    found = weight.beside(BACKENDS[name])
    return found


def why_not(name: str, weight: Packed, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend of that name cannot compute with a weight: see `Backend.why_not`."""
    return BACKENDS[name].why_not(weight.bare, device, dtype)


def prepare(
    weight: Packed,
    backend: str = AUTO,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Prepared:
    """Make a packed weight ready.

    Args:
        weight: as `formats` reads it, checked.
        backend: `auto`, or the name of one.
        device: where to compute.
        dtype: of the inputs.

    Raises:
        UsageError: see `choose`.
    """
    device = torch.device(device)
    chosen = choose(weight, backend, device, dtype)
    device = torch.empty(0, device=device).device  # with its number, as tensors have it
    return Prepared(chosen, chosen.prepare(weight, device, dtype), weight.shape, device)


def _input_gradient(grad_TO: Tensor, number: int, I: int) -> Tensor:
    """grad W, for the weight of that number: unpacked in pieces, which is nothing that a compiler could trace."""
    weight = _PREPARED[number]
    return weight.backend.gradient(weight.weight, grad_TO)


def _empty_gradient(grad_TO: Tensor, number: int, I: int) -> Tensor:
    return grad_TO.new_empty(grad_TO.shape[0], I)


# Not `torch.library.custom_op`, which looks for its caller in all the modules that there are.
OPERATORS = torch.library.Library("secateur", "FRAGMENT")
OPERATORS.define("input_gradient(Tensor grad, int number, int features) -> Tensor")
OPERATORS.impl("input_gradient", _input_gradient, "CompositeExplicitAutograd")
OPERATORS.impl("input_gradient", _empty_gradient, "Meta")


class _Linear(torch.autograd.Function):
    """`Backend.linear` with gradients with respect to inputs and bias. A packed weight has none."""

    @staticmethod
    def forward(ctx: Any, weight: Prepared, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.weight = weight
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        return weight.backend.linear(weight.weight, x_TI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        grad_TI = grad_O = None
        if ctx.needs_input_grad[1]:
            grad_TI = torch.ops.secateur.input_gradient(grad_TO, ctx.weight.number, ctx.weight.shape[1])
        if ctx.needs_input_grad[2]:
            grad_O = grad_TO.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return None, grad_TI, grad_O


def linear(weight: Prepared, x: Tensor, bias_O: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
    """x W^T + bias, differentiable once with respect to x and bias.

    Args:
        weight: `[O, I]`, made ready by `prepare`.
        x: `[…, I]`, of any strides, float32, bfloat16 or float16.
        bias_O: or None.
        kept: bool, of the shape of x: what it does not keep counts as zero, whatever it is. For up to `KEPT_TOKENS` tokens, and
            without gradients, a backend that can reads no weight that belongs to no kept input.

    Returns:
        `[…, O]` in the dtype of x.

    Raises:
        UsageError: x has another last dimension, is on another device, or has a dtype that no backend computes in; or the mask
            is not of its shape.
    """
    O, I = weight.shape
    if x.shape[-1] != I:
        raise UsageError(f"the input has {x.shape[-1]} features, but the weight takes {I}")
    if x.device != weight.device:
        raise UsageError(f"the input is on {x.device}, but the weight on {weight.device}: move one of them")
    if x.dtype not in FLOAT_DTYPES:
        raise UsageError(f"the input is {x.dtype}: packed weights take float32, bfloat16 or float16")
    gradients = torch.is_grad_enabled() and (x.requires_grad or (bias_O is not None and bias_O.requires_grad))
    if kept is not None:
        if kept.dtype != torch.bool or kept.shape != x.shape:
            raise UsageError(
                f"the mask of kept inputs is {kept.dtype} {list(kept.shape)}, not torch.bool {list(x.shape)}"
            )
        some = getattr(weight.backend, "linear_kept", None)
        if some is not None and not gradients and x.numel() <= KEPT_TOKENS * I:
            found: Tensor = some(weight.weight, x.reshape(-1, I), kept.reshape(-1, I), bias_O)
            return found.view(*x.shape[:-1], O)
        x = x.masked_fill(~kept, 0)
    x_TI = x.reshape(-1, I)
    if gradients:
        return _Linear.apply(weight, x_TI, bias_O).view(*x.shape[:-1], O)
    return weight.backend.linear(weight.weight, x_TI, bias_O).view(*x.shape[:-1], O)
