"""What each packed linear of a checkpoint costs: time and bytes, against dense and against the machine's memory.

Decoding reads every weight once a token, so memory bounds it, and a kernel is as good as the share of the memory's bandwidth
that it makes use of, with no more bytes counted than it needs. That is the sparse memory bandwidth utilization, S-MBU, of
MoE-CAP (Jiang et al. 2024, arXiv 2412.07067): the bytes that are active for a token, over time and bandwidth. Here it is taken
linear by linear, the active bytes are those of the packed weight with inputs and outputs, and the bandwidth is what a copy
reaches on the machine, not the one on its data sheet.

O: output features, I: input features, T: tokens.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur import kernels
from secateur.errors import UsageError
from secateur.evaluation.bench.timing import COLD, cache_bytes, free_bytes, large_copy, time_in_turn
from secateur.formats.layouts.layout import Layout
from secateur.kernels import AUTO, BACKENDS, Prepared, check_backend, choose, prepare
from secateur.kernels.packed import Packed, map_tensors, nbytes
from secateur.model.in_memory import open_model
from secateur.model.load import open_device, parse_dtype
from secateur.model.source import Source
from secateur.model.transformers.packed_modules import packed_linears

# Copies of a weight at most: more of one so small would take longer to make than to measure.
_MOST_COPIES = 4096
# What packed and dense copies may each take of the free memory.
_MEMORY_SHARE = 1 / 8
# What `auto` would have taken where it had to fall back to dense weights.
_WANTED = {"cpu": "cpu", "cuda": "triton"}


@dataclass(frozen=True)
class Case:
    """Linears of one shape, in one layout, computed by one backend, for one number of tokens.

    Attributes:
        layout: its name and parameters, as `config.json` has them.
        shape: (O, I).
        linears: how many of them the checkpoint has.
        backend: that computes with them.
        tokens: inputs of one call.
        seconds: one call takes: median over rounds, each of which goes over many weights.
        dense_seconds: the same of `torch.nn.functional.linear` with dense weights of that shape.
        bytes: one call has to move: the weight as it lies in the memory of the device, inputs and outputs. Where linears
            differ, the mean.
        dense_bytes: the same with a dense weight.
        cached: the weights gone over fitted into the last-level cache, as memory or their number was at its limit: they were
            read faster than in a model.
    """

    layout: dict[str, Any]
    shape: tuple[int, int]
    linears: int
    backend: str
    tokens: int
    seconds: float
    dense_seconds: float
    bytes: int
    dense_bytes: int
    cached: bool

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds

    @property
    def speed_up(self) -> float:
        """Over dense."""
        return self.dense_seconds / self.seconds


@dataclass(frozen=True)
class Total:
    """All packed linears of a checkpoint: seconds a token, when so many tokens are computed at a time."""

    tokens: int
    seconds: float
    dense_seconds: float

    @property
    def speed_up(self) -> float:
        """Over dense."""
        return self.dense_seconds / self.seconds


@dataclass(frozen=True)
class Bench:
    """The figures of `bench`.

    Attributes:
        model: what was measured.
        backend: that was asked for.
        device: where.
        dtype: of inputs, outputs and dense weights.
        threads: that torch computed with on the CPU.
        copy_bandwidth: bytes a second that torch reads and writes together when it copies a large tensor. Copies are timed in
            turn with all cases, and the fastest counts: it is to be a limit.
        cases: by layout and shape, in the order of the checkpoint, and by tokens.
        fallback: where `auto` had to take dense weights, why.
    """

    model: str
    backend: str
    device: str
    dtype: str
    threads: int
    copy_bandwidth: float
    cases: tuple[Case, ...]
    fallback: str | None

    def utilization(self, case: Case) -> float:
        """The share of the copy bandwidth that a case reached: its S-MBU."""
        return case.bandwidth / self.copy_bandwidth

    @property
    def chosen(self) -> dict[str, int]:
        """How many linears each backend computes with."""
        found: dict[str, int] = {}
        for case in self.cases:
            if case.tokens == self.cases[0].tokens:
                found[case.backend] = found.get(case.backend, 0) + case.linears
        return found

    @property
    def totals(self) -> tuple[Total, ...]:
        """Over all linears, one for each number of tokens."""
        found = []
        for T in dict.fromkeys(case.tokens for case in self.cases):
            cases = [case for case in self.cases if case.tokens == T]
            packed = sum(case.linears * case.seconds for case in cases) / T
            dense = sum(case.linears * case.dense_seconds for case in cases) / T
            found.append(Total(T, packed, dense))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """All of it, what is computed included, as JSON holds it."""
        cases = [
            {
                **dataclasses.asdict(case),
                "bandwidth": case.bandwidth,
                "utilization": self.utilization(case),
                "speed_up": case.speed_up,
            }
            for case in self.cases
        ]
        totals = [{**dataclasses.asdict(total), "speed_up": total.speed_up} for total in self.totals]
        return {**dataclasses.asdict(self), "cases": cases, "chosen": self.chosen, "totals": totals}


def describe(layout: Mapping[str, Any]) -> str:
    """A layout's config in a few words: `nm 2:4`, `packed-int, 4 bits, groups of 64`."""
    rest = {key: value for key, value in layout.items() if key not in ("layout", "dtype")}
    name = str(layout["layout"])
    if rest.keys() >= {"n", "m"}:
        name += f" {rest.pop('n')}:{rest.pop('m')}"
    words = [name]
    for key, value in rest.items():
        plain = key.replace("_", " ")
        if isinstance(value, Mapping):
            words.append(f"{plain}: {describe(value)}")
        elif key in ("bits", "group_size"):
            words.append(f"{value} bits" if key == "bits" else f"groups of {value}")
        elif value is not False and value is not None:
            words.append(plain if value is True else f"{plain} {value}")
    return ", ".join(words)


def bench(  # noqa: PLR0913 - users name them
    model: str | PreTrainedModel,
    backend: str = AUTO,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    tokens: Sequence[int] = (1,),
    threads: int | None = None,
    seconds: float = 2.0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Bench:
    """Time the packed linears of a checkpoint, and dense linears of the same shapes in turn with them.

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
    with _threads(threads), torch.inference_mode():
        groups, fallback = _group(source, backend, target, computed)
        copy, copied = large_copy(target)
        copy_seconds = math.inf
        cases: list[Case] = []
        total = len(groups) * len(tokens)
        for key in list(groups):
            # Its weights are not held any longer than they are needed.
            rotation = _Rotation(groups.pop(key), key.backend, target, computed)
            for T in tokens:
                case, once = _measure(key, rotation, T, copy, seconds)
                cases.append(case)
                copy_seconds = min(copy_seconds, once)
                if progress is not None:
                    progress(len(cases), total)
        used = torch.get_num_threads()
    name = str(computed).removeprefix("torch.")
    return Bench(source.name, backend, str(target), name, used, copied / copy_seconds, tuple(cases), fallback)


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


def _group(
    source: Source, backend: str, device: torch.device, dtype: torch.dtype
) -> tuple[dict[_Key, list[Packed]], str | None]:
    """All packed weights of a checkpoint by their key, and why `auto` could not do better than dense weights, if so.

    Raises:
        UsageError: there are none, or the backend cannot compute with one of them.
    """
    packed_weights = list(_packed_weights(source))
    if not packed_weights:
        raise UsageError(
            f"{source.name} has no linears packed by secateur to measure: make them by `secateur compress`, or, of weights "
            "with zeros, by `secateur export --to secateur`"
        )
    groups: dict[_Key, list[Packed]] = {}
    fallback = None
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        # Reading is checking, which other threads do while this one waits for the first.
        loaded = pool.map(lambda each: each[1](), packed_weights)
        for (layout, _), weight in zip(packed_weights, loaded, strict=True):
            chosen = choose(weight, backend, device, dtype).name
            if backend == AUTO and chosen == "dense" and fallback is None and device.type in _WANTED:
                wanted = _WANTED[device.type]
                fallback = f"backend {wanted!r} cannot be used: {BACKENDS[wanted].why_not(weight, device, dtype)}"
            key = _Key(json.dumps(layout.to_config()), weight.shape, chosen)
            groups.setdefault(key, []).append(weight)
    return groups, fallback


def _packed_weights(source: Source) -> Iterator[tuple[Layout, Callable[[], Packed]]]:
    """The layout of each packed weight of a model, and what has it in the CPU's memory."""
    if source.loaded is not None:
        for _, linear in packed_linears(source.loaded):
            form: Any = linear.store  # of what was read, which is told with its layout
            yield form.layout, partial(map_tensors, linear.packed(), Tensor.cpu)
    # Other libraries' packed checkpoints are made dense as they are loaded.
    elif source.quantization is not None:
        for name, packed in source.weights.packed.items():
            yield packed.layout, partial(packed.load, name, source.weights.stored)


class _Rotation:
    """Packed weights of a group, ready, and dense ones of their shape: so many that no call finds its weight in the cache.

    Attributes:
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


def _measure(key: _Key, rotation: _Rotation, T: int, copy: Callable[[], object], seconds: float) -> tuple[Case, float]:
    """A row of figures, and the least seconds of a copy in turn with it."""
    O, I = key.shape
    W_OI = rotation.dense[0]
    x_TI = torch.randn(T, I, generator=torch.Generator().manual_seed(0)).to(W_OI.device, W_OI.dtype)
    packed = [partial(kernels.linear, ready, x_TI) for ready in rotation.ready]
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
        bytes=rotation.weight_bytes + moved,
        dense_bytes=W_OI.nbytes + moved,
        cached=rotation.cached,
    )
    return case, min(copy_taken)
