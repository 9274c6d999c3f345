"""A sweep of eight recipes against the same eight as separate runs of `compress` and `eval`, on SmolLM2; and its report.

python -m benchmarks.sweep --text TEXT
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

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
    table,
)
from secateur.recipes.command_line import flags_of
from secateur.recipes.strings import parse_recipes

RECIPES = "magnitude:0.5, wanda:0.4..0.6, wanda:2:4, rtn:4, rtn:8, sparsegpt:0.5"


def opening(page_file: Path) -> float:
    """Milliseconds from asking Chromium for a report to its last script, the fastest of five."""
    from playwright.sync_api import sync_playwright

    times = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(5):
            page = browser.new_page()
            page.goto(page_file.absolute().as_uri())
            times.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
            page.close()
        browser.close()
    return min(times)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--report", type=Path, help="only open this report, the index.html of a sweep")
    parser.add_argument("--recipes", default=RECIPES)
    args = parser.parse_args()
    if args.report is not None:
        print(f"{args.report}: {args.report.stat().st_size / 1e3:.0f} kB, open in {opening(args.report):.0f} ms")
        return
    prepare(args)
    dense = plain_model(args.work)
    evaluation, calibration = split_text(args.text, args.work, dense)
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    secateur = [sys.executable, "-m", "secateur"]
    text = ["--data", str(evaluation), "--seq-len", str(EVAL_SEQ_LEN), "--windows", str(EVAL_WINDOWS)]
    calibrated = ["--calibration", str(calibration), "--samples", str(SAMPLES)]

    def seconds(command: list[str]) -> float:
        began = time.perf_counter()
        subprocess.run([*secateur, *command, "--quiet"], check=True, env=env)
        return time.perf_counter() - began

    report, out = args.work / "report", args.work / "sweep-out"
    shutil.rmtree(report, ignore_errors=True)
    whole = ["sweep", str(dense), "--recipes", args.recipes, "--out", str(report), *calibrated, *text]
    together = seconds([*whole, "--calibration-seq-len", str(SEQ_LEN)])
    rows, alone = [], 0.0
    for name, recipe in parse_recipes(args.recipes):
        options = [*flags_of(recipe), *calibrated, "--seq-len", str(SEQ_LEN), "--overwrite"]
        compressing = seconds(["compress", str(dense), str(out), *options])
        measuring = seconds(["eval", str(out), "--reference", str(dense), *text])
        alone += compressing + measuring
        rows.append([name, f"{compressing:.1f}", f"{measuring:.1f}"])
    print(machine())
    table(["recipe", "compress, s", "eval, s"], rows)
    print(f"separate runs {alone:.1f} s, the sweep {together:.1f} s: {together / alone:.2f}×")
    size, opened = (report / "index.html").stat().st_size, opening(report / "index.html")
    print(f"report: {size / 1e3:.0f} kB, open in {opened:.0f} ms")


if __name__ == "__main__":
    main()
