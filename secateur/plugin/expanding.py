"""Packed weights made dense while transformers loads them, for what does not compute on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from copy import copy
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from secateur.errors import CheckpointError
from secateur.formats.layouts.layout import part_names

#: Makes the weight of a name in a model of its parts.
Decode = Callable[[Any, str, dict[str, Tensor]], Tensor]


class _Expand(ConversionOps):
    """Turns the parts of one weight into the dense weight."""

    def __init__(self, decode: Decode, errors: list[CheckpointError]) -> None:
        self.decode, self.errors = decode, errors

    def __deepcopy__(self, memo: Any) -> _Expand:
        return self  # transformers copies the operation for every weight; the quantizer must stay the same

    def convert(
        self, input_dict: dict[str, Any], *args: Any, full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors = {
            pattern.rpartition(".")[2]: found[0] if isinstance(found, list) else found
            for pattern, found in input_dict.items()
        }
        try:
            W = self.decode(model, full_layer_name, tensors)
        except CheckpointError as error:
            # transformers would catch it and raise one in its place that does not name the weight.
            self.errors.append(error)
            return {}
        return {full_layer_name: W}


class _ExpandConverter(WeightConverter):
    """transformers makes a deep copy of a converter for every tensor; only what it collects has to be its own."""

    def __deepcopy__(self, memo: Any) -> _ExpandConverter:
        twin = copy(self)
        twin.collected_tensors = defaultdict(list)
        twin.layer_targets = defaultdict(set)
        return twin


def expanding(decode: Decode, errors: list[CheckpointError]) -> WeightConverter:
    """The conversion that makes weights dense; what is wrong with one goes to `errors`."""
    # By keyword: the order of its fields is not the same in all releases.
    parts = [f"weight.{part}" for part in sorted(part_names())]
    return _ExpandConverter(parts, ["weight"], operations=[_Expand(decode, errors)])


def expands(conversion: Any) -> bool:
    """Whether a conversion is one of these."""
    return any(isinstance(op, _Expand) for op in getattr(conversion, "operations", []))
