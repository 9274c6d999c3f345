"""Blocks each with widths of its own: which numbers give them is tried on blocks that are built from such numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.mixture.unfuse import fused_in, unfuse
from secateur.model.source import Source
from secateur.model.structure import build_skeleton
from secateur.plugin.block_widths import BlockWidths, built_block
from secateur.structured.probing import Call, random_hidden, without_experts
from secateur.structured.reshape import Widths, head_edits, neuron_edits, same_block, shares_keys
from secateur.structured.sites import Probed, Site, Width, shapes_left


def fitted(source: Source, model: nn.Module, probed: Probed, widths: Widths) -> Source | None:
    """The source with widths of its own for each block; None where a block cannot have what it is to have.

    Args:
        source: whose weights are to be cut.
        model: its skeleton.
        probed: what was found in it.
        widths: of the sites, by name; those that are not named stay as they are.
    """
    fitter = Fitter(source, model, probed)
    own = dict(source.widths)
    for site in probed.sites:
        width = widths.get(site.name, site.width)
        if width != site.width:
            found = fitter.of(site, width)
            if found is None:
                return None
            own[site.prefix] = own.get(site.prefix, BlockWidths()).changed(found)
    edited = replace(source, widths=own)
    built = build_skeleton(edited, torch.float32).state_dict(keep_vars=True)
    sites = {site.name: site for site in probed.sites}
    wanted = shapes_left(sites, widths, model.state_dict(keep_vars=True))
    return edited if {name: tuple(tensor.shape) for name, tensor in built.items()} == wanted else None


@dataclass(frozen=True)
class Fitter:
    """Finds numbers for blocks.

    Attributes:
        source, model, probed: see `fitted`.
    """

    source: Source
    model: Any
    probed: Probed
    _known: dict[Any, BlockWidths | None] = field(default_factory=dict)

    def of(self, site: Site, width: Width) -> BlockWidths | None:
        """How the block of a site differs from what the config says where that has another width; None: it cannot."""
        key = id(self.probed.trial(site)[1]), site.coupling.consumer, width
        if key not in self._known:
            self._known[key] = self._find(site, width)
        return self._known[key]

    def _find(self, site: Site, width: Width) -> BlockWidths | None:
        block = self.model.get_submodule(site.prefix)
        before = self.source.widths.get(site.prefix, BlockWidths())
        call, sample = self.probed.trial(site)
        for found in self._candidates(site, width, before):
            try:
                built = built_block(self.model, block, site.prefix, before.changed(found))
                unfuse(self.model, fused_in(built), built)
                if _shapes(built, sample) == _wanted(site, width, sample) and same_block(
                    block, built, (call, call), sample, [site], {site.name: width}
                ):
                    return found
            except Exception:  # whatever a model's code does with such numbers
                continue
        return None

    def _candidates(self, site: Site, width: Width, before: BlockWidths) -> Iterator[BlockWidths]:
        if site.coupling.kind == "heads" and shares_keys(self.source):
            return
        if site.takes_out(width):
            returns = _values(self.model.get_submodule(site.prefix), *self.probed.trial(site), site.module)
            if returns is not None and _is_all_inside(site):
                yield BlockWidths(absent={site.coupling.consumer: returns})
            return
        text = self.source.config.get_text_config()
        content = {**text.to_dict(), **before.settings}
        edits = neuron_edits if site.coupling.kind == "neurons" else head_edits
        for settings in edits(text, content, site, width):
            yield BlockWidths(settings)


def _is_all_inside(site: Site) -> bool:
    """Whether all that computes what a linear reads is in the module that it ends."""
    return bool(site.module) and all(name.startswith(f"{site.module}.") for name in site.coupling.producers)


def _values(block: nn.Module, call: Call, sample: Mapping[str, Tensor], module: str) -> int | None:
    """How many values a module of a block returns, of which the first is what counts; None where it is not called once."""
    found: list[Any] = []
    handle = block.get_submodule(module).register_forward_hook(lambda _, __, out: found.append(out))
    try:
        with torch.no_grad(), without_experts(block):
            call.run(block, sample, random_hidden(call, torch.Generator().manual_seed(4)))
    finally:
        handle.remove()
    if len(found) != 1:
        return None
    return len(found[0]) if isinstance(found[0], tuple) else 1


def _shapes(block: nn.Module, sample: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Of the parameters of a block, but for what is not among random weights: experts'."""
    return {name: tuple(p.shape) for name, p in block.named_parameters() if name in sample}


def _wanted(site: Site, width: Width, sample: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    tensors = {f"{site.prefix}.{name}": tensor for name, tensor in sample.items()}
    left = shapes_left({site.name: site}, {site.name: width}, tensors)
    return {name.removeprefix(f"{site.prefix}."): shape for name, shape in left.items()}
