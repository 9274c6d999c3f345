"""How much memory a run takes by its settings, and which settings keep to what there is.

S: tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.errors import UsageError
from secateur.memory.free_memory import free_memory
from secateur.units import enough, words

# More tokens at a time are not faster on a CPU: the activations of a batch then leave its caches.
_MOST_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
# Of what is free, a run that was given no limit takes so much.
_FREE_SHARE = 0.8
# What is not counted: what operators and libraries for linear algebra allocate for themselves, pages that are not quite full.
_MARGIN = 1.15


@dataclass(frozen=True)
class Settings:
    """How a run is carried out: no matter for the result, but for the size of a batch, in which sums are taken.

    Attributes:
        batch_tokens: run at a time; whole windows, one at least.
        pause: whether batches stand half way through a block while a linear is solved (see `walk`); else they begin again.
        hidden: where hidden states wait between blocks: `device`, `host` or `file`.
        experts: of a mixture, visited together.
    """

    batch_tokens: int
    pause: bool
    hidden: str
    experts: int = 1

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
        expert: bytes of the expert of a mixture that they belong to, 0 for others: of these there are as many in memory as are
            visited together.
    """

    held: Polynomial
    stats: int
    solve: float
    expert: int = 0


@dataclass(frozen=True)
class Footprint:
    """What there is to hold, in bytes.

    Attributes:
        base: this process as it is.
        mapped: of files, the most at a time within a block.
        outside: what reading and writing the tensors outside the blocks takes at most.
        embeddings: what runs before the first block.
        block: the largest, in the dtype that it is computed in, without the experts of a mixture.
        written: what waits to be written of a block, at most.
        hidden: hidden states of one token.
        forward: the most that one window takes on its way through a block.
        groups: of linears.
        tokens, seq_len: of the calibration text of one process.
        device: the type of the device.
        experts: how many a layer of a mixture has.
        processes: of the run.
        streams: of hidden states: two where the dense model's go along, whose weights of a block stay until it is done.
        keeps: whether the C library keeps what is freed within a block, as it does where there is no limit: see `return_freed`.
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
    experts: int = 0
    processes: int = 1
    streams: int = 1
    keeps: bool = False

    @property
    def waiting(self) -> int:
        """Bytes of the hidden states between two blocks."""
        return self.streams * self.tokens * self.hidden

    def peaks(self, settings: Settings) -> tuple[int, int]:
        """The most memory of the host and of the device that a run with these settings has in use."""
        S = self.seq_len
        windows = self.tokens // S if S else 0
        batch = max(1, settings.batch_tokens // S) if S else 0
        waiting, block = self.waiting, self.streams * self.block
        near = waiting if settings.hidden == "device" else 2 * self.streams * batch * S * self.hidden
        # A batch stands half way while the other stream's runs.
        running = self.streams * batch * self.forward(S)
        stages = [(self.embeddings + block + near + running) * _MARGIN]
        held = [self.streams * windows * group.held(S) if settings.pause else near for group in self.groups]
        for group, kept, earlier in zip(self.groups, held, [0, *held], strict=False):
            together = settings.experts if group.expert else 1
            experts = together * (group.stats + self.streams * group.expert)
            live = block + kept + experts + max(running, group.solve)
            # What windows held before, and what one took on its way, is freed by now, in pieces between those that stay; what
            # operators take for themselves finds room there. Where nothing stands half way, the block has given all back.
            freed = earlier + running if self.keeps and kept and self.device != "cuda" else 0
            stages.append(max(live * _MARGIN, live + freed))
        computing = max(stages)
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
                for experts in self._together(pause):
                    yield Settings(tokens, pause, hidden, experts)
                if batch_tokens or tokens // 2 < self.seq_len:
                    break
                tokens //= 2

    def _together(self, pause: bool) -> Iterable[int]:
        """How many experts may be visited together: batches that begin again for each visit had better make few of them."""
        if pause or not self.experts:
            return (max(1, min(self.processes, self.experts)),)
        return (max(1, self.experts >> halved) for halved in range(self.experts.bit_length()))

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
                f"`max_memory` {words(host)} is too little for this run, which needs {enough(on_host)} at least"
            )
        return settings
