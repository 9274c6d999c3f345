"""What `config.json` says in the words of transformers 5 and in those of releases before it, which other tools are built on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.folder.reader import read_json
from secateur.folder.writer import write_json
from secateur.formats.dtypes import DTYPE_KEYS, config_dtype

#: Names under which transformers 4.51 knows settings of rotary embeddings by the kind of layers that they are for.
_FULL, _SLIDING = "full_attention", "sliding_attention"


def set_dtype(config: dict[str, Any], dtype: torch.dtype | None, known: torch.dtype) -> None:
    """Have a config say of which dtype weights are.

    Args:
        config: to be changed, under the keys and at the levels where it says a dtype; under both keys where it says none.
        dtype: that all weights were written in; None: the one that they had, which is `known`.
        known: what the model is loaded in.
    """
    if dtype is not None:
        _replace_dtype(config, _name(dtype))
    if config_dtype(config) is None:
        config.update(dict.fromkeys(DTYPE_KEYS, _name(dtype or known)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _replace_dtype(config: dict[str, Any], name: str) -> None:
    for key, value in config.items():
        if key in DTYPE_KEYS:
            config[key] = name
        elif isinstance(value, dict) and key.endswith("_config"):
            _replace_dtype(value, name)


def in_all_dialects(config: Any) -> dict[str, Any]:
    """What `config.json` has to say of a configuration of transformers' so that releases 4 and 5 take the same from it."""
    content = config.to_diff_dict()
    content.pop("_name_or_path", None)
    dtypes = dict.fromkeys(DTYPE_KEYS, content["dtype"]) if content.get("dtype") else {}
    others = {**_aliases(config, content), **_layer_types(content), **dtypes}
    return {**others, **content, **_rotary(content.get("rope_parameters"))}


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer that is all in its `tokenizer.json` so that releases 4 and 5 make the same tokens with it.

    The class that both take as that file has it is called otherwise by release 5, which also knows tokens under other keys.
    """
    tokenizer.save_pretrained(folder)
    content = read_json(folder / "tokenizer_config.json")
    for key in ("backend", "is_local", "local_files_only"):  # how it was opened
        content.pop(key, None)
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    write_json(folder / "tokenizer_config.json", {**content, "tokenizer_class": "PreTrainedTokenizerFast"})


def _aliases(config: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their other names: `num_experts` is `num_local_experts` by now, for one family."""
    names = getattr(config, "attribute_map", None) or {}
    return {other: content[name] for other, name in names.items() if name in content}


def _rotary(parameters: Any) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `partial_rotary_factor`, which are parts of `rope_parameters` by now."""
    if not isinstance(parameters, Mapping):
        return {}
    if _FULL in parameters:
        sliding = parameters.get(_SLIDING) or {}
        local = {"rope_local_base_freq": sliding["rope_theta"]} if "rope_theta" in sliding else {}
        return {**_rotary(parameters[_FULL]), **local}
    apart = ("rope_theta", "partial_rotary_factor")
    found = {key: parameters[key] for key in apart if parameters.get(key) is not None}
    if parameters.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in parameters.items() if key not in apart}
    return found


def _layer_types(content: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window_pattern`, where every so many layers attend to all tokens."""
    kinds = content.get("layer_types")
    if not isinstance(kinds, list) or set(kinds) != {_FULL, _SLIDING}:
        return {}
    every = kinds.index(_FULL) + 1
    regular = all((kind == _FULL) == ((i + 1) % every == 0) for i, kind in enumerate(kinds))
    return {"sliding_window_pattern": every} if regular else {}
