"""The module that stands in a model where a linear's weight stays packed.

O: output features, I: input features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.kernels.backends import Prepared, linear, prepare
from secateur.kernels.packed import CodedWeight, Packed, SparseWeight, nbytes
from secateur.kernels.plain import dense_weight


class PackedLinear(nn.Module):
    """x W^T + bias with a packed W `[O, I]`, in place of `nn.Linear` or transformers' `Conv1D`.

    The weight is no parameter: it does not train, is not in the state dict, and keeps its dtype whatever the model is cast to.
    It follows the model from device to device where its backend can.

    Args:
        weight: packed, in the CPU's memory.
        bias_O: a parameter (which may be on the meta device still), or None.
        backend: as `prepare` takes it.
        dtype: of the inputs.
        transposed: whether it stands for a `Conv1D`.
    """

    def __init__(
        self, weight: Packed, bias_O: nn.Parameter | None, backend: str, dtype: torch.dtype, transposed: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.backend, self.dtype, self.transposed = backend, dtype, transposed
        self.bias = bias_O
        self.prepared: Prepared | Packed = weight

    def place(self, device: torch.device) -> None:
        """Make the weight ready on a device. Raises UsageError when its backend cannot, or it cannot be moved any more."""
        weight = self.prepared
        if isinstance(weight, Prepared):
            if weight.device == device:
                return
            weight = weight.weight
            if not isinstance(weight, SparseWeight | CodedWeight):
                raise UsageError(
                    f"a weight that is ready for {self._backend_name()} stays on its device: load the model on {device} instead"
                )
        self.prepared = prepare(weight, self.backend, device=device, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.prepared, Prepared)
        return linear(self.prepared, x, self.bias)

    def dense(self) -> Tensor:
        """The dense weight `[O, I]`. Raises UsageError when its backend keeps it in a form of its own."""
        weight = self.prepared.weight if isinstance(self.prepared, Prepared) else self.prepared
        if not isinstance(weight, SparseWeight | CodedWeight):
            raise UsageError(f"{self._backend_name()} does not give weights back: load with backend dense")
        return dense_weight(weight)

    @property
    def weight(self) -> Tensor:
        """The dense weight as the module that this one stands for keeps it, unpacked anew at each access.

        Before `place`, a tensor without memory that transformers' initialisation of weights passes over.
        """
        if isinstance(self.prepared, Prepared):
            W_OI = self.dense()
        else:
            W_OI = torch.empty(self.out_features, self.in_features, device="meta")
        W = W_OI.T if self.transposed else W_OI
        W._is_hf_initialized = True  # type: ignore[attr-defined]
        return W

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes in memory."""
        return nbytes(self.prepared.weight if isinstance(self.prepared, Prepared) else self.prepared)

    def _backend_name(self) -> str:
        return self.prepared.backend.name if isinstance(self.prepared, Prepared) else self.backend

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # What a cast or a move does to any tensor tells where it would go; casts leave the weight alone.
        if isinstance(self.prepared, Prepared):
            probe = fn(torch.empty(0, device=self.prepared.device))
            if probe.device.type != "meta":
                self.place(probe.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, backend={self._backend_name()}, {self.nbytes} bytes"
