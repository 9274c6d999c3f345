"""Codes of matrices that may lie stacked in one tensor, as those of a layer's experts do: each is decoded alone.

E: experts, O: output features, I: input features.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.formats.dtypes import config_dtype
from secateur.formats.layouts.layout import Decoder, Stored, all_finite, bytes_of

_DTYPE = "dtype"


@dataclass(frozen=True)
class Stacked(Decoder):
    """A decoder that takes the memory of one matrix beside what it returns.

    Attributes:
        made: the dtype of decoded weights, the model's own.
    """

    made: torch.dtype = torch.bfloat16

    rounded: ClassVar[bool] = True

    @abstractmethod
    def shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Of the decoded weight, of two or three dimensions; the dtypes and shapes of all tensors are checked.

        Raises ValueError, saying what is wrong.
        """

    @abstractmethod
    def matrix(self, tensors: Mapping[str, Tensor], expert: int) -> Tensor:
        """One matrix of tensors whose shapes were checked, 0 where there is one, with strides of any kind.

        Raises ValueError, saying what is wrong with its values.
        """

    def unpack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        shape = self.shape(tensors)
        if len(shape) == 2:
            return self.matrix(tensors, 0).contiguous()
        W = torch.empty(shape, dtype=self.made)
        for expert in range(len(W)):
            W[expert] = self.matrix(tensors, expert)
        return W

    def unpack_expert(self, tensors: Mapping[str, Tensor], expert: int) -> Tensor:
        shape = self.shape(tensors)
        if len(shape) != 3 or not 0 <= expert < shape[0]:
            raise ValueError(f"it is {list(shape)}, which has no expert {expert}")
        return self.matrix(tensors, expert)

    def form(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[int, ...], torch.dtype]:
        return self.shape(tensors), self.made

    def describe(self, tensors: Mapping[str, Tensor]) -> Stored:
        shape = self.shape(tensors)
        experts = range(shape[0] if len(shape) == 3 else 1)
        finite = all(all_finite(self.matrix(tensors, expert)) for expert in experts)
        return Stored(self.name, shape, math.prod(shape), 0, bytes_of(tensors), finite)


def with_dtype(section: Mapping[str, Any] | None, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A section, if there is one, that says which dtype weights are decoded to: the model's, bfloat16 where it says none."""
    return None if section is None else {**section, _DTYPE: config_dtype(config) or torch.bfloat16}


def dtype_of(section: Mapping[str, Any]) -> torch.dtype:
    """What `with_dtype` found."""
    dtype: torch.dtype = section[_DTYPE]
    return dtype
