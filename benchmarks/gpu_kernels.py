"""One linear at a time on the GPU: how fast each backend multiplies by each form of weight, and how exactly.

    python -m benchmarks.gpu_kernels

Weights are random and bfloat16, and made as kernels take them. Each is timed by CUDA events over a CUDA graph that goes over
so many copies of it that none is left in the L2 cache when its turn comes again, as in a model. Outside a graph, few tokens
take as long as Python and the libraries need for the call. A time marked "e" is from outside one, for it could not be
captured.

O: output features, I: input features, T: tokens, G: groups of a row, B: bytes of a row's mask, N: outliers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur import kernels
from secateur.errors import one_line
from secateur.kernels.bits import bytes_of
from secateur.kernels.expand import compress_bitmap, count_rows
from secateur.kernels.packed import (
    CodedWeight,
    Packed,
    SparseRows,
    SparseWeight,
    TwoLevelGrid,
    UniformGrid,
    map_tensors,
    padded,
    tensors_of,
)
from secateur.kernels.plain import dense_weight

SHAPES = ((4096, 4096), (8192, 8192), (4096, 11008), (14336, 4096))
TOKENS = (1, 16, 512, 4096)
BF16 = torch.bfloat16


def two_of_four(O: int, I: int) -> SparseWeight:
    """Random 2:4: every half byte of the mask is one of the six with two bits."""
    halves_6 = torch.tensor([0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100], dtype=torch.uint8)
    low_OB, high_OB = halves_6[torch.randint(0, 6, (2, O, I // 8))]
    start_O1 = torch.arange(O + 1) * (I // 2)
    return SparseWeight((O, I), padded(torch.randn(O * I // 2).to(BF16)), low_OB | high_OB << 4, start_O1, (2, 4))


def bitmap(O: int, I: int, density: float) -> SparseWeight:
    """Random, without a pattern."""
    values, bitmask_OB = compress_bitmap(torch.randn(O, I).masked_fill_(torch.rand(O, I) >= density, 0).to(BF16))
    start_O1 = torch.nn.functional.pad(count_rows(bitmask_OB, I).cumsum(0), (1, 0))
    return SparseWeight((O, I), padded(values), bitmask_OB, start_O1)


def packed_int(O: int, I: int) -> CodedWeight:
    """4 bits in groups of 128, as GPTQ makes them."""
    G = I // 128
    scale_Γ = (torch.rand(O * G) + 0.5).to(torch.float16)
    return coded(O, I, 4, UniformGrid(128, scale_Γ, torch.randint(0, 16, (O * G,), dtype=torch.uint8)))


def spqr(O: int, I: int) -> CodedWeight:
    """3 bits in groups of 16, columns out of order, and one outlier in every 64 columns, as SpQR makes them."""
    G = I // 16
    pair_Γ = torch.randint(0, 8, (O * G,), dtype=torch.uint8) | torch.randint(0, 8, (O * G,), dtype=torch.uint8) << 4
    # Scales of 0.5 to 1.9 and zero points of 0 to 7.
    second_TG4 = torch.tensor([0.2, 0.5, 1, 0], dtype=torch.float16).repeat(O // 16, G, 1)
    column_N = (torch.arange(0, I, 64) + torch.randint(0, 64, (O, I // 64))).flatten().int()
    start_O1 = torch.arange(O + 1, dtype=torch.int32) * (I // 64)
    outliers = SparseRows(start_O1, column_N, torch.randn(len(column_N)).to(torch.float16))
    return coded(O, I, 3, TwoLevelGrid(16, 16, pair_Γ, second_TG4), torch.randperm(I).int(), outliers)


def coded(
    O: int,
    I: int,
    bits: int,
    grid: UniformGrid | TwoLevelGrid,
    order_I: Tensor | None = None,
    outliers: SparseRows | None = None,
) -> CodedWeight:
    """Random codes on a grid."""
    width = bytes_of(I, bits)
    codes_S = padded(torch.randint(0, 256, (O * width,), dtype=torch.uint8))
    start_O1 = torch.arange(O + 1) * width
    return CodedWeight((O, I), BF16, bits, codes_S, start_O1, None, None, grid, None, order_I, outliers)


# What a row is called: how its weights are made, and the backend.
CASES: dict[str, tuple[Callable[[int, int], Packed], str]] = {
    "dense": (two_of_four, "dense"),
    "2:4, cuda-2:4": (two_of_four, "cuda-2:4"),
    "bitmap 50 %, triton": (lambda O, I: bitmap(O, I, 0.5), "triton"),
    "bitmap 70 %, triton": (lambda O, I: bitmap(O, I, 0.3), "triton"),
    "SpQR 3 bits, triton": (spqr, "triton"),
    "packed-int 4 bits, triton": (packed_int, "triton"),
}
# Case, tokens, and how many times as fast as dense it is to be.
GOALS = (
    ("2:4, cuda-2:4", 4096, 1.3),
    ("bitmap 50 %, triton", 1, 1.5),
    ("SpQR 3 bits, triton", 1, 2.5),
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


def stored_tensors(ready: kernels.Prepared) -> Iterator[Tensor]:
    """What a prepared weight keeps on the GPU."""
    for tensor in tensors_of(ready.weight):
        if isinstance(tensor, torch.sparse.SparseSemiStructuredTensor):
            yield from (part for part in (tensor.packed, tensor.meta) if part is not None)
        else:
            yield tensor


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


def microseconds(copies: list[kernels.Prepared], x_TI: Tensor) -> tuple[float, bool]:
    """Of one linear, going over the copies; and whether it was outside a CUDA graph."""

    def once() -> None:
        for ready in copies:
            kernels.linear(ready, x_TI)

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


def measure(make: Callable[[int, int], Packed], shape: tuple[int, int], backend: str) -> Figures:
    """All figures of one weight."""
    with torch.device("cuda"):
        random = make(*shape)
    # From the CPU, as they are read: of tensors that lie on the GPU already, `prepare` may make no copy.
    weight = map_tensors(random, Tensor.cpu)

    def prepare() -> kernels.Prepared:
        return kernels.prepare(weight, backend, device="cuda", dtype=BF16)

    copies = [prepare()]
    held = sum(tensor.nbytes for tensor in stored_tensors(copies[0]))
    cold = 4 * torch.cuda.get_device_properties(0).L2_cache_size
    copies += [prepare() for _ in range(math.ceil(cold / held))]
    W_OI = dense_weight(random).float()
    times, error = [], 0.0
    for T in TOKENS:
        x_TI = torch.randn(T, shape[1], device="cuda").to(BF16)
        wanted_TO = x_TI.float() @ W_OI.T
        error = max(error, ((kernels.linear(copies[0], x_TI) - wanted_TO).abs().amax() / wanted_TO.abs().amax()).item())
        del wanted_TO
        times.append(microseconds(copies, x_TI))
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
                figures = found[shape, case] = measure(make, shape, backend)
                print(figures.row(shape, case, found.get((shape, "dense")), copied), flush=True)
            except Exception as error:
                # The other figures are worth having.
                print(f"| {shape[0]}×{shape[1]} | {case} | failed: {one_line(error)} |", flush=True)
    print()
    for case, T, wanted in GOALS:
        print(goal(found, case, T, wanted))


if __name__ == "__main__":
    main()
