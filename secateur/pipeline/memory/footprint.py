"""How much memory a run takes, before it is taken: measured on a few tokens and on small linears, and scaled up.

O: output features, I: input features, S: tokens of a window.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.patterns import NM
from secateur.core.stats import InputStats, Level
from secateur.errors import UsageError
from secateur.folder.reader import MAPPED_BYTES
from secateur.model.free_memory import free_memory
from secateur.model.structure import Linear, weight_matrix
from secateur.pipeline.capture import BlockCalls, BodyCalls
from secateur.pipeline.memory.live_bytes import LiveBytes
from secateur.pipeline.solve import Problem, solve
from secateur.recipes.plan import Plan
from secateur.units import parse_size, words

# More tokens at a time are not faster on a CPU: the activations of a batch then leave its caches.
_MOST_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
# Tokens on which a block is measured: two lengths tell what grows with the length from what grows with its square.
_PROBES = (8, 32)
# Linears are measured at two sizes, of so many inputs at most.
_MEASURED_INPUTS = (512, 1024)
# More copies of the weights and of the Gram matrix than any solver makes.
_MOST_WEIGHTS, _MOST_GRAMS = 16, 6
# Of what is free, a run that was given no limit takes so much.
_FREE_SHARE = 0.8
# What is not counted: what operators and libraries for linear algebra allocate for themselves, pages that are not quite full.
_MARGIN = 1.15
_M_MMAP_THRESHOLD = -3


def return_freed() -> None:
    """Have the C library give memory back when it is freed, at some cost in time. It keeps pieces of up to 32 MiB otherwise."""
    with suppress(OSError, AttributeError, TypeError):  # only glibc has this
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def limit_memory(max_memory: str | int | None) -> int | None:
    """The limit in bytes that a user gave in bytes or in words, if any; what is freed is then given back: see `return_freed`.

    Raises:
        UsageError: the words are no size.
    """
    limit = parse_size(max_memory, "--max-memory") if isinstance(max_memory, str) else max_memory
    if limit is not None:
        return_freed()
    return limit


@dataclass(frozen=True)
class Settings:
    """How a run is carried out: no matter for the result, but for the size of a batch, in which sums are taken.

    Attributes:
        batch_tokens: run at a time; whole windows, one at least.
        pause: whether batches stand half way through a block while a linear is solved (see `walk`); else they begin again.
        hidden: where hidden states wait between blocks: `device`, `host` or `file`.
    """

    batch_tokens: int
    pause: bool
    hidden: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Polynomial:
    """linear·n + square·n² bytes for n tokens of one window."""

    linear: float
    square: float

    def __call__(self, n: int) -> float:
        return max(self.linear * n + self.square * n * n, 0)

    @classmethod
    def through(cls, points: Sequence[tuple[int, int]]) -> Polynomial:
        """The one through two points, or through one and without a square."""
        (n, y), (m, z) = points[0], points[-1]
        if n == m:
            return cls(y / n, 0)
        square = (z / m - y / n) / (m - n)
        return cls(y / n - square * n, square)


@dataclass(frozen=True)
class Group:
    """Linears that read the same input.

    Attributes:
        held: what a window that pauses at them keeps, its hidden states included.
        stats: bytes of their statistics.
        solve: the most that solving them takes besides.
    """

    held: Polynomial
    stats: int
    solve: float


@dataclass(frozen=True)
class Footprint:
    """What there is to hold, in bytes.

    Attributes:
        base: this process as it is.
        mapped: of files, the most at a time within a block.
        outside: what reading and writing the tensors outside the blocks takes at most.
        embeddings: what runs before the first block.
        block: the largest, in the dtype that it is computed in.
        written: a block as it is written, at most.
        hidden: hidden states of one token.
        forward: the most that one window takes on its way through a block.
        groups: of linears.
        tokens, seq_len: of the calibration text of one process.
        device: the type of the device.
    """

    base: int
    mapped: int
    outside: int
    embeddings: int
    block: int
    written: int
    hidden: int
    forward: Polynomial
    groups: tuple[Group, ...]
    tokens: int
    seq_len: int
    device: str

    def peaks(self, settings: Settings) -> tuple[int, int]:
        """The most memory of the host and of the device that a run with these settings has in use."""
        S = self.seq_len
        windows = self.tokens // S if S else 0
        batch = max(1, settings.batch_tokens // S) if S else 0
        waiting = windows * S * self.hidden
        near = waiting if settings.hidden == "device" else 2 * batch * S * self.hidden
        running = batch * self.forward(S)
        stages = [self.embeddings + self.block + near + running]
        for group in self.groups:
            kept = windows * group.held(S) if settings.pause else near
            stages.append(self.block + kept + group.stats + max(running, group.solve))
        computing = max(stages) * _MARGIN
        before = self.base + self.mapped + self.outside
        within = self.base + self.mapped + self.written
        if self.device == "cuda":
            return int(max(before, within + (waiting if settings.hidden == "host" else 0))), int(computing)
        return int(max(before, within + computing)), 0

    def choices(self, batch_tokens: int | None) -> Iterable[Settings]:
        """Ways to carry the run out, the fastest first."""
        spilled = "file" if self.device != "cuda" else "host"
        ways = [(True, "device"), (False, "device"), (False, spilled)]
        if self.device == "cuda":
            ways.append((False, "file"))
        for pause, hidden in ways:
            tokens = batch_tokens or max(_MOST_BATCH_TOKENS.get(self.device, 2048), self.seq_len)
            while True:
                yield Settings(tokens, pause, hidden)
                if batch_tokens or tokens // 2 < self.seq_len:
                    break
                tokens //= 2

    def fits(self, settings: Settings, host: int | None, device: int | None) -> bool:
        """Whether settings keep to the limits in bytes; without one for the host it is most of what is free."""
        limit = host or self.base + _FREE_SHARE * free_memory()
        on_host, on_device = self.peaks(settings)
        return on_host <= limit and (device is None or on_device <= device)

    def choose(self, host: int | None, device: int | None, batch_tokens: int | None) -> Settings:
        """The fastest way that fits.

        Args:
            host, device: limits, see `fits`. Where none is given for the host and nothing fits, the most frugal way is taken.
            batch_tokens: what the user or an earlier run chose.

        Raises:
            UsageError: nothing fits the limit for the host; the least that would is said.
        """
        least = None
        for settings in self.choices(batch_tokens):
            if self.fits(settings, host, device):
                return settings
            on_host, on_device = self.peaks(settings)
            if least is None or (on_device, on_host) <= least[:2]:
                least = (on_device, on_host, settings)
        assert least is not None
        on_device, on_host, settings = least
        if host is not None and on_host > host:
            raise UsageError(
                f"--max-memory {words(host)} is too little for this model and method, which need "
                f"{words(math.ceil(on_host / 2**20) * 2**20)} at least"
            )
        return settings


def footprint(
    plan: Plan,
    block: nn.Module,
    calls: BlockCalls | BodyCalls,
    ids_NS: Tensor,
    groups: Sequence[Sequence[str]],
    linears: dict[str, Linear],
    dtype: torch.dtype,
    base: int,
    sizes: dict[str, int],
    exact: bool,
) -> Footprint:
    """Measure what a run will take.

    Args:
        plan: the methods.
        block: a block in place on its device.
        calls: of the model's blocks, or of the body that `block` is.
        ids_NS: the windows of this process.
        groups: the block's linears by common input, in the order in which they are reached, and `linears` by name.
        dtype: of the weights in the source.
        base: bytes of the process before the block was there.
        sizes: `outside`, `embeddings`, `block`, `written`: see `Footprint`; `tensor`: the largest of a block in its file;
            `stored`: a weight that is written dense.
        exact: also measure what solving takes; else it is put at more than it is, which takes no time.
    """
    S = ids_NS.shape[1]
    firsts = [group[0] for group in groups]
    peaks: list[tuple[int, int]] = []
    held: dict[str, list[tuple[int, int]]] = {name: [] for name in firsts}
    hidden = 0
    for n in sorted({min(n, S) for n in _PROBES}):
        call = calls.catch(ids_NS[:1, :n])[0]
        hidden = call.hidden.nbytes // n
        with LiveBytes() as live:

            def note(name: str, n: int = n, size: int = call.hidden.nbytes, live: LiveBytes = live) -> Any:
                return lambda *_: held[name].append((n, live.now + size))

            handles = [linears[name].register_forward_pre_hook(note(name)) for name in firsts]
            call.run(block, call.hidden)
            peaks.append((n, live.peak))
            for handle in handles:
                handle.remove()
    found = []
    written = float(sizes["written"])
    for names in groups:
        shapes = [weight_matrix(linears[name]).shape for name in names]
        I = shapes[0][1]
        bytes_of_stats = 4 * I * (I + 2 if plan.level >= Level.GRAM else 2)
        rows = [O for O, _ in shapes]
        solving = 4.0 * (_MOST_WEIGHTS * sum(rows) * I + _MOST_GRAMS * I * I)
        if exact:
            solving, packed = _solving(plan, rows, I, dtype, block_device(linears[names[0]]))
            written -= sizes["stored"] * sum(rows) * I - packed
        found.append(Group(Polynomial.through(held[names[0]]), bytes_of_stats, solving))
    return Footprint(
        base=base,
        mapped=MAPPED_BYTES + sizes["tensor"],
        outside=sizes["outside"],
        embeddings=sizes["embeddings"],
        block=sizes["block"],
        written=int(written),
        hidden=hidden,
        forward=Polynomial.through(peaks),
        groups=tuple(found),
        tokens=ids_NS.numel(),
        seq_len=S,
        device=block_device(block).type,
    )


def block_device(module: nn.Module) -> torch.device:
    """The device of a module's parameters."""
    return next(module.parameters()).device


def _solving(
    plan: Plan, rows: Sequence[int], features: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """The most memory that solving takes besides the weights and the statistics, and the bytes of what is written then.

    What a solver keeps is as large as the weights or as the Gram matrix, or is so many rows or columns of them. So linears of
    the same shape are solved at two smaller scales, which tell what grows with the square of the scale from what grows with it.
    """
    pattern = plan.pruning.pattern if plan.pruning is not None else None
    unit = pattern.m if isinstance(pattern, NM) else 1
    peaks, written = [], 0.0
    for limit in _MEASURED_INPUTS:
        I = min(features, max(unit, limit // unit * unit))
        draw = torch.Generator().manual_seed(0)
        stats = InputStats.empty(I, plan.level, device)
        stats.add(torch.randn(2 * I, I, generator=draw).to(device))
        problems = []
        for i, O in enumerate(rows):
            W_OI = torch.randn(max(1, round(O * I / features)), I, generator=draw).to(device)
            fisher_OI = W_OI.square().cpu() if plan.needs_fisher else None
            problems.append(Problem(str(i), W_OI, False, dtype, fisher_OI))
        with LiveBytes() as live:
            solutions, _ = solve(plan, problems, stats)
        peaks.append((I, live.peak))
        written = sum(solution.report.bytes for solution in solutions) * (features / I) ** 2
        if features == I:
            return live.peak, written
    return Polynomial.through(peaks)(features), written


def without_inputs(
    base: int, linears: Iterable[Linear], sizes: dict[str, int], plan: Plan, device: str, exact: bool
) -> Footprint:
    """What a run takes whose methods look at no inputs: one linear at a time. See `footprint`."""
    shapes = {tuple(weight_matrix(linear).shape) for linear in linears}
    largest = max(O * I for O, I in shapes)
    solving = 4.0 * _MOST_WEIGHTS * largest
    if exact:
        solving = max(_solving(plan, [O], I, torch.float32, torch.device("cpu"))[0] for O, I in shapes)
    zero = Polynomial(0, 0)
    return Footprint(
        base=base,
        mapped=MAPPED_BYTES + sizes["tensor"],
        outside=sizes["outside"],
        embeddings=0,
        block=4 * largest,
        written=sizes["written"],
        hidden=0,
        forward=zero,
        groups=(Group(zero, 0, solving),),
        tokens=0,
        seq_len=0,
        device=device,
    )
