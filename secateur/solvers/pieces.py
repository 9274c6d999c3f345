"""Work of compiled code, which leaves Python's lock alone, in pieces that threads share."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache


def run_pieces(run: Callable[[int], bool], pieces: int, threads: int) -> bool:
    """Whether all of `run(0), …, run(pieces - 1)` are true.

    The calling thread starts at once and the others join as they wake, which can take as long as a whole small linear.
    """
    left = itertools.count()

    def work() -> bool:
        done = True
        while (i := next(left)) < pieces:
            done = run(i) and done
        return done

    others = [_pool(threads - 1).submit(work) for _ in range(threads - 1)]
    try:
        done = work()
    finally:
        # Whatever happens here, an interrupt included, no thread may outlive the tensors it reads and writes.
        started = [other for other in others if not other.cancel()]
        wait(started)
    return done and all(other.result() for other in started)


@lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    """Kept from call to call: starting threads takes as long as expanding a small linear."""
    return ThreadPoolExecutor(workers, thread_name_prefix="secateur-kernels")


if hasattr(os, "register_at_fork"):
    # Threads do not survive a fork; the child makes its own.
    os.register_at_fork(after_in_child=_pool.cache_clear)
