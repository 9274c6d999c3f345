"""Where there is no POSIX: what only Linux and macOS have is taken away, in a process of its own."""

import sys
import textwrap

import processes
import pytest

# Others' libraries look for these, too, and do without where they are not: what they have imported is left to them.
_WITHOUT = """
    import sys
    import typer, rich, psutil, torch, transformers, accelerate, safetensors.torch, greenlet, yaml, numpy, filelock
    import torch.distributed, transformers.integrations, transformers.modeling_utils

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name in NAMES:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    NAMES = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "posix", "curses", "readline", "_posixshmem"}
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Missing())
"""
_WORK = """
    import os, shutil, filelock
    import secateur, secateur.cli, secateur.solvers.column_sweep, secateur_pytest
    from secateur.commands.find_commands import find, names
    assert len([find(name) for name in names()]) > 12
    import secateur.runs.sweep, secateur.evaluation.gate.gate, secateur.evaluation.tasks.tasks
    from secateur.memory import peak as report

    # As on Windows: there are no folders to open, no flock, no /proc and no C library of that name.
    plain = os.open
    def no_folders(path, flags, mode=0o777, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, flags, mode, **options)
    os.open = no_folders
    shutil._use_fd_functions = False
    for name in ("fork", "getuid", "fchmod", "O_NOFOLLOW", "mkfifo", "killpg", "setsid", "uname", "sysconf"):
        if hasattr(os, name):
            delattr(os, name)
    from secateur.unfinished import partial
    partial.FileLock = filelock.SoftFileLock
    import ctypes
    def no_library(name):
        raise TypeError("LoadLibrary() argument 1 must be str, not None")
    ctypes.CDLL = no_library
    from secateur.runs.compress import compress
    model, text, out = sys.argv[1:]
    recipe = secateur.Recipe("sparsegpt", 0.5, calibration=secateur.Calibration(text, 8, 24))
    compress(model, out, recipe, max_memory="100GiB")
    assert secateur.verify(out) == []
    compress(model, out, recipe, overwrite=True)
    ids = torch.arange(8)[None]
    assert secateur.load(out)(ids).logits.isfinite().all()
    print(sorted(os.listdir(os.path.dirname(out))))
"""


@pytest.fixture
def elsewhere():
    def run(code, *args):
        return processes.script(textwrap.dedent(_WITHOUT) + textwrap.dedent(code), *args)

    return run


def test_it_runs_without_what_only_posix_has(elsewhere, model_of, text_file, tmp_path):
    found = elsewhere(_WORK, model_of("llama"), text_file, tmp_path / "out")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "['out']"


@pytest.mark.parametrize(("platform", "said"), [("win32", "12"), ("darwin", "34"), ("freebsd", str(34 * 1024))])
def test_peak_memory_without_proc(platform, said, monkeypatch):
    from types import SimpleNamespace

    from secateur.memory import peak as report

    def no_proc(*_, **__):
        raise FileNotFoundError

    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=12))
    usage = SimpleNamespace(getrusage=lambda _: SimpleNamespace(ru_maxrss=34), RUSAGE_SELF=0)
    monkeypatch.setattr(report.Path, "read_text", no_proc)
    monkeypatch.setattr(report.sys, "platform", platform)
    monkeypatch.setattr(report.psutil, "Process", lambda: process)
    monkeypatch.setitem(sys.modules, "resource", None if platform == "win32" else usage)
    assert str(report.peak_memory()) == said
