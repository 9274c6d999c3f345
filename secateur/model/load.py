"""Loading a model whole, to run it: `secateur.load`, and the same for a model that is open already."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig

from secateur.errors import CheckpointError, UsageError, one_line
from secateur.formats.layouts.layout import DTYPES
from secateur.formats.layouts.packed_weight import DecodedAhead
from secateur.kernels.backends import AUTO, check_backend
from secateur.memory.free_memory import free_memory
from secateur.memory.room import limit_memory
from secateur.mixture.skipping import skip_experts
from secateur.mixture.unfuse import experts_in
from secateur.model.repacked import place_repacked, repacked
from secateur.model.source import Source, open_source, with_revision
from secateur.model.structure import build_skeleton
from secateur.model.weights import ModelWeights, materialise, tie
from secateur.offload.link import link_to
from secateur.plugin.expert_modules import fuse_again
from secateur.plugin.offloaded import may_offload
from secateur.plugin.quantization_config import SecateurConfig
from secateur.plugin.quantizer import SecateurQuantizer, current_backend
from secateur.plugin.quantizer import backend as for_backend

if TYPE_CHECKING:
    from secateur.model.dispatch import Placement
    from secateur.model.stream_room import Limits

_LOG = logging.getLogger(__name__)
# What people call devices whose name is another.
_DEVICE_NICKNAMES = {"cuda": ("gpu", "gpus", "nvidia", "rocm", "amd"), "mps": ("metal", "apple"), "cpu": ("host",)}


def best_device() -> str:
    """What `auto` stands for: cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_device(name: str | torch.device) -> torch.device:
    """The device of that name, or for `auto` the best. Raises UsageError when there is none that can be computed on here."""
    name = best_device() if name == "auto" else name
    try:
        device = torch.device(name)
    except RuntimeError as error:
        kind = str(name).partition(":")[0].lower()
        meant = next((known for known, others in _DEVICE_NICKNAMES.items() if kind in others), None)
        hint = f"did you mean {meant!r}? " if meant else ""
        raise UsageError(f"`device` {name} cannot be used here: {hint}here it can be {_device_names()}") from error
    try:
        torch.empty(1, device=device).add(1).item()
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise UsageError(f"`device` {name} cannot be used here: {why}; here it can be {_device_names()}") from error
    return device


def _device_names() -> str:
    """What can be computed on here, in words."""
    found = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        count = torch.accelerator.device_count()
        found += [accelerator.type] if count < 2 else [accelerator.type, f"{accelerator.type}:0 to {count - 1}"]
    return " or ".join(found)


def parse_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name, or None for `auto`. Raises UsageError when it is neither."""
    if name not in ("auto", *DTYPES):
        raise UsageError(f"`dtype` {name!r} is not known: it can be {', '.join(('auto', *DTYPES))}")
    return DTYPES.get(name)


def load(  # noqa: PLR0913 - users name them
    model: str | Path,
    backend: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: str | int | Mapping[Any, Any] | None = None,
    offload_folder: str | Path | None = None,
    expert_skip: float | None = None,
) -> Any:
    """Load a model that secateur can read, as a transformers model ready to run.

    Args:
        model: a folder (dense, compressed by secateur, or packed by others, see docs/interchange.md), a hub id, a `.gguf` file,
            or `demo`.
        backend: what computes with packed weights. `dense` unpacks them while loading; `auto` takes the fastest that is
            installed for the device; for the others see docs/backends.md. None: what `secateur.backend` says, else `auto`.
        dtype: of the loaded weights; None keeps that of the files.
        device: where they go.
        revision: branch, tag or commit of a model of the hub, as `id@revision` says it too.
        trust_remote_code: whether code that comes with the model may run.
        verify: compare the SHA-256 of every file with the folder's manifest before any is opened. What they hold is checked
            in any case.
        device_map: shares the model out between devices, the CPU's memory and disk, as transformers' `from_pretrained` does,
            instead of `device`. Packed weights of blocks that go to disk are read from the files whenever they are wanted;
            what is dense lies in the CPU's memory before.
        max_memory: what `device_map="auto"` may fill. Without a `device_map`, the most memory of the host that the process may
            have in use, in bytes or in words such as `4GiB`: what is more is read from the files each time that it is wanted.
            Or by device, `{"cuda": "8GiB", "cpu": "16GiB"}`: of the first, what the model may take there.
        offload_folder: where what goes to disk goes.
        expert_skip: of a mixture of experts that was compressed with `expert_skip`, the share of each token's experts beside
            the first that are left out, 0 for none; None: as it was compressed with.

    Raises:
        SecateurError: there is no such model or backend, the backend cannot be used here or with these weights, the files are
            damaged, or, if that is asked for, not those that the manifest names.
    """
    backend = current_backend() if backend is None else backend
    check_backend(backend)
    target = open_device(device)
    placement = None
    if device_map is not None:
        if target.type != "cpu":
            raise UsageError("device and device_map both say where the model goes: leave one of them out")
        if isinstance(max_memory, str | int):
            raise UsageError("with a device_map max_memory says what each device may hold: {'cpu': '4GiB'}")
        from secateur.model.dispatch import Placement

        placement = Placement(device_map, max_memory, offload_folder)
    elif offload_folder is not None:
        raise UsageError("offload_folder is for a device_map: add device_map='auto', or leave it out")
    source = open_source(with_revision(model, revision), trust_remote_code, verify, dtype, codes=backend != "dense")
    if max_memory is not None and placement is None:
        loaded = load_within(source, dtype or source.dtype, target, max_memory, backend)
    else:
        loaded = load_source(source, dtype or source.dtype, target, backend=backend, placement=placement)
    skip_experts(loaded, source.quantization, expert_skip)
    return loaded


def load_source(
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    check_finite: bool = False,
    backend: str = "dense",
    placement: Placement | None = None,
    apart: bool = False,
) -> Any:
    """The whole model of an open source, its floating weights as `dtype`, for a backend.

    A model from a folder of secateur's knows how to save itself packed, as one loaded by `from_pretrained` does; so does one
    whose weights others have packed, where layouts of ours hold them.

    Args:
        apart: whether experts of mixtures stay linears of their own also where no weight of them is packed.

    Raises:
        UsageError: the backend cannot be used with these weights.
        CheckpointError: a tensor is missing or damaged, has another shape than the model's, or, if that is to be checked,
            holds a value that is not finite.
    """
    if source.loaded is not None:
        return _as_it_is(source, dtype, device, backend)
    _LOG.info("loading %s in %s on %s, for backend %s", source.name, dtype, device, backend)
    quantizer = None if source.quantization is None else SecateurQuantizer(SecateurConfig(**source.quantization))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        held = repacked(source.weights, pool) if quantizer is None and backend != "dense" else {}
        if backend not in (AUTO, "dense") and quantizer is None and not held:
            raise UsageError(
                f"{source.name} has no packed weights that backend {backend!r} computes on: leave `backend` out"
            )
        if quantizer is None or backend == "dense":
            # Decoding is C code that other threads run while this one builds the model.
            source = replace(source, weights=DecodedAhead(source.weights, pool, held))
        model: Any = build_skeleton(source, dtype)
        weights = ModelWeights(source, model)
        if quantizer is not None:
            main = device if placement is None else placement.main_device
            offload = placement is not None and may_offload(placement.device_map)
            with for_backend(backend):
                quantizer.preprocess_model(model, weights=source.weights, device_map=main, offload=offload)
        elif held:
            with for_backend(backend):
                quantizer = place_repacked(model, held, device if placement is None else placement.main_device)
        materialise(model, "", list(model.state_dict()), weights, device, check_finite=check_finite)
    tie(model)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise CheckpointError(f"{source.name} lacks the tensor {left[0]}")
    if not apart and (quantizer is None or backend == "dense"):
        fuse_again(model, experts_in(model))
    if placement is not None:
        from secateur.model.dispatch import dispatch

        dispatch(model, placement)
    else:
        model.to(device)  # buffers that are computed, not stored
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
        if not quantizer.older_names(model):
            model._weight_conversions = []  # else transformers saves it under the names of older releases
    _set_generation(source, model)
    _spare_head(model)
    return model


def load_within(
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    max_memory: str | int | Mapping[Any, Any],
    backend: str,
    tokens: int | None = None,
) -> Any:
    """A model of an open source that takes no more memory than it may, see `load` and `load_streamed`."""
    if source.loaded is not None:
        raise UsageError(f"{source.name} is in memory already: leave `max_memory` out")
    from secateur.model.streaming import load_streamed

    limits = _limits(max_memory, device)
    model = load_streamed(source, dtype, limits, backend, **({} if tokens is None else {"tokens": tokens}))
    _set_generation(source, model)
    _spare_head(model)
    return model


def _limits(max_memory: str | int | Mapping[Any, Any], device: torch.device) -> Limits:
    """What may be in memory: of the host, in words or bytes, or by device, of which there is one beside the host.

    Raises:
        UsageError: the words are no size, or a device cannot be used.
    """
    from secateur.model.stream_room import Limits

    asked = dict(max_memory) if isinstance(max_memory, Mapping) else {"cpu": max_memory}
    here = limit_memory(asked.pop("cpu", None))
    here = free_memory() if here is None else here
    if len(asked) > 1:
        names = ", ".join(map(str, asked))
        raise UsageError(
            f"`max_memory` names several devices ({names}): add device_map='auto', or name one beside the cpu"
        )
    there = None
    for name, size in asked.items():
        device = open_device(f"cuda:{name}" if isinstance(name, int) else name)
        there = limit_memory(size)
    if device.type == "cpu":
        return Limits(here)
    if device.type != "cuda":
        raise UsageError(
            f"`max_memory` is for the CPU and for CUDA devices, not for {device.type}: leave it or `device` out"
        )
    free = torch.cuda.mem_get_info(device)[0]
    return Limits(here, free if there is None else min(there, free), link_to(device))


def _as_it_is(source: Source, dtype: torch.dtype, device: torch.device, backend: str) -> Any:
    """A model that is in memory. Raises UsageError where something else is asked for than what it is."""
    model = source.loaded
    # What evaluation takes where nothing is said counts as nothing said.
    asked = {
        "dtype": dtype not in (torch.float32, model.dtype),
        "device": device.type not in ("cpu", model.device.type),
        "backend": backend not in (AUTO, "dense"),
    }
    wrong = next((name for name, differs in asked.items() if differs), None)
    if wrong is not None:
        raise UsageError(
            f"{source.name} is in memory, in {str(model.dtype).removeprefix('torch.')} on {model.device}, and runs as it is: "
            f"leave `{wrong}` out"
        )
    return model


def _spare_head(model: Any) -> None:
    """Have the head of a model be multiplied as it lies in memory.

    After a prompt it is given the last of several tokens, which lie apart from one another; torch copies a weight that does not
    train to multiply that, and the head is the largest of all.
    """
    head = model.get_output_embeddings()
    if getattr(head, "original", type(head)) is nn.Linear:  # its own class, or that of `decode_steps`
        head.register_forward_pre_hook(_side_by_side)


def _side_by_side(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs of a linear without gaps between tokens."""
    x, *rest = args
    return (x.reshape(-1, x.shape[-1]).view(x.shape), *rest)


def _set_generation(source: Source, model: Any) -> None:
    """Give a model the generation settings that come with it. Raises CheckpointError when they are damaged."""
    if source.folder is None or not (source.folder / "generation_config.json").exists():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(source.folder, local_files_only=not source.from_hub)
    except Exception as error:
        raise CheckpointError(f"{source.folder / 'generation_config.json'}: {one_line(error)}") from error
