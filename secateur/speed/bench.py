"""What each packed linear of a checkpoint costs: time and bytes, against dense and against the machine's memory.

Decoding reads every weight once a token, so memory bounds it, and a kernel is as good as the share of the memory's bandwidth
that it makes use of, with no more bytes counted than it needs. That is the sparse memory bandwidth utilization, S-MBU, of
MoE-CAP (Jiang et al. 2024, arXiv 2412.07067): the bytes that are active for a token, over time and bandwidth. Here it is taken
linear by linear, the active bytes are those of the packed weight with inputs and outputs, and the bandwidth is what a copy
reaches on the machine, not the one on its data sheet. A mixture of experts is measured as a whole besides: see `decoding`.

O: output features, I: input features, T: tokens.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur import kernels
from secateur.errors import UsageError
from secateur.formats.layouts.layout import Layout
from secateur.kernels import AUTO, Prepared, check_backend, choose, prepare
from secateur.kernels.backends import KEPT_TOKENS, why_not
from secateur.kernels.module import PackedLinear
from secateur.kernels.packed import Packed, map_tensors, nbytes
from secateur.model.in_memory import open_model
from secateur.model.load import load_within, open_device, parse_dtype
from secateur.model.source import Source
from secateur.model.structure import build_skeleton
from secateur.model.vocabulary import EMBEDDINGS, find_tables, is_tied
from secateur.plugin.names import stored_as
from secateur.speed.bench_result import Bench, Case
from secateur.speed.decoding import decode_source
from secateur.speed.inputs_read import shares_read, some_inputs
from secateur.speed.streamed_decoding import TOKENS, time_streamed
from secateur.speed.timing import COLD, cache_bytes, free_bytes, large_copy, time_in_turn

# Copies of a weight at most: more of one so small would take longer to make than to measure.
_MOST_COPIES = 4096
# What packed and dense copies may each take of the free memory.
_MEMORY_SHARE = 1 / 8
# What `auto` would have taken where it had to fall back to dense weights.
_WANTED = {"cpu": "cpu", "cuda": "triton"}


def bench(  # noqa: PLR0913 - users name them
    model: str | PreTrainedModel,
    backend: str = AUTO,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    tokens: Sequence[int] = (1,),
    threads: int | None = None,
    seconds: float = 2.0,
    max_memory: str | int | dict[Any, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Bench:
    """Time the packed linears of a checkpoint, in turn with dense linears of their shapes, and a whole mixture of experts.

    Every call takes another weight: the checkpoint's own, and copies of them where these together would stay in the last-level
    cache. Biases are left out. On a GPU the time is that of calls from Python, not of a CUDA graph.

    Args:
        model: a folder made by secateur, or one that was loaded, as an object.
        backend: `auto`, or the name of one.
        device: where to compute.
        dtype: to compute in; `auto` is that of the files.
        tokens: how many inputs a call takes; one row of figures for each.
        threads: of the CPU; None leaves that to torch.
        seconds: to spend on each row of figures, about.
        max_memory: as in `load`. The model is then timed as it writes, with what memory does not hold read for every
            token, and not its linears one by one.
        revision: branch, tag or commit of a model of the hub, as `id@revision` says it too.
        trust_remote_code: whether code that comes with the model may run.
        progress: called with (rows done, rows in total).

    Raises:
        UsageError: there is no such model, it has no packed linears, or the backend, device or dtype cannot be used.
        CheckpointError: files are damaged.
    """
    check_backend(backend)
    wanted = parse_dtype(dtype)
    if not tokens or min(tokens) < 1:
        raise UsageError(
            f"`tokens` {','.join(map(str, tokens))}: there must be at least one number, and all at least 1"
        )
    target = open_device(device)
    source = open_model(model, revision=revision, trust_remote_code=trust_remote_code, dtype=wanted)
    computed = wanted or source.dtype
    name = str(computed).removeprefix("torch.")
    if max_memory is not None:
        with _threads(threads), torch.inference_mode():
            model = load_within(source, computed, target, max_memory, backend, max(tokens) * TOKENS)
            streamed, transfers = time_streamed(model, tokens, seconds, progress)
            used, where = torch.get_num_threads(), str(model.device)
        return Bench(
            *(source.name, backend, where, name, used, math.nan, (), None),
            streamed=tuple(streamed),
            transfers=transfers,
        )
    with _threads(threads), torch.inference_mode():
        _check_packed(source)
        written, product_flops = decode_source(source, backend, target, computed, tokens)
        groups, fallback = _group(source, backend, target, computed)
        cases, bandwidth = _measure_all(groups, tokens, target, computed, seconds, progress)
        used = torch.get_num_threads()
    return Bench(
        source.name, backend, str(target), name, used, bandwidth, tuple(cases), fallback, tuple(written), product_flops
    )


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Key:
    """What linears of a group have in common. `layout` is a config as JSON."""

    layout: str
    shape: tuple[int, int]
    backend: str


@dataclass
class _Group:
    """Linears that are timed together: their weights, and the share of the inputs that each reads for a token."""

    weights: list[Packed] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)


def _check_packed(source: Source) -> None:
    """Raise UsageError where there are no packed linears."""
    if next(_packed_weights(source), None) is None:
        raise UsageError(
            f"{source.name} has no linears packed by secateur to measure: make them by `secateur compress`, or, of weights "
            "with zeros, by `secateur export --to secateur`"
        )


def _group(
    source: Source, backend: str, device: torch.device, dtype: torch.dtype
) -> tuple[dict[_Key, _Group], str | None]:
    """All packed weights of a checkpoint by their key, and why `auto` could not do better than dense weights, if so.

    Raises:
        UsageError: the backend cannot compute with one of them.
    """
    packed_weights = list(_packed_weights(source))
    groups: dict[_Key, _Group] = {}
    shares = shares_read(source)
    fallback = None
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        # Reading is checking, which other threads do while this one waits for the first.
        loaded = pool.map(lambda each: each[2](), packed_weights)
        for (name, layout, _), weight in zip(packed_weights, loaded, strict=True):
            chosen = choose(weight, backend, device, dtype).name
            if backend == AUTO and chosen == "dense" and fallback is None and device.type in _WANTED:
                wanted = _WANTED[device.type]
                fallback = f"backend {wanted!r} cannot be used: {why_not(wanted, weight, device, dtype)}"
            key = _Key(json.dumps(layout.to_config()), weight.shape, chosen)
            group = groups.setdefault(key, _Group())
            group.weights.append(weight)
            group.kept.append(shares.get(name, 1.0))
    return groups, fallback


def _packed_weights(source: Source) -> Iterator[tuple[str, Layout, Callable[[], Packed]]]:
    """The linear and the layout of each packed weight of a model that something is multiplied with, and what has it in the
    CPU's memory."""
    if source.loaded is not None:
        multiplied = {name: each for name, each in source.loaded.named_modules() if isinstance(each, PackedLinear)}
        for name, linear in multiplied.items():
            form: Any = linear.store  # of what was read, which is told with its layout
            yield name, form.layout, partial(map_tensors, linear.packed(), Tensor.cpu)
    # Other libraries' packed checkpoints are made dense as they are loaded.
    elif source.quantization is not None:
        looked_up = _only_looked_up(source)
        for name, packed in source.weights.packed.items():
            if name == looked_up:
                continue
            yield name.removesuffix(".weight"), packed.layout, partial(packed.load, name, source.weights.stored)


def _only_looked_up(source: Source) -> str | None:
    """The name in the files of a table of embeddings that no head reads."""
    model = build_skeleton(source, source.dtype)
    table = find_tables(model).get(EMBEDDINGS)
    if table is None or is_tied(model):
        return None
    return stored_as(model, table.weight, source.weights.packed, {})


class _Rotation:
    """Packed weights of a group, ready, and dense ones of their shape: so many that no call finds its weight in the cache.

    Attributes:
        example: one of the weights.
        ready: for a backend; first those of the checkpoint, then copies of them.
        dense: of the first of them, `[O, I]`.
        linears: how many weights the checkpoint has in the group.
        weight_bytes: of one packed weight, the mean.
        cached: whether either stays in the cache after all.
    """

    def __init__(self, weights: list[Packed], backend: str, device: torch.device, dtype: torch.dtype) -> None:
        cold = COLD * cache_bytes(device)
        most = free_bytes(device) * _MEMORY_SHARE
        first = prepare(weights[0], backend, device=device, dtype=dtype)
        size = nbytes(first.weight)
        held = max(1, math.floor(most / size))
        own = weights[:held]
        self.linears = len(weights)
        self.ready = [first, *(prepare(weight, backend, device=device, dtype=dtype) for weight in own[1:])]
        self.weight_bytes = round(statistics.mean(nbytes(ready.weight) for ready in self.ready))
        self.example = weights[0]
        copies = min(_copies(size, cold), held) - len(own)
        self.ready += [_copy(self.ready[i % len(own)], own[i % len(own)], dtype) for i in range(copies)]
        W_OI: Tensor = prepare(weights[0], "dense", device=device, dtype=dtype).weight
        copies = min(_copies(W_OI.nbytes, cold), math.floor(most / W_OI.nbytes)) - 1
        self.dense = [W_OI, *(W_OI.clone() for _ in range(copies))]
        smaller = min(self.weight_bytes * len(self.ready), W_OI.nbytes * len(self.dense))
        self.cached = smaller < cache_bytes(device)


def _copies(size: int, cold: int) -> int:
    """How many weights of a size are gone over."""
    return min(_MOST_COPIES, math.ceil(cold / size))


def _copy(ready: Prepared, weight: Packed, dtype: torch.dtype) -> Prepared:
    """The same in memory of its own."""
    if type(ready.weight) in (type(weight), Tensor):
        return Prepared(ready.backend, map_tensors(ready.weight, torch.clone), ready.shape, ready.device)
    # A form of a backend's own, which may share nothing with the packed weight, or all.
    return prepare(map_tensors(weight, torch.clone), ready.backend.name, device=ready.device, dtype=dtype)


def _measure_all(
    groups: dict[_Key, _Group],
    tokens: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[Case], float]:
    """All rows of figures, and the bandwidth of a copy in turn with them; groups are let go of on the way."""
    copy, copied = large_copy(device)
    copy_seconds = math.inf
    cases: list[Case] = []
    total = len(groups) * len(tokens)
    for key in list(groups):
        # Its weights are not held any longer than they are needed.
        group = groups.pop(key)
        kept = statistics.mean(group.kept)
        rotation = _Rotation(group.weights, key.backend, device, dtype)
        del group
        for T in tokens:
            case, once = _measure(key, rotation, T, copy, seconds, kept)
            cases.append(case)
            copy_seconds = min(copy_seconds, once)
            if progress is not None:
                progress(len(cases), total)
    return cases, copied / copy_seconds


def _measure(
    key: _Key, rotation: _Rotation, T: int, copy: Callable[[], object], seconds: float, kept: float
) -> tuple[Case, float]:
    """A row of figures, and the least seconds of a copy in turn with it; `kept` is the share of inputs that a token reads."""
    O, I = key.shape
    W_OI = rotation.dense[0]
    x_TI = torch.randn(T, I, generator=torch.Generator().manual_seed(0)).to(W_OI.device, W_OI.dtype)
    mask_TI, read = None, 1.0
    if kept < 1 and T <= KEPT_TOKENS:
        mask_TI, some = some_inputs(T, I, kept, x_TI.device)
        read = rotation.example.read_bytes(some) / nbytes(rotation.example)
    packed = [partial(kernels.linear, ready, x_TI, None, mask_TI) for ready in rotation.ready]
    dense = [partial(torch.nn.functional.linear, x_TI, each_OI) for each_OI in rotation.dense]
    taken, dense_taken, copy_taken = time_in_turn([packed, dense, [copy]], W_OI.device, seconds)
    moved = T * (O + I) * x_TI.itemsize
    case = Case(
        layout=json.loads(key.layout),
        shape=key.shape,
        linears=rotation.linears,
        backend=key.backend,
        tokens=T,
        seconds=statistics.median(taken),
        dense_seconds=statistics.median(dense_taken),
        bytes=round(rotation.weight_bytes * read) + moved,
        dense_bytes=W_OI.nbytes + moved,
        cached=rotation.cached,
        kept=kept,
    )
    return case, min(copy_taken)
