"""Products of blocks in bfloat16, where the model is in it and stays in it; solvers, and sums over tokens, are outside."""

import pytest
import torch

import secateur
from secateur.core.stats import InputStats
from secateur.walking.capture import BlockCall
from secateur.walking.clock import Clock
from secateur.walking.forward import forward

PRECISION = torch.backends.mkldnn.matmul


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_precision_is_the_models_and_is_put_back(dtype):
    before, clock = PRECISION.fp32_precision, Clock(torch.device("cpu"))

    def fails():
        with forward(clock, dtype):
            assert PRECISION.fp32_precision == ("bf16" if dtype is torch.bfloat16 else before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert PRECISION.fp32_precision == before
    assert list(clock.seconds) == ["forward"]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_statistics_and_solvers_are_outside(method, model_of, text_file, tmp_path, monkeypatch):
    seen = {"blocks": set(), "statistics": set(), "solving": set()}

    def seeing(owner, name, place):
        real = getattr(owner, name)

        def called(*args, **kwargs):
            seen[place].add(PRECISION.fp32_precision)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    seeing(BlockCall, "run", "blocks")
    seeing(InputStats, "add", "statistics")
    seeing(torch.linalg, "cholesky_ex", "solving")
    before = PRECISION.fp32_precision
    text = secateur.Calibration(str(text_file), 4, 16)
    recipe = secateur.Recipe(method, 0.5, calibration=text)
    secateur.compress(model_of("llama", dtype=torch.bfloat16), tmp_path / "out", recipe)
    assert "bf16" in seen["blocks"]  # beside those that are run to see what they take
    assert seen["statistics"] == {before}
    assert seen["solving"] == ({before} if method == "sparsegpt" else set())


@pytest.mark.parametrize(
    ("stored", "asked", "rounded"),
    [(torch.bfloat16, "auto", True), (torch.bfloat16, "float32", False), (torch.float32, "bfloat16", False)],
)
def test_only_models_that_are_and_stay_in_bfloat16_are_rounded(
    stored, asked, rounded, model_of, text_file, tmp_path, monkeypatch
):
    seen, real = set(), BlockCall.run

    def run(*args):
        seen.add(PRECISION.fp32_precision)
        return real(*args)

    monkeypatch.setattr(BlockCall, "run", run)
    recipe = secateur.Recipe("wanda", 0.5, dtype=asked, calibration=secateur.Calibration(str(text_file), 4, 16))
    secateur.compress(model_of("llama", dtype=stored), tmp_path / "out", recipe)
    assert ("bf16" in seen) == rounded
