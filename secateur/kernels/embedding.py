"""The module that stands in a model where a table of embeddings stays packed.

V: vocabulary, I: features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.kernels.lazy import LazyWeight
from secateur.kernels.module import PackedLinear


class PackedEmbedding(nn.Embedding):
    """Rows of a packed weight `[V, I]`, of which those that are asked for are expanded, and no others.

    A class made of `nn.Embedding`, which may scale its rows, goes on to do so: see `pack_embedding`.

    Attributes:
        linear: has the weight. It is the head's module where the head reads the same weight, and else no part of the model.
        rows_dtype: of what comes out.
    """

    #: What it stands for.
    original: ClassVar[type[nn.Embedding]] = nn.Embedding
    linear: PackedLinear
    rows_dtype: torch.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear.rows(ids, self.rows_dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight, unpacked at each use: see `PackedLinear.weight`."""
        shape, ready = (self.num_embeddings, self.embedding_dim), self.linear.prepared
        if ready is None:
            W = torch.empty(shape, dtype=self.rows_dtype, device="meta")
        else:
            W = LazyWeight(shape, self.rows_dtype, ready.device, lambda: self.linear.dense().to(self.rows_dtype))
        W._is_hf_initialized = True  # type: ignore[attr-defined]
        return W

    def unpack(self, W_VI: Tensor) -> None:
        """Become what it stands for again, with such a weight."""
        del self.linear, self.rows_dtype
        self.__class__ = self.original  # type: ignore[assignment]
        self.register_parameter("weight", nn.Parameter(W_VI, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.linear._apply(fn)
        self.rows_dtype = fn(torch.empty(0, dtype=self.rows_dtype)).dtype
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes that are made here cannot be found by their names.
        return _restored, (self.original, self.__dict__)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, packed: {self.linear.extra_repr()}"


def pack_embedding(module: nn.Embedding, linear: PackedLinear, dtype: torch.dtype) -> None:
    """Let a table of embeddings, which may be on the meta device, give the rows of a packed weight, in a dtype.

    It stays the same object, with all that is hooked to it, and is of a class of its own from here on.
    """
    module._parameters.pop("weight")
    module.__class__ = _packed_class(type(module))
    # Not as a part of it, whose names would stand in the model's.
    vars(module).update(linear=linear, rows_dtype=dtype)


_PACKED: dict[type[nn.Embedding], type[PackedEmbedding]] = {nn.Embedding: PackedEmbedding}


def _packed_class(original: type[nn.Embedding]) -> type[PackedEmbedding]:
    """A class whose `super().forward(ids)`, where `original` calls it, are the packed rows."""
    if original not in _PACKED:
        _PACKED[original] = type(f"Packed{original.__name__}", (original, PackedEmbedding), {"original": original})
    return _PACKED[original]


def _restored(original: type[nn.Embedding], state: dict[str, Any]) -> PackedEmbedding:
    cls = _packed_class(original)
    module = cls.__new__(cls)
    module.__setstate__(state)
    return module
