"""What `bench` prints."""

from __future__ import annotations

from typing import Any

from secateur.terminal.screen import screen, show
from secateur.terminal.tables import Column, print_table


def print_bench(found: Any) -> None:
    """All figures of a `Bench`."""
    show(f"{found.model} in {found.dtype} on {found.device}")
    if found.streamed:
        _print_streamed(found)
        return
    _print_tables(found)
    if found.decoding:
        _print_decoding(found)
    screen.print()
    for line in _lines(found):
        show(line)


def _print_tables(found: Any) -> None:
    """A table for each layout, and no lines: so the figures fit into eighty columns."""
    from secateur.speed.bench_result import describe

    columns = [Column("shape"), Column("linears", spare=3), Column("backend", right=False)]
    columns += [Column("tokens"), Column("ms"), Column("dense"), Column("faster")]
    columns += [Column("MB", spare=2), Column("GB/s", spare=1), Column("of copy")]

    def title(case: Any) -> str:
        return describe(case.layout) + (f", {case.kept:.0%} of the inputs read for a token" if case.kept < 1 else "")

    for layout in dict.fromkeys(map(title, found.cases)):
        rows = [
            [
                "{}×{}".format(*case.shape),
                str(case.linears),
                case.backend,
                str(case.tokens),
                f"{1e3 * case.seconds:.3f}",
                f"{1e3 * case.dense_seconds:.3f}",
                f"{case.speed_up:.2f}×",
                f"{case.bytes / 1e6:.2f}",
                f"{case.bandwidth / 1e9:.1f}",
                f"{found.utilization(case):.0%}{'*' if case.cached else ''}",
            ]
            for case in found.cases
            if title(case) == layout
        ]
        print_table(screen, columns, rows, title=f"\n{layout}", lines=False)


def _print_decoding(found: Any) -> None:
    """A mixture of experts as a whole."""
    columns = [Column("texts"), Column("ms a step"), Column("tokens/s", spare=1), Column("experts of a layer")]
    columns += [Column("MB", spare=2), Column("GB/s", spare=1), Column("S-MBU"), Column("S-MFU")]
    rows = []
    for each in found.decoding:
        memory, arithmetic = found.whole_utilization(each)
        rows.append(
            [
                str(each.tokens),
                f"{1e3 * each.seconds:.2f}",
                f"{each.tokens / each.seconds:.1f}",
                f"{each.experts:.1f} of {each.of:g}",
                f"{each.bytes / 1e6:.2f}",
                f"{each.bytes / each.seconds / 1e9:.1f}",
                f"{memory:.0%}",
                f"{arithmetic:.1%}",
            ]
        )
    print_table(screen, columns, rows, title="\nthe whole model as it writes so many texts at a time", lines=False)


def _print_streamed(found: Any) -> None:
    """A model that is read as it writes."""
    columns = [
        Column("texts"),
        Column("s a step"),
        Column("tokens/s"),
        Column("MB read"),
        Column("MB/s"),
        Column("of disk"),
    ]
    bus = found.transfers.bus > 0
    columns += [Column("MB copied"), Column("GB/s"), Column("of bus")] if bus else []
    rows = []
    for each in found.streamed:
        of_disk, of_bus = found.shares(each)
        row = [
            str(each.tokens),
            f"{each.seconds:.3f}",
            f"{each.tokens / each.seconds:.3g}",
            f"{each.bytes_read / 1e6:.0f}",
        ]
        row += [f"{each.bytes_read / each.seconds / 1e6:.0f}", f"{of_disk:.0%}"]
        copied = [f"{each.bytes_copied / 1e6:.0f}", f"{each.bytes_copied / each.seconds / 1e9:.1f}", f"{of_bus:.0%}"]
        rows.append(row + (copied if bus else []))
    print_table(screen, columns, rows, title="\nthe whole model as it writes so many texts at a time", lines=False)
    screen.print()
    show(f"without computing the same reader gives {found.transfers.disk / 1e6:.0f} MB/s")
    if bus:
        show(f"to {found.device} go {found.transfers.bus / 1e9:.1f} GB/s without computing")


def _lines(found: Any) -> list[str]:
    threads = f"{found.threads} thread{'' if found.threads == 1 else 's'}"
    lines = [f"a copy moves {found.copy_bandwidth / 1e9:.1f} GB/s, read and written, with {threads}"]
    if found.product_flops is not None:
        lines.append(f"a product of large matrices makes {found.product_flops / 1e9:.1f} GFLOP/s")
    if any(case.cached for case in found.cases):
        lines.append("* out of the cache: memory does not hold enough such weights to fill it")
    chosen = ", ".join(f"{name} for {count} linears" for name, count in found.chosen.items())
    lines.append(f"backend {found.backend} chose {chosen}" if found.backend == "auto" else f"backend {chosen}")
    lines += [found.fallback] if found.fallback is not None else []
    for total in found.totals:
        at_once = "" if total.tokens == 1 else f", {total.tokens} tokens at a time"
        lines.append(
            f"all linears{at_once}: {1e3 * total.seconds:.2f} ms a token, dense {1e3 * total.dense_seconds:.2f} ms "
            f"({total.speed_up:.2f}×)"
        )
    return lines
