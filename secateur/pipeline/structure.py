"""Finding a decoder's blocks, and the linears in them, by structure instead of by a list of architectures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from fnmatch import fnmatchcase
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from secateur.errors import CheckpointError, UsageError, one_line
from secateur.pipeline.limits import check_sizes, few_parameters
from secateur.pipeline.source import Source
from secateur.pipeline.weights import place

#: What counts as a linear: GPT-2's Conv1D is one that keeps its weight as `[I, O]`.
LINEARS = (nn.Linear, Conv1D)
Linear = nn.Module


def build_skeleton(source: Source, dtype: torch.dtype) -> nn.Module:
    """The model with its parameters on the meta device and its computed buffers (rotary frequencies, say) in place.

    Every tensor has the dtype that `from_pretrained(dtype=dtype)` gives it: not all are of that dtype.

    Raises:
        UsageError: transformers cannot build it.
        CheckpointError: it is larger than its files can hold.
    """
    options = {"dtype": dtype, "trust_remote_code": source.trust_remote_code}
    config = _config_for(source.config, dtype)
    try:
        # On the meta device first, where even a model that would not fit anywhere takes no memory. Classes of transformers can
        # all be made there; code of a checkpoint, which the user trusts, need not.
        if not (source.trust_remote_code and hasattr(source.config, "auto_map")):
            with torch.device("meta"), few_parameters(source.name, source.weights):
                check_sizes(source.name, AutoModelForCausalLM.from_config(config, **options), source.files)
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, **options)
        _compute_buffers(model)
    except CheckpointError:
        raise
    except Exception as error:
        raise UsageError(f"{source.name} cannot be built by transformers: {one_line(error)}") from error
    for name, tensor in kept_in_float32(model, dtype):
        owner, leaf = name.rpartition(".")[::2]
        place(model.get_submodule(owner), leaf, tensor.to(torch.float32))
    model.tie_weights()  # made on the meta device, every parameter is one of its own
    return model.eval()


def _config_for(config: Any, dtype: torch.dtype) -> Any:
    """A copy of a config by which all parts of a model, also those with a config of their own, are made in a dtype."""
    config = deepcopy(config)
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    return config


def _compute_buffers(model: Any) -> None:
    """Compute the buffers of a model anew, as `from_pretrained` does, in float32.

    While a model is made, the dtype of its weights is torch's default, in which positions above a few hundred and their sines
    are rounded.
    """
    with torch.no_grad():
        model.initialize_weights()


def kept_in_float32(model: Any, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """The floating parameters and saved buffers of a model that transformers loads as float32 where the rest is of a dtype."""
    # A method since transformers 5.1; in 5.0 an attribute, which holds for all dtypes.
    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else model.dtype_plan
    if not plan:
        return []
    pattern = re.compile("|".join(glob.replace("*", ".*") for glob in plan))
    return [
        (name, tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.is_floating_point() and pattern.search(name)
    ]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder blocks: the longest list of like modules with linears in them.

    Of lists equally long the one with the most parameters is taken.

    Raises:
        UsageError: there is no such list.
    """

    def rank(blocks: nn.ModuleList) -> tuple[int, int]:
        return len(blocks), sum(p.numel() for p in blocks.parameters())

    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(block) for block in module}) == 1
        and any(isinstance(part, LINEARS) for block in module for part in block.modules())
    }
    if not candidates:
        raise UsageError(f"{type(model).__name__} has no list of decoder blocks with linears: it cannot be compressed")
    name = max(candidates, key=lambda n: rank(candidates[n]))
    return name, candidates[name]


def check_no_experts(block: nn.Module, name: str) -> None:
    """Raise UsageError when a block routes its tokens to experts."""
    for part, module in block.named_modules():
        # A convolution, as blocks with a short memory have, keeps three dimensions too; a vector may be kept as [1, 1, I].
        fused = not isinstance(module, nn.Conv1d) and any(
            p.ndim == 3 and len(p) > 1 for p in module.parameters(recurse=False)
        )
        listed = isinstance(module, nn.ModuleList) and any(isinstance(m, LINEARS) for m in module.modules())
        if fused or (listed and "expert" in part):
            raise UsageError(
                f"{name}.{part} holds a mixture of experts: secateur does not compress mixture-of-experts models yet"
            )


def block_linears(block: nn.Module, prefix: str) -> dict[str, Linear]:
    """The linears of a block by full name, in the order they are defined."""
    return {f"{prefix}.{name}": m for name, m in block.named_modules() if isinstance(m, LINEARS)}


def select_linears(names: Iterable[str], targets: tuple[str, ...], ignore: tuple[str, ...]) -> list[str]:
    """The names that match a target pattern (any, if there are none) and no pattern to ignore.

    Raises:
        UsageError: a pattern matches nothing, or nothing is left.
    """
    names = list(names)
    for option, patterns in (("--targets", targets), ("--ignore", ignore)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(f"{option} {pattern!r} matches none of the linears, which are called like {names[0]}")
    chosen = [
        name
        for name in names
        if (not targets or any(fnmatchcase(name, p) for p in targets)) and not any(fnmatchcase(name, p) for p in ignore)
    ]
    if not chosen:
        raise UsageError("nothing is left to compress: --targets and --ignore rule every linear out")
    return chosen


def weight_matrix(linear: Linear) -> Tensor:
    """The weight as `[O, I]`; a Conv1D keeps it the other way round."""
    weight = linear.get_parameter("weight")
    return weight.T if is_transposed(linear) else weight


def is_transposed(linear: Linear) -> bool:
    """Whether the module keeps its weight as `[I, O]`."""
    return isinstance(linear, Conv1D)


def generalise(entries: dict[str, dict[str, Any]], prefix: str, absent: set[str]) -> dict[str, dict[str, Any]]:
    """Entries for modules of numbered blocks as few entries with `*` in place of the number.

    A pattern stands only where every module it matches has the same entry; others are named one by one.

    Args:
        entries: module name → entry.
        prefix: name of the list of blocks.
        absent: linears without an entry, which no pattern may match.
    """
    patterns: dict[str, list[str]] = {}
    for name in entries:
        number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        patterns.setdefault(f"{prefix}.*.{rest}" if number.isdigit() and rest else name, []).append(name)
    result: dict[str, dict[str, Any]] = {}
    for pattern, names in patterns.items():
        matched = {name for name in [*entries, *absent] if fnmatchcase(name, pattern)}
        if matched == set(names) and all(entries[name] == entries[names[0]] for name in names):
            result[pattern] = entries[names[0]]
        else:
            result.update({name: entries[name] for name in names})
    return result


def parameters_outside(model: nn.Module, blocks: nn.ModuleList) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers that are not in a block."""
    inside = {id(t) for t in [*blocks.parameters(), *blocks.buffers()]}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in inside:
            yield name, tensor
