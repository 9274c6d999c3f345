"""The dense model's outputs as the target, and damping by held-out windows, on SmolLM2 by the protocol: two texts, and seconds.

    python -m benchmarks.dense_target --text wiki.test.raw
    python -m benchmarks.dense_target --text wiki.test.raw --only "gptq 3 bits" --ways "plain,--match-dense"

Pruners on the model as it is, quantizers on the dithered one. Perplexity, and KL divergence to the dense model over the
likeliest tokens of each prediction (1024, and all others as one). What was measured once is kept in the work folder.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from benchmarks.protocol import (
    EVAL_SEQ_LEN,
    EVAL_WINDOWS,
    arguments,
    compress,
    machine,
    measured_once,
    plain_model,
    prepare,
    split_text,
    table,
)
from secateur.calibration.text import read_text
from secateur.evaluation.eval_text import Text
from secateur.evaluation.quality import evaluate

CASES = {
    "sparsegpt 50 %": "--prune sparsegpt --sparsity 0.5",
    "sparsegpt 2:4": "--prune sparsegpt --pattern 2:4",
    "alps 2:4": "--prune alps --pattern 2:4",
    "wanda 50 %, reconstructed": "--prune wanda --sparsity 0.5 --reconstruct",
    "gptq 4 bits": "--quantize gptq --bits 4 --group-size 64",
    "gptq 3 bits": "--quantize gptq --bits 3 --group-size 64",
    "spqr 3 bits": "--quantize spqr --bits 3 --group-size 64 --outlier-threshold 1",
    "trellis 3 bits": "--quantize trellis --bits 3",
    "trellis 2 bits": "--quantize trellis --bits 2",
}
WAYS = ("plain", "--match-dense", "--damping auto", "--match-dense --damping auto")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default=",".join(CASES), help="cases, with commas between them")
    parser.add_argument("--ways", default=",".join(WAYS), help="what is added to each, with commas between them")
    parser.add_argument("--again", action="store_true", help="measure what is known already, too")
    args = parser.parse_args()
    if args.text is None:
        parser.error("--text is needed")
    prepare(args)
    models = {dithered: plain_model(args.work, dithered=dithered) for dithered in (False, True)}
    evaluation, calibration = split_text(args.text, args.work, models[False])
    docs = args.work / "docs.txt"
    docs.write_text("\n".join(read_text("docs", max_chars=8 * EVAL_WINDOWS * EVAL_SEQ_LEN)), encoding="utf-8")
    texts = {"evaluation": evaluation, "docs": docs}
    print(f"{machine()}\n")
    rows = []
    for case in args.only.split(","):
        model = models["--quantize" in CASES[case]]
        plain: dict[str, Any] = {}
        for way in args.ways.split(","):
            options = CASES[case] + ("" if way == "plain" else f" {way}")
            found = _measured(model, calibration, texts, args, options)
            plain = plain or found
            rows.append([case, way])
            for text in texts:
                quality = found[text]
                change = quality["perplexity"] / plain[text]["perplexity"] - 1
                rows[-1] += [f"{quality['perplexity']:.2f}", f"{change:+.1%}", f"{quality['kl']:.4f}"]
            rows[-1] += [f"{found['seconds']:.0f}", f"{found['seconds'] / plain['seconds']:.2f}×"]
    heads = [head for text in texts for head in (text, "", "KL")]
    table(["method", "", *heads, "s", "of plain"], rows)


def _measured(model: Path, calibration: Path, texts: dict[str, Path], args: Any, options: str) -> dict[str, Any]:
    """Perplexity and divergence on each text, and the seconds of the run."""

    def measure() -> dict[str, Any]:
        out = args.work / "matched"
        report = compress(model, out, shlex.split(options), calibration, args.threads)
        found: dict[str, Any] = {"options": options, "seconds": report["seconds"]}
        for name, text in texts.items():
            measured_on = Text(str(text), EVAL_SEQ_LEN, EVAL_WINDOWS, bos=False)
            quality = evaluate(str(out), str(model), measured_on, cache=args.work / "reference").quality
            found[name] = {"perplexity": quality.perplexity, "kl": quality.kl}
        return found

    return measured_once(args, "dense-target", f"{model.name} {options}", measure)


if __name__ == "__main__":
    main()
