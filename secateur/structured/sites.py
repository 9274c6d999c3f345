"""Where units can be removed in a model, and how many weights go with them.

O: output features, I: input features, R: rows of a producer, U: units.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from secateur.core.feature_units import Units
from secateur.errors import one_line
from secateur.model.structure import Blocks, is_transposed, weight_matrix
from secateur.structured.coupling import Coupling
from secateur.structured.expert_units import expert_couplings
from secateur.structured.probing import Call, calls_of, find_couplings, linears_of

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Width:
    """How many units a linear reads: neurons, or query heads and the groups of them that share keys and values."""

    units: int
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Site:
    """A linear whose input features make units that can be removed.

    Attributes:
        prefix: of its block.
        coupling: within the block.
        matrices: (O, I) of it and of its producers, by their names within the block.
        transposed: of them those that keep their weights as `[I, O]`.
        beside: how many weights other linears have of the module that it ends.
        of_expert: whether it is one of an expert of a mixture.
    """

    prefix: str
    coupling: Coupling
    matrices: Mapping[str, tuple[int, int]]
    transposed: frozenset[str]
    beside: int = 0
    of_expert: bool = False

    @property
    def name(self) -> str:
        """The linear's name."""
        return f"{self.prefix}.{self.coupling.consumer}"

    @property
    def width(self) -> Width:
        """As the model has it."""
        return Width(self.coupling.units, self.coupling.groups)

    def units(self, width: Width) -> Units:
        """Which units there are where it is made so wide: single ones, or whole groups."""
        coupling = self.coupling
        if width.groups == coupling.groups or not width.units:
            return Units(coupling.size, coupling.each, coupling.groups, width.units // width.groups)
        return Units(coupling.size * coupling.each, coupling.groups, 1, width.groups)

    def keep(self, width: Width, kept: Sequence[int]) -> Tensor:
        """keep_U of the coupling's own units, by the numbers of those of `units` that stay."""
        units = self.units(width)
        keep_U = torch.zeros(units.count, dtype=torch.bool)
        keep_U[torch.tensor(kept, dtype=torch.long)] = True
        return keep_U.repeat_interleave(self.coupling.units // units.count)

    def keep_first(self, width: Width) -> Tensor:
        """The same for the first units, of each group where it has as many groups as before."""
        units = self.units(width)
        return self.keep(width, [g * units.each + u for g in range(units.groups) for u in range(units.keep)])

    @property
    def module(self) -> str:
        """The module that its linear ends, by its name within the block; nothing where that is the block itself."""
        return self.coupling.consumer.rpartition(".")[0]

    def takes_out(self, width: Width) -> bool:
        """Whether nothing is left to compute in that module, but what the linear gives for nothing."""
        return not width.units and self.coupling.kind == "heads"

    def is_inside(self, name: str) -> bool:
        """Whether a parameter, by its name in the model, goes when the module is taken out."""
        return name.startswith(f"{self.prefix}.{self.module}.") and not name.startswith(f"{self.name}.")

    def has_part(self, name: str) -> bool:
        """Whether a parameter, by its name in the model, is computed with by these units."""
        owner = name.rpartition(".")[0].removeprefix(f"{self.prefix}.")
        return owner == self.coupling.consumer or owner in self.coupling.producers

    def weights(self, width: Width) -> int:
        """How many weights of matrices are left."""
        if self.takes_out(width):
            return 0
        keep_U = self.keep_first(width)
        O, _ = self.matrices[self.coupling.consumer]
        rows = [
            int(feeds.kept(keep_U).sum()) * self.matrices[name][1] for name, feeds in self.coupling.producers.items()
        ]
        return O * int(keep_U.sum()) * self.coupling.size + sum(rows) + self.beside

    def masks(self, keep_U: Tensor) -> dict[str, tuple[int, Tensor]]:
        """What stays of each parameter that is cut, by its name in the model: a dimension, and a mask of it."""
        found = {}
        keep_I = keep_U.repeat_interleave(self.coupling.size)
        consumer = self.coupling.consumer
        found[f"{self.name}.weight"] = (0 if consumer in self.transposed else 1, keep_I)
        for name, feeds in self.coupling.producers.items():
            keep_R = feeds.kept(keep_U)
            found[f"{self.prefix}.{name}.weight"] = (1 if name in self.transposed else 0, keep_R)
            found[f"{self.prefix}.{name}.bias"] = (0, keep_R)
        return found


def cut(name: str, tensor: Tensor, masks: Sequence[Mapping[str, tuple[int, Tensor]]]) -> Tensor:
    """What is left of a parameter; a row that several sites have a part in stays where all let it."""
    for mask in masks:
        if name in mask and mask[name][1].numel() != tensor.shape[mask[name][0]]:
            raise ValueError(f"{name} is not of the form that was probed")
    dims = {mask[name][0] for mask in masks if name in mask}
    for dim in dims:
        keeps = [mask[name][1] for mask in masks if name in mask and mask[name][0] == dim]
        keep = torch.stack(keeps).all(0)
        tensor = tensor.index_select(dim, keep.nonzero()[:, 0].to(tensor.device))
    return tensor


def shapes_left(
    sites: Mapping[str, Site], widths: Mapping[str, Width], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """What is left of the shapes of parameters where sites have other widths: the same whichever units stay."""
    changed = [(sites[name], width) for name, width in widths.items() if width != sites[name].width]
    masks: dict[str, list[Mapping[str, tuple[int, Tensor]]]] = {}
    for site, width in changed:
        found = site.masks(site.keep_first(width))
        for name in found:
            masks.setdefault(name, []).append(found)
    out = [site for site, width in changed if site.takes_out(width)]
    return {
        name: tuple(cut(name, tensor, masks.get(name, ())).shape)
        for name, tensor in tensors.items()
        if not any(site.is_inside(name) for site in out)
    }


@dataclass(frozen=True)
class Probed:
    """What was found in a model.

    Attributes:
        sites: in order.
        weights: of the blocks' linears in all.
        calls, samples: how each block is called, and random weights for it, to try what is found on.
        prefixes: the names of blocks.
    """

    sites: list[Site]
    weights: int
    calls: list[Call]
    samples: list[Mapping[str, Tensor]]
    prefixes: list[str]

    def trial(self, site: Site) -> tuple[Call, Mapping[str, Tensor]]:
        """How the block of a site is called, and random weights for it."""
        number = self.prefixes.index(site.prefix)
        return self.calls[number], self.samples[number]


def find_sites(
    model: nn.Module, blocks: Blocks, heads: int, own_heads: Mapping[str, int] | None = None
) -> Probed | None:
    """Find where units can be removed, of blocks that are alike in one; None where the model does not run without weights.

    Args:
        model: whose parameters may be on the meta device.
        blocks: of it.
        heads: of attention.
        own_heads: of those blocks that have another number of them, by their names.
    """
    modules = list(blocks.modules.values())
    calls = calls_of(model, modules)
    if calls is None:
        return None
    known: dict[object, tuple[list[Coupling], Mapping[str, Tensor]]] = {}
    sites: list[Site] = []
    samples = []
    for (prefix, block), call in zip(blocks.modules.items(), calls, strict=True):
        kind = (type(block), tuple((name, tuple(p.shape)) for name, p in block.named_parameters()))
        if kind not in known:
            try:
                known[kind] = find_couplings(block, call, (own_heads or {}).get(prefix, heads))
            except Exception as error:  # whatever code of a block does with random weights
                _LOG.info("%s is left as it is, for it does not run with random weights: %s", prefix, one_line(error))
                known[kind] = [], {}
        couplings, sample = known[kind]
        samples.append(sample)
        inside = expert_couplings(block)
        for coupling in [*couplings, *inside]:
            names = [coupling.consumer, *coupling.producers]
            linears = {name: block.get_submodule(name) for name in names}
            matrices = {}
            for name, linear in linears.items():
                O, I = weight_matrix(linear).shape
                matrices[name] = (O, I)
            turned = frozenset(name for name, linear in linears.items() if is_transposed(linear))
            site = Site(prefix, coupling, matrices, turned, of_expert=coupling in inside)
            if coupling.kind == "heads":
                others = [
                    name for name in linears_of(block) if site.is_inside(f"{prefix}.{name}.") and name not in names
                ]
                beside = sum(weight_matrix(block.get_submodule(name)).numel() for name in others)
                site = replace(site, beside=beside)
            sites.append(site)
    weights = sum(weight_matrix(linear).numel() for linear in blocks.linears.values())
    return Probed(sites, weights, calls, samples, list(blocks.modules))


def of_kind(sites: Sequence[Site], kind: str) -> list[Site]:
    """Those whose units are neurons, or heads."""
    return [site for site in sites if site.coupling.kind == kind]
