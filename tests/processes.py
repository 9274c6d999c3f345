"""Processes of their own, for what must not happen in that of the tests.

One that begins from nothing takes seconds to import torch and transformers. These are forked from one that has done so, and
has imported nothing of secateur: its import, its entry points and all that it does are new in each.
"""

import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "accelerate", "filelock", "greenlet", "jinja2", "psutil", "rich.progress", "rich.table", "safetensors.torch",
        "torch.distributed", "torch.utils.checkpoint", "transformers.integrations.accelerate", "transformers.modeling_utils",
        "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama", "transformers.quantizers.auto", "typer", "yaml",
    ]
)  # fmt: skip
# A process that hangs is ended; none takes a tenth of this.
_HANGS_AFTER_S = 300


def command(*args, **options):
    """Run `secateur` with these arguments to its end, as `subprocess.run` would; for `options` see `Process`."""
    return Process.of_module("secateur", *args, **options).end()


def script(code, *args, **options):
    """The same for code that finds the arguments in `sys.argv[1:]`."""
    return Process.of_code(code, *args, **options).end()


def file(path, *args, **options):
    """The same for a script in a file."""
    return Process(_run_file, path, args, **options).end()


class Process:
    """A function in a process that has been started.

    Args:
        run, what, args: called as `run(what)`, with the others as `sys.argv[1:]`.
        env: its environment; None: that of the tests.
        cwd: where it runs.
        path: folders whose modules can be imported, before all others.
    """

    def __init__(self, run, what, args, *, env=None, cwd=None, path=()):
        self._folder = Path(tempfile.mkdtemp())
        self._args = list(map(str, args))
        setting = (dict(os.environ) if env is None else env, str(cwd or Path.cwd()), list(map(str, path)))
        # As a daemon, it does not outlive the tests.
        given = (run, what, self._args, str(self._folder), *setting)
        self._process = CONTEXT.Process(target=_work, args=given, daemon=True)
        # What computes does so on one thread, and threads do not survive a fork. The server imports Triton, with the others, as
        # who compiles needs it.
        with mock.patch.dict(os.environ, OPENBLAS_NUM_THREADS="1"):
            os.environ.pop("TRITON_INTERPRET", None)
            self._process.start()

    @classmethod
    def of_module(cls, name, *args, **options):
        """As `python -m name` runs it."""
        return cls(_run_module, name, args, **options)

    @classmethod
    def of_code(cls, code, *args, **options):
        """As `python -c code` runs it."""
        return cls(_run_code, textwrap.dedent(code), args, **options)

    def said(self, name, encoding="utf-8"):
        """What it has written so far to `stdout` or `stderr`."""
        path = self._folder / name
        return path.read_text(encoding) if path.exists() else ""

    def wait_for(self, line, name="stderr"):
        """Until it has written that, or has ended."""
        while self._process.is_alive() and line not in self.said(name):
            time.sleep(0.01)

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def end(self, timeout=_HANGS_AFTER_S):
        """Wait for its end: exit code and output, as of `subprocess.run`."""
        self._process.join(timeout)
        if self._process.is_alive():
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired(self._args, timeout, self.said("stdout"), self.said("stderr"))
        said = [self.said(name) for name in ("stdout", "stderr")]
        shutil.rmtree(self._folder)
        return subprocess.CompletedProcess(self._args, self._process.exitcode, *said)


def _work(run, what, args, folder, env, cwd, path):
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    for number, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115 - it stays open
    sys.stderr = open(2, "w", 1, encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = path
    sys.argv = ["-c", *args]
    run(what)


def _run_code(code):
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def _run_module(name):
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_file(path):
    runpy.run_path(str(path), run_name="__main__")
