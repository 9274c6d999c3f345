"""Shared budgets against uniform ones, on SmolLM2 by the protocol: perplexity on two texts, size and seconds.

    python -m benchmarks.allocation --text wiki.test.raw --part sparsity
    python -m benchmarks.allocation --text wiki.test.raw --part size
    python -m benchmarks.allocation --text wiki.test.raw --part rise

`sparsity`: SparseGPT at 50 % and 60 %, uniform, by OWL, searched. `size`: --target-size on the dithered model, written in
the dtype of --dtype, beside uniform recipes of the same methods with what sparsity makes them as large. `rise`: what
--max-perplexity-rise is on two texts that its run has not seen, the evaluation text and Python's own library. What was measured
once is kept in the work folder by its options (--again measures anew), so a run that was stopped goes on.
"""

from __future__ import annotations

import os
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.protocol import (
    EVAL_SEQ_LEN,
    EVAL_WINDOWS,
    SAMPLES,
    arguments,
    compress,
    machine,
    measured_once,
    perplexity,
    plain_model,
    prepare,
    split_text,
    table,
)
from secateur.calibration.text import read_text

SPARSITIES = (0.5, 0.6)
SHARES = (0.25, 0.3, 0.35, 0.5)
RISE = "3%"
ALLOCATIONS = ("uniform", "owl", "search")
# Bits of uniform recipes; none is pruning alone.
BITS = (None, 2, 3, 4, 8)
GROUP = 64
# What is pruned less or more than this is a plain quantizer, or nothing worth measuring.
LEAST, MOST = 0.05, 0.95


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=("sparsity", "size", "rise"), required=True)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model, but for `sparsity`"
    )
    parser.add_argument("--again", action="store_true", help="measure what is known already, too")
    args = parser.parse_args()
    if args.text is None:
        parser.error("--text is needed")
    prepare(args)
    dithered = args.part != "sparsity"
    model = plain_model(args.work, getattr(torch, args.dtype) if dithered else torch.float32, dithered)
    evaluation, calibration = split_text(args.text, args.work, model)
    other = args.work / ("code.txt" if args.part == "rise" else "docs.txt")
    enough = 8 * EVAL_WINDOWS * EVAL_SEQ_LEN
    text = _code(enough) if args.part == "rise" else "\n".join(read_text("docs", max_chars=enough))
    other.write_text(text, encoding="utf-8")
    texts = {"evaluation": evaluation, other.stem: other}
    dense = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    before = {name: perplexity(model, text) for name, text in texts.items()}
    print(f"{machine()}\n\ndense, {dense} bytes: {[f'{each:.2f}' for each in before.values()]}\n")
    measured = partial(_measured, model, calibration, texts, args)
    if args.part == "rise":
        _rises(measured, before)
    elif dithered:
        _sizes(measured, dense, torch.finfo(getattr(torch, args.dtype)).bits)
    else:
        _sparsities(measured)


def _measured(
    model: Path, calibration: Path, texts: dict[str, Path], args: Any, options: str, samples: int = SAMPLES
) -> dict[str, Any]:
    """Perplexity on each text, bytes of the files, and the seconds of the whole run; or why there is none."""

    def measure() -> dict[str, Any]:
        out = args.work / "out"
        try:
            report = compress(model, out, shlex.split(options), calibration, args.threads, samples)
        except SystemExit as error:
            return {"options": options, "refused": str(error).partition(" failed: ")[2].strip()}
        return {
            "options": options,
            "seconds": report["seconds"],
            "bytes": report["bytes"],
            "weights": sum(linear["shape"][0] * linear["shape"][1] for linear in report["linears"]),
            "outside": report["bytes"] - sum(linear["bytes"] for linear in report["linears"]),
            **{name: perplexity(out, text) for name, text in texts.items()},
        }

    return measured_once(args, "allocation", f"{model.name} {options}", measure)


def _sparsities(measured: Any) -> None:
    rows = []
    for sparsity in SPARSITIES:
        uniform: dict[str, Any] = {}
        for allocation in ALLOCATIONS:
            found = measured(f"--prune sparsegpt --sparsity {sparsity} --allocation {allocation}")
            uniform = uniform or found
            rows.append([f"{sparsity:.0%}", allocation])
            for text in ("evaluation", "docs"):
                rows[-1] += [f"{found[text]:.2f}", f"{found[text] / uniform[text] - 1:+.1%}"]
            rows[-1] += [f"{found['seconds']:.0f}", f"{found['seconds'] / uniform['seconds']:.2f}×"]
    table(["sparsity", "allocation", "evaluation", "", "docs", "", "seconds", ""], rows)


def _sizes(measured: Any, dense: int, float_bits: int) -> None:
    plain = measured(f"--quantize gptq --bits 4 --group-size {GROUP}")
    rows = []
    for share in SHARES:
        found = [("searched", measured(f"--target-size {share}x"))]
        # Bits that each weight of the linears may take.
        room = 8 * (share * dense - plain["outside"]) / plain["weights"]
        for bits in BITS:
            options = _uniform(bits, room, float_bits)
            if options is not None:
                found.append((f"`{options}`", measured(options)))
        for name, each in found:
            if "refused" in each:
                rows.append([f"{share:g}×", name, each["refused"], "", "", "", ""])
                continue
            size, seconds = each["bytes"], f"{each['seconds']:.0f}"
            rows.append(
                [f"{share:g}×", name, f"{size / 1e6:.2f}", f"{size / dense / share - 1:+.2%}"]
                + [f"{each[text]:.2f}" for text in ("evaluation", "docs")]
                + [seconds]
            )
    table(["asked for", "recipe", "MB", "against it", "evaluation", "docs", "seconds"], rows)


def _rises(measured: Any, before: dict[str, float]) -> None:
    # Others of the calibration text are what the run measures on.
    found = measured(f"--max-perplexity-rise {RISE}", 3 * SAMPLES // 4)
    if "refused" in found:
        raise SystemExit(found["refused"])
    rises = [f"{found[text]:.2f} ({found[text] / dense - 1:+.2%})" for text, dense in before.items()]
    table(
        ["limit", "MB", *before, "seconds"], [[RISE, f"{found['bytes'] / 1e6:.2f}", *rises, f"{found['seconds']:.0f}"]]
    )


def _code(enough: int) -> str:
    """The first modules of Python's library, by name."""
    text = ""
    for file in sorted(Path(os.__file__).parent.glob("[a-z]*.py")):
        text += file.read_text(encoding="utf-8")
        if len(text) >= enough:
            break
    return text[:enough]


def _uniform(bits: int | None, room: float, float_bits: int) -> str | None:
    """Options that fill a room of so many bits a weight, with the least that is pruned; None: there are none."""
    if bits is None:
        sparsity = 1 - (room - 1) / float_bits
        options = ""
    else:
        # A scale of 16 bits and a zero point for each group; a mask of one bit where weights are pruned.
        each = bits + (16 + bits) / GROUP
        sparsity = 0.0 if each <= room else 1 - (room - 1) / each
        options = f"--quantize gptq --bits {bits} --group-size {GROUP}"
    if not LEAST <= sparsity <= MOST:
        return options if sparsity == 0 else None
    return f"--prune sparsegpt --sparsity {sparsity:.3f} {options}".strip()


if __name__ == "__main__":
    main()
