"""A model with fewer experts as a view of its source: names renumbered, rows of routers and slices of fused tensors left out.

E: experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, UsageError
from secateur.experts.kept_experts import KeptExperts
from secateur.folder.reader import LoadedTensors, Tensors
from secateur.formats.layouts.packed_weight import DecodedWeights, PackedWeight
from secateur.mixture.experts import Experts
from secateur.mixture.unfuse import experts_in
from secateur.model.located import Located, locate
from secateur.model.source import Source
from secateur.model.structure import build_skeleton, find_blocks, run_without_weights
from secateur.structured.reshape import with_edits

# What is told of layers that predict further tokens and that no module of the model reads, by the config.
_FURTHER = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
_EXPERT = re.compile(r"(.*?)\.experts?\.")


@dataclass(frozen=True)
class _Cut:
    """Which slices of a tensor are left, along which of its dimensions."""

    dim: int
    kept: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(self.dim, torch.tensor(self.kept, device=tensor.device))

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[: self.dim], len(self.kept), *shape[self.dim + 1 :])


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the view lies: under which name in the source, and what of it is left."""

    name: str
    cut: _Cut | None = None


class _FewerTensors(Tensors):
    """Some tensors under other names, some of them cut, and some in the place of others."""

    def __init__(self, tensors: Tensors, places: Mapping[str, _Place], instead: Tensors) -> None:
        self._tensors, self._places, self._instead = tensors, places, instead

    def __getitem__(self, name: str) -> Tensor:
        if name in self._instead:
            return self._instead[name]
        place = self._places[name]
        tensor = self._tensors[place.name]
        return tensor if place.cut is None else place.cut.of(tensor)

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._instead

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._places if name not in self._instead)
        yield from self._instead

    def __len__(self) -> int:
        return len(set(self._places) | set(self._instead))

    def headers(self) -> Iterator[tuple[str, torch.dtype | None, tuple[int, ...]]]:
        known = {name: (dtype, shape) for name, dtype, shape in self._tensors.headers()}
        for name, place in self._places.items():
            if name not in self._instead:
                dtype, shape = known[place.name]
                yield name, dtype, shape if place.cut is None else place.cut.shape(shape)
        yield from self._instead.headers()

    def release(self) -> None:
        self._tensors.release()
        self._instead.release()


class _FewerWeights(DecodedWeights):
    """The same as weights, of which one expert can be read without the others that it lies with."""

    def __init__(
        self, weights: DecodedWeights, stored: Tensors, packed: Mapping[str, PackedWeight], places: Mapping[str, _Place]
    ) -> None:
        super().__init__(stored, packed)
        self._whole, self._cuts = weights, {name: place for name, place in places.items() if place.cut is not None}

    def expert(self, name: str, expert: int) -> Tensor:
        place = self._cuts.get(name)
        if place is None or place.cut is None or place.cut.dim:
            return super().expert(name, expert)
        return self._whole.expert(place.name, place.cut.kept[expert])

    def form(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        place = self._cuts.get(name)
        if place is None or place.cut is None:
            return super().form(name)
        shape, dtype = self._whole.form(place.name)
        return place.cut.shape(shape), dtype


@dataclass(frozen=True)
class Fewer:
    """A source with fewer experts in every layer.

    Attributes:
        source: the whole one.
        model: its skeleton.
        built: the skeleton of the other.
        written: the other, without anything that experts take over from each other.
        places: where its weights lie in the source, by stored names, and `stored`: where the tensors of files do.
        found, located: of the source and of the other, by the names of their models.
        notes: what a user should know of it.
    """

    source: Source
    model: nn.Module
    built: nn.Module
    written: Source
    places: Mapping[str, _Place]
    stored: Mapping[str, _Place]
    found: Located
    located: Located
    notes: tuple[str, ...]

    def with_tensors(self, instead: Tensors) -> Source:
        """The other source, with dense tensors in the place of some of its own, by stored names."""
        whole, packed = self.source.weights, dict(self.written.weights.packed)
        gone = {part for name in instead if name in packed for part in packed[name].parts.values()} | set(instead)
        stored = {name: place for name, place in self.stored.items() if name not in gone}
        places = {name: place for name, place in self.places.items() if name not in instead}
        packed = {name: weight for name, weight in packed.items() if name not in instead}
        tensors = _FewerTensors(whole.stored, stored, instead)
        return replace(self.written, weights=_FewerWeights(whole, tensors, packed, places))


def experts_of(source: Source, model: nn.Module) -> dict[str, Experts]:
    """The modules of experts of a model, by name, all with as many.

    Raises:
        UsageError: it has none, or not as many in each layer.
    """
    modules = experts_in(model)
    if not modules:
        raise UsageError(f"{source.name} is dense, and has no experts to drop: leave `drop_experts` out")
    counts = {module.count for module in modules.values()}
    if len(counts) > 1:
        raise UsageError(
            f"{source.name} has layers of {min(counts)} and of {max(counts)} experts: some can go where all layers have as "
            "many"
        )
    return modules


def groups_of(source: Source, model: nn.Module) -> int:
    """Of how many groups of experts a router chooses some first."""
    text: Any = source.config.get_text_config()
    count = next(iter(experts_in(model).values())).count
    found = next((n for key in ("n_group", "num_expert_group") if isinstance(n := getattr(text, key, None), int)), 1)
    return found if found > 0 and count % found == 0 else 1


def experts_of_a_token(source: Source, model: nn.Module) -> int:
    """To how many experts each token is sent, as the model is seen to do it, or else as its config says."""
    seen: list[int] = []
    modules = list(experts_in(model).values())
    handles = [
        m.register_forward_pre_hook(lambda _, args: seen.append(args[1].shape[1] if len(args) > 1 else 0))
        for m in modules
    ]
    try:
        run_without_weights(model)
    except Exception:  # whatever a model's code does where weights are zeros
        seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    said = getattr(source.config.get_text_config(), "num_experts_per_tok", None)
    return max(seen, default=0) or (said if isinstance(said, int) else 1)


def fewer(source: Source, model: nn.Module, kept: Mapping[str, KeptExperts]) -> Fewer:
    """The source without some of its experts.

    Args:
        source: of dense weights, or of such as others have packed.
        model: its skeleton.
        kept: which stay, by the names of the modules of experts.

    Raises:
        UsageError: it cannot be without them, and why not.
    """
    modules = experts_of(source, model)
    if set(kept) != set(modules):
        wrong = next(iter(set(kept) ^ set(modules)))
        raise UsageError(
            f"the recipe says which experts stay of {len(kept)} layers, and {source.name} has {len(modules)} of them, {wrong} "
            "in but one: is it of another model?"
        )
    for name, each in kept.items():
        each.check(modules[name].count, f"the recipe's choice for {name}")
    counts = {len(each.kept) for each in kept.values()}
    if len(counts) > 1:
        raise UsageError("the recipe keeps more experts in one layer than in another: all models have as many in each")
    if source.quantization is not None:
        raise UsageError(
            f"{source.name} is packed, and its experts have numbers in its config: drop experts of the dense model, which "
            "`secateur export --to dense` writes"
        )
    edited, built = _configured(source, model, counts.pop())
    found = locate(source.weights, model)
    if found.missing:
        raise UsageError(
            f"transformers converts tensors of {source.name} as it loads them, such as {found.missing[0]}: drop "
            "experts of what it saves"
        )
    places, left_out = _places(model, built, modules, kept, found), _beyond(source, model, found)
    taken = set(found.stored.values())
    places |= {name: _Place(name) for name in source.weights if name not in taken and name not in left_out}
    stored, packed = _stored(source.weights, places)
    view = replace(
        edited,
        sound=set(source.sound),
        weights=_FewerWeights(
            source.weights, _FewerTensors(source.weights.stored, stored, LoadedTensors({})), packed, places
        ),
    )
    notes = []
    if left_out:
        view = with_edits(view, {key: 0 for key in _FURTHER if key in _text_of(view)}) or view
        notes.append(
            f"{len(left_out)} tensors of layers that predict further tokens, such as {min(left_out)}, are left out: they have "
            "experts of their own, of which the model does not read any"
        )
    return Fewer(source, model, built, view, places, stored, found, locate(view.weights, built), tuple(notes))


def _configured(source: Source, model: nn.Module, count: int) -> tuple[Source, nn.Module]:
    """The source with a config for so many experts, and the skeleton of that."""
    whole = next(iter(experts_in(model).values())).count
    text = _text_of(source)
    keys = [key for key, value in text.items() if "expert" in key and _says(value, whole)]
    ways = [*([key] for key in keys), *([keys] if len(keys) > 1 else [])]
    runs = _runs(model)
    for way in ways:
        edited = with_edits(
            source, {key: [count] * len(text[key]) if isinstance(text[key], list) else count for key in way}
        )
        if edited is None:
            continue
        try:
            built = build_skeleton(edited, torch.float32)
        except SecateurError:
            continue
        if runs and not _runs(built):  # its router takes no fewer, say
            continue
        if {name: each.count for name, each in experts_in(built).items()} == dict.fromkeys(experts_in(model), count):
            return edited, built
    raise UsageError(
        f"no config of {source.name} gives {count} experts instead of {whole}: another `drop_experts` may do, or its router "
        "takes no fewer"
    )


def _runs(model: nn.Module) -> bool:
    """Whether a model can be run without its weights."""
    try:
        run_without_weights(model)
    except Exception:  # whatever a model's code does where weights are zeros
        return False
    return True


def _says(value: Any, count: int) -> bool:
    """Whether a value of a config is a number of experts, or that of each layer."""
    every = value if isinstance(value, list) else [value]
    return bool(every) and all(type(each) is int and each == count for each in every)


def _text_of(source: Source) -> dict[str, Any]:
    """What a source's config says of its text part, under its own keys."""
    if source.own_config is None:
        content: dict[str, Any] = source.config.get_text_config().to_dict()
        return content
    text = source.config.get_text_config()
    if text is source.config:
        return source.own_config
    key = next((key for key in source.config.sub_configs if getattr(source.config, key, None) is text), "")
    part = source.own_config.get(key)
    return part if isinstance(part, dict) else source.own_config


def _places(
    model: nn.Module, built: nn.Module, modules: Mapping[str, Experts], kept: Mapping[str, KeptExperts], found: Located
) -> dict[str, _Place]:
    """Where each tensor of the smaller model lies, by the names under which it is stored."""
    places: dict[str, _Place] = {}
    before, after = model.state_dict(keep_vars=True), built.state_dict(keep_vars=True)
    tied = {name for name in after if name not in found.stored}
    for name, tensor in after.items():
        if name in tied:
            continue
        module = name.rsplit(".", 3)[0]
        if module in modules and name.removeprefix(f"{module}.") in modules[module].pieces:
            e, _, rest = name.removeprefix(f"{module}.").partition(".")
            old = f"{module}.{kept[module].kept[int(e)]}.{rest}"
            if old in found.pieces:
                places[found.stored[old]] = _Place(found.stored[old], _Cut(0, kept[module].kept))
            else:
                places[found.stored[name]] = _Place(found.stored[old])
        elif tensor.shape == before[name].shape:
            places[found.stored[name]] = _Place(found.stored[name])
        else:
            owner = _layer_of(name, modules)
            places[found.stored[name]] = _Place(found.stored[name], _cut(name, before[name], tensor, kept[owner].kept))
    return places


def _layer_of(name: str, modules: Mapping[str, Experts]) -> str:
    """The module of experts that a tensor belongs to: the one with which it has most of its name in common."""

    def common(module: str) -> int:
        pairs = zip(name.split("."), module.split("."), strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(module.split(".")))

    return max(modules, key=common)


def _cut(name: str, before: Tensor, after: Tensor, kept: Sequence[int]) -> _Cut:
    differing = [dim for dim, sizes in enumerate(zip(before.shape, after.shape, strict=True)) if sizes[0] != sizes[1]]
    whole, left = before.shape[differing[0]], after.shape[differing[0]]
    extra = left - len(kept)
    if len(differing) > 1 or extra < 0:
        raise UsageError(f"{name} hangs on the number of experts in a way that is not understood")
    # Outputs beyond the experts, to none of them say, come last.
    return _Cut(differing[0], (*kept, *range(whole - extra, whole)))


def _beyond(source: Source, model: nn.Module, found: Located) -> set[str]:
    """Stored tensors of layers that no module reads and that have experts of their own."""
    used = set(found.stored.values())
    unused = [name for name in source.weights if name not in used]
    try:
        lists = find_blocks(model).lists
    except SecateurError:
        lists = []
    prefixes = set()
    for name in unused:
        match = _EXPERT.match(name)
        if match is not None:
            layer = re.match(rf"(?:{'|'.join(map(re.escape, lists))})\.\d+\.", name) if lists else None
            prefixes.add(layer[0] if layer is not None else f"{name.partition('.')[0]}.")
    return {name for name in unused if any(name.startswith(prefix) for prefix in prefixes)}


def _stored(weights: DecodedWeights, places: Mapping[str, _Place]) -> tuple[dict[str, _Place], dict[str, PackedWeight]]:
    """Where the tensors of files lie, and which weights are packed in them: the parts of one go where it goes."""
    stored: dict[str, _Place] = {}
    packed: dict[str, PackedWeight] = {}
    for name, place in places.items():
        weight = weights.packed.get(place.name)
        if weight is None:
            stored[name] = place
            continue
        parts = {}
        for part, key in weight.parts.items():
            parts[part] = _renamed(key, place.name, name)
            cut = place.cut
            if cut is not None and (cut.dim or weights.stored[key].shape[:1] != weights.form(place.name)[0][:1]):
                raise UsageError(
                    f"{place.name} is packed in a way that no expert can be taken out of: make it dense first"
                )
            stored[parts[part]] = _Place(key, cut)
        packed[name] = replace(weight, parts=parts)
    return stored, packed


def _renamed(key: str, before: str, after: str) -> str:
    """The name of a part of a weight that has another name now."""
    old, new = before.removesuffix(".weight"), after.removesuffix(".weight")
    return f"{new}{key[len(old) :]}" if key.startswith(old) else key
