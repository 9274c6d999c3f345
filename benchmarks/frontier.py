"""The frontier: size against perplexity, and size against tokens a second, in pictures for light and for dark pages.

    python -m benchmarks.frontier --text TEXT            # measures on SmolLM2, writes docs/pictures/frontier.json, and draws
    python -m benchmarks.frontier --text TEXT --few      # three recipes, four windows, in the work folder: whether it works
    python -m benchmarks.frontier --draw                 # only draws, what docs/pictures/frontier.json says

The model is SmolLM2-135M-Instruct in bfloat16 with its 4-bit grid broken up (see protocol.py). A sweep measures perplexity by
the protocol and keeps the checkpoints, of which each then decodes as in decode.py, the fastest of `--rounds` in turn.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import CODE, TOKENS, run
from benchmarks.protocol import (
    EVAL_SEQ_LEN,
    EVAL_WINDOWS,
    SAMPLES,
    SEQ_LEN,
    arguments,
    machine,
    plain_model,
    prepare,
    split_text,
)
from secateur.folder.manifest import MANIFEST_NAME
from secateur.folder.paths import SWEEP_MODELS, SWEEP_RESULT
from secateur.folder.reader import read_json
from secateur.report.report_plot import write_labels
from secateur.report.report_points import family
from secateur.report.sweep_result import SweepResult

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
RECIPES = "gptq:2..4, gptq:8, spqr:3, spqr:4, wanda:0.5, sparsegpt:0.5, sparsegpt:2:4, alps:0.5, sparsegpt:0.5+gptq:4"
FEW_RECIPES, FEW_WINDOWS = "rtn:4, rtn:8, magnitude:0.5", 4
FAMILIES = {"prune": "pruned", "quantize": "quantized", "both": "both"}
# A shape for each family, for those who see no colours; Okabe and Ito's colours, the lighter of which are for dark pages.
STYLES = {
    "dense": ("dense model", "D", "#333333", "#dddddd"),
    "pruned": ("pruned", "^", "#d55e00", "#e69f00"),
    "quantized": ("quantized", "o", "#0072b2", "#56b4e9"),
    "both": ("pruned and quantized", "s", "#009e73", "#4fd1a5"),
    "searched": ("searched", "P", "#a0528a", "#cc79a7"),
}
INK = {"light": "#24292f", "dark": "#d0d7de"}
WORDS = {
    "quality": ("Size against perplexity", "perplexity (log scale, lower is better)"),
    "speed": ("Size against speed", "tokens a second (higher is better)"),
}


def measured(args: Any) -> dict[str, Any]:
    """The figures of both pictures, from a sweep and from decoding what it kept."""
    model = plain_model(args.work, torch.bfloat16, dithered=True)
    evaluation, calibration = split_text(args.text, args.work, model)
    out, windows = args.work / "frontier", FEW_WINDOWS if args.few else EVAL_WINDOWS
    if not args.resume:
        shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "secateur", "sweep", str(model), "--out", str(out), "--keep-models", "--resume"]
    command += ["--recipes", FEW_RECIPES if args.few else RECIPES, "--data", str(evaluation)]
    command += ["--seq-len", str(EVAL_SEQ_LEN), "--windows", str(windows), "--calibration", str(calibration)]
    command += ["--samples", str(SAMPLES), "--calibration-seq-len", str(SEQ_LEN)]
    subprocess.run(command, check=True)
    result = SweepResult.read(out / SWEEP_RESULT)
    recipes = {json.dumps(read_json(f / MANIFEST_NAME)["recipe"]): f for f in (out / SWEEP_MODELS).iterdir()}
    folders = {"dense": model}
    quality = [{"name": "dense", "family": "dense", "bytes": result.dense.bytes, "value": result.dense.perplexity}]
    for point in result.points:
        if point.measured is not None:
            folders[point.name] = recipes[json.dumps(point.recipe)]
            found = {"bytes": point.measured.bytes, "value": point.measured.perplexity}
            quality.append({"name": point.name, "family": FAMILIES[family(point.recipe)], **found})
    code = CODE.format(threads=args.threads, tokens=TOKENS)
    seconds: dict[str, list[float]] = {name: [] for name in folders}
    for _ in range(1 if args.few else args.rounds):
        for name, folder in folders.items():
            how = "transformers" if name == "dense" else "auto"
            seconds[name].append(run(sys.executable, code, how, str(folder))["token"])
    speed = [{**each, "value": 1 / min(seconds[each["name"]])} for each in quality]
    about = f"python -m benchmarks.frontier{' --few' if args.few else ''}: {machine()}"
    threads = f"{args.threads} threads"
    return {
        "about": about,
        "quality": {
            "title": f"SmolLM2-135M, bfloat16, WikiText-2, {windows} × {EVAL_SEQ_LEN} tokens",
            "points": quality,
        },
        "speed": {"title": f"SmolLM2-135M, bfloat16, {threads}", "points": speed},
    }


def frontier(points: list[dict[str, Any]], higher: bool) -> list[dict[str, Any]]:
    """Those than which no other is both smaller and better, by size."""
    found: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["bytes"], -p["value"] if higher else p["value"])):
        if not found or ((point["value"] > found[-1]["value"]) == higher and point["value"] != found[-1]["value"]):
            found.append(point)
    return found


def draw(kind: str, figures: dict[str, Any], theme: str, file: Path) -> None:
    """One picture as SVG, on no ground of its own."""
    import matplotlib
    from matplotlib.figure import Figure

    points, ink = figures["points"], INK[theme]
    title, ylabel = WORDS[kind]
    # Names of elements that are the same each time, and letters that can be searched and read aloud.
    with matplotlib.rc_context({"svg.hashsalt": "secateur", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.5, 4.4), layout="constrained", facecolor="none", dpi=72)  # as SVG counts
        axes = figure.subplots()
        axes.set_facecolor("none")
        axes.set_title(f"{title}: {figures['title']}", color=ink, fontsize="medium")
        axes.set_xlabel("size on disk, MB (log scale)", color=ink)
        axes.set_ylabel(ylabel, color=ink)
        axes.tick_params(colors=ink, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(ink)
        if kind == "quality":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        else:
            axes.set_ylim(0, 1.15 * max(p["value"] for p in points))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.margins(x=0.12, y=0.12)
        line = frontier(points, kind == "speed")
        if len(line) > 1:
            across, up = [p["bytes"] / 1e6 for p in line], [p["value"] for p in line]
            axes.plot(across, up, color=ink, alpha=0.4, label="frontier")
        for name, (label, marker, light, dark) in STYLES.items():
            members = [p for p in points if p["family"] == name]
            xs, ys = [p["bytes"] / 1e6 for p in members], [p["value"] for p in members]
            if members:
                axes.plot(xs, ys, marker, color=light if theme == "light" else dark, label=label, markersize=7)
        axes.legend(frameon=False, labelcolor=ink, fontsize="small")
        order = [
            *line,
            *(point for point in points if point not in line),
        ]  # those on the frontier have the first choice
        labels = [(point["bytes"] / 1e6, point["value"], point["name"]) for point in order]
        write_labels(figure, axes, labels, ink=ink, ground=None)
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument(
        "--few", action="store_true", help="three recipes and few windows; the pictures go to the work folder"
    )
    parser.add_argument("--resume", action="store_true", help="go on with a sweep that was interrupted")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not args.draw and args.text is None:
        parser.error("--text is needed, or --draw")
    place = PICTURES
    if not args.draw:
        prepare(args)
        place = args.work if args.few else PICTURES
        content = json.dumps(measured(args), indent=1, ensure_ascii=False)
        (place / "frontier.json").write_text(content + "\n", encoding="utf-8")
    figures = json.loads((place / "frontier.json").read_text(encoding="utf-8"))
    for kind in WORDS:
        for theme in INK:
            draw(kind, figures[kind], theme, place / f"frontier-{kind}-{theme}.svg")
    print(f"{figures['about']}\npictures are in {place}")


if __name__ == "__main__":
    main()
