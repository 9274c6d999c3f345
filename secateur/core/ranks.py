"""The processes of one run, as torchrun starts them: windows are split over them, statistics summed, solving dealt out.

What they tell each other goes as JSON and tensors of bytes; nothing is pickled.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.core.histogram import Histogram
from secateur.core.stats import InputStats, upper_panels
from secateur.errors import ReportedError, SecateurError, UsageError

# A rank may wait for another for as long as that one solves; one that is gone is noticed by its connection.
_PATIENCE = timedelta(days=2)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. Of one process all methods give back what they are given.

    Attributes:
        device: that this process computes on.
        rank, size: which of how many it is.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, value: Any, source: int = 0) -> Any:
        """What `source` says, in all processes: anything that JSON holds."""
        return self.share_with_tensors(value, [], source)[0]

    def share_with_tensors(self, value: Any, tensors: Sequence[Tensor], source: int = 0) -> tuple[Any, list[Tensor]]:
        """The same, and tensors with it, on the CPU. Only the arguments of `source` count."""
        if self.size == 1:
            return value, list(tensors)
        # One tensor of bytes for all of them: every message has a price.
        pieces = [tensor.cpu().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
        forms = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
        text = json.dumps([value, forms]).encode()
        lengths = self._broadcast(torch.tensor([len(text), sum(map(len, pieces))]), source).tolist()
        if self.rank == source:
            content = torch.cat([torch.frombuffer(bytearray(text), dtype=torch.uint8), *pieces])
        else:
            content = torch.empty(sum(lengths), dtype=torch.uint8)
        said, content = self._broadcast(content, source).split(lengths)
        value, forms = json.loads(bytes(said.numpy()))
        received = []
        for name, shape in forms:
            dtype = getattr(torch, name)
            size = math.prod(shape) * dtype.itemsize
            received.append(content[:size].clone().view(dtype).view(shape))
            content = content[size:]
        return value, received

    def gather(self, value: Any) -> list[Any]:
        """What each process says, by rank, in all of them."""
        return [self.share(value, rank) for rank in range(self.size)]

    def add_up(self, stats: InputStats) -> None:
        """Make the statistics those of the inputs of all processes together."""
        if self.size == 1:
            return
        tokens = torch.tensor([stats.tokens, stats.borrowed], device=self.device)
        sums = [stats.sum_I, stats.square_I]
        sums += [] if stats.upper_II is None else upper_panels(stats.upper_II)
        sums += [] if stats.drift_II is None else [stats.drift_II]
        # All in one message.
        together = torch.cat([tensor.flatten() for tensor in sums])
        for tensor in (tokens, together):
            self.add(tensor)
        for tensor, total in zip(sums, together.split([tensor.numel() for tensor in sums]), strict=True):
            tensor.copy_(total.view_as(tensor))
        stats.tokens, stats.borrowed = tokens.tolist()
        stats.forget()

    def add_up_sizes(self, histogram: Histogram) -> None:
        """The same of counts of how large inputs are."""
        if self.size == 1:
            return
        zeros = torch.tensor(histogram.zeros, device=self.device)
        for tensor in (zeros, histogram.count_B):
            self.add(tensor)
        histogram.zeros = int(zeros)

    def add(self, tensor: Tensor) -> None:
        """Make a tensor the sum of those that the processes have."""
        if self.size > 1:
            there = tensor.to(self.device)
            _collective(lambda: dist.all_reduce(there))
            if there is not tensor:
                tensor.copy_(there)

    def mine(self, windows_N: Tensor) -> Tensor:
        """The windows of this process: neighbours, as many as the others have or one more."""
        if len(windows_N) < self.size:
            raise UsageError(
                f"{len(windows_N)} windows cannot be split over {self.size} processes: give more `samples`"
            )
        return windows_N.tensor_split(self.size)[self.rank]

    def deal(self, costs: Sequence[float]) -> list[list[int]]:
        """Which pieces of work each process does, of pieces that cost so much: the dearest first, to who has least."""
        hands: list[list[int]] = [[] for _ in range(self.size)]
        loads = [0.0] * self.size
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            rank = loads.index(min(loads))
            hands[rank].append(i)
            loads[rank] += costs[i]
        return [sorted(hand) for hand in hands]

    def _broadcast(self, tensor: Tensor, source: int) -> Tensor:
        there = tensor.to(self.device)
        _collective(lambda: dist.broadcast(there, source))
        return there.cpu()


def _collective(operation: Callable[[], _T]) -> _T:
    try:
        return operation()
    except RuntimeError as error:
        raise SecateurError(
            "another process of this run is gone, and this one cannot go on alone: see what was said of it"
        ) from error


@dataclass
class _Speaker:
    """Decides which process tells the user what went wrong: the first that asks."""

    store: Any = field(repr=False)

    def may_speak(self) -> bool:
        try:
            return self.store.add("secateur/spoken", 1) == 1
        except (RuntimeError, ValueError):  # the store went with the process that kept it
            return True


@contextmanager
def open_ranks(device: Callable[[str], torch.device], name: str) -> Iterator[Ranks]:
    """This process among those that torchrun started, or alone.

    An error is told by the process that meets it first; in the others it becomes a `ReportedError`.

    Args:
        device: opens a device by name.
        name: what the user calls it; `cuda` becomes each process's own GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(device(name))
        return
    local = f"{name}:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name
    opened = device(local)
    if opened.type == "cuda":
        torch.cuda.set_device(opened)
    begun = not dist.is_initialized()
    if begun:
        dist.init_process_group("nccl" if opened.type == "cuda" else "gloo", timeout=_PATIENCE)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    speaker = _Speaker(dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store))
    try:
        yield Ranks(opened, dist.get_rank(), dist.get_world_size())
    except BaseException as error:
        if speaker.may_speak():
            raise
        raise ReportedError(getattr(error, "exit_code", 1)) from error
    finally:
        if begun:
            dist.destroy_process_group()
