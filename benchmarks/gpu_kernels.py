"""One linear at a time on the GPU: whether each kernel computes what it should, how fast, and how that compares with dense.

Weights are random and bfloat16, and made as kernels take them. Each is timed by CUDA events over a CUDA graph that goes over
so many copies of it that none is left in the L2 cache when its turn comes again, as in a model. Outside a graph, few tokens
take as long as Python and the libraries need for the call. A time marked "e" is from outside one, for it could not be
captured.

O: output features, I: input features, T: tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_budget import Line
from benchmarks.random_packed import (
    BF16,
    bitmap,
    codebook,
    columns,
    columns_bitmap,
    columns_int,
    packed_int,
    spqr,
    trellis,
    two_of_four,
)
from secateur import kernels
from secateur.kernels.backends import KEPT_TOKENS
from secateur.kernels.packed import Packed, map_tensors, nbytes

SHAPES = ((4096, 4096), (8192, 8192), (4096, 11008), (14336, 4096))
TOKENS = (1, 16, 512, 4096)
# What is compared in float64: one token, a few in one tile and in several, and so many that weights are expanded.
CHECKED = ((1, 5, 40, 300), ((512, 1280), (1008, 4096)))
# A dry run on the CPU, where Triton's interpreter takes seconds for what a GPU does in microseconds.
DRY_SHAPES, DRY_TOKENS, DRY_CHECKED = ((64, 256),), (1, 16), ((1, 17), ((64, 256),))

Make = Callable[[int, int], Packed]
# What a row is called: how its weights are made, and the backend.
CASES: dict[str, tuple[Make, str]] = {
    "dense": (two_of_four, "dense"),
    "2:4, cuda-2:4": (two_of_four, "cuda-2:4"),
    "bitmap 50 %, triton": (partial(bitmap, density=0.5), "triton"),
    # One outlier in 64 columns.
    "SpQR 3 bits, triton": (partial(spqr, bits=3, group_size=16, outlier_share=1 / 64), "triton"),
    "packed-int 4 bits, triton": (partial(packed_int, bits=4, group_size=128), "triton"),
    "trellis 3 bits, triton": (partial(trellis, bits=3), "triton"),
    "columns, half the inputs kept, triton": (columns, "triton"),
    "columns-int 4 bits, half the inputs kept, triton": (partial(columns_int, bits=4, group_size=128), "triton"),
    "columns-bitmap 50 %, half the inputs kept, triton": (partial(columns_bitmap, density=0.5), "triton"),
    "columns, triton": (columns, "triton"),
    "bitmap 70 %, triton": (partial(bitmap, density=0.3), "triton"),
}
# Every kernel that there is, by the form of its weight.
CHECKS: dict[str, tuple[Make, str]] = {
    "bitmap": (partial(bitmap, density=0.5), "triton"),
    "nm 2:4": (two_of_four, "triton"),
    "packed-int 4 bits": (partial(packed_int, bits=4, group_size=128), "triton"),
    "packed-int 3 bits, symmetric": (partial(packed_int, bits=3, group_size=64, symmetric=True), "triton"),
    "SpQR 3 bits": (partial(spqr, bits=3, group_size=16, outlier_share=1 / 64), "triton"),
    "codebook 4 bits": (partial(codebook, bits=4), "triton"),
    "trellis 2 bits": (partial(trellis, bits=2), "triton"),
    "trellis 3 bits": (partial(trellis, bits=3), "triton"),
    "trellis 4 bits": (partial(trellis, bits=4), "triton"),
    "columns": (columns, "triton"),
    "columns-bitmap": (partial(columns_bitmap, density=0.5), "triton"),
    "columns-int": (partial(columns_int, bits=4, group_size=128), "triton"),
    "2:4": (two_of_four, "cuda-2:4"),
}
HALF = "half the inputs kept"
# Case, tokens, and how many times as fast as dense it is to be.
GOALS = (
    ("2:4, cuda-2:4", 4096, 1.3),
    ("bitmap 50 %, triton", 1, 1.5),
    ("SpQR 3 bits, triton", 1, 2.5),
    ("trellis 3 bits, triton", 1, 2.5),
    ("columns, half the inputs kept, triton", 1, 1.6),
)
# What may be off of an output, in roundings of what is added up, as their squares add up.
_ROUNDINGS = 8


def check_lines(device: str) -> list[Line]:
    """Whether every kernel computes what the dense weight in float64 does."""
    return [
        Line(f"{case}, {backend}: right", 40, partial(checked, make, backend, device))
        for case, (make, backend) in CHECKS.items()
    ]


def speed_lines(device: str) -> list[Line]:
    """How fast linears are, the most wanted first."""
    lines = [Line("copy bandwidth, GB/s", 20, partial(copy_bandwidth, device))]
    return lines + [Line(case, 40, partial(timed, case, device)) for case in CASES]


def checked(make: Make, backend: str, device: str) -> str:
    """The largest error of outputs and of gradients, over dtypes, tokens and shapes, as a share of what roundings allow.

    In float32 that is so little that a single wrong weight of a row is seen.

    Raises:
        ValueError: it is more.
    """
    tokens, shapes = CHECKED if device == "cuda" else DRY_CHECKED
    errors = []
    for O, I in shapes:
        torch.manual_seed(0)
        weight: Any = make(O, I)
        if hasattr(weight, "grid") or hasattr(weight, "codes_S"):
            weight = replace(weight, dtype=torch.float32)  # else what is wanted is rounded
        W_OI = weight.dense().double().to(device)
        # cuSPARSELt has no float32.
        for dtype in (BF16, torch.float16, *([] if backend == "cuda-2:4" else [torch.float32])):
            ready = kernels.prepare(weight, backend, device=device, dtype=dtype)
            # What compiles for bfloat16 does for float16: one number of tokens is enough, for each takes seconds to compile.
            for T in tokens[:1] if dtype == torch.float16 else tokens:
                x_TI, back_TO = torch.randn(T, I).to(device, dtype), torch.randn(T, O).to(device, dtype)
                kept_TI = torch.rand(T, I, device=device) < 0.5
                for kept in [None, kept_TI] if weight.kernels == "columns" and T <= KEPT_TOKENS else [None]:
                    used_TI = x_TI if kept is None else x_TI * kept
                    errors.append(_off(kernels.linear(ready, x_TI, None, kept), used_TI, W_OI.T))
                x_TI.requires_grad_()
                kernels.linear(ready, x_TI, None).backward(back_TO)
                assert x_TI.grad is not None
                errors.append(_off(x_TI.grad, back_TO, W_OI))
    worst = torch.tensor(errors).amax().item()  # which is NaN where one is
    if not worst <= 1:
        raise ValueError(f"errors are {worst:.3g} times what roundings allow")
    return f"errors are {worst:.2f} of what roundings allow"


def _off(found_TO: Tensor, x_TI: Tensor, W_IO: Tensor) -> float:
    """The largest difference between a product and what was found of it, relative to what roundings of its dtype allow."""
    exact = found_TO.dtype == torch.float32
    sums = _ROUNDINGS + (len(W_IO) ** 0.5 if exact else 0)  # those of float32 are of partial sums
    x_TI = x_TI.detach().double()
    allowed_TO = sums * torch.finfo(found_TO.dtype).eps * (x_TI.square() @ W_IO.square()).sqrt()
    return ((found_TO.detach().double() - x_TI @ W_IO).abs() / (allowed_TO + 1e-30)).amax().item()


def timed(case: str, device: str) -> dict[str, dict[str, Any]]:
    """Bytes, microseconds by tokens and the largest error of a case, by shape."""
    make, backend = CASES[case]
    shapes, tokens = (SHAPES, TOKENS) if device == "cuda" else (DRY_SHAPES, DRY_TOKENS)
    return {f"{O}×{I}": measure(make, (O, I), tokens, backend, HALF in case, device) for O, I in shapes}


def milliseconds(run: Callable[[], object], device: str, least: float = 20) -> float:
    """How long `run` takes, from as many runs as take so many milliseconds."""
    if device != "cuda":
        run()
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3

    def together(repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    together(2)
    once = together(2) / 2
    repeats = max(3, min(200, math.ceil(least / once)))
    return together(repeats) / repeats


def copy_bandwidth(device: str) -> float:
    """Gigabytes a second, read and written, of a copy within the memory."""
    source = torch.empty(2**30 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return round(2 * source.nbytes / milliseconds(lambda: target.copy_(source), device) / 1e6, 1)


def microseconds(
    copies: list[kernels.Prepared], x_TI: Tensor, kept_TI: Tensor | None, device: str
) -> tuple[float, bool]:
    """Of one linear, going over the copies; and whether it was outside a CUDA graph."""

    def once() -> None:
        for ready in copies:
            kernels.linear(ready, x_TI, None, kept_TI)

    once()  # compiles, and lets libraries allocate what they do not allow themselves while a graph is captured
    if device != "cuda":
        return milliseconds(once, device) / len(copies) * 1e3, True
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        run, eager = graph.replay, False
    except RuntimeError:
        torch.cuda.synchronize()
        run, eager = once, True
    return milliseconds(run, device) / len(copies) * 1e3, eager


def measure(
    make: Make, shape: tuple[int, int], tokens: tuple[int, ...], backend: str, half: bool, device: str
) -> dict[str, Any]:
    """All figures of one weight; `half`: few tokens keep a half of their inputs."""
    torch.manual_seed(0)
    with torch.device(device):
        random = make(*shape)
    # From the CPU, as they are read: of tensors that lie on the GPU already, `prepare` may make no copy.
    weight = map_tensors(random, Tensor.cpu)

    def prepare() -> kernels.Prepared:
        return kernels.prepare(weight, backend, device=device, dtype=BF16)

    copies = [prepare()]
    held = nbytes(copies[0].weight)
    if device == "cuda":
        cold = 4 * torch.cuda.get_device_properties(0).L2_cache_size
        copies += [prepare() for _ in range(math.ceil(cold / held))]
    W_OI = random.dense().float()
    times, error = {}, 0.0
    for T in tokens:
        x_TI = torch.randn(T, shape[1], device=device).to(BF16)
        kept_TI = torch.rand(T, shape[1], device=device) < 0.5 if half and T <= KEPT_TOKENS else None
        wanted_TO = (x_TI if kept_TI is None else x_TI * kept_TI).float() @ W_OI.T
        off_TO = kernels.linear(copies[0], x_TI, None, kept_TI) - wanted_TO
        error = max(error, (off_TO.abs().amax() / wanted_TO.abs().amax()).item())
        del wanted_TO, off_TO
        taken, eager = microseconds(copies, x_TI, kept_TI, device)
        times[str(T)] = f"{taken:.1f}{' e' if eager else ''}"
    stayed_dense = backend == "cuda-2:4" and copies[0].weight.algorithm is None
    notes = {"note": "stayed dense"} if stayed_dense else {}
    moved = (held + 2 * sum(shape)) / float(times["1"].split()[0]) / 1e3
    return {
        "MB": round(held / 1e6, 2),
        "µs by tokens": times,
        "GB/s at one token": round(moved),
        "largest error": float(f"{error:.1e}"),
        **notes,
    }


def goals(found: dict[str, dict[str, Any]]) -> list[str]:
    """How many times as fast as dense each case with a goal was at each shape, as rows; of what `timed` gave."""
    rows = []
    for case, T, wanted in GOALS:
        mine, dense = (found.get(name, {}).get("figure", {}) for name in (case, "dense"))
        ratios = {
            shape: _number(dense[shape], T) / _number(mine[shape], T)
            for shape in mine
            if shape in dense and str(T) in mine[shape]["µs by tokens"]
        }
        reached = sum(ratio >= wanted for ratio in ratios.values())
        listed = ", ".join(f"{shape}: {ratio:.2f}×" for shape, ratio in ratios.items()) or "no figures"
        rows.append(
            f"| {case} against dense, tokens: {T}, goal: {wanted}× | {listed}; reached at {reached} of {len(SHAPES)} |"
        )
    return rows


def _number(figures: dict[str, Any], T: int) -> float:
    return float(figures["µs by tokens"][str(T)].split()[0])
