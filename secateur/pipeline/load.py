"""Loading a model whole, to run it: `secateur.load`, and the same for a model that is open already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from secateur.errors import CheckpointError, SecateurError, UsageError, one_line
from secateur.formats.hf import QUANT_METHOD
from secateur.formats.reader import read_json
from secateur.pipeline.source import Source, open_source
from secateur.pipeline.structure import build_skeleton
from secateur.pipeline.weights import ModelWeights, materialise

BACKENDS = ("dense",)


def load(
    model: str | Path,
    backend: str = "dense",
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """Load a model that secateur can read, as a transformers model ready to run.

    Args:
        model: a folder (dense, compressed by secateur, or with an old sparse layout of compressed-tensors), a hub id, a
            `.gguf` file, or `demo`.
        backend: `dense` unpacks the weights while loading.
        dtype: of the loaded weights; None keeps that of the files.
        device: where they go.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        SecateurError: there is no such model or backend, or the files are damaged.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r} is not known: it can be {', '.join(BACKENDS)}")
    model = str(model)
    if _is_packed(Path(model)):
        return _load_packed(model, dtype, torch.device(device), trust_remote_code)
    source = open_source(model, trust_remote_code)
    return load_source(source, dtype or source.dtype, torch.device(device))


def _is_packed(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    quantization = read_json(folder / "config.json").get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def _load_packed(folder: str, dtype: torch.dtype | None, device: torch.device, trust_remote_code: bool) -> Any:
    """By transformers, so that the model knows how to save itself packed."""
    open_source(folder, trust_remote_code)  # finds what is wrong with the files and says it in one line
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", device_map={"": device}, trust_remote_code=trust_remote_code
        )
    except SecateurError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be loaded: {one_line(error)}") from error
    return model


def load_source(source: Source, dtype: torch.dtype, device: torch.device) -> Any:
    """The whole model of an open source, its floating weights as `dtype`.

    Raises:
        CheckpointError: a tensor is missing, has another shape than the model's, or is not finite.
    """
    model: Any = build_skeleton(source, dtype)
    weights = ModelWeights(source, model)
    materialise(model, "", list(model.state_dict()), weights, dtype, device)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise CheckpointError(f"{source.name} lacks the tensor {left[0]}")
    model.to(device)  # buffers that are computed, not stored
    if source.folder is not None and (source.folder / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(source.folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{source.folder / 'generation_config.json'}: {one_line(error)}") from error
    return model
