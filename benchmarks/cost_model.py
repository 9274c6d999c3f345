"""What SparseGPT or GPTQ costs by phase, computed for large models: the tables of docs/large-models.md.

    python -m benchmarks.cost_model

Nothing is measured here. The rates are what is assumed of an H100, and say so in the table that is printed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.protocol import table

TOKENS, WINDOW = 128 * 2048, 2048
# FLOP/s of one GPU that is busy with large products: half of the bfloat16 peak for the forward pass; 60 % of the float32 peak
# for statistics; for solving, a fifth, for it is a sequence of smaller ones.
FORWARD, STATISTICS, SOLVING = 0.5 * 989e12, 0.6 * 67e12, 0.2 * 67e12
# Bytes a second: a disk that all GPUs share, links within a machine of 8 and between machines, for each GPU.
DISK, WITHIN, BETWEEN = 5e9, 300e9, 40e9
GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Group:
    """Linears that read the same input.

    Attributes:
        inputs: features of the input.
        rows: of each linear.
        count: how many such groups a block has.
        share: of the tokens that reach one.
    """

    inputs: int
    rows: tuple[int, ...]
    count: int = 1
    share: float = 1.0


@dataclass(frozen=True)
class Model:
    blocks: int
    width: int
    groups: tuple[Group, ...] = field(repr=False)

    @property
    def weights(self) -> int:
        """Of the linears of one block."""
        return sum(group.count * group.inputs * sum(group.rows) for group in self.groups)

    def phases(self) -> dict[str, float]:
        """FLOP of one block by phase."""
        forward = sum(2 * TOKENS * g.share * g.count * g.inputs * sum(g.rows) for g in self.groups)
        forward += 2 * TOKENS * WINDOW * self.width  # causal attention: half of 4·T·S·width
        return {
            "forward": forward,
            "statistics": sum(TOKENS * g.share * g.count * g.inputs**2 for g in self.groups),
            "factorisation": sum(g.count * 2 / 3 * g.inputs**3 for g in self.groups),
            "sweep": sum(g.count * sum(g.rows) * g.inputs**2 for g in self.groups),
        }

    def largest_solve(self) -> float:
        """Seconds that the dearest linear of each group takes, one group after the other: what no more GPUs make shorter."""
        seconds = 0.0
        for group in self.groups:
            if group.count == 1:
                seconds += (2 / 3 * group.inputs**3 + max(group.rows) * group.inputs**2) / SOLVING
        return seconds


def dense(blocks: int, width: int, inner: int, kv: int) -> Model:
    attention = (Group(width, (width, kv, kv)), Group(width, (width,)))
    return Model(blocks, width, (*attention, Group(width, (inner, inner)), Group(inner, (width,))))


def experts(blocks: int, width: int, inner: int, count: int, active: int) -> Model:
    share = active / count
    attention = (Group(width, (width, width // 8, width // 8)), Group(width, (width,)))
    mixture = (Group(width, (inner, inner), count, share), Group(inner, (width,), count, share))
    return Model(blocks, width, (*attention, *mixture))


MODELS = {
    "8 B": dense(32, 4096, 14336, 1024),
    "70 B": dense(80, 8192, 28672, 1024),
    "405 B": dense(126, 16384, 53248, 1024),
    "1 T, 384 experts, 8 at a time": experts(61, 7168, 2048, 384, 8),
}


def seconds(model: Model, gpus: int) -> dict[str, float]:
    """Of one block by phase: windows split over the GPUs, linears dealt out to them."""
    flop = model.phases()
    link = WITHIN if gpus <= 8 else BETWEEN
    # Of Gram matrices a triangle.
    exchanged = sum(g.count * 2 * g.inputs**2 for g in model.groups) * 2 * (gpus - 1) / gpus
    exchanged += 2 * model.weights  # the solved weights go to all, dense at most
    solving = (flop["factorisation"] + flop["sweep"]) / SOLVING / gpus
    return {
        "reading": 2 * model.weights / DISK,
        "forward": flop["forward"] / FORWARD / gpus,
        "statistics": flop["statistics"] / STATISTICS / gpus,
        "exchange": exchanged / link if gpus > 1 else 0.0,
        "solving": max(solving, model.largest_solve()),
        "writing": 1.1 * model.weights / DISK,
    }


def main() -> None:
    print(f"{TOKENS} tokens in windows of {WINDOW}; SparseGPT at 50 %\n")
    rows = []
    for name, model in MODELS.items():
        flop = model.phases()
        gram = max(group.inputs for group in model.groups) ** 2 * 4
        rows.append(
            [
                name,
                f"{model.blocks * model.weights / 1e9:.0f}",
                *(f"{value / 1e12:.0f}" for value in flop.values()),
                f"{2 * model.weights / 1e9:.1f}",
                f"{gram / 1e9:.2f}",
                f"{TOKENS * model.width * 2 / 1e9:.1f}",
            ]
        )
    headings = ["", "10⁹ weights in blocks", *(f"{phase}, TFLOP" for phase in flop)]
    table([*headings, "block in bfloat16, GB", "largest Gram matrix, GB", "hidden states, GB"], rows)
    print("\nSeconds a block, and hours in all\n")
    rows = []
    for name, model in MODELS.items():
        for gpus in GPUS:
            each = seconds(model, gpus)
            # The next block is read while one is solved.
            total = sum(each.values()) - min(each["reading"], each["solving"])
            rows.append(
                [
                    name,
                    str(gpus),
                    *(f"{s:.2f}" for s in each.values()),
                    f"{total:.1f}",
                    f"{total * model.blocks / 3600:.2f}",
                ]
            )
    table(["", "GPUs", *each, "a block", "hours"], rows)


if __name__ == "__main__":
    main()
