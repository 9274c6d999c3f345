"""The fixture `secateur_gate` for pytest: a test that fails when a checkpoint is worse than its baseline.

A module of its own, because pytest imports it at every start, and importing `secateur` takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("secateur").addoption(
        "--secateur-write", action="store_true", help="write the baselines of secateur_gate anew instead of comparing"
    )


@pytest.fixture
def secateur_gate(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`secateur_gate(model, baseline, …)` fails the test if the model is worse than its baseline.

    It takes `reference`, and by name the limits that `secateur.evaluation.gate.tolerances.Tolerances` has; shares as numbers
    below 1 or as text like `1%`. With `--secateur-write` it writes the baseline instead, on `text` (a
    `secateur.evaluation.eval_text.Text`), or on what the old one was measured on. It returns the
    `secateur.evaluation.quality.Evaluation` of the model.
    """

    def check(
        model: str | Path, baseline: str | Path, *, text: Any = None, reference: str | None = None, **limits: Any
    ) -> Any:
        from secateur.errors import CheckpointError
        from secateur.evaluation.gate.baseline import TEXT, Baseline, write_baseline
        from secateur.evaluation.gate.gate import gate
        from secateur.evaluation.gate.tolerances import Tolerances
        from secateur.evaluation.quality import Runner
        from secateur.folder.paths import check_named
        from secateur.report.gate_report import markdown

        check_named(baseline, "the name of a baseline")
        file, beside = Path(baseline), None if reference is None else str(reference)
        if request.config.getoption("--secateur-write"):
            kept, runner = TEXT, Runner()
            if file.exists():
                with suppress(CheckpointError):  # it is what is to be mended
                    old = Baseline.read(file)
                    kept, runner = old.text, Runner(dtype=old.dtype)
            return write_baseline(str(model), file, text or kept, reference=beside, runner=runner, overwrite=True)
        wanted = vars(text) if text is not None else None
        result = gate(str(model), Baseline.read(file), Tolerances.of(**limits), reference=beside, text=wanted)
        if not result.passed:
            pytest.fail(markdown(result), pytrace=False)
        return result.evaluation

    return check
