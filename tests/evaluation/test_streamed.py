"""Measuring a model block by block: the figures of the whole model, and every weight read once."""

import shutil
from collections import Counter
from dataclasses import replace

import mixtures
import pytest
import torch
from conftest import EVERY_KIND

import secateur
from secateur import CheckpointError, UsageError
from secateur.evaluation.eval_text import Text
from secateur.evaluation.quality import Runner, evaluate
from secateur.memory.footprint import Footprint, Settings
from secateur.model.weights import ModelWeights
from secateur.walking import block_stream

LIMIT = "16GiB"
WHOLE, STREAMED = Runner(), Runner(max_memory=LIMIT)


@pytest.fixture
def text(text_file):
    return Text(str(text_file), 24, 5)


def alike(streamed, whole):
    """Whether all figures of two evaluations are the same up to rounding."""
    for name, values_KP in whole.quality.scores.given().items():
        torch.testing.assert_close(
            streamed.quality.scores.given()[name], values_KP, rtol=1e-4, atol=1e-5, equal_nan=True
        )
    return streamed.size == whole.size


def compressed(model, out, text_file, **options):
    calibration = secateur.Calibration(str(text_file), 4, 16)
    secateur.compress(str(model), out, secateur.Recipe(**options, calibration=calibration))
    return str(out)


@pytest.mark.thin(2)
@pytest.mark.parametrize("family", EVERY_KIND)
def test_the_figures_of_every_family(family, model_of, text_file, text, tmp_path):
    model = str(model_of(family))
    if family not in ("gpt2",):
        model = compressed(model, tmp_path / "out", text_file, quantize="rtn", quantization={"bits": 4})
    dense = str(model_of(family))
    assert alike(*(evaluate(model, dense, text, runner=runner) for runner in (STREAMED, WHOLE)))


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", mixtures.known(mixtures.KINDS))
def test_the_figures_of_mixtures(name, build, text_file, text, tmp_path):
    dense = build(tmp_path / "dense", mixtures.config_of(name))
    model = compressed(dense, tmp_path / "out", text_file, prune="magnitude", sparsity=0.5)
    streamed, whole = (evaluate(model, str(dense), text, runner=runner) for runner in (STREAMED, WHOLE))
    assert alike(streamed, whole)
    assert streamed.quality.same_experts is not None


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("batch_tokens", [24, 48, 10_000])
def test_every_weight_is_read_once(file, batch_tokens, model_of, text, monkeypatch):
    def choose(self, host, device, tokens):
        assert host == 16 * 2**30
        assert self.tokens == 5 * 24
        return Settings(tokens, False, "file" if file else "device")

    monkeypatch.setattr(Footprint, "choose", choose)
    read = Counter()
    checked = ModelWeights.checked

    def count(self, name, *args, **kwargs):
        read[name] += 1
        return checked(self, name, *args, **kwargs)

    monkeypatch.setattr(ModelWeights, "checked", count)
    monkeypatch.setattr(block_stream.Footprint, "choose", choose)
    model = str(model_of("llama"))
    streamed = evaluate(model, text=text, runner=replace(STREAMED, batch_tokens=batch_tokens))
    first = {name: times for name, times in read.items() if ".layers.0." in name}
    others = {name: times for name, times in read.items() if ".layers.1." in name}
    assert set(first.values()) == {2}, "once to see how the model works"
    assert set(others.values()) == {1}
    monkeypatch.undo()
    assert alike(streamed, evaluate(model, text=text))


def test_overlapping_windows_and_a_cache(model_of, text_file, tmp_path):
    model, dense = (str(model_of("llama", num_hidden_layers=n)) for n in (2, 3))
    text = Text(str(text_file), 24, 4, stride=7)
    options = {"text": text, "cache": tmp_path / "cache", "cache_tokens": 20}
    streamed = evaluate(model, dense, runner=STREAMED, **options)
    assert alike(streamed, evaluate(model, dense, runner=WHOLE, **options))
    assert len(list((tmp_path / "cache").iterdir())) == 1, "what one has kept serves the other"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_errors_of_blocks(family, model_of, text_file, text, tmp_path):
    dense = str(model_of(family))
    model = compressed(dense, tmp_path / "out", text_file, prune="wanda", sparsity=0.5)
    streamed, whole = (evaluate(model, dense, text, runner=r, by_block=True).blocks for r in (STREAMED, WHOLE))
    assert [block.name for block in streamed] == [block.name for block in whole]
    for mine, theirs in zip(streamed, whole, strict=True):
        assert mine.own == pytest.approx(theirs.own, rel=1e-4)
        assert mine.carried == pytest.approx(theirs.carried, rel=1e-4)
        assert mine.carried > 0


def test_too_little_memory_says_how_much_would_do(says, model_of, text_file):
    model = model_of("llama")
    options = ["--data", text_file, "--windows", 4, "--seq-len", 24]
    code, _, err = says("eval", model, *options, "--max-memory", "10MiB")
    assert code == 2
    assert "--max-memory 10.5 MB is too little for this run, which needs" in err
    assert "at least" in err
    code, out, err = says("eval", model, *options, "--max-memory", LIMIT)
    assert code == 0, err
    assert out == says("eval", model, *options)[1]


def test_tasks_run_a_model_whole(model_of):
    with pytest.raises(UsageError, match="leave `max_memory` out, or the tasks"):
        evaluate(str(model_of("llama")), runner=STREAMED, tasks=["arc_easy"])


def test_the_head_is_computed_in_slices(monkeypatch):
    monkeypatch.setattr(block_stream, "_HEAD_VALUES", 40)
    torch.manual_seed(0)
    W_VH, bias_V, x = torch.randn(13, 8).bfloat16(), torch.randn(13), torch.randn(2, 3, 8)
    for bias in (None, bias_V):
        wanted = torch.nn.functional.linear(x, W_VH.float(), bias)
        torch.testing.assert_close(block_stream.SlicedHead(lambda: W_VH, bias)(x), wanted)


@pytest.mark.parametrize("change", ["cut off", "written over", "while the head is computed"])
def test_files_that_change_while_a_model_is_measured(change, model_of, text, tmp_path, monkeypatch):
    """A mapped file that was cut off would end the process without a word."""
    folder = tmp_path / "model"
    shutil.copytree(model_of("llama", num_hidden_layers=3), folder)
    [file] = folder.glob("*.safetensors")

    def spoil():
        if change == "written over":
            file.write_bytes(bytes(file.stat().st_size))
        else:
            file.write_bytes(file.read_bytes()[:-10])

    def progress(self, text, number, outputs=block_stream.BlockStream.outputs):
        yield from outputs(self, text, number)
        if number == (2 if change == "while the head is computed" else 0):
            spoil()

    monkeypatch.setattr(block_stream.BlockStream, "outputs", progress)
    with pytest.raises(CheckpointError, match=r"safetensors was changed while it was in use"):
        evaluate(str(folder), text=text, runner=STREAMED)
