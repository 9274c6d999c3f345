"""What the files of a model cannot hold, its config cannot ask for: checked before a model of that size is made.

The numbers of a `config.json` decide how many modules transformers makes and how large the buffers are that they compute. A
config that asks for a billion layers is a few bytes long.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import CheckpointError
from secateur.formats.layouts.packed_weight import DecodedWeights

# Numbers that Python counts up to: layers, each of which has tensors, and what transformers makes lists of. Configs of tiny
# models keep defaults that are of no use to them, such as `max_window_layers`.
_LAYERS = re.compile(r".*layers?", re.IGNORECASE)
_SPARE_LAYERS = 128
_BYTES_OF_ENTRY = 64  # which the header of a safetensors file has at least for a tensor
_COUNTS = re.compile(r"num_labels|.*(experts|heads?)", re.IGNORECASE)
_MOST_COUNTED = 2**16
# A mask of one bit a weight that keeps nothing, and codes of one bit, hold eight weights a byte; tied ones are counted twice.
_WEIGHTS_PER_BYTE = 16
_SPARE_WEIGHTS = 2**20
# A model has few buffers that are not stored: rotary frequencies, masks of its positions.
_SPARE_BYTES = 64 * 2**20


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Check a folder's config. Raises CheckpointError when its numbers are beyond what its weight files can be for."""
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    layers = max(_SPARE_LAYERS, stored // _BYTES_OF_ENTRY)
    for key, value in _numbers(config):
        most = layers if _LAYERS.fullmatch(key) else _MOST_COUNTED if _COUNTS.fullmatch(key) else None
        if most is not None and value > most:
            raise CheckpointError(
                f"{folder / 'config.json'} says {key} {value}, which is too many for its weight files"
            )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """The numbers at any depth of a config, by the key that they stand under."""
    left = [(key, value)]
    while left:
        key, value = left.pop()
        if isinstance(value, Mapping):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, each) for each in value]
        elif isinstance(value, int | float):
            yield key, value


@contextmanager
def few_parameters(name: str, weights: DecodedWeights) -> Iterator[None]:
    """While it is open, no model of more parameters than twice the stored tensors is made.

    Raises:
        CheckpointError: it would have more.
    """
    left = 2 * len(weights.stored) + _SPARE_LAYERS
    register = nn.Module.register_parameter

    def count(module: nn.Module, parameter_name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= parameter is not None
        if left < 0:
            raise CheckpointError(f"{name}: config.json describes a model of many more tensors than its files have")
        register(module, parameter_name, parameter)

    nn.Module.register_parameter = count  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def check_sizes(name: str, model: nn.Module, files: tuple[Path, ...]) -> None:
    """Check a model on the meta device. Raises CheckpointError when it is larger than files of that size can hold."""
    stored = sum(file.stat().st_size for file in files)
    weights = sum(parameter.numel() for parameter in model.parameters())
    if weights > _WEIGHTS_PER_BYTE * stored + _SPARE_WEIGHTS:
        raise CheckpointError(
            f"{name}: config.json describes a model of {weights} weights, which files of {stored} bytes cannot hold"
        )
    computed = sum(buffer.nbytes for buffer in model.buffers())
    if computed > stored + _SPARE_BYTES:
        raise CheckpointError(
            f"{name}: config.json describes a model that computes {computed} bytes of buffers beside files of {stored}"
        )
