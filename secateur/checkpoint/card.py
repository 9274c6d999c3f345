"""The model card, `README.md`: how to open the folder that it lies in, before whatever the card of its source says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.foreign import FOREIGN
from secateur.formats.stored_weights import QUANT_METHOD

CARD_NAME = "README.md"
# Ends what is ours, so that it is replaced when the folder is made into another.
_END = "<!-- secateur ends here; what follows came with the model -->"
# What the hub reads, which has to stay first.
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n.*?^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)

_OPEN = """```python
{imports}
model = AutoModelForCausalLM.from_pretrained("FOLDER"{options})
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{options})
```
"""
_PLAIN_IMPORT = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
_OUR_IMPORT = f"import secateur  # transformers cannot read this folder without it\n{_PLAIN_IMPORT}"
_PACKED = """
FOLDER is this folder, or its name on the hub. `secateur generate FOLDER "Once upon a time"` does it on the command line.

Tools that you cannot add the import to are started by secateur:
`secateur run -- lm_eval --model hf --model_args pretrained=FOLDER …`.
Those that do not load models through transformers, such as vLLM and llama.cpp, take what
`secateur export FOLDER OUT --to dense` writes.
"""
_DENSE = """
FOLDER is this folder, or its name on the hub. The weights are dense: every tool that reads Hugging Face folders opens it.
"""


def write_card(folder: Path, name: str, config: Mapping[str, Any]) -> None:
    """Put our card before the one that is in a folder, if there is one.

    Args:
        folder: a checkpoint.
        name: of the model that it was made of.
        config: its `config.json`.
    """
    path = folder / CARD_NAME
    # Bytes that are not UTF-8 come through as they are.
    before = path.read_bytes().decode("utf-8", "surrogateescape") if path.is_file() else ""
    front = _FRONT_MATTER.match(before)
    matter = front[0] if front is not None else ""
    rest = before[len(matter) :]
    if _END in rest:
        rest = rest.partition(_END)[2]
    card = "\n".join(filter(None, [matter.rstrip("\r\n"), f"{_card(name, config)}\n{_END}\n"]))
    if rest.strip():
        card += f"\n{rest.lstrip()}"
    path.write_bytes(card.encode("utf-8", "surrogateescape"))


def _card(name: str, config: Mapping[str, Any]) -> str:
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    ours = method == QUANT_METHOD
    options = ", trust_remote_code=True" if config.get("auto_map") else ""
    opening = _OPEN.format(imports=_OUR_IMPORT if ours else _PLAIN_IMPORT, options=options)
    known = FOREIGN.get(method) if isinstance(method, str) else None
    how = _PACKED if ours else (known and known.card) or _DENSE
    made = "What was done to it stands in `secateur.json`; `secateur verify FOLDER` tells whether its files are as they were."
    return f"# {_title(name)}, written by secateur\n\n{opening}{how}\n{made}\n"


def _title(name: str) -> str:
    """The last part of a path or hub id, on one line."""
    path = Path(name)
    return " ".join((path.stem if path.suffix == ".gguf" else path.resolve().name).split()) or "A model"
