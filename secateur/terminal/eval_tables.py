"""The figures of `secateur eval` in tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from secateur.terminal.figures import between, size
from secateur.terminal.screen import screen
from secateur.terminal.tables import Column, print_table


def print_evaluation(result: Any, model: str, reference: str | None, text: str) -> None:
    """Print an `Evaluation`; `text` says on which windows."""
    from secateur.evaluation.eval_text import with_bos

    quality, own, dense = result.quality, result.size, result.reference_size
    columns = [Column("", right=False), Column(model)]
    rows: list[tuple[str, str, str]] = [
        (
            "perplexity",
            f"{quality.perplexity:.3f}{between(quality.perplexity_interval, '.2f')}",
            f"{quality.reference_perplexity or math.nan:.3f}{between(quality.reference_perplexity_interval, '.2f')}",
        ),
        ("bits per byte of text", f"{result.bits_per_byte:.4f}", f"{result.reference_bits_per_byte or math.nan:.4f}"),
        ("size on disk", size(own.bytes), size(dense.bytes) if dense else ""),
        ("bits per weight", f"{own.bits_per_weight:.2f}", f"{dense.bits_per_weight:.2f}" if dense else ""),
    ]
    if quality.kl is not None and quality.agreement is not None:
        columns.append(Column(reference or ""))
        rows.append(("KL divergence, nats per token", f"{quality.kl:.4f}{between(quality.kl_interval, '.4f')}", ""))
        agreement = between(quality.agreement_interval, ".2%")
        rows.append(("same most likely token", f"{quality.agreement:.2%}{agreement}", ""))
    if quality.routing_agreement is not None:
        rows += _routing(quality)
    title = f"{text}, {with_bos(result.text['bos'])}"
    said = result.activations
    if said is not None:
        first = "second half" if said["prompt"] else f"all but the first {said['dense_tokens']} tokens"
        title += f"; {first} of each as if written, with {said['method']}"
        rows.append((f"weights read for a token at level {said['level']:g}", f"{said['share_read']:.1%}", ""))
    print_table(screen, columns, [row[: len(columns)] for row in rows], title=title)
    if result.blocks is not None:
        _print_blocks(result.blocks)
    if result.tasks:
        _print_tasks(result.tasks, model, reference)


def _routing(quality: Any) -> list[tuple[str, str, str]]:
    """Of a mixture of experts, how alike its tokens are routed."""
    agreement = f"{quality.routing_agreement:.2%}{between(quality.routing_agreement_interval, '.2%')}"
    same = f"{quality.same_experts:.2%}{between(quality.same_experts_interval, '.2%')}"
    rows = [("experts of a token that are the same", agreement, ""), ("tokens with all experts the same", same, "")]
    if quality.routing_kl is not None:
        divergence = f"{quality.routing_kl:.4f}{between(quality.routing_kl_interval, '.4f')}"
        rows.append(("KL divergence of routers, nats per token", divergence, ""))
    return rows


def _print_blocks(blocks: Any) -> None:
    columns = [Column("block", right=False), Column("its own"), Column("carried along")]
    rows = [[block.name, f"{block.own:.2e}", f"{block.carried:.2e}"] for block in blocks]
    title = "relative squared error of each block's output"
    print_table(screen, columns, rows, title=title, lines=False, dotted=True)


def _print_tasks(scores: Sequence[Any], model: str, reference: str | None) -> None:
    columns = [Column("task", right=False), Column("metric", right=False), Column(model)]
    if reference is not None:
        columns += [Column(reference), Column("difference")]
    rows, told = [], None
    for score in scores:
        shots = f", {score.few_shot}-shot" if score.few_shot else ""
        task = f"{score.task}{shots}, {score.samples} samples" if score.task != told else ""
        told = score.task
        better = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
        figures = [f"{score.value:.4f}{_error(score.stderr)}"]
        if score.difference is not None:
            figures.append(f"{score.reference_value:.4f}{_error(score.reference_stderr)}")
            figures.append(f"{score.difference:+.4f}{_error(score.difference_stderr)}")
        rows.append([task, score.metric + better, *figures])
    print_table(screen, columns, rows, title="\ntasks, ± one standard error", lines=False)


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {stderr:.4f}"
