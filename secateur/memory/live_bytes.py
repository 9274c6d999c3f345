"""Counting the bytes that operations of torch keep alive: how much memory a computation takes, without a profiler."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Tokens on which a block is measured: two lengths tell what grows with the length from what grows with its square.
PROBES = (8, 32)


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts what operators allocate and is not freed yet; memory that was there before does not count.

    What an operator allocates and frees within itself is not seen, nor is memory that is not torch's.

    Attributes:
        now: bytes alive.
        peak: the most that were alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.finalize[Any, UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            self._see(value, new=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self._see(value, new=True)
        return result

    def _see(self, value: Any, new: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if new else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        self._known[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.now -= size
        del self._known[key]
