"""Blocks that are narrower than the config of their model says, each by itself: what our section of it says of them.

transformers builds all blocks alike from the configs of most families. Here a block that differs is built once more, by its own
class, from a config in which its own numbers stand.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from secateur.errors import CheckpointError, one_line
from secateur.plugin.names import spellings

#: Where our section of a config says it.
KEY = "widths"
# Of what a module returns.
_MOST_VALUES = 8


@dataclass(frozen=True)
class BlockWidths:
    """How a block differs from what the config says of all.

    Attributes:
        settings: numbers of the config, the text's part of it, that are others for this block.
        absent: linears, by their names within the block, that read nothing any more, so that the module which they end has
            nothing to compute: how many values that returns. A tensor alone is one.
    """

    settings: Mapping[str, int] = field(default_factory=dict)
    absent: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As a config has it."""
        return {key: value for key, value in asdict(self).items() if value}

    def changed(self, other: BlockWidths) -> BlockWidths:
        """The same with what else differs by now."""
        return BlockWidths({**self.settings, **other.settings}, {**self.absent, **other.absent})


def parse_widths(section: Any) -> dict[str, BlockWidths]:
    """What our section of a config says of blocks, by their names. Raises CheckpointError when it makes no sense."""
    said = section.get(KEY) if isinstance(section, Mapping) else None
    if said is None:
        return {}
    if not isinstance(said, Mapping):
        raise CheckpointError(f"'{KEY}' of the checkpoint's quantization_config is no mapping of blocks")
    found = {}
    for name, each in said.items():
        parts = each if isinstance(each, Mapping) else {"": each}
        settings, absent = parts.get("settings", {}), parts.get("absent", {})
        sound = (
            set(parts) <= {"settings", "absent"} and _counts(settings, 0, 2**31) and _counts(absent, 1, _MOST_VALUES)
        )
        if not sound or not str(name).rpartition(".")[2].isdecimal():
            raise CheckpointError(f"'{KEY}' of the checkpoint's quantization_config makes no sense for {name!r}")
        found[name] = BlockWidths(dict(settings), dict(absent))
    return found


def with_widths(section: dict[str, Any], widths: Mapping[str, BlockWidths]) -> dict[str, Any]:
    """Our section of a config with what it says of blocks, where any has widths of its own."""
    return {**section, KEY: {name: own.to_dict() for name, own in widths.items()}} if widths else section


def _counts(said: Any, least: int, most: int) -> bool:
    return isinstance(said, Mapping) and all(
        isinstance(key, str) and type(value) is int and least <= value <= most for key, value in said.items()
    )


def fit_blocks(model: Any, widths: Mapping[str, BlockWidths], meta: bool = False) -> None:
    """Put blocks of their own widths in the place of those that a model was built with.

    Args:
        model: whose parameters are on the meta device.
        widths: by the names of blocks.
        meta: whether buffers are to be there, too, for transformers to compute.

    Raises:
        CheckpointError: there is no such block, or it is none of such a model, or would be wider.
    """
    for name, own in widths.items():
        place = next((each for each in spellings(model, name) if _is_block(model, each)), None)
        if place is None:
            raise CheckpointError(f"the checkpoint's quantization_config has widths of {name}, which the model has not")
        blocks, number = model.get_submodule(place.rpartition(".")[0]), int(place.rpartition(".")[2])
        blocks[number] = built_block(model, blocks[number], place, own, meta)


def _is_block(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
        return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList)
    except AttributeError:
        return False


def built_block(model: Any, block: nn.Module, name: str, own: BlockWidths, meta: bool = False) -> nn.Module:
    """A block like one of a model, called `name`, but for its widths. Raises CheckpointError where that cannot be."""
    config = model.config.get_text_config()
    _check_settings(config, name, own.settings)
    narrow = deepcopy(config)
    narrow.__dict__.update(own.settings)  # what checks a config as a whole takes no such numbers
    try:
        with _without_weights(model.dtype, meta):
            found: nn.Module = type(block)(narrow, **_number_of(type(block), name))
    except Exception as error:  # whatever a model's code does with such numbers
        raise CheckpointError(f"{name} cannot be built with its own widths: {one_line(error)}") from error
    for module in found.modules():
        if vars(module).get("config") is narrow and not _reads(module, own.settings):
            module.config = config  # which is told of other ways of attention
    for consumer, returns in own.absent.items():
        _take_out(found, name, consumer, returns)
    _check_narrower(block, found, name)
    return found.train(block.training)


def _reads(module: nn.Module, settings: Mapping[str, int]) -> bool:
    """Whether a module looks some settings up each time that it runs."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is None or not settings.keys().isdisjoint(code.co_names)


def _check_settings(config: Any, name: str, settings: Mapping[str, int]) -> None:
    content = config.to_dict()
    for key, value in settings.items():
        known = content.get(key)
        if type(known) not in (int, type(None)) or (known is not None and value > known):
            raise CheckpointError(
                f"{name} says {key} {value}, and config.json {known!r}: no block can be wider than that"
            )


def _number_of(kind: type[nn.Module], name: str) -> dict[str, int]:
    takes = inspect.signature(kind.__init__).parameters
    return {"layer_idx": int(name.rpartition(".")[2])} if "layer_idx" in takes else {}


@contextmanager
def _without_weights(dtype: torch.dtype, meta: bool) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta") if meta else init_empty_weights(include_buffers=False), no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def _check_narrower(block: nn.Module, found: nn.Module, name: str) -> None:
    before = dict(block.named_parameters())
    for leaf, parameter in found.named_parameters():
        wide = before.get(leaf)
        if wide is not None and any(now > was for now, was in zip(parameter.shape, wide.shape, strict=True)):
            raise CheckpointError(
                f"{name}.{leaf} is {list(parameter.shape)} by its own widths, which does not fit the model"
            )


def _take_out(block: nn.Module, name: str, consumer: str, returns: int) -> None:
    path, _, leaf = consumer.rpartition(".")
    try:
        linear, module = block.get_submodule(consumer), block.get_submodule(path)
    except AttributeError:
        linear = module = block
    if not path or not isinstance(linear, nn.Linear | Conv1D):
        raise CheckpointError(f"{name}.{consumer} is said to read nothing, and is no linear that ends a module")
    block.set_submodule(path, Nothing(leaf, linear, returns, getattr(module, "layer_idx", None)))


class Nothing(nn.Module):
    """Stands for a module of which nothing is left but the linear at its end, which reads nothing: it gives its bias.

    Args:
        leaf: the name of the linear in it.
        linear: as it was.
        returns: how many values the module gave, of which the first counts.
        layer_idx: of the cache, where the module had one, which has to know how many tokens there were.
    """

    def __init__(self, leaf: str, linear: nn.Module, returns: int, layer_idx: int | None) -> None:
        super().__init__()
        weight = linear.get_parameter("weight")
        O = weight.shape[1] if isinstance(linear, Conv1D) else weight.shape[0]
        self.leaf, self.returns, self.layer_idx, self.features = leaf, returns, layer_idx, O
        shape = (0, O) if isinstance(linear, Conv1D) else (O, 0)
        linear._parameters["weight"] = nn.Parameter(weight.new_empty(shape), requires_grad=weight.requires_grad)
        if isinstance(linear, nn.Linear):
            linear.in_features = 0
        self.add_module(leaf, linear)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        cache = next((each for each in (*args, *kwargs.values()) if isinstance(each, Cache)), None)
        if cache is not None and self.layer_idx is not None:
            token = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
            cache.update(token, token, self.layer_idx)
        linear: Any = self.get_submodule(self.leaf)
        out = hidden.new_zeros(*hidden.shape[:-1], self.features)
        out = out if linear.bias is None else out + linear.bias
        return out if self.returns == 1 else (out, *[None] * (self.returns - 1))
