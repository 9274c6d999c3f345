"""Running somebody else's command in this process, where transformers knows our checkpoints: `secateur run`."""

from __future__ import annotations

import logging
import os
import runpy
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from secateur.errors import SecateurError, UsageError


def run_tool(command: Sequence[str]) -> NoReturn:
    """Run a command as Python would run it, and exit with its exit code.

    Args:
        command: the name of a console script of an installed package, a Python file, or `-m` and a module; then its arguments.

    Raises:
        SystemExit: the command has ended.
        SecateurError: there is no such command (UsageError), or it opened a checkpoint of ours that is damaged, say.
    """
    tool = _find(command)
    _as_by_default()
    try:
        sys.exit(tool())
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            raise
        print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except SecateurError:
        raise
    except Exception:
        traceback.print_exc()
    raise SystemExit(1)


def _find(command: Sequence[str]) -> Callable[[], Any]:
    """What runs a command. `sys.argv` and `sys.path` are set for it."""
    name, *arguments = command
    if name == "-m":
        return _module(arguments)
    sys.argv = [shutil.which(name) or name, *arguments]
    script = next(iter(entry_points(group="console_scripts", name=name)), None)
    if script is not None:
        return lambda: script.load()()
    path = Path(name if Path(name).is_file() else sys.argv[0])
    if not path.is_file():
        raise UsageError(
            f"{name!r} is neither a command of a package that is installed beside secateur nor a Python file: "
            "a module is run by `secateur run -- -m MODULE`"
        )
    if not _is_python(path):
        raise UsageError(f"{path} is not written in Python, and what it starts would know nothing of secateur")
    sys.argv[0] = str(path)
    sys.path.insert(0, str(path.resolve().parent))
    return lambda: _discard(runpy.run_path(str(path), run_name="__main__"))


def _module(arguments: list[str]) -> Callable[[], Any]:
    if not arguments:
        raise UsageError("-m needs the name of a module: `secateur run -- -m lm_eval …`")
    name = arguments[0]
    sys.argv, sys.path[:0] = arguments, [""]
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{name}.__main__")
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None:
        raise UsageError(f"there is no module {name!r} that could be run: is its package installed beside secateur?")
    return lambda: _discard(runpy.run_module(name, run_name="__main__", alter_sys=True))


def _discard(_: Any) -> None:
    """A module's variables are not its exit code."""


def _is_python(path: Path) -> bool:
    if path.suffix == ".py":
        return True
    with path.open("rb") as file:
        first = file.readline(200)
    return first.startswith(b"#!") and b"python" in first


def _as_by_default() -> None:
    """Take back what our own command line changes: what signals do, and how much transformers says."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
    from transformers.utils import logging as transformers_logging

    levels = transformers_logging.get_log_levels_dict()
    transformers_logging.set_verbosity(levels.get(os.environ.get("TRANSFORMERS_VERBOSITY", ""), logging.WARNING))
    transformers_logging.enable_progress_bar()
