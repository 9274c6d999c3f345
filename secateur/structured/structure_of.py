"""What a structured recipe makes of a model: which linears lose which units, and what the model is then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from secateur.core.feature_units import Units
from secateur.core.patterns import Structured
from secateur.errors import UsageError
from secateur.model.source import Source
from secateur.model.structure import Blocks
from secateur.structured.reshape import Widths, reshaped
from secateur.structured.sites import Probed, Site, Width, cut, find_sites, of_kind

# What the number of neurons is a multiple of where nothing else is said: kernels and formats of others take whole tiles.
_MULTIPLE = 32


@dataclass(frozen=True, eq=False)
class Structure:
    """What is to become of a model.

    Attributes:
        probed: what was found in it.
        widths: of the sites, by name; those that are not named stay as they are.
        written: the source with the config that the result has.
        before: how many blocks there were, and weights of their linears.
    """

    probed: Probed
    widths: Widths
    written: Source
    before: tuple[int, int] = (0, 0)

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Those that lose units, by the names of their linears."""
        by_name = {site.name: site for site in self.probed.sites}
        return {name: by_name[name] for name in self.widths}

    def units(self, name: str) -> Units:
        """Of a linear that loses some."""
        return self.sites[name].units(self.widths[name])

    def cut(self, name: str, tensor: Tensor, kept: Mapping[str, Sequence[int]]) -> Tensor:
        """What is left of a parameter, where of each linear these units stay."""
        sites = self.sites
        masks = [
            sites[each].masks(sites[each].keep(self.widths[each], units))
            for each, units in kept.items()
            if name.startswith(f"{sites[each].prefix}.")
        ]
        return cut(name, tensor, masks)

    def shapes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """What is left of the shapes of parameters: the same whichever units stay."""
        masks = [site.masks(site.keep_first(self.widths[name])) for name, site in self.sites.items()]
        return {name: tuple(cut(name, tensor, masks).shape) for name, tensor in tensors.items()}

    def uncut(self, name: str, left: Tensor, kept: Sequence[int]) -> Tensor:
        """The weight of a linear with zeros for what it reads of units that went."""
        site = self.sites[name]
        dim, keep_I = site.masks(site.keep(self.widths[name], kept))[f"{name}.weight"]
        shape = list(left.shape)
        shape[dim] = keep_I.numel()
        return left.new_zeros(shape).index_copy_(dim, keep_I.nonzero()[:, 0], left)

    def told(self) -> dict[str, tuple[int, int]]:
        """What there was before and is now: weights of the blocks' linears, blocks, heads and neurons."""
        blocks, weights = self.before
        gone = sum(site.weights(site.width) - site.weights(self.widths[name]) for name, site in self.sites.items())
        found = {"weights": (weights, self.probed.weights - gone), "blocks": (blocks, len(self.probed.calls))}
        for site in self.sites.values():
            own, now = site.width, self.widths[site.name]
            found[site.coupling.kind] = (own.units, now.units)
            if site.coupling.kind == "heads":
                found["kv_heads"] = (own.groups, now.groups)
        return {what: each for what, each in found.items() if each[0] != each[1]}


def structure_of(
    source: Source, model: nn.Module, blocks: Blocks, pattern: Structured, given: Widths | None, search: bool
) -> Structure:
    """What a pattern makes of a model.

    Args:
        source: of the model, without the blocks that go.
        model: its skeleton.
        blocks: of it.
        given: what was chosen for each linear already, by name; None: all blocks lose as many neurons.
        search: whether it is still to be found out: all sites of the kinds that may lose units have their own width then.

    Raises:
        UsageError: nothing was understood, nothing would be left, or no config gives such a model.
    """
    probed = find_sites(model, blocks, _heads(source))
    kinds = [kind for kind in ("neurons", "heads") if kind in pattern.units or "blocks" in pattern.units]
    sites = [site for kind in kinds for site in of_kind(probed.sites, kind)] if probed is not None else []
    missing = [kind for kind in kinds if not any(site.coupling.kind == kind for site in sites)]
    if probed is None or missing:
        what = " or ".join(missing or kinds)
        raise UsageError(
            f"no {what} of {source.name} can be told apart: in its blocks more hangs on them than what one linear reads"
        )
    if search:
        return Structure(probed, {site.name: site.width for site in sites}, source)
    widths = given if given is not None else uniform_neurons(source, probed, pattern)
    unknown = [name for name in widths if name not in {site.name for site in probed.sites}]
    if unknown:
        raise UsageError(
            f"the recipe chooses how wide {unknown[0]} is to be, whose units are not understood: is it of another model?"
        )
    by_name = {site.name: site for site in probed.sites}
    widths = {name: width for name, width in widths.items() if width != by_name[name].width}
    written = reshaped(source, model, probed, widths) if widths else source
    if written is None:
        raise UsageError(
            f"no config of {source.name} gives {describe(by_name, widths)}: {_instead(source, model, probed, widths)}"
        )
    return Structure(probed, widths, written)


def _heads(source: Source) -> int:
    heads: Any = getattr(source.config.get_text_config(), "num_attention_heads", 0)
    return heads if isinstance(heads, int) else 0


def describe(sites: Mapping[str, Site], widths: Widths) -> str:
    """Widths in words."""
    said = dict.fromkeys((sites[name].coupling.kind, width) for name, width in widths.items())
    return ", ".join(
        f"{width.units} neurons" if kind == "neurons" else f"{width.units} heads of {width.groups} for keys and values"
        for kind, width in said
    )


def multiple_for(site: Site, pattern: Structured) -> int:
    """What the number of neurons left is a multiple of. Raises UsageError where there is none below the model's own number."""
    own = site.coupling.units
    if pattern.multiple is None:
        return _MULTIPLE if own % _MULTIPLE == 0 else 1
    if pattern.multiple >= own:
        raise UsageError(f"`multiple` {pattern.multiple} leaves nothing to choose: {site.name} reads {own} neurons")
    return pattern.multiple


def uniform_neurons(source: Source, probed: Probed, pattern: Structured) -> dict[str, Width]:
    """The same share of the neurons of every block, as near to the sparsity as the multiple allows."""
    sites = of_kind(probed.sites, "neurons")
    whole = sum(site.weights(site.width) - site.weights(Width(0)) for site in sites)
    share = pattern.sparsity * probed.weights / whole
    widths = {}
    for site in sites:
        multiple, own = multiple_for(site, pattern), site.coupling.units
        units = round((1 - share) * own / multiple) * multiple
        if units < multiple:
            most = (own - multiple) / own * whole / probed.weights
            raise UsageError(
                f"sparsity {pattern.sparsity:g} would leave no neurons: they are {whole / probed.weights:.0%} of the weights "
                f"of the blocks of {source.name}, so at most {int(1000 * most) / 10:g}% can go"
            )
        widths[site.name] = Width(min(units, own))
    if all(width == site.width for width, site in zip(widths.values(), sites, strict=True)):
        site = sites[0]
        step = (
            site.weights(site.width) - site.weights(Width(site.coupling.units - multiple_for(site, pattern)))
        ) * len(sites)
        raise UsageError(
            f"sparsity {pattern.sparsity:g} removes nothing: neurons go in steps of {step / probed.weights:.2%}, or of fewer "
            "with a smaller `multiple`"
        )
    return widths


def _instead(source: Source, model: nn.Module, probed: Probed, widths: Widths) -> str:
    """What to ask for instead of widths that no config gives."""
    sites = [site for site in probed.sites if site.name in widths]
    kind = sites[0].coupling.kind
    sites = of_kind(probed.sites, kind)
    if len({widths.get(site.name, site.width) for site in sites}) > len({site.width for site in sites}):
        return "transformers builds all blocks alike"
    if kind == "neurons":
        return "transformers derives the number of neurons from other sizes; give `units` heads or blocks"
    found = legal_heads(source, model, probed, sites)
    if not found:
        return "transformers derives the size of a head from their number; give `units` neurons or blocks"
    said = ", ".join(f"{width.units}/{width.groups}" for width in found)
    return f"of {sites[0].width.units} heads, {sites[0].width.groups} for keys and values, it takes {said}"


def head_widths(site: Site) -> list[Width]:
    """Fewer heads: as many of every group, or whole groups."""
    each, groups = site.coupling.each, site.coupling.groups
    fewer = [Width(left * groups, groups) for left in range(each - 1, 0, -1)]
    return fewer + [Width(left * each, left) for left in range(groups - 1, 0, -1)]


def shares_keys(source: Source) -> bool:
    """Whether layers of a model use keys and values of others."""
    text: Any = source.config.get_text_config()
    return bool(getattr(text, "num_kv_shared_layers", 0))


def legal_heads(source: Source, model: nn.Module, probed: Probed, sites: Sequence[Site]) -> list[Width]:
    """Those of `head_widths` that a config gives where all blocks have them."""
    if not sites or shares_keys(source):
        return []
    if len({site.width for site in sites}) > 1:
        return []
    return [
        width
        for width in head_widths(sites[0])
        if reshaped(source, model, probed, {site.name: width for site in sites}) is not None
    ]
