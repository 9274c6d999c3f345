"""The model card, `README.md`: how to open the folder that it lies in and what was done, before whatever the card of its source
says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from secateur.checkpoint.front_matter import FRONT_MATTER, license_in_words, read_matter, renewed, write_matter
from secateur.checkpoint.measured import Figure, model_index, table
from secateur.foreign.format import FOREIGN, Foreign
from secateur.formats.stored_weights import QUANT_METHOD
from secateur.units import words

CARD_NAME = "README.md"
# Ends what is ours, so that it is replaced when the folder is made into another.
_END = "<!-- secateur ends here; what follows came with the model -->"

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


# Where blocks have widths of their own.
_OWN_WIDTHS = """
FOLDER is this folder, or its name on the hub. `secateur generate FOLDER "Once upon a time"` does it on the command line.

Its blocks have widths of their own, which transformers builds with the import alone. vLLM and llama.cpp take what
`secateur export FOLDER OUT --to decilm` writes.
"""
_DECILM = """
It is of DeciLM's form (Nemotron-NAS), a Llama whose blocks differ. vLLM runs it where it is allowed to trust remote code: a few
lines of configuration lie beside the weights. llama.cpp's `convert_hf_to_gguf.py` makes a GGUF file of the folder.
"""


def write_card(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    manifest: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    figures: Sequence[Figure] = (),
) -> None:
    """Put our card before the one that is in a folder, if there is one.

    Args:
        folder: a checkpoint.
        name: of the model that it was made of.
        config: its `config.json`.
        manifest: what is told of how it was made.
        base_model: what that model is called on the hub, if it came from there.
        figures: that were measured of it.
    """
    path = folder / CARD_NAME
    # Bytes that are not UTF-8 come through as they are.
    before = path.read_bytes().decode("utf-8", "surrogateescape") if path.is_file() else ""
    front = FRONT_MATTER.match(before)
    rest = before[front.end() :] if front is not None else before
    if _END in rest:
        rest = rest.partition(_END)[2]
    said = read_matter(front[1]) if front is not None else {}
    index = model_index(_title(name), figures)
    files = sorted(file.name for file in folder.iterdir())
    matter = None
    if said is not None:
        known = _format(config)
        library = QUANT_METHOD if _is_ours(config) else known.library if known is not None else "transformers"
        matter = renewed(said, base_model=base_model, library=library, files=files, results=index)
    # What cannot be read is left to whoever wrote it.
    begin = write_matter(matter) if matter is not None else front[0] if front is not None else ""
    card = _card(name, config, manifest or {}, figures)
    if matter is not None:
        card = f"{card}\n{license_in_words(matter)}\n"
    card = "\n".join(filter(None, [begin.rstrip("\r\n"), f"{card}\n{_END}\n"]))
    if rest.strip():
        card += f"\n{rest.lstrip()}"
    path.write_bytes(card.encode("utf-8", "surrogateescape"))


def _is_ours(config: Mapping[str, Any]) -> bool:
    section = config.get("quantization_config")
    return isinstance(section, Mapping) and section.get("quant_method") == QUANT_METHOD


def _format(config: Mapping[str, Any]) -> type[Foreign] | None:
    """That of others which a folder is in."""
    return next((known for known in FOREIGN.values() if known.section(config) is not None), None)


def _opening(config: Mapping[str, Any]) -> str:
    """How the folder is opened."""
    ours, known = _is_ours(config), _format(config)
    if known is not None and known.opening:
        return known.opening
    if "block_configs" in config:
        return _DECILM
    how = _PACKED if ours else (known and known.card) or _DENSE
    if ours and config["quantization_config"].get("widths"):
        how = _OWN_WIDTHS
    options = ", trust_remote_code=True" if config.get("auto_map") else ""
    return _OPEN.format(imports=_OUR_IMPORT if ours else _PLAIN_IMPORT, options=options) + how


def _card(name: str, config: Mapping[str, Any], manifest: Mapping[str, Any], figures: Sequence[Figure]) -> str:
    made = "All of it stands in `secateur.json`; `secateur verify FOLDER` tells whether its files are as they were."
    done = "\n".join(_done(manifest))
    parts = [f"# {_title(name)}, written by secateur\n\n{_opening(config)}"]
    if done:
        parts.append(f"## What was done\n\n{done}\n")
    parts.append(f"{made}\n")
    if figures:
        parts.append(f"## Measured\n\n{table(figures)}\n")
    return "\n".join(parts)


def _done(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What a manifest tells of how a checkpoint was made, in a few lines."""
    recipe, size = manifest.get("recipe"), manifest.get("weight_bytes")
    sparsity, bits = manifest.get("sparsity"), manifest.get("bits")
    if isinstance(sparsity, int | float) and sparsity > 0:
        yield f"- {sparsity:.1%} of the weights in its blocks are zero"
    if isinstance(bits, int | float):
        yield f"- {bits:.2f} bits for each weight in its blocks, scales and masks included"
    exported = manifest.get("exported")
    if isinstance(exported, Mapping):
        yield f"- the weights were written again, as {exported.get('to')}"
    elif isinstance(size, int):
        yield f"- {words(size)} of weights"
    if isinstance(recipe, Mapping):
        lines = yaml.safe_dump(dict(recipe), sort_keys=False)
        yield f"\nThe recipe, of secateur {manifest.get('secateur')}:\n\n```yaml\n{lines}```"


def _title(name: str) -> str:
    """The last part of a path or hub id, on one line."""
    path = Path(name)
    return " ".join((path.stem if path.suffix == ".gguf" else path.resolve().name).split()) or "A model"
