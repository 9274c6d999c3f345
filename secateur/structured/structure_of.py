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
from secateur.structured.own_widths import fitted
from secateur.structured.reshape import Widths, reshaped, shares_keys
from secateur.structured.sites import Probed, Site, Width, cut, find_sites, of_kind, shapes_left

# What the number of neurons is a multiple of where nothing else is said: kernels and formats of others take whole tiles.
_MULTIPLE = 32
# Widths that a message names.
_TOLD = 3


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
            if name.startswith(f"{sites[each].prefix}.") and sites[each].has_part(name)
        ]
        return cut(name, tensor, masks)

    def goes(self, name: str) -> bool:
        """Whether a parameter goes, with the module that it is in."""
        return any(site.is_inside(name) for site in self._out)

    @cached_property
    def _out(self) -> list[Site]:
        return [site for name, site in self.sites.items() if site.takes_out(self.widths[name])]

    def shapes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """What is left of the shapes of parameters: the same whichever units stay."""
        return shapes_left(self.sites, self.widths, tensors)

    def uncut(self, name: str, left: Tensor, kept: Sequence[int]) -> Tensor:
        """The weight of a linear with zeros for what it reads of units that went."""
        site = self.sites[name]
        dim, keep_I = site.masks(site.keep(self.widths[name], kept))[f"{name}.weight"]
        shape = list(left.shape)
        shape[dim] = keep_I.numel()
        return left.new_zeros(shape).index_copy_(dim, keep_I.nonzero()[:, 0], left)

    @property
    def not_understood(self) -> dict[str, list[str]]:
        """The blocks in which units of a kind that goes elsewhere could not be told apart, by the kind."""
        found = {}
        for kind in dict.fromkeys(site.coupling.kind for site in self.sites.values()):
            known = {site.prefix for site in of_kind(self.probed.sites, kind)}
            lacking = [each for each in self.probed.prefixes if each not in known and each not in self.written.widths]
            if lacking:
                found[kind] = lacking
        return found

    def told(self) -> dict[str, tuple[int, int]]:
        """What there was before and is now: weights of the blocks' linears, blocks, heads and neurons."""
        blocks, weights = self.before
        gone = sum(site.weights(site.width) - site.weights(self.widths[name]) for name, site in self.sites.items())
        found = {"weights": (weights, self.probed.weights - gone), "blocks": (blocks, len(self.probed.calls))}
        for kind in ("heads", "neurons"):
            sites = of_kind(self.probed.sites, kind)
            pairs = [(site.width, self.widths.get(site.name, site.width)) for site in sites]
            if len(set(pairs)) > 1:
                found[f"{kind}_in_all"] = (sum(own.units for own, _ in pairs), sum(now.units for _, now in pairs))
            elif pairs:
                own, now = pairs[0]
                found[kind] = (own.units, now.units)
                if kind == "heads":
                    found["kv_heads"] = (own.groups, now.groups)
        return {what: each for what, each in found.items() if each[0] != each[1]}


def structure_of(
    source: Source,
    model: nn.Module,
    blocks: Blocks,
    pattern: Structured,
    given: Mapping[str, Width | float] | None,
    search: bool,
) -> Structure:
    """What a pattern makes of a model.

    Args:
        source: of the model, without the blocks that go.
        model: its skeleton.
        blocks: of it.
        given: what was chosen for each linear already, by name, how wide it is to be or which share of its units goes; None:
            all blocks lose as many neurons.
        search: whether it is still to be found out: all sites of the kinds that may lose units have their own width then.

    Raises:
        UsageError: nothing was understood, nothing would be left, or no config gives such a model.
    """
    probed = find_sites(model, blocks, *heads_of(source))
    kinds = [kind for kind in ("neurons", "heads") if kind in pattern.units or "blocks" in pattern.units]
    sites = [site for kind in kinds for site in of_kind(probed.sites, kind)] if probed is not None else []
    if search:  # experts are alike in a whole model
        sites = [site for site in sites if not site.of_expert]
    missing = [kind for kind in kinds if not any(site.coupling.kind == kind for site in sites)]
    if probed is None or (given is None and missing and (not pattern.per_layer or len(missing) == len(kinds))):
        what = " or ".join(missing or kinds)
        raise UsageError(
            f"no {what} of {source.name} can be told apart: in its blocks more hangs on them than what one linear reads"
        )
    if search:
        return Structure(probed, {site.name: site.width for site in sites}, source)
    by_name = {site.name: site for site in probed.sites}
    unknown = [name for name in given or {} if name not in by_name]
    if unknown:
        raise UsageError(
            f"the recipe chooses how wide {unknown[0]} is to be, whose units are not understood: is it of another model?"
        )
    if given is None:
        widths = uniform_neurons(source, probed, pattern)
    else:
        widths = {name: _width(by_name[name], each, pattern) for name, each in given.items()}
    widths = {name: width for name, width in widths.items() if width != by_name[name].width}
    _check_possible(by_name, widths)
    written = _written(source, model, probed, widths, pattern) if widths else source
    if written is None:
        raise UsageError(
            f"no config of {source.name} gives {describe(by_name, widths)}: {_instead(source, model, probed, widths, pattern)}"
        )
    return Structure(probed, widths, written)


def _written(source: Source, model: nn.Module, probed: Probed, widths: Widths, pattern: Structured) -> Source | None:
    """The source with a config that gives some widths: one that all tools read, where there is one, or else ours, if it may."""
    found = reshaped(source, model, probed, widths)
    if found is None and (pattern.per_layer or source.widths):
        found = fitted(source, model, probed, widths)
    return found


def _width(site: Site, given: Width | float, pattern: Structured) -> Width:
    """The width of a linear that is given, or of which a share is to go."""
    if isinstance(given, Width):
        return given
    return nearest_width(site, 1 - given, multiple_for(site, pattern) if site.coupling.kind == "neurons" else 1)


def nearest_width(site: Site, left: float, multiple: int = 1) -> Width:
    """The width at which a share of a linear's units is left, as near as they allow.

    Args:
        multiple: that the number of neurons is of.
    """
    if site.coupling.kind == "heads":
        return min([site.width, *head_widths(site)], key=lambda width: abs(width.units / site.width.units - left))
    return Width(min(max(1, round(left * site.width.units / multiple)) * multiple, site.width.units))


def _check_possible(sites: Mapping[str, Site], widths: Widths) -> None:
    """Raise UsageError where a linear is to have units that cannot be had of those that it has."""
    for name, width in widths.items():
        own = sites[name].width
        if sites[name].coupling.kind == "neurons":
            if not 0 <= width.units < own.units:
                raise UsageError(
                    f"{name} reads {own.units} neurons, and is to read {width.units}: give 0 to {own.units}"
                )
        elif width.units and width not in head_widths(sites[name]):
            said = ", ".join(f"{each.units}/{each.groups}" for each in head_widths(sites[name]))
            raise UsageError(
                f"{name} reads {own.units} heads, {own.groups} for keys and values, and cannot read "
                f"{width.units}/{width.groups}: it takes {said}, or 0"
            )


def heads_of(source: Source) -> tuple[int, dict[str, int]]:
    """How many heads attention has; and of blocks that have another number of them, by their names."""
    text: Any = source.config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)
    key = text.attribute_map.get("num_attention_heads", "num_attention_heads")
    own = {name: each.settings[key] for name, each in source.widths.items() if key in each.settings}
    return heads if isinstance(heads, int) else 0, own


def describe(sites: Mapping[str, Site], widths: Widths) -> str:
    """Widths in words."""
    said = list(dict.fromkeys((sites[name].coupling.kind, width) for name, width in widths.items()))
    words = [
        f"{width.units} neurons" if kind == "neurons" else f"{width.units} heads of {width.groups} for keys and values"
        for kind, width in said[:_TOLD]
    ]
    return ", ".join([*words, *(["…"] if len(said) > _TOLD else [])])


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


def _instead(source: Source, model: nn.Module, probed: Probed, widths: Widths, pattern: Structured) -> str:
    """What to ask for instead of widths that no config gives."""
    sites = [site for site in probed.sites if site.name in widths]
    kind = sites[0].coupling.kind
    sites = of_kind(probed.sites, kind)
    if len({widths.get(site.name, site.width) for site in sites}) > len({site.width for site in sites}):
        if pattern.per_layer:
            return "blocks of this kind cannot be built from other numbers alone; let all of them lose as much"
        return "transformers builds all blocks alike; `widths` per-layer writes them for secateur's own loader"
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
