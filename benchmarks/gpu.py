"""Every figure of this project that needs a GPU, in one run of less than ten minutes, the most wanted first.

    python -m benchmarks.gpu [--work FOLDER] [--json FILE]
    TRITON_INTERPRET=1 python -m benchmarks.gpu --device cpu     # a dry run: the same lines at tiny sizes
    python -m benchmarks.gpu --only "right,SpQR"                 # lines whose names hold one of these

Needs torch with CUDA, transformers and what `pip install secateur` brings; no network, no data. Each line runs in a process of
its own, and is stopped when its time is up; one that fails says why, and the others go on. After each line the --json file is
written anew. Results are printed as rows for benchmarks/gpu.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks import gpu_kernels
from benchmarks.gpu_budget import Line, run_lines
from secateur.errors import UsageError, one_line

# Less than a machine is lent for, with what it takes to start and to copy the figures.
BUDGET = 540.0


def lines(device: str, work: Path) -> list[Line]:
    """All of them: first whether kernels are right, then what is claimed of them, then whole models."""
    found = [Line("machine", 30, machine if device == "cuda" else lambda: "a dry run on the CPU")]
    found += gpu_kernels.check_lines(device)
    speed = gpu_kernels.speed_lines(device)
    try:
        from benchmarks.gpu_models import Models
    except ImportError as error:  # a package that kernels do not need
        return [*found, *speed, Line("whole models", 10, partial(missing, one_line(error)))]
    models = Models(device, work).lines()
    # Of the linears, what has a goal; whole models before those that were only looked at besides.
    wanted = {"copy bandwidth, GB/s", "dense", *(case for case, _, _ in gpu_kernels.GOALS)}
    return [
        *found,
        *(line for line in speed if line.name in wanted),
        *models,
        *(line for line in speed if line.name not in wanted),
    ]


def missing(package: str) -> None:
    """Lines that need a package which is not here."""
    raise UsageError(package)


def machine() -> str:
    """The GPU and what computes on it."""
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("bench-out/gpu"), help="folder for models, emptied at the end"
    )
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="file for the figures")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument("--only", default="", help="parts of names of lines, comma-separated")
    args = parser.parse_args()
    # Else whoever asks, as it is imported, whether there is a GPU leaves forked processes none.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    args.work.mkdir(parents=True, exist_ok=True)
    parts = args.only.split(",")
    asked = [line for line in lines(args.device, args.work) if any(part in line.name for part in parts)]
    found = run_lines(asked, args.budget, args.json, lambda row: print(row, flush=True))
    for row in gpu_kernels.goals(found):
        print(row)
    shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
