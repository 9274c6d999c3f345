"""What `bench` found: figures of packed linears, and of a mixture of experts as a whole.

O: output features, I: input features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.speed.decoding import Decoding
from secateur.speed.streamed_decoding import Streamed, Transfers


@dataclass(frozen=True)
class Case:
    """Linears of one shape, in one layout, computed by one backend, for one number of tokens.

    Attributes:
        layout: its name and parameters, as `config.json` has them.
        shape: (O, I).
        linears: how many of them the checkpoint has.
        backend: that computes with them.
        tokens: inputs of one call.
        seconds: one call takes: median over rounds, each of which goes over many weights.
        dense_seconds: the same of `torch.nn.functional.linear` with dense weights of that shape.
        bytes: one call has to move: the weight as it lies in the memory of the device, inputs and outputs. Where linears
            differ, the mean.
        dense_bytes: the same with a dense weight.
        cached: the weights gone over fitted into the last-level cache, as memory or their number was at its limit: they were
            read faster than in a model.
        kept: the share of inputs that are read for a token, the mean of the linears; more tokens than four read all.
    """

    layout: dict[str, Any]
    shape: tuple[int, int]
    linears: int
    backend: str
    tokens: int
    seconds: float
    dense_seconds: float
    bytes: int
    dense_bytes: int
    cached: bool
    kept: float = 1.0

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds

    @property
    def speed_up(self) -> float:
        """Over dense."""
        return self.dense_seconds / self.seconds


@dataclass(frozen=True)
class Total:
    """All packed linears of a checkpoint: seconds a token, when so many tokens are computed at a time."""

    tokens: int
    seconds: float
    dense_seconds: float

    @property
    def speed_up(self) -> float:
        """Over dense."""
        return self.dense_seconds / self.seconds


@dataclass(frozen=True)
class Bench:
    """The figures of `bench`.

    Attributes:
        model: what was measured.
        backend: that was asked for.
        device: where.
        dtype: of inputs, outputs and dense weights.
        threads: that torch computed with on the CPU.
        copy_bandwidth: bytes a second that torch reads and writes together when it copies a large tensor. Copies are timed in
            turn with all cases, and the fastest counts: it is to be a limit. NaN where there are none.
        cases: by layout and shape, in the order of the checkpoint, and by tokens.
        fallback: where `auto` had to take dense weights, why.
        decoding: of a mixture of experts, the whole model as it writes, by the numbers of tokens.
        product_flops: floating-point operations a second that torch reaches in a product of large dense matrices; None where
            `decoding` is empty.
        streamed: of a model that was run under a limit on memory, by the numbers of tokens; there are no cases then.
        transfers: what its reader gives alone.
    """

    model: str
    backend: str
    device: str
    dtype: str
    threads: int
    copy_bandwidth: float
    cases: tuple[Case, ...]
    fallback: str | None
    decoding: tuple[Decoding, ...] = ()
    product_flops: float | None = None
    streamed: tuple[Streamed, ...] = ()
    transfers: Transfers | None = None

    def utilization(self, case: Case) -> float:
        """The share of the copy bandwidth that a case reached: its S-MBU."""
        return case.bandwidth / self.copy_bandwidth

    def whole_utilization(self, decoding: Decoding) -> tuple[float, float]:
        """The shares that the whole model reached of the copy's bandwidth and of the product's operations: S-MBU and S-MFU."""
        assert self.product_flops is not None
        bandwidth, flops = decoding.bytes / decoding.seconds, decoding.flops / decoding.seconds
        return bandwidth / self.copy_bandwidth, flops / self.product_flops

    def shares(self, streamed: Streamed) -> tuple[float, float]:
        """The shares that such a step reached of what the disk and the way to a device give without computing; 0 where nothing
        goes that way."""
        assert self.transfers is not None
        disk, bus = self.transfers.disk, self.transfers.bus
        return (
            streamed.bytes_read / streamed.seconds / disk if disk else 0.0,
            streamed.bytes_copied / streamed.seconds / bus if bus else 0.0,
        )

    @property
    def chosen(self) -> dict[str, int]:
        """How many linears each backend computes with."""
        found: dict[str, int] = {}
        for case in self.cases:
            if case.tokens == self.cases[0].tokens:
                found[case.backend] = found.get(case.backend, 0) + case.linears
        return found

    @property
    def totals(self) -> tuple[Total, ...]:
        """Over all linears, one for each number of tokens."""
        found = []
        for T in dict.fromkeys(case.tokens for case in self.cases):
            cases = [case for case in self.cases if case.tokens == T]
            packed = sum(case.linears * case.seconds for case in cases) / T
            dense = sum(case.linears * case.dense_seconds for case in cases) / T
            found.append(Total(T, packed, dense))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """All of it, what is computed included, as JSON holds it."""
        cases = [
            {
                **dataclasses.asdict(case),
                "bandwidth": case.bandwidth,
                "utilization": self.utilization(case),
                "speed_up": case.speed_up,
            }
            for case in self.cases
        ]
        totals = [{**dataclasses.asdict(total), "speed_up": total.speed_up} for total in self.totals]
        decoding = [
            {**dataclasses.asdict(each), **dict(zip(("s_mbu", "s_mfu"), self.whole_utilization(each), strict=True))}
            for each in self.decoding
        ]
        streamed = [
            {**dataclasses.asdict(each), **dict(zip(("of_disk", "of_bus"), self.shares(each), strict=True))}
            for each in self.streamed
        ]
        found = {"cases": cases, "chosen": self.chosen, "totals": totals, "decoding": decoding, "streamed": streamed}
        return {**dataclasses.asdict(self), **found}


def describe(layout: Mapping[str, Any]) -> str:
    """A layout's config in a few words: `nm 2:4`, `packed-int, 4 bits, groups of 64`."""
    rest = {key: value for key, value in layout.items() if key not in ("layout", "dtype")}
    name = str(layout["layout"])
    if rest.keys() >= {"n", "m"}:
        name += f" {rest.pop('n')}:{rest.pop('m')}"
    words = [name]
    for key, value in rest.items():
        plain = key.replace("_", " ")
        if isinstance(value, Mapping):
            words.append(f"{plain}: {describe(value)}")
        elif key in ("bits", "group_size"):
            words.append(f"{value} bits" if key == "bits" else f"groups of {value}")
        elif value is not False and value is not None:
            words.append(plain if value is True else f"{plain} {value}")
    return ", ".join(words)
