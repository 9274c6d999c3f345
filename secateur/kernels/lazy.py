"""A tensor that stands for a dense weight which is kept packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from secateur.errors import UsageError

# What says nothing about the values, and so is answered without them.
_PROPERTIES = (
    *(
        "shape",
        "dtype",
        "device",
        "layout",
        "ndim",
        "nbytes",
        "itemsize",
        "requires_grad",
        "is_leaf",
        "grad",
        "is_meta",
    ),
    *("is_cpu", "is_cuda", "is_sparse", "is_quantized"),
)
_OUTSIDE = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex),
}
_SETS_GRADIENTS: Any = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_NOT_IN_PLACE = ("__index__", "__int__", "__invert__")


class LazyWeight(Tensor):
    """What `linear.weight` is where the weight is packed: shape, dtype and device cost nothing, any other use unpacks it.

    It cannot be written to. What would be written, adapters that are merged for example, would be lost with the unpacked copy.
    """

    _unpack: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls: type[LazyWeight],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        unpack: Callable[[], Tensor],
    ) -> LazyWeight:
        weight: LazyWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight._unpack = unpack
        return weight

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyWeight({tuple(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._unpack().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self._unpack()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OUTSIDE:
            return super().__torch_function__(func, types, args, kwargs)
        if func in (Tensor.data.__get__, Tensor.detach):  # type: ignore[attr-defined]
            return args[0]
        target = next(iter((*args, *kwargs.values())), None)
        if func in _SETS_GRADIENTS and False in (*args[1:], *kwargs.values()):
            return target  # it has none
        if (isinstance(target, cls) and _writes(func)) or isinstance(kwargs.get("out"), cls):
            raise UsageError(
                "a packed weight cannot be written to, and no adapter merged into it: call dequantize() of the model first"
            )
        args, kwargs = tree_map_only(cls, lambda weight: weight._unpack(), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(cls, lambda weight: weight._unpack(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _writes(func: Any) -> bool:
    """Whether a function of tensors changes its first argument."""
    name: str = func.__name__
    if name.startswith("__") and name.endswith("__"):
        return name in ("__set__", "__setitem__") or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    return name.endswith("_")
