"""The dictionary codes of ternary weights: what they take against the entropy, and how fast they are read.

python -m benchmarks.ternary --threads 1
"""

from __future__ import annotations

import time
from functools import partial

import torch

from benchmarks.protocol import arguments, machine, prepare, table
from secateur.core.quantized import Quantized
from secateur.formats.layouts.ternary_dict import TernaryCodes, TernaryDict
from secateur.kernels.backends import linear
from secateur.kernels.backends import prepare as made_ready

O, I, ROUNDS = 2048, 8192, 9


def main() -> None:
    parser = arguments(__doc__)
    args = parser.parse_args()
    prepare(args)
    print(machine())
    rows = []
    for zeros in (0.5, 0.7, 0.8, 0.885, 0.95):
        draw = torch.Generator().manual_seed(0)
        other_OI = torch.randint(1, 3, (O, I), generator=draw)
        symbol_OI = torch.where(torch.rand(O, I, generator=draw) < zeros, 0, other_OI).to(torch.uint8)
        half_O = torch.ones(O).bfloat16()
        layout = TernaryDict(torch.bfloat16)
        parts = layout.pack(Quantized(TernaryCodes(symbol_OI, -half_O, half_O), (O, I), torch.bfloat16))
        share_3 = torch.bincount(symbol_OI.flatten().long(), minlength=3).double() / symbol_OI.numel()
        entropy = float(-(share_3 * share_3.log2()).sum())
        codes = 16 * parts["codes"].numel() / (O * I)
        total = 8 * sum(part.nbytes for part in parts.values()) / (O * I)
        weight = layout.load(parts)
        prepared = made_ready(weight, "cpu", dtype=torch.bfloat16)
        x_1I = torch.randn(1, I).bfloat16()
        speeds = [O * I / seconds / 1e9 for seconds in (_best(weight.expanded), _best(partial(linear, prepared, x_1I)))]
        rows.append(
            [
                f"{zeros}",
                *(f"{x:.4f}" for x in (entropy, codes, total)),
                f"{codes / entropy - 1:.1%}",
                *(f"{x:.2f}" for x in speeds),
            ]
        )
    headings = ["P(0)", "entropy, bits", "codes", "all that is stored", "codes against entropy"]
    table([*headings, "made dense, G weights/s", "times one token, G weights/s"], rows)


def _best(run) -> float:  # type: ignore[no-untyped-def]
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


if __name__ == "__main__":
    main()
