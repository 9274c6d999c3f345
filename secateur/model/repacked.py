"""Codes of others, held in memory as the layout of ours that holds the same, for kernels to compute on."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from secateur.folder.reader import LoadedTensors
from secateur.formats.layouts.layout import LAYOUT_VERSION, Layout
from secateur.formats.layouts.packed_weight import DecodedWeights, PackedWeight, StoredForm
from secateur.kernels.packed import Packed
from secateur.plugin.names import stored_as
from secateur.plugin.packed_modules import packed_linears
from secateur.plugin.quantization_config import SecateurConfig
from secateur.plugin.quantizer import SecateurQuantizer


@dataclass(frozen=True)
class Repacked(PackedWeight[Layout]):
    """A weight that is no longer in a file.

    Attributes:
        held: it, until it is read.
    """

    held: list[tuple[Packed, StoredForm]] = field(default_factory=list)

    def read(self, name: str, stored: Any) -> tuple[Packed, StoredForm]:
        return self.held.pop()


def repacked(weights: DecodedWeights, pool: Executor) -> dict[str, PackedWeight]:
    """Those packed weights of blocks, by name, that layouts of ours hold to the bit; others are decoded when they are needed.

    Raises:
        CheckpointError: one is damaged.
    """

    def convert(name: str) -> Repacked | None:
        found = weights.packed[name].load_ours(name, weights.stored)
        return None if found is None else Repacked(found[1].layout, {}, held=[found])

    names = [name for name in weights.packed if any(part.isdigit() for part in name.split("."))]
    found = zip(names, pool.map(convert, names), strict=True)
    return {name: weight for name, weight in found if weight is not None}


def quantizer_of(packed: Iterable[str], layouts: Iterable[Layout]) -> SecateurQuantizer:
    """A quantizer as of a folder of ours, for weights of these names in these layouts."""
    entries = {n.removesuffix(".weight"): layout.to_config() for n, layout in zip(packed, layouts, strict=True)}
    return SecateurQuantizer(SecateurConfig(LAYOUT_VERSION, entries))


def place_repacked(model: Any, packed: dict[str, PackedWeight], device: Any) -> SecateurQuantizer | None:
    """Let the linears of a model compute on such weights, and others be dense; None where all have to be."""
    quantizer = quantizer_of(packed, (weight.layout for weight in packed.values()))
    quantizer.preprocess_model(model, weights=DecodedWeights(LoadedTensors(), packed), device_map=device)
    older = quantizer.older_names(model)
    names = {stored_as(model, f"{name}.weight", packed, older) for name, _ in packed_linears(model)}
    used = {name: weight for name, weight in packed.items() if name in names}
    if not used:
        return None
    # Saved, the others are dense.
    quantizer.quantization_config = quantizer_of(used, (weight.layout for weight in used.values())).quantization_config
    return quantizer
