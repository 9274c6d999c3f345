"""Where units can be removed in a model, and how many weights go with them.

O: output features, I: input features, R: rows of a producer, U: units.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.core.feature_units import Units
from secateur.errors import one_line
from secateur.model.structure import Blocks, is_transposed, weight_matrix
from secateur.structured.coupling import Coupling
from secateur.structured.probing import Call, calls_of, find_couplings

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
    """

    prefix: str
    coupling: Coupling
    matrices: Mapping[str, tuple[int, int]]
    transposed: frozenset[str]

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
        if width.groups == coupling.groups:
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

    def weights(self, width: Width) -> int:
        """How many weights of matrices are left."""
        keep_U = self.keep_first(width)
        O, _ = self.matrices[self.coupling.consumer]
        rows = [
            int(feeds.kept(keep_U).sum()) * self.matrices[name][1] for name, feeds in self.coupling.producers.items()
        ]
        return O * int(keep_U.sum()) * self.coupling.size + sum(rows)

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


@dataclass(frozen=True)
class Probed:
    """What was found in a model.

    Attributes:
        sites: in order.
        weights: of the blocks' linears in all.
        calls, samples: how each block is called, and random weights for it, to try what is found on.
    """

    sites: list[Site]
    weights: int
    calls: list[Call]
    samples: list[Mapping[str, Tensor]]


def find_sites(model: nn.Module, blocks: Blocks, heads: int) -> Probed | None:
    """Find where units can be removed, of blocks that are alike in one; None where the model does not run without weights."""
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
                known[kind] = find_couplings(block, call, heads)
            except Exception as error:  # whatever code of a block does with random weights
                _LOG.info("%s is left as it is, for it does not run with random weights: %s", prefix, one_line(error))
                known[kind] = [], {}
        couplings, sample = known[kind]
        samples.append(sample)
        for coupling in couplings:
            names = [coupling.consumer, *coupling.producers]
            linears = {name: block.get_submodule(name) for name in names}
            matrices = {}
            for name, linear in linears.items():
                O, I = weight_matrix(linear).shape
                matrices[name] = (O, I)
            turned = frozenset(name for name, linear in linears.items() if is_transposed(linear))
            sites.append(Site(prefix, coupling, matrices, turned))
    weights = sum(weight_matrix(linear).numel() for linear in blocks.linears.values())
    return Probed(sites, weights, calls, samples)


def of_kind(sites: Sequence[Site], kind: str) -> list[Site]:
    """Those whose units are neurons, or heads."""
    return [site for site in sites if site.coupling.kind == kind]
