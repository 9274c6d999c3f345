"""Lines of a report, each in a process of its own and within a time of its own: one that fails, hangs or breaks the GPU for its
process costs its own figure and no other.

Processes are forked, so that what is imported by then is not imported again; before that, nothing may have touched the GPU.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# What is left of the time when a line is not begun any more: it would not come to anything.
_LEAST_SECONDS = 1.0


@dataclass(frozen=True)
class Line:
    """One line of a report.

    Attributes:
        name: what it is called.
        seconds: that it may take.
        figure: gives what JSON can hold. Runs in a process of its own.
    """

    name: str
    seconds: float
    figure: Callable[[], Any]


def run_lines(
    lines: Sequence[Line], budget: float, file: Path, say: Callable[[str], None] = print
) -> dict[str, dict[str, Any]]:
    """Run lines in their order until the time is up, and write what there is to a file after each.

    Args:
        budget: seconds for all of them.
        file: JSON. Of each line by its name, `figure` or `error`, and `seconds`.
        say: told of each line as a row of a Markdown table.

    Returns:
        What stands in the file.
    """
    found: dict[str, dict[str, Any]] = {}
    began = time.monotonic()
    for line in lines:
        left = budget - (time.monotonic() - began)
        started = time.monotonic()
        if left < _LEAST_SECONDS:
            found[line.name] = {"error": "not begun: no time was left"}
        else:
            found[line.name] = _in_a_process(line.figure, min(line.seconds, left))
        found[line.name]["seconds"] = round(time.monotonic() - started, 1)
        _write(file, found)
        said = found[line.name].get("figure", f"failed: {found[line.name].get('error')}")
        say(f"| {line.name} | {said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)} |")
    return found


def _in_a_process(figure: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """`figure` or `error`. What takes longer is killed, with all that it started."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(figure, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return {"error": f"stopped after {seconds:.0f} s"}
        received: dict[str, Any] = json.loads(ours.recv_bytes())
        return received
    except EOFError:
        process.join()
        return {"error": f"its process ended with code {process.exitcode}"}
    finally:
        assert process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _send(figure: Callable[[], Any], to: Connection) -> None:
    os.setpgid(0, 0)  # what it starts ends with it
    try:
        sent = json.dumps({"figure": figure()})
    except Exception as error:
        # The first line is what says most; Triton's and CUDA's go on for pages.
        sent = json.dumps({"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"})
    to.send_bytes(sent.encode())


def _write(file: Path, found: dict[str, dict[str, Any]]) -> None:
    """All at once, so that there is never half a file."""
    beside = file.with_name(f"{file.name}.new")
    beside.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    beside.replace(file)
