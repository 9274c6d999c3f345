"""`probe`: what could go of a model, and what it would cost."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.recipes.recipe import Calibration
from secateur.search.probe import LOWEST, probe


@pytest.fixture
def text(text_file):
    return Calibration(str(text_file), 3, 32)


def windows_of(model, text):
    from secateur.calibration.kept_windows import calibration_ids
    from secateur.model.source import open_source

    return calibration_ids(open_source(str(model)), text, torch.device("cpu"), lambda _: None)[0]


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_what_is_told_is_what_hooks_and_shorter_models_tell(family, model_of, text):
    folder = model_of(family)
    found = probe(str(folder), text)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids_NS = windows_of(folder, text)
    with torch.no_grad():
        out = model(ids_NS, output_hidden_states=True)
        expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids_NS[:, 1:].flatten())
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)
    before, after = out.hidden_states[0], out.hidden_states[1]
    assert found.blocks[0].cosine == pytest.approx(
        torch.cosine_similarity(before, after, dim=-1).mean().item(), abs=1e-5
    )
    layers = model.get_submodule("model.layers" if family == "llama" else "gpt_neox.layers")
    del layers[1]
    with torch.no_grad():
        out = model(ids_NS, use_cache=False)
        without = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids_NS[:, 1:].flatten())
    assert found.blocks[1].loss_rise == pytest.approx(without.item() - expected.item(), abs=1e-4)


def test_shares_are_of_all_units(model_of, text):
    (first, *_) = probe(str(model_of("llama")), text).blocks
    assert (len(first.heads), len(first.neurons)) == (4, 64)
    assert sum(first.heads) == pytest.approx(1)
    assert sum(first.neurons) == pytest.approx(1)
    low = [first.lowest(share) for share in LOWEST]
    assert low == sorted(low)
    assert all(part < share for part, share in zip(low, LOWEST, strict=True))
    assert first.weights == sum(first.weights_of.values())


def test_a_model_whose_neurons_are_not_told_apart(model_of, text):
    (first, *_) = probe(str(model_of("olmo2")), text).blocks
    assert (len(first.heads), len(first.neurons)) == (0, 64)


def test_the_command(model_of, text_file, tmp_path, says):
    options = [
        "--data",
        text_file,
        "--windows",
        2,
        "--seq-len",
        32,
        "--json",
        tmp_path / "p.json",
        "--html",
        tmp_path / "p.html",
    ]
    code, out, _ = says("probe", model_of("llama"), *options)
    assert code == 0
    assert "model.layers.1" in out
    told = json.loads((tmp_path / "p.json").read_text())
    assert [block["name"] for block in told["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert all(math.isfinite(block["loss_rise"]) for block in told["blocks"])
    page = (tmp_path / "p.html").read_text()
    assert page.count("<tr>") == 3
    assert "<script" not in page
    assert "lowest 25.0% of neurons" in page
    code, _, err = says("probe", tmp_path / "nothing", "--data", text_file)
    assert code == 2
    assert err.count("\n") == 1


def test_a_packed_model_is_probed(packed_of, text):
    assert len(probe(str(packed_of("llama", "bitmap")), text).blocks[0].neurons) == 64


def test_it_is_part_of_the_library():
    assert secateur.probe is probe
