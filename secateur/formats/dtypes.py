"""The dtype that a config says its model has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

#: Where configs say the dtype of a model: as transformers 5 does, and as those before it did.
DTYPE_KEYS = ("dtype", "torch_dtype")
_FLOATS = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}


def config_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a `config.json` says its model has, at the top or for the text part; None where it says no usable one."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in DTYPE_KEYS:
            found = _FLOATS.get(str(part.get(key)))
            if found is not None:
                return found
    return None
