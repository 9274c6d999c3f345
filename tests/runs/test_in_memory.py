"""A model object in the place of a path."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur import UsageError
from secateur.folder.manifest import MANIFEST_NAME
from secateur.folder.reader import read_json
from secateur.model.in_memory import open_files

RTN = secateur.Recipe(quantize="rtn", quantization={"bits": 8})


@pytest.fixture(scope="module")
def folder(model_of):
    return str(model_of("llama"))


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def text(text_file):
    return secateur.Text(str(text_file), seq_len=32, windows=4)


def test_an_object_is_measured_as_its_files_are(folder, model, tokenizer, text, text_file):
    of_files, of_object = (
        secateur.evaluate(folder, folder, text),
        secateur.evaluate(model, folder, text, tokenizer=tokenizer),
    )
    assert of_object.quality.perplexity == pytest.approx(of_files.quality.perplexity, rel=1e-6)
    assert of_object.quality.kl == pytest.approx(0.0, abs=1e-6)
    assert of_object.size.parameters == of_files.size.parameters
    assert of_object.size.bytes == sum(p.nbytes for p in model.parameters())
    assert of_object.model == folder
    assert secateur.evaluate(folder, model, text).quality.kl == pytest.approx(0.0, abs=1e-6)
    prompt = text_file.read_text()[:20]
    assert secateur.generate(model, prompt, tokenizer=tokenizer) == secateur.generate(folder, prompt)


def test_an_object_is_compressed_as_its_files_are(folder, tokenizer, text_file, tmp_path):
    calibration = secateur.Calibration(str(text_file), samples=2, seq_len=16)
    recipe = secateur.Recipe(quantize="gptq", calibration=calibration)
    secateur.compress(folder, tmp_path / "a", recipe)
    stored = AutoModelForCausalLM.from_pretrained(folder)
    secateur.compress(stored, tmp_path / "new" / "b", recipe, tokenizer=tokenizer)
    assert os.listdir(tmp_path / "new") == ["b"]
    a, b = (secateur.load(tmp_path / name, "dense") for name in ("a", "new/b"))
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name
    assert secateur.verify(tmp_path / "new" / "b") == []
    assert read_json(tmp_path / "new" / "b" / MANIFEST_NAME)["source"]["model"] == folder


def test_a_run_on_an_object_goes_on_where_it_was(model, tokenizer, tmp_path, monkeypatch):
    from secateur.runs import compress as runs

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "put_together", stop)
        with pytest.raises(BaseException):  # noqa: B017, PT011 - whatever an interruption has become
            secateur.compress(model, tmp_path / "out", RTN, tokenizer=tokenizer)
    assert os.listdir(tmp_path) == ["out.partial"]
    secateur.compress(model, tmp_path / "out", RTN, tokenizer=tokenizer, resume=True)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
@pytest.mark.usefixtures("small_cache")
def test_a_packed_object_is_measured_as_it_is(folder, tokenizer, text, tmp_path):
    secateur.compress(folder, tmp_path / "out", RTN)
    packed = secateur.load(tmp_path / "out", dtype=torch.float32)
    found = secateur.evaluate(packed, folder, text, tokenizer=tokenizer)
    other = secateur.evaluate(str(tmp_path / "out"), folder, text)
    assert found.quality.perplexity == pytest.approx(other.quality.perplexity, rel=1e-4)
    assert found.size.parameters == other.size.parameters
    one, other = (
        secateur.bench(packed, seconds=0.01),
        secateur.bench(str(tmp_path / "out"), dtype="float32", seconds=0.01),
    )
    assert {(c.shape, c.linears, c.bytes) for c in one.cases} == {(c.shape, c.linears, c.bytes) for c in other.cases}
    assert one.cases[0].layout == other.cases[0].layout


def test_what_an_object_cannot_do_is_said(folder, model, tokenizer, text, tmp_path, monkeypatch):
    for call, says in (
        (lambda: secateur.evaluate(model, text=text), "has no tokenizer with it: give it as `tokenizer`"),
        (lambda: secateur.evaluate(folder, text=text, tokenizer=tokenizer), "`tokenizer` is for a model object"),
        (lambda: secateur.evaluate(folder, model, text, cache=tmp_path / "kept"), "`reference` is in memory"),
        (lambda: secateur.generate(model, "a", tokenizer=tokenizer, verify=True), "`verify` is for files"),
        (lambda: secateur.generate(model, "a", tokenizer=tokenizer, revision="v2"), "`revision` is for files"),
        (lambda: secateur.generate(model, "a", tokenizer=tokenizer, dtype="float16"), "leave `dtype` out"),
        (lambda: secateur.generate(model, "a", tokenizer=tokenizer, backend="torch"), "leave `backend` out"),
        (lambda: secateur.bench(model), "has no linears packed by secateur"),
        (lambda: secateur.inspect(model), "`model` is a LlamaForCausalLM: give the name of the folder"),
        (lambda: secateur.export(model, tmp_path / "x", "dense"), "`model` is a LlamaForCausalLM: give the name"),
        (lambda: secateur.compress(model, tmp_path / "x", RTN, revision="v2"), "`revision` is for files"),
        (lambda: secateur.compress(torch.nn.Linear(1, 1), tmp_path / "x", RTN), "`model` is a Linear: give the name"),
    ):
        with pytest.raises(UsageError, match=says):
            call()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="share no object"), open_files(model, None, tmp_path / "x"):
        pass
    assert os.listdir(tmp_path) == []
