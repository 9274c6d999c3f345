"""The module that stands in a model where a linear's weight stays packed.

O: output features, I: input features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.kernels.backends import Prepared, linear, prepare
from secateur.kernels.chosen_rows import chosen_rows
from secateur.kernels.lazy import LazyWeight
from secateur.kernels.packed import Packed, map_tensors, nbytes

Store = Callable[[Packed], dict[str, Tensor]]


class PackedLinear(nn.Module):
    """x W^T + bias with a packed W `[O, I]`; see `formats.packed_modules` for the two classes that stand in models.

    The weight is no parameter: it does not train, is not in the state dict, and keeps its dtype whatever the model is cast to.
    It follows the model from device to device where its backend can. Gradients go through it to the inputs and to the bias.

    Args:
        weight: packed, in the CPU's memory.
        bias_O: a parameter (which may be on the meta device still), or None.
        backend: as `prepare` takes it.
        dtype: of the inputs.
        store: makes the tensors that the weight was stored as of the packed weight.
    """

    #: Whether it stands for a module that keeps its weight as `[I, O]`.
    transposed: ClassVar[bool]

    def __init__(
        self, weight: Packed, bias_O: nn.Parameter | None, backend: str, dtype: torch.dtype, store: Store | None = None
    ) -> None:
        nn.Module.__init__(self)  # and not that of what it stands for, which would make a dense weight
        self.out_features, self.in_features = weight.shape
        self.backend, self.dtype, self.store = backend, dtype, store
        self.bias: nn.Parameter | None = bias_O
        #: None until it is placed.
        self.prepared: Prepared | None = None
        self._weight_dtype = weight.dtype
        self._fetch = False
        # What `prepared` is made of; None where that gives it back.
        self._source: Packed | None = weight
        # Reads the weight where it is not in memory, but for what `prepared` is given of it while it computes.
        self._reader: Callable[[], Packed] | None = None

    def place(self, device: torch.device, fetch: bool = False) -> None:
        """Make the weight ready on a device. Raises UsageError when its backend cannot be used there.

        Args:
            device: where.
            fetch: whether inputs that are elsewhere are brought there, and outputs back.
        """
        self._fetch = fetch
        if self.prepared is not None and self.prepared.device == device:
            return
        weight = self.packed()
        if weight.device != device:
            weight = map_tensors(weight, lambda tensor: tensor.to(device))
        self.prepared = prepare(weight, self.backend, device=device, dtype=self.dtype)
        self._source = weight if self.prepared.backend.packed(self.prepared.weight) is None else None
        self._reader = None

    def take(self, weight: Packed, device: torch.device) -> None:
        """Compute on a weight, which is on the device, in the place of the one that it has."""
        self.prepared, self._source, self._reader = None, weight, None
        self.place(device, self._fetch)

    def let_go(self, weight: Any, reader: Callable[[], Packed]) -> None:
        """Keep of the weight what is given; it is whole again once it is placed anew.

        Args:
            weight: in the form that it has: that of the backend, once it is placed.
            reader: reads the whole.
        """
        if self.prepared is None:
            self._source = weight
        else:
            self.prepared, self._source = replace(self.prepared, weight=weight), None
        self._reader = reader

    @property
    def away(self) -> bool:
        """Whether the weight is not in memory as a whole."""
        return self._reader is not None

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        assert self.prepared is not None
        if self._reader is not None and torch.is_grad_enabled() and x.requires_grad:
            raise UsageError(
                "a weight that is read when it runs is gone when gradients are wanted: load the model whole"
            )
        if not self._fetch or x.device == self.prepared.device:
            return linear(self.prepared, x, self.bias, kept)
        device = self.prepared.device
        bias_O = None if self.bias is None else self.bias.to(device)
        return linear(self.prepared, x.to(device), bias_O, None if kept is None else kept.to(device)).to(x.device)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of the weight of these numbers, `[…, I]` in a dtype."""
        assert self.prepared is not None
        here = ids.to(self.prepared.device) if self._fetch else ids
        found = chosen_rows(self.packed(), here.reshape(-1)).to(dtype).view(*ids.shape, self.in_features)
        return found.to(ids.device) if self._fetch else found

    def packed(self) -> Packed:
        """The weight as it is stored, but in the dtype of the inputs where the backend needs that."""
        if self._reader is not None:
            return self._reader()
        found = self._source
        if found is None and self.prepared is not None:
            found = self.prepared.backend.packed(self.prepared.weight)
        assert found is not None
        return found

    def parts(self) -> dict[str, Tensor]:
        """The tensors that the weight was stored as."""
        assert self.store is not None
        return self.store(map_tensors(self.packed(), lambda tensor: tensor.cpu()))

    def dense(self) -> Tensor:
        """The dense weight `[O, I]`."""
        return self.packed().dense().to(self._weight_dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight as the module that this one stands for keeps it, unpacked at each use.

        Before `place`, a tensor without memory that transformers' initialisation of weights passes over.
        """
        shape = (self.out_features, self.in_features)
        W: Tensor
        if self.prepared is None:
            W = torch.empty(shape[::-1] if self.transposed else shape, device="meta")
        elif self.transposed:
            W = LazyWeight(shape[::-1], self._weight_dtype, self.prepared.device, lambda: self.dense().T)
        else:
            W = LazyWeight(shape, self._weight_dtype, self.prepared.device, self.dense)
        W._is_hf_initialized = True  # type: ignore[attr-defined]
        return W

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes in memory."""
        return nbytes(self.prepared and self.prepared.weight) + nbytes(self._source)

    def __getstate__(self) -> dict[str, Any]:
        # As it is stored: what a backend made of it may not be of use where it is read.
        fresh = {"prepared": None, "_source": self.packed(), "_reader": None, "_ready": self.prepared is not None}
        return {**self.__dict__, **fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        ready = state.pop("_ready")
        super().__setstate__(state)
        if not ready:
            return
        device = self.packed().device
        try:
            self.place(device, self._fetch)
        except UsageError as error:
            warnings.warn(f"{error}; until the model is loaded for another, backend 'torch' stands in", stacklevel=2)
            self.backend = "torch"
            self.place(device, self._fetch)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        twin: PackedLinear = type(self).__new__(type(self))
        memo[id(self)] = twin
        # The packed weight is never changed: copies share it.
        shared = {"prepared": self.prepared, "_source": self._source, "_reader": self._reader}
        twin.__dict__.update({key: shared.get(key) or deepcopy(value, memo) for key, value in self.__dict__.items()})
        return twin

    def _backend_name(self) -> str:
        return self.backend if self.prepared is None else self.prepared.backend.name

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # What a cast or a move does to any tensor tells where it would go; casts leave the weight alone.
        if self.prepared is not None:
            probe = fn(torch.empty(0, device=self.prepared.device))
            if self.away and probe.device.type not in ("meta", self.prepared.device.type):
                raise UsageError(
                    "a weight that is read when it runs stays where it is: load the model anew for the other device"
                )
            if probe.device.type != "meta":
                self.place(probe.device, self._fetch and probe.device == self.prepared.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, backend={self._backend_name()}, {self.nbytes} bytes"
