"""A GGUF file as a source: opened by transformers, which knows its families, names and orders of rows.

O: output features, I: input features.
"""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import quantization_config as configs

from secateur.core.quantized import Quantized
from secateur.errors import CheckpointError, one_line
from secateur.folder.gguf_header import matrix_dtype
from secateur.folder.reader import LoadedTensors
from secateur.foreign.gguf_blocks import read_blocks
from secateur.foreign.gguf_file import GGUFFile, check_package
from secateur.foreign.gguf_rows import RowIndex
from secateur.foreign.quick_gguf import read_quickly
from secateur.formats.layouts.block_codes import BlocksLayout
from secateur.formats.layouts.block_types import BLOCK_TYPES
from secateur.formats.layouts.packed_weight import DecodedWeights
from secateur.formats.stored_weights import packed_weights, parse_quantization_config, quantization_config

# What the names of tensors in blocks begin with, and those of tables of tokens.
_CODED = ("blk.", "token_embd.", "output.")


def read_gguf(
    file: Path, dtype: torch.dtype | None, codes: bool
) -> tuple[Any, DecodedWeights, torch.dtype, dict[str, Any] | None]:
    """The config, the weights and their dtype of a GGUF file, and how those are packed that keep their codes.

    Args:
        file: the file.
        dtype: that weights are wanted in; None: the one that they have in the file, bfloat16 for codes.
        codes: whether linears and tables of tokens keep their codes where they are of a type that layout `blocks` holds; else
            all weights are dense.

    Raises:
        UsageError: the package gguf is missing.
        CheckpointError: it is not a GGUF file, is damaged, or transformers does not know its family.
    """
    check_package(f"reading {file.name}")
    # What quantized weights stand for is a model in bfloat16, as such models were trained in.
    stored = matrix_dtype(file) or torch.bfloat16
    try:
        with redirect_stderr(StringIO()), read_quickly():  # a progress bar that has no switch
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=dtype or stored, **_dequantized()
            )
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}") from error
    config = model.config
    config.__dict__.pop("quantization_config", None)
    config.dtype = stored
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    tensors = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
    entries = _keep_codes(model, tensors, GGUFFile(file), dtype or stored) if codes else {}
    if not entries:
        return config, DecodedWeights(LoadedTensors(tensors)), stored, None
    section = quantization_config(entries)
    held = LoadedTensors(tensors)
    return config, DecodedWeights(held, packed_weights(held, parse_quantization_config(section))), stored, section


def _dequantized() -> dict[str, Any]:
    """Options that have transformers make the weights of a GGUF file dense, where its release can keep them packed."""
    config = getattr(configs, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _keep_codes(
    model: nn.Module, tensors: dict[str, Tensor], file: GGUFFile, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """Put the parts of layout `blocks` in the place of dense weights that are rows of coded tensors; returns their entries.

    A weight is what transformers made of the file, to the bit, or stays as it is.
    """
    index = RowIndex()
    coded = [name for name in file if name.startswith(_CODED) and file.type(name) in BLOCK_TYPES]
    for name in coded:
        index.add(name, file.values(name).to(dtype))
    entries: dict[str, dict[str, Any]] = {}
    for module, linear in model.named_modules():
        name = f"{module}.weight"
        if not isinstance(linear, nn.Linear | nn.Embedding) or name not in tensors:
            continue
        found = index.find(tensors[name])
        if found is None or len({owner for owner, _ in found}) > 1:
            continue
        kind = file.type(found[0][0])
        rows_OB = file.rows(found[0][0])[[row for _, row in found]]
        layout = BlocksLayout(kind, dtype)
        O, I = tensors[name].shape
        parts = layout.pack(Quantized(read_blocks(kind, rows_OB), (O, I), dtype))
        del tensors[name]
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
        entries[module] = layout.to_config()
    return entries
