"""The weights of a checkpoint folder, whatever form they lie in: dense, in our layouts, or as others pack them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.folder.reader import StoredTensors, weight_files
from secateur.foreign.format import FOREIGN
from secateur.formats.layouts.layout import LAYOUT_VERSION, Layout, layout_from_config, part_names
from secateur.formats.layouts.packed_weight import BESIDE, DecodedWeights, PackedWeight

#: What the `quantization_config` of a folder of ours calls it.
QUANT_METHOD = "secateur"


def quantization_config(modules: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What `config.json` says about a folder whose modules lie in these layouts."""
    return {"quant_method": QUANT_METHOD, "layout_version": LAYOUT_VERSION, "modules": modules}


def parse_quantization_config(config: Any) -> Entries:
    """Module patterns of a `quantization_config` of secateur, each with its layout and whether it is stored transposed.

    Raises:
        CheckpointError: the layout version is unknown, or something is missing or makes no sense.
    """
    version = config.get("layout_version")
    if version != LAYOUT_VERSION:
        raise CheckpointError(
            f"the checkpoint has layout version {version!r}, and this secateur reads {LAYOUT_VERSION}: "
            "install a version that matches"
        )
    modules = config.get("modules")
    if not isinstance(modules, dict):
        raise CheckpointError("the checkpoint's quantization_config has no 'modules'")
    return Entries(
        (pattern, (layout_from_config(entry), entry.get("transposed") is True)) for pattern, entry in modules.items()
    )


class Entries(dict[str, tuple[Layout, bool]]):
    """What a config says of modules, by name or pattern (`*` stands for anything)."""

    @cached_property
    def patterns(self) -> dict[str, tuple[Layout, bool]]:
        """Those that stand for several: a mixture of experts may have tens of thousands that do not."""
        return {pattern: entry for pattern, entry in self.items() if is_pattern(pattern)}

    @property
    def parts(self) -> set[str]:
        """The parts of all their layouts."""
        return {part for layout, _ in self.values() for part in layout.parts}


def is_pattern(name: str) -> bool:
    """Whether a name in a config stands for several modules."""
    return any(character in name for character in "*?[")


def find_entry(modules: Entries, module: str) -> tuple[Layout, bool] | None:
    """The entry whose pattern matches a module's name; the exact name comes first."""
    if module in modules:
        return modules[module]
    return next((entry for pattern, entry in modules.patterns.items() if fnmatchcase(module, pattern)), None)


def packed_weights(stored: Mapping[str, Tensor], modules: Entries) -> dict[str, PackedWeight]:
    """The packed weights among stored names such as `….up_proj.weight.bitmask`."""
    parts_of: dict[str, dict[str, str]] = {}
    split = [(name, *name.rpartition(".")[::2]) for name in stored]
    below = [(name, weight, part) for name, weight, part in split if weight.endswith(".weight")]
    known = modules.parts
    if not known.union(BESIDE).issuperset(part for _, _, part in below):
        known = part_names()  # what the config does not name may be of any layout
    for name, weight, part in below:
        if part in known:
            parts_of.setdefault(weight, {})[part] = name
    packed = {}
    for weight, parts in parts_of.items():
        entry = find_entry(modules, weight.removesuffix(".weight"))
        if entry is None:
            raise CheckpointError(f"{weight} is stored packed, but the config does not name its layout")
        packed[weight] = PackedWeight(entry[0], _with_lent(weight, parts, parts_of, entry[0]), entry[1])
    return packed


def _with_lent(
    weight: str, parts: dict[str, str], parts_of: Mapping[str, dict[str, str]], layout: Layout
) -> dict[str, str]:
    """The parts of a weight with those that lie with another."""
    lender = layout.lender_of(weight)
    if lender is None:
        return parts
    there = parts_of.get(lender, {})
    own = layout.own(there)
    lent = {part: name for part, name in there.items() if part not in own}
    if not lent and len(layout.own(parts)) == len(parts):
        raise CheckpointError(
            f"{weight} has parts in common with {lender}, says config.json, and that has none of them"
        )
    return {**lent, **parts}


def open_weights(folder: Path, config: Mapping[str, Any]) -> DecodedWeights:
    """The weights of a checkpoint folder.

    Args:
        folder: a Hugging Face folder.
        config: its `config.json`.

    Raises:
        CheckpointError: files are missing or damaged, or the weights are quantized in a way that is not read here.
    """
    stored = StoredTensors(weight_files(folder))
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == QUANT_METHOD:
        return DecodedWeights(stored, packed_weights(stored, parse_quantization_config(quantization)))
    for known in FOREIGN.values():
        section = known.section(config)
        if section is not None:
            return DecodedWeights(stored, known.packed_weights(stored, section))
    if quantization is None:
        return DecodedWeights(stored)
    *others, last = (known.reads for _, known in sorted(FOREIGN.items(), reverse=True))
    readable = ", ".join(["dense checkpoints", "its own", *others])
    raise CheckpointError(f"{folder} is quantized with {method!r}: secateur reads {readable}, and {last}")


def check_no_codes(weights: DecodedWeights) -> None:
    """Raise CheckpointError where a tensor holds floats of eight bits: a quantizer's codes, which are no weights without it."""
    for name in weights:
        if name in weights.packed:
            continue
        tensor = weights[name]
        if tensor.is_floating_point() and tensor.element_size() == 1:
            raise CheckpointError(
                f"{name} is {tensor.dtype}, the codes of a quantizer, and nothing says how they are decoded: secateur reads "
                f"those of quant_method 'fp8' in config.json with {name}_scale_inv beside them; make others bfloat16 with "
                "what quantized them"
            )


def is_rounded(weights: DecodedWeights) -> bool:
    """Whether packed weights are codes, and not just without their zeros."""
    return any(weight.layout.rounded for weight in weights.packed.values())


def stored_dtype(weights: DecodedWeights) -> torch.dtype:
    """The dtype of most bytes of a checkpoint's matrices: of those in blocks, which are numbered, where there are any.

    Codes that are made one dtype, whatever lies beside them, are most of them.

    Raises:
        CheckpointError: there are no matrices.
    """
    for weight in weights.packed.values():
        if weight.layout.made is not None:
            return weight.layout.made
    sizes: dict[bool, dict[torch.dtype, int]] = {True: {}, False: {}}
    for name, dtype, shape in weights.stored.headers():
        if name in weights and dtype is not None and len(shape) == 2:
            found = sizes[any(part.isdigit() for part in name.split("."))]
            found[dtype] = found.get(dtype, 0) + dtype.itemsize * math.prod(shape)
    most = sizes[True] or sizes[False]
    if most:
        return max(most, key=lambda dtype: most[dtype])
    if weights.packed:
        return weights[next(iter(weights.packed))].dtype
    raise CheckpointError("the checkpoint holds no weight matrices")
