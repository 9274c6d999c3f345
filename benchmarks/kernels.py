"""One linear at a time on the CPU: how fast the compiled kernels multiply by each form of weight, against torch.

    python -m benchmarks.kernels [--tokens 1,8] [--instructions avx2] [--only spqr] [--shapes 576x576,1536x576]

Weights are random, bfloat16, and made as kernels take them. Each case goes over copies of its weight, one call each, and all
cases of a shape take turns, round after round: what slows the machine down slows all of them down, and by the time a copy is
used again, the other cases' weights have put it out of the cache. Bytes are those of the weight, inputs and outputs. A large
copy and a scalar product of large vectors, which only reads, take turns with them: of these the fastest round counts.

O: output features, I: input features, T: tokens, G: groups of a row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.protocol import arguments, machine, table
from benchmarks.random_packed import (
    BF16,
    bitmap,
    codebook,
    dictionary,
    low_rank,
    packed_int,
    sparse_int,
    spqr,
    trellis,
    two_of_four,
    two_precisions,
)
from secateur import kernels
from secateur.kernels.cpu import cpu_backend
from secateur.kernels.packed import Packed, map_tensors, nbytes
from secateur.speed.timing import large_copy

SHAPES = ((2048, 2048), (5632, 2048), (4096, 11008))
FP32 = torch.float32
CPU = torch.device("cpu")
# What the copies of a case take, and how many there are at least.
COPIES_BYTES, LEAST_COPIES = 2**28, 2
INT4_GROUP = 64
COPY, READ = "a copy", "a scalar product"
TORCH_BF16, TORCH_FP32, TORCH_INT4 = "torch, bfloat16", "torch, float32", "torch, int4 groups of 64"
# What a row is called: how its weight is made, and the dtype of inputs and outputs.
CASES: dict[str, tuple[Callable[[int, int], Packed], torch.dtype]] = {
    "bitmap 50 %": (partial(bitmap, density=0.5), BF16),
    "bitmap 50 %, float32 inputs": (partial(bitmap, density=0.5), FP32),
    "bitmap 70 %": (partial(bitmap, density=0.3), BF16),
    "bitmap 70 %, float32 inputs": (partial(bitmap, density=0.3), FP32),
    "nm 2:4": (two_of_four, BF16),
    "nm 2:4, 3 % of low rank": (partial(low_rank, main=two_of_four, share=1 / 32), BF16),
    "nm 2:4, 3 % of low rank, float32 inputs": (partial(low_rank, main=two_of_four, share=1 / 32), FP32),
    "packed-int 2 bits, groups of 64": (partial(packed_int, bits=2, group_size=64), BF16),
    "packed-int 3 bits, groups of 64": (partial(packed_int, bits=3, group_size=64), BF16),
    "packed-int 3 bits, groups of 16": (partial(packed_int, bits=3, group_size=16), BF16),
    "packed-int 4 bits, groups of 64": (partial(packed_int, bits=4, group_size=64), BF16),
    "packed-int 4 bits, symmetric": (partial(packed_int, bits=4, group_size=64, symmetric=True), BF16),
    "packed-int 8 bits, groups of 64": (partial(packed_int, bits=8, group_size=64), BF16),
    "spqr 3 bits, groups of 16, 1.4 % outliers": (partial(spqr, bits=3, group_size=16, outlier_share=0.014), BF16),
    "spqr 4 bits, groups of 64, 0.3 % outliers": (partial(spqr, bits=4, group_size=64, outlier_share=0.003), BF16),
    "codebook 4 bits": (partial(codebook, bits=4), BF16),
    "trellis 2 bits": (partial(trellis, bits=2), BF16),
    "trellis 3 bits": (partial(trellis, bits=3), BF16),
    "trellis 4 bits": (partial(trellis, bits=4), BF16),
    "dictionary, 0.7 of 16 bits": (partial(dictionary, size=0.7), BF16),
    "bitmap of as many bytes as a dictionary": (partial(bitmap, density=0.6375), BF16),
    "sq 8 and 4 bits, 2 of 64 high": (partial(two_precisions, bits=(8, 4), bank=64, high=2), BF16),
    "sq 8 and 4 bits, 8 of 64 high": (partial(two_precisions, bits=(8, 4), bank=64, high=8), BF16),
    "sparse-int 50 %, 4 bits": (partial(sparse_int, density=0.5, bits=4, group_size=64), BF16),
}


@dataclass(frozen=True)
class Case:
    """One way to compute a linear, or to move bytes.

    Attributes:
        calls: of it, each with memory of its own.
        bytes: that one call has to move.
    """

    calls: list[Callable[[], object]]
    bytes: int


def copies(size: int) -> int:
    """How many weights of a size a case goes over."""
    return max(LEAST_COPIES, round(COPIES_BYTES / size))


def read_case() -> Case:
    """Two large vectors are read, and nothing is written."""
    a, b = torch.ones(2, COPIES_BYTES // 4)
    return Case([lambda: torch.dot(a, b)], a.nbytes + b.nbytes)


def dense_case(W_OI: Tensor, x_TI: Tensor) -> Case:
    """torch's linear."""
    moved = (W_OI.shape[0] + W_OI.shape[1]) * len(x_TI) * x_TI.itemsize
    return Case([partial(linear, x_TI, W_OI.clone()) for _ in range(copies(W_OI.nbytes))], W_OI.nbytes + moved)


def int4_case(O: int, I: int, x_TI: Tensor) -> Case:
    """torch's own 4 bits: in bfloat16, with a scale and a zero point a group."""
    codes_OI = torch.randint(0, 16, (O, I), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI, 1)
    scale_zero_GO2 = torch.rand(I // INT4_GROUP, O, 2).to(BF16)
    size = packed.nbytes + scale_zero_GO2.nbytes
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    calls = [partial(multiply, x_TI, packed.clone(), INT4_GROUP, scale_zero_GO2.clone()) for _ in range(copies(size))]
    return Case(calls, size + (O + I) * len(x_TI) * x_TI.itemsize)


def packed_case(weight: Packed, x_TI: Tensor) -> Case:
    """Our kernels."""
    O, I = weight.shape
    ready = [
        kernels.prepare(map_tensors(weight, torch.clone), "cpu", dtype=x_TI.dtype)
        for _ in range(copies(nbytes(weight)))
    ]
    moved = (O + I) * len(x_TI) * x_TI.itemsize
    return Case([partial(kernels.linear, each, x_TI) for each in ready], nbytes(ready[0].weight) + moved)


def make_cases(O: int, I: int, T: int, only: str) -> dict[str, Case]:
    """All cases of a shape by name; of ours, those with `only` in their name."""
    x_TI, W_OI = torch.randn(T, I), torch.randn(O, I)
    copy, copied = large_copy(CPU)
    found = {
        COPY: Case([copy], copied),
        READ: read_case(),
        TORCH_BF16: dense_case(W_OI.to(BF16), x_TI.to(BF16)),
        TORCH_FP32: dense_case(W_OI, x_TI),
        TORCH_INT4: int4_case(O, I, x_TI.to(BF16)),
    }
    for name, (make, dtype) in CASES.items():
        if only in name:
            found[name] = packed_case(make(O, I), x_TI.to(dtype))
    return found


def one_pass(case: Case) -> float:
    """Seconds of a call, when each copy is used once."""
    start = time.perf_counter()
    for call in case.calls:
        call()
    return (time.perf_counter() - start) / len(case.calls)


def use(instructions: str | None, parser: argparse.ArgumentParser) -> str:
    """Let the kernels use these instructions, or the best that there are; which it is."""
    problem = cpu_backend.missing()
    if problem is not None:
        parser.error(f"backend cpu cannot be used: {problem}")
    if instructions is not None and not torch.ops.secateur.use_instructions(instructions):
        parser.error(f"this CPU has no {instructions}")
    found: str = torch.ops.secateur.instructions()
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", default="1", help="inputs of a call, with commas between")
    parser.add_argument(
        "--instructions", choices=("plain", "avx2", "avx512vnni", "avx512"), help="of our kernels; default: the best"
    )
    parser.add_argument("--only", default="", help="of our cases, those with this in their name")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", default=",".join(f"{O}x{I}" for O, I in SHAPES), help="outputs x inputs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{machine()}, kernels: {use(args.instructions, parser)}; {args.rounds} rounds")
    for T in map(int, args.tokens.split(",")):
        for O, I in (map(int, shape.split("x")) for shape in args.shapes.split(",")):
            print(f"\n{O}×{I}, tokens: {T}\n")
            with torch.inference_mode():
                cases = make_cases(O, I, T, args.only)
                samples: dict[str, list[float]] = {name: [] for name in cases}
                for turn in range(1 + args.rounds):
                    for name, case in cases.items():
                        taken = one_pass(case)
                        if turn:  # the first is to warm up
                            samples[name].append(taken)
            report(cases, samples)


def report(cases: dict[str, Case], samples: dict[str, list[float]]) -> None:
    """Print a table. Ratios are of medians; above 1 is faster than torch."""
    copied, read = (cases[name].bytes / min(samples[name]) for name in (COPY, READ))
    middle = {name: statistics.median(each) for name, each in samples.items()}
    torch_cases = {"bfloat16": TORCH_BF16, "float32": TORCH_FP32, "int4": TORCH_INT4}
    rows = []
    for name, case in cases.items():
        bandwidth = case.bytes / middle[name]
        rows.append(
            [
                name,
                f"{1e3 * middle[name]:.3f}",
                f"{1e3 * min(samples[name]):.3f}",
                f"{case.bytes / 1e6:.2f}",
                f"{bandwidth / 1e9:.1f}",
                f"{bandwidth / copied:.0%}",
                f"{bandwidth / read:.0%}",
                *(
                    "" if name in (COPY, READ) else f"{middle[other] / middle[name]:.2f}×"
                    for other in torch_cases.values()
                ),
            ]
        )
    against = [f"against torch, {dtype}" for dtype in torch_cases]
    table(["", "ms", "least ms", "MB", "GB/s", "of copy", "of read", *against], rows)


if __name__ == "__main__":
    main()
