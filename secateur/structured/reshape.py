"""Configs for models of other widths: one is believed where the skeleton that is built from it has just the shapes wanted.

R: rows of a linear, U: units.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.model.source import Source
from secateur.model.structure import build_skeleton, find_blocks
from secateur.structured.probing import Call, calls_of, random_hidden, without_experts
from secateur.structured.sites import Probed, Site, Width, cut, shapes_left

# What configs call the number of heads that keys and values have, and the features of a head. The number of neurons is found
# by its value, of whatever name.
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "num_query_groups")
_HEAD_DIM = "head_dim"
#: The number that stands for four times the hidden size where it is not given.
_MAY_BE_NONE = ("n_inner", "intermediate_size", "ffn_dim", "ffn_hidden_size")
# Sliced and zeroed may differ by so much of the largest value, in float32.
_ROUNDING = 1e-4

Widths = Mapping[str, Width]


def reshaped(source: Source, model: nn.Module, probed: Probed, widths: Widths) -> Source | None:
    """The source with a config for other widths; None where no config gives them.

    Args:
        source: whose weights are to be cut.
        model: its skeleton.
        probed: what was found in it.
        widths: of the sites, by name; those that are not named stay as they are.
    """
    chosen = [site for site in probed.sites if widths.get(site.name, site.width) != site.width]
    by_name = {site.name: site for site in probed.sites}
    wanted = shapes_left(by_name, widths, model.state_dict(keep_vars=True))
    text = source.config.get_text_config()
    for edits in _edits(text, chosen, widths):
        edited = with_edits(source, edits)
        if edited is None:
            continue
        try:
            built = build_skeleton(edited, torch.float32)
        except SecateurError:
            continue
        shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict(keep_vars=True).items()}
        if shapes == wanted and _same_outputs(model, built, probed, chosen, widths):
            return edited
    return None


def shares_keys(source: Source) -> bool:
    """Whether layers of a model use keys and values of others."""
    text: Any = source.config.get_text_config()
    return bool(getattr(text, "num_kv_shared_layers", 0))


def with_edits(source: Source, edits: Mapping[str, Any]) -> Source | None:
    """The source with other values in the text part of its config; None where transformers refuses them."""
    # Without a file of its own, a config is written anew, in words of several releases, once it is changed.
    content = source.config.to_dict() if source.own_config is None else deepcopy(source.own_config)
    text = source.config.get_text_config()
    part = content
    if text is not source.config:
        key = next((key for key in source.config.sub_configs if getattr(source.config, key, None) is text), None)
        if key is None or not isinstance(content.get(key), dict):
            return None
        part = content[key]
    part.update(edits)
    # Infinity, which JSON does not know, is spelled out in files.
    decoded = getattr(source.config, "_decode_special_floats", deepcopy)
    try:
        config = type(source.config).from_dict(decoded(deepcopy(content)))
    except Exception:  # whatever a config class checks
        return None
    for key in ("quantization_config", "compression_config"):
        config.__dict__.pop(key, None)
    config.dtype = source.config.dtype
    return replace(source, config=config, own_config=content if source.own_config is not None else None)


def _edits(text: Any, chosen: Sequence[Site], widths: Widths) -> Iterator[dict[str, Any]]:
    """What may have to be changed in a config, the likeliest first; nothing where sites of a kind differ in width."""
    content = text.to_dict()
    ways: list[list[dict[str, Any]]] = []
    for kind, before in dict.fromkeys((site.coupling.kind, site.width) for site in chosen):
        alike = [site for site in chosen if (site.coupling.kind, site.width) == (kind, before)]
        now = {widths[site.name] for site in alike}
        if len(now) > 1:
            return
        ways.append(list((neuron_edits if kind == "neurons" else head_edits)(text, content, alike[0], now.pop())))
    for each in itertools.product(*ways):
        yield {key: value for edits in each for key, value in edits.items()}


def neuron_edits(text: Any, content: Mapping[str, Any], site: Site, width: Width) -> Iterator[dict[str, Any]]:
    """What in a config may say how many neurons there are, the likeliest first."""
    own = [key for key, value in content.items() if type(value) is int and value == site.coupling.units]
    likely = [key for key in own if any(word in key for word in ("inter", "ffn", "inner"))]
    # Some other number may be the same by chance.
    for key in [*likely, *(key for key in own if key not in likely)]:
        yield {key: width.units}
    if len(likely) > 1:  # those of experts, and of what is beside them
        yield dict.fromkeys(likely, width.units)
    yield from ({key: width.units} for key in _MAY_BE_NONE if key in content and content[key] is None)


def head_edits(text: Any, content: Mapping[str, Any], site: Site, width: Width) -> Iterator[dict[str, Any]]:
    """What in a config may say how many heads there are, the likeliest first."""
    heads = text.attribute_map.get("num_attention_heads", "num_attention_heads")
    kv = next((key for key in (text.attribute_map.get(k, k) for k in _KV_HEADS) if content.get(key) is not None), None)
    both = {heads: width.units, **({kv: width.groups} if kv is not None else {})}
    head_dim = {text.attribute_map.get(_HEAD_DIM, _HEAD_DIM): site.coupling.size}
    yield {**both, **head_dim}
    yield both
    yield {heads: width.units, **head_dim}
    yield {heads: width.units}


def _same_outputs(model: nn.Module, built: Any, probed: Probed, chosen: Sequence[Site], widths: Widths) -> bool:
    """Whether blocks of the new model do what those of the old one do with zeros in what the consumers read of what goes.

    What a config tells besides shapes, such as the slopes that each head has, may hang on the same numbers.
    """
    before, after = find_blocks(model).modules, find_blocks(built).modules
    calls = calls_of(built, list(after.values()))
    if calls is None or list(before) != list(after):
        return False
    tried: list[Mapping[str, Tensor]] = []
    for number, (prefix, block) in enumerate(before.items()):
        sample = probed.samples[number]
        sites = [site for site in chosen if site.prefix == prefix]
        if any(sample is other for other in tried) or not sites:
            continue
        tried.append(sample)
        if not same_block(block, after[prefix], (probed.calls[number], calls[number]), sample, sites, widths):
            return False
    return True


def same_block(
    block: nn.Module,
    built: nn.Module,
    calls: tuple[Call, Call],
    sample: Mapping[str, Tensor],
    sites: Sequence[Site],
    widths: Widths,
) -> bool:
    """Whether a block does with what is left of random weights what the wide one does with zeros for what goes.

    Args:
        block, built: with all weights, and with what is left.
        calls: of both.
        sample: weights of the first.
        sites: of the block, those that lose units.
        widths: of them.
    """
    masks = [site.masks(site.keep_first(widths[site.name])) for site in sites]
    consumers = {f"{site.coupling.consumer}.weight" for site in sites}
    prefix = sites[0].prefix
    zeroed, sliced = {}, {}
    for name, tensor in sample.items():
        full = f"{prefix}.{name}"
        zeroed[name] = tensor
        if any(site.takes_out(widths[site.name]) and site.is_inside(full) for site in sites):
            continue
        sliced[name] = cut(full, tensor, masks)
        if name in consumers:
            dim, keep_I = next(mask[full] for mask in masks if full in mask)
            zeroed[name] = tensor * (keep_I if dim == 1 else keep_I[:, None])
    hidden = random_hidden(calls[0], torch.Generator().manual_seed(3))
    with torch.no_grad():
        dense = _run(block, calls[0], zeroed, hidden)
        cut_out = _run(built, calls[1], sliced, hidden)
    return bool((dense - cut_out).abs().max() <= _ROUNDING * dense.abs().max())


def _run(block: nn.Module, call: Call, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    with without_experts(block):
        return call.run(block, weights, hidden)
