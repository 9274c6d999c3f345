"""What lm-eval is kept from while it runs: the terminal, telling a server what is loaded, and code from the hub."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import datasets
import evaluate

from secateur.errors import UsageError

# Libraries whose loggers write to the terminal by a handler of their own. lm-eval's has none.
_LOUD = ("datasets", "evaluate", "huggingface_hub", "transformers")


@contextmanager
def quiet(progress: Callable[[int, int], None] | None) -> Iterator[Callable[[int, int], None]]:
    """Keep bars, warnings and prints from the terminal; what is yielded calls `progress`, which may print.

    `datasets` would also report each opening of a data set, local ones included, to be counted.
    """
    shown = sys.stdout, sys.stderr
    loggers = [logging.getLogger(name) for name in _LOUD]
    before = [logger.level for logger in loggers], datasets.config.HF_UPDATE_DOWNLOAD_COUNTS

    def tell(done: int, total: int) -> None:
        if progress is not None:
            with redirect_stdout(shown[0]), redirect_stderr(shown[1]):
                progress(done, total)

    with ExitStack() as stack:
        nothing = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(nothing))
        stack.enter_context(redirect_stderr(nothing))
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
            yield tell
        finally:
            levels, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def no_metric_code(allowed: bool) -> Iterator[None]:
    """Refuse metrics of the library `evaluate`, each of which is a Python file of the hub or of the current folder.

    Raises:
        UsageError: at the end at the latest, when one was asked for and that is not allowed.
    """
    refused: list[UsageError] = []

    def refuse(path: str, *_: Any, **__: Any) -> Any:
        error = UsageError(
            f"a task's metric {path!r} is not lm-eval's but code of the hub: leave that task out, or correct the name, or let "
            "the code run by `trust_remote_code=True`"
        )
        refused.append(error)
        raise error

    load = evaluate.load
    if not allowed:
        evaluate.load = refuse
    try:
        yield
    except Exception:
        # lm-eval and its tasks may have made another error of it.
        if refused:
            raise refused[0] from None
        raise
    finally:
        evaluate.load = load
    if refused:
        raise refused[0]
