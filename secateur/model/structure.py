"""Finding a decoder's blocks, and the linears in them, by structure instead of by a list of architectures."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from secateur.errors import CheckpointError, UsageError, one_line
from secateur.mixture.experts import Experts
from secateur.mixture.unfuse import fused_in, routers_in, unfuse
from secateur.model.block_names import lists_of
from secateur.model.limits import check_sizes, few_parameters
from secateur.model.located import stored_names
from secateur.model.source import Source
from secateur.model.weights import place
from secateur.plugin.block_widths import fit_blocks
from secateur.plugin.computed_buffers import buffers_from_nothing, compute_buffers

#: What counts as a linear: GPT-2's Conv1D is one that keeps its weight as `[I, O]`.
LINEARS = (nn.Linear, Conv1D)
Linear = nn.Module
#: Tokens by which is seen what a text runs.
TRACED_TOKENS = 8


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
        model: Any = None
        # On the meta device first, where even a model that would not fit anywhere takes no memory. Classes of transformers can
        # all be made there; code of a checkpoint, which the user trusts, need not.
        if not (source.trust_remote_code and hasattr(source.config, "auto_map")):
            with torch.device("meta"), no_init_weights(), few_parameters(source.name, source.weights):
                model = AutoModelForCausalLM.from_config(config, **options)
            fit_blocks(model, source.widths, meta=True)
            check_sizes(source.name, model, source.files)
        if model is None or not buffers_from_nothing(model):
            with init_empty_weights(include_buffers=False), no_init_weights():
                model = AutoModelForCausalLM.from_config(config, **options)
            fit_blocks(model, source.widths)
            compute_buffers(model)
    except CheckpointError:
        raise
    except Exception as error:
        raise UsageError(f"{source.name} cannot be built by transformers: {one_line(error)}") from error
    for name, tensor in kept_in_float32(model, dtype):
        owner, leaf = name.rpartition(".")[::2]
        place(model.get_submodule(owner), leaf, tensor.to(torch.float32))
    unfuse(model, fused_in(model))
    model.tie_weights()  # made on the meta device, every parameter is one of its own
    _check_head(source, model)
    return model.eval()


def _config_for(config: Any, dtype: torch.dtype) -> Any:
    """A copy of a config by which all parts of a model, also those with a config of their own, are made in a dtype."""
    config = deepcopy(config)
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    return config


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


def _check_head(source: Source, model: Any) -> None:
    """Raise UsageError where a checkpoint is said to be of a decoder alone, and has no head to predict words with."""
    named = getattr(source.config, "architectures", None)
    found = ", ".join(map(str, named)) if isinstance(named, list) else ""
    if not found or type(model).__name__.lower() in found.lower():
        return
    head = model.get_output_embeddings()
    names = [f"{name}.weight" for name, module in model.named_modules() if module is head]
    lacking = [name for name in stored_names(source.weights, model)[1] if name in names]
    if lacking:
        raise UsageError(
            f"{source.name} is a {found}, a model without the head that predicts words: its files lack {lacking[0]}"
        )


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a model.

    Attributes:
        modules: by full name, in the order in which a text reaches them.
        idle: names of blocks in lists like theirs that a text does not run: those of an image encoder, say.
        unreached: names of linears in blocks that a text runs without calling them (None: not known).
    """

    modules: dict[str, nn.Module]
    idle: tuple[str, ...] = ()
    unreached: frozenset[str] | None = None

    @property
    def lists(self) -> list[str]:
        """The names of the lists that the blocks are in."""
        return lists_of(self.modules)

    @property
    def linears(self) -> dict[str, Linear]:
        """The linears of all blocks by full name."""
        return {name: m for prefix, block in self.modules.items() for name, m in block_linears(block, prefix).items()}


def find_blocks(model: nn.Module) -> Blocks:
    """The decoder blocks: what a few tokens of text run of the lists of modules with linears in them.

    Where a model cannot be run on text without its weights, it is the longest of the lists in its decoder.

    Raises:
        UsageError: there is no such list.
    """
    lists = _block_lists(model)
    if not lists:
        raise UsageError(f"{type(model).__name__} has no list of decoder blocks with linears: it cannot be compressed")
    everything = {f"{name}.{i}": block for name, blocks in lists.items() for i, block in enumerate(blocks)}
    ran = _modules_run(model, everything)
    if ran is None:
        decoder = _in_decoder(model, lists)
        longest = max(decoder, key=lambda name: (len(lists[name]), sum(p.numel() for p in lists[name].parameters())))
        run = [name for name in everything if name.rpartition(".")[0] == longest]
    else:
        run = [name for name in ran if name in everything]
    found = {name: everything[name] for name in run}
    if not any(isinstance(part, LINEARS) for block in found.values() for part in block.modules()):
        raise UsageError(f"{type(model).__name__} runs no list of blocks with linears on text: it cannot be compressed")
    idle = tuple(name for name in everything if name not in found)
    if ran is None:
        return Blocks(found, idle)
    return Blocks(found, idle, frozenset(name for name in Blocks(found).linears if name not in ran))


def _block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules with linears in them. Bare linears in a list, one for each block, are no blocks."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and not any(isinstance(block, LINEARS) for block in module)
            and any(isinstance(part, LINEARS) for part in module.modules())
            and not any(name.startswith(f"{outer}.") for outer in found)
        ):
            found[name] = module
    return found


def _in_decoder(model: nn.Module, lists: dict[str, nn.ModuleList]) -> list[str]:
    """The names of the lists in what transformers calls the decoder of a model; of all lists where none is in it."""
    get_decoder: Any = getattr(model, "get_decoder", lambda: model)
    decoder = get_decoder()
    inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    return [name for name in lists if id(lists[name]) in inside] or list(lists)


def body_of(model: nn.Module) -> nn.Module:
    """The model without its head, whose logits would be the largest tensor of all."""
    return getattr(model, getattr(model, "base_model_prefix", ""), model)


def _modules_run(model: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, None] | None:
    """The names of blocks, and of linears in them, in the order in which a few tokens reach them; None: it cannot be told."""
    order: dict[str, None] = {}
    names = {id(block): name for name, block in blocks.items()}
    names |= {id(m): n for name, block in blocks.items() for n, m in block_linears(block, name).items()}

    def note(module: nn.Module, _: Any) -> None:
        order.setdefault(names[id(module)])

    def note_all(experts: nn.Module, _: Any) -> None:
        for module in experts.modules():
            if id(module) in names:
                order.setdefault(names[id(module)])

    handles = [module.register_forward_pre_hook(note) for module in model.modules() if id(module) in names]
    # Few tokens do not go to all experts.
    handles += [m.register_forward_pre_hook(note_all) for m in model.modules() if isinstance(m, Experts)]
    try:
        run_without_weights(model)
    except Exception:  # whatever a model's code does where weights are zeros
        return None
    finally:
        for handle in handles:
            handle.remove()
    return order


def run_without_weights(model: nn.Module) -> None:
    """Run the body of a model on a few tokens, for its hooks to see what is called with what.

    No weights are needed, and little memory: linears give zeros, and all other parameters are zeros that share one place.
    """
    device = next((b.device for b in model.buffers() if b.device.type != "meta"), torch.device("cpu"))
    parameters = [(m, leaf, p) for m in model.modules() for leaf, p in m._parameters.items() if p is not None]
    # Those of other classes, routers say, may return something else.
    linears = [m for m in model.modules() if type(m).forward in (nn.Linear.forward, Conv1D.forward)]
    linears = [linear for linear in linears if "forward" not in vars(linear)]
    try:
        for owner, leaf, p in parameters:
            zeros = torch.zeros((), dtype=p.dtype, device=device).expand(p.shape)
            owner._parameters[leaf] = nn.Parameter(zeros, requires_grad=False)
        for linear in linears:
            linear.forward = _zeros_like_output(linear)
        with torch.no_grad():
            body_of(model)(input_ids=torch.ones(1, TRACED_TOKENS, dtype=torch.long, device=device), use_cache=False)
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)
        for owner, leaf, p in parameters:
            owner._parameters[leaf] = p


def _zeros_like_output(linear: Linear) -> Callable[[Tensor], Tensor]:
    features = weight_matrix(linear).shape[0]
    return lambda x: x.new_zeros(*x.shape[:-1], features)


def shared_parameters(model: nn.Module) -> dict[str, list[str]]:
    """The names of parameters that have several: each name → all of them."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return {name: names for names in owners.values() if len(names) > 1 for name in names}


def block_linears(block: nn.Module, prefix: str) -> dict[str, Linear]:
    """The linears of a block by full name, in the order they are defined, but for those that choose among experts, and those
    of no weights, of which a structured pattern left nothing.
    """
    routers = routers_in(block)
    return {
        f"{prefix}.{name}": m
        for name, m in block.named_modules()
        if isinstance(m, LINEARS) and not _is_empty(m) and not (routers and _is_within(name, routers))
    }


def empty_linears(model: nn.Module) -> set[str]:
    """The names of linears of no weights."""
    return {name for name, module in model.named_modules() if isinstance(module, LINEARS) and _is_empty(module)}


def _is_empty(linear: Linear) -> bool:
    shape = (
        (linear.in_features, linear.out_features)
        if isinstance(linear, nn.Linear)
        else linear.get_parameter("weight").shape
    )
    return 0 in shape


def _is_within(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def select_linears(names: Iterable[str], targets: tuple[str, ...], ignore: tuple[str, ...]) -> list[str]:
    """The names that match a target pattern (any, if there are none) and no pattern to ignore.

    Raises:
        UsageError: a pattern matches nothing, or nothing is left.
    """
    names = list(names)
    for option, patterns in (("targets", targets), ("ignore", ignore)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(
                    f"`{option}` {pattern!r} matches none of the linears, which are called like {names[0]}"
                )
    chosen = [
        name
        for name in names
        if (not targets or any(fnmatchcase(name, p) for p in targets)) and not any(fnmatchcase(name, p) for p in ignore)
    ]
    if not chosen:
        raise UsageError("nothing is left to compress: `targets` and `ignore` rule every linear out")
    return chosen


def weight_matrix(linear: Linear) -> Tensor:
    """The weight as `[O, I]`; a Conv1D keeps it the other way round."""
    weight = linear.get_parameter("weight")
    return weight.T if is_transposed(linear) else weight


def is_transposed(linear: Linear) -> bool:
    """Whether the module keeps its weight as `[I, O]`."""
    return isinstance(linear, Conv1D)


def parameters_outside(model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers that are not in a block."""
    inside = {id(t) for block in blocks for t in [*block.parameters(), *block.buffers()]}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in inside:
            yield name, tensor
