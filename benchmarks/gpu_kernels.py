"""One linear at a time on the GPU: how fast each backend multiplies by each form of weight, and how exactly.

    python -m benchmarks.gpu_kernels

Weights are random and bfloat16, and made as kernels take them. Each is timed by CUDA events over a CUDA graph that goes over
so many copies of it that none is left in the L2 cache when its turn comes again, as in a model. Outside a graph, few tokens
take as long as Python and the libraries need for the call. A time marked "e" is from outside one, for it could not be
captured.

O: output features, I: input features, T: tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.random_packed import (
    BF16,
    bitmap,
    columns,
    columns_bitmap,
    columns_int,
    packed_int,
    spqr,
    trellis,
    two_of_four,
)
from secateur import kernels
from secateur.errors import one_line
from secateur.kernels.backends import KEPT_TOKENS
from secateur.kernels.packed import Packed, map_tensors, nbytes

SHAPES = ((4096, 4096), (8192, 8192), (4096, 11008), (14336, 4096))
TOKENS = (1, 16, 512, 4096)

# What a row is called: how its weights are made, and the backend.
CASES: dict[str, tuple[Callable[[int, int], Packed], str]] = {
    "dense": (two_of_four, "dense"),
    "2:4, cuda-2:4": (two_of_four, "cuda-2:4"),
    "bitmap 50 %, triton": (partial(bitmap, density=0.5), "triton"),
    "bitmap 70 %, triton": (partial(bitmap, density=0.3), "triton"),
    # One outlier in 64 columns.
    "SpQR 3 bits, triton": (partial(spqr, bits=3, group_size=16, outlier_share=1 / 64), "triton"),
    "packed-int 4 bits, triton": (partial(packed_int, bits=4, group_size=128), "triton"),
    "trellis 3 bits, triton": (partial(trellis, bits=3), "triton"),
    "columns, triton": (columns, "triton"),
    "columns, half the inputs kept, triton": (columns, "triton"),
    "columns-bitmap 50 %, half the inputs kept, triton": (partial(columns_bitmap, density=0.5), "triton"),
    "columns-int 4 bits, half the inputs kept, triton": (partial(columns_int, bits=4, group_size=128), "triton"),
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


@dataclass(frozen=True)
class Figures:
    """Of one weight.

    Attributes:
        held: bytes of it on the GPU.
        microseconds: of one linear, in the order of `TOKENS`.
        eager: for which of them that was outside a CUDA graph.
        error: the largest, relative to the largest output in float32.
        note: what else the reader has to know.
    """

    held: int
    microseconds: list[float]
    eager: list[bool]
    error: float
    note: str

    def row(self, shape: tuple[int, int], case: str, dense: Figures | None, copied: float) -> str:
        """As a row of a table; `copied`: bytes a second that a copy moves."""
        O, I = shape
        times = [
            f"{taken:.1f}{' e' if eager else ''}" + (f" ({dense.microseconds[i] / taken:.2f}×)" if dense else "")
            for i, (taken, eager) in enumerate(zip(self.microseconds, self.eager, strict=True))
        ]
        moved = (self.held + 2 * (O + I)) / self.microseconds[0] * 1e6
        cells = [
            f"{O}×{I}",
            case + self.note,
            f"{self.held / 1e6:.1f}",
            *times,
            f"{moved / 1e9:.0f}, {moved / copied:.0%}",
            f"{self.error:.1e}",
        ]
        return f"| {' | '.join(cells)} |"


def milliseconds(run: Callable[[], object], least: float = 20) -> float:
    """How long `run` takes on the GPU, from as many runs as take so many milliseconds."""

    def timed(repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    timed(2)
    once = timed(2) / 2
    repeats = max(3, min(200, math.ceil(least / once)))
    return timed(repeats) / repeats


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy within the GPU's memory."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3


def microseconds(copies: list[kernels.Prepared], x_TI: Tensor, kept_TI: Tensor | None) -> tuple[float, bool]:
    """Of one linear, going over the copies; and whether it was outside a CUDA graph."""

    def once() -> None:
        for ready in copies:
            kernels.linear(ready, x_TI, None, kept_TI)

    once()  # compiles, and lets libraries allocate what they do not allow themselves while a graph is captured
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        run, eager = graph.replay, False
    except RuntimeError:
        torch.cuda.synchronize()
        run, eager = once, True
    return milliseconds(run) / len(copies) * 1e3, eager


def measure(make: Callable[[int, int], Packed], shape: tuple[int, int], backend: str, half: bool) -> Figures:
    """All figures of one weight; `half`: few tokens keep a half of their inputs."""
    with torch.device("cuda"):
        random = make(*shape)
    # From the CPU, as they are read: of tensors that lie on the GPU already, `prepare` may make no copy.
    weight = map_tensors(random, Tensor.cpu)

    def prepare() -> kernels.Prepared:
        return kernels.prepare(weight, backend, device="cuda", dtype=BF16)

    copies = [prepare()]
    held = nbytes(copies[0].weight)
    cold = 4 * torch.cuda.get_device_properties(0).L2_cache_size
    copies += [prepare() for _ in range(math.ceil(cold / held))]
    W_OI = random.dense().float()
    times, error = [], 0.0
    for T in TOKENS:
        x_TI = torch.randn(T, shape[1], device="cuda").to(BF16)
        kept_TI = torch.rand(T, shape[1], device="cuda") < 0.5 if half and T <= KEPT_TOKENS else None
        wanted_TO = (x_TI if kept_TI is None else x_TI * kept_TI).float() @ W_OI.T
        off_TO = kernels.linear(copies[0], x_TI, None, kept_TI) - wanted_TO
        error = max(error, (off_TO.abs().amax() / wanted_TO.abs().amax()).item())
        del wanted_TO, off_TO
        times.append(microseconds(copies, x_TI, kept_TI))
    stayed_dense = backend == "cuda-2:4" and copies[0].weight.algorithm is None
    return Figures(held, *map(list, zip(*times, strict=True)), error, " (stayed dense)" if stayed_dense else "")


def goal(found: dict[tuple[tuple[int, int], str], Figures], case: str, T: int, wanted: float) -> str:
    """How much faster than dense it was at each shape, as a row."""
    i = TOKENS.index(T)
    ratios = {
        shape: found[shape, "dense"].microseconds[i] / found[shape, case].microseconds[i]
        for shape in SHAPES
        if (shape, "dense") in found and (shape, case) in found
    }
    reached = sum(ratio >= wanted for ratio in ratios.values())
    listed = ", ".join(f"{O}×{I}: {ratio:.2f}×" for (O, I), ratio in ratios.items()) or "no figures"
    return f"| {case} against dense, tokens: {T}, goal: {wanted}× | {listed}; reached at {reached} of {len(SHAPES)} |"


def main() -> None:
    torch.manual_seed(0)
    copied = copy_bandwidth()
    print(f"| copy bandwidth | {copied / 1e9:.0f} GB/s |")
    tokens = " | ".join(f"µs, T = {T}" for T in TOKENS)
    print(f"\n| linear | weights, backend | MB | {tokens} | GB/s at T = 1, of copy | largest error |")
    print("|---" * (len(TOKENS) + 5) + "|", flush=True)
    found: dict[tuple[tuple[int, int], str], Figures] = {}
    for shape in SHAPES:
        for case, (make, backend) in CASES.items():
            try:
                figures = found[shape, case] = measure(make, shape, backend, HALF in case)
                print(figures.row(shape, case, found.get((shape, "dense")), copied), flush=True)
            except Exception as error:
                # The other figures are worth having.
                print(f"| {shape[0]}×{shape[1]} | {case} | failed: {one_line(error)} |", flush=True)
    print()
    for case, T, wanted in GOALS:
        print(goal(found, case, T, wanted))


if __name__ == "__main__":
    main()
