"""Linears that pass over inputs: how fast they multiply by the share that is kept, against those that read every weight.

    python -m benchmarks.kept_inputs [--shares 1,0.5,0.25] [--tokens 1,4] [--instructions avx2]
    python -m benchmarks.kept_inputs --part model [--shares 1,0.5]

Linears are timed as `benchmarks.kernels` does it, with the same shapes; which inputs are kept is drawn anew for every copy of
a weight, and for several tokens it is any that one of them keeps, each an even part of the share. The model is a Llama of
1.1 B random weights, whose activations say nothing: in each of its linears a mask that was drawn stands for what a method would
keep. Of its tokens a second the best round counts; all kinds take turns.

O: output features, I: input features, T: tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.kernels import SHAPES, TORCH_BF16, Case, copies, dense_case, one_pass, packed_case, use
from benchmarks.protocol import arguments, machine, table
from benchmarks.random_packed import BF16, bitmap, columns, columns_bitmap, columns_int, packed_int
from secateur import kernels
from secateur.kernels.packed import Packed, map_tensors

GROUP = 64
PACKED_INT, BITMAP = "packed-int 4 bits, groups of 64", "bitmap 50 %"
COLUMNS, COLUMNS_BITMAP, COLUMNS_INT = "columns", "columns-bitmap 50 %", "columns-int 4 bits, groups of 64"
BY_OUTPUT: dict[str, Callable[[int, int], Packed]] = {
    BITMAP: partial(bitmap, density=0.5),
    PACKED_INT: partial(packed_int, bits=4, group_size=GROUP),
}
BY_INPUT: dict[str, Callable[[int, int], Packed]] = {
    COLUMNS: columns,
    COLUMNS_BITMAP: partial(columns_bitmap, density=0.5),
    COLUMNS_INT: partial(columns_int, bits=4, group_size=GROUP),
}
#: By how much a half of the inputs is to be faster, and than what.
GOALS = (
    (COLUMNS, f"{COLUMNS}, all", 1.6),
    (COLUMNS, TORCH_BF16, 1.6),
    (COLUMNS_BITMAP, TORCH_BF16, 2.6),
    (COLUMNS_INT, PACKED_INT, 1.4),
)
#: TinyLlama's sizes.
MODEL = {
    **{"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    **{"num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 512},
}
TOKENS = 32


def mask(T: int, I: int, share: float) -> Tensor:
    """Which inputs each token keeps; together they keep a share."""
    some_I = torch.rand(I) < share
    return torch.stack([some_I & (torch.randint(0, T, (I,)) == t) for t in range(T)])


def kept_case(weight: Packed, x_TI: Tensor, share: float) -> Case:
    """Our kernels, with a mask."""
    T, I = x_TI.shape
    calls = []
    for _ in range(copies(round(weight.read_bytes(1.0)))):
        ready = kernels.prepare(map_tensors(weight, torch.clone), "cpu", dtype=x_TI.dtype)
        calls.append(partial(kernels.linear, ready, x_TI, None, mask(T, I, share)))
    return Case(calls, round(weight.read_bytes(share)) + (weight.shape[0] + I) * T * x_TI.itemsize)


def make_cases(O: int, I: int, T: int, shares: list[float]) -> dict[str, Case]:
    """All cases of a shape by name."""
    x_TI = torch.randn(T, I).to(BF16)
    found = {TORCH_BF16: dense_case(torch.randn(O, I).to(BF16), x_TI)}
    for name, make in BY_OUTPUT.items():
        found[name] = packed_case(make(O, I), x_TI)
    for name, make in BY_INPUT.items():
        weight = make(O, I)
        found[f"{name}, all"] = packed_case(weight, x_TI)
        for share in shares:
            found[f"{name}, {share:.0%}"] = kept_case(weight, x_TI, share)
    return found


def report(cases: dict[str, Case], samples: dict[str, list[float]]) -> None:
    """Print a table of medians, and what has become of the goals."""
    middle = {name: statistics.median(each) for name, each in samples.items()}
    rows = [
        [
            name,
            f"{1e3 * middle[name]:.3f}",
            f"{1e3 * min(samples[name]):.3f}",
            f"{case.bytes / 1e6:.2f}",
            f"{case.bytes / middle[name] / 1e9:.1f}",
            *(f"{middle[other] / middle[name]:.2f}×" for other in (TORCH_BF16, f"{COLUMNS}, all", PACKED_INT)),
        ]
        for name, case in cases.items()
    ]
    against = [f"against {name}" for name in ("torch, bfloat16", "columns, all", "packed-int")]
    table(["", "ms", "least ms", "MB", "GB/s", *against], rows)
    for name, other, goal in GOALS:
        half = f"{name}, 50%"
        if half in middle:
            print(f"{half} against {other}: {middle[other] / middle[half]:.2f}×, goal {goal}×")


def linears(args: argparse.Namespace, shares: list[float]) -> None:
    """The part that times linears."""
    for T in map(int, args.tokens.split(",")):
        for O, I in SHAPES:
            print(f"\n{O}×{I}, tokens: {T}\n")
            cases = make_cases(O, I, T, shares)
            samples: dict[str, list[float]] = {name: [] for name in cases}
            for turn in range(1 + args.rounds):
                for name, case in cases.items():
                    taken = one_pass(case)
                    if turn:  # the first is to warm up
                        samples[name].append(taken)
            report(cases, samples)


class Forced(nn.Module):
    """A linear that keeps inputs that were drawn, once it has looked at them as a method would."""

    def __init__(self, make: Callable[[int, int], Packed], O: int, I: int, share: float) -> None:
        super().__init__()
        self.ready = kernels.prepare(make(O, I), "cpu", dtype=BF16)
        self.kept_I = None if share == 1 else torch.rand(I) < share

    def forward(self, x: Tensor) -> Tensor:
        if self.kept_I is None or x.shape[-2] > 1:
            return kernels.linear(self.ready, x)
        return kernels.linear(self.ready, x, None, (x.abs() >= 0) & self.kept_I)


def seconds_of_a_token(model: nn.Module) -> float:
    """Of greedy text after a short prompt."""
    prompt = torch.randint(3, 1000, (1, 16))
    options = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "pad_token_id": 0}
    start = time.perf_counter()
    model.generate(prompt, **options)  # type: ignore[operator]
    return (time.perf_counter() - start) / TOKENS


def forced(make: Callable[[int, int], Packed] | None, share: float) -> nn.Module:
    """The model with all linears of its blocks made so; None leaves them to torch."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.initialization import no_init_weights

    with no_init_weights():  # to draw a billion numbers takes longer than all that is timed
        model: nn.Module = AutoModelForCausalLM.from_config(LlamaConfig(**MODEL), dtype=BF16)
    some = torch.randn(2**20).mul_(0.02).to(BF16)
    for parameter in model.parameters():
        for part in parameter.data.view(-1).split(len(some)):
            part.copy_(some[: len(part)])
    for block in model.model.layers if make else ():  # type: ignore[union-attr]
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Forced(make, child.out_features, child.in_features, share))
    return model.eval()


def whole_model(args: argparse.Namespace, shares: list[float]) -> None:
    """The part that times a model: goals are 1.5 times dense, and with codes 1.3 times packed-int, at a half."""
    kinds: dict[str, Callable[[], nn.Module]] = {
        "torch, bfloat16": partial(forced, None, 1.0),
        PACKED_INT: partial(forced, BY_OUTPUT[PACKED_INT], 1.0),
    }
    for name in (COLUMNS, COLUMNS_INT):
        for share in shares:
            kinds[f"{name}, {share:.0%}"] = partial(forced, BY_INPUT[name], share)
    models = {name: make() for name, make in kinds.items()}
    samples: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(1 + args.rounds):
        for name, model in models.items():
            taken = seconds_of_a_token(model)
            if turn:
                samples[name].append(taken)
    best = {name: min(each) for name, each in samples.items()}
    others = ("torch, bfloat16", PACKED_INT)
    rows = [[name, f"{1 / t:.1f}", *(f"{best[other] / t:.2f}×" for other in others)] for name, t in best.items()]
    table(["", "tokens a second", *(f"against {other}" for other in others)], rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=("linears", "model"), default="linears")
    parser.add_argument("--shares", default="1,0.5,0.25", help="of the inputs that are kept, with commas between")
    parser.add_argument("--tokens", default="1", help="inputs of a call, with commas between")
    parser.add_argument("--instructions", choices=("plain", "avx2", "avx512"), help="of our kernels; default: the best")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{machine()}, kernels: {use(args.instructions, parser)}; {args.rounds} rounds")
    with torch.inference_mode():
        (linears if args.part == "linears" else whole_model)(args, [float(share) for share in args.shares.split(",")])


if __name__ == "__main__":
    main()
