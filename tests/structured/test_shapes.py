"""Sharing what goes between neurons, heads and blocks."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import UsageError
from secateur.search.goals.shapes import loss_without


def recipe_of(text_file, units, sparsity, method="wanda", **more):
    text = secateur.Calibration(str(text_file), 8, 32)
    return secateur.Recipe(prune=method, pattern="structured", sparsity=sparsity, units=units, calibration=text, **more)


def weights_of_blocks(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2), model.config


@pytest.mark.parametrize(
    ("units", "sparsity"), [("neurons,heads", 0.3), ("neurons,heads,blocks", 0.4), ("blocks", 0.25), ("heads", 0.15)]
)
def test_the_share_that_is_asked_for_goes(units, sparsity, model_of, text_file, tmp_path):
    model = model_of("llama", num_hidden_layers=4)
    secateur.compress(str(model), tmp_path / "out", recipe_of(text_file, units, sparsity, multiple=4))
    before, _ = weights_of_blocks(model)
    after, config = weights_of_blocks(tmp_path / "out")
    assert abs(1 - after / before - sparsity) < 0.04
    assert secateur.verify(tmp_path / "out") == []
    if units == "blocks":
        assert config.num_hidden_layers == 3
    again = json.loads((tmp_path / "out" / "secateur.json").read_text())["recipe"]
    secateur.compress(str(model), tmp_path / "again", again)
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_blocks_that_go_leave_the_others_as_they_were(model_of, text_file, tmp_path):
    model = model_of("qwen3", num_hidden_layers=4, layer_types=["full_attention"] * 4)
    secateur.compress(str(model), tmp_path / "out", recipe_of(text_file, "blocks", 0.25))
    dense, short = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (model, tmp_path / "out")
    )
    linears = json.loads((tmp_path / "out" / "secateur.json").read_text())["recipe"]["linears"]
    gone = {int(name.split(".")[2]) for name, choice in linears.items() if choice["units"] == 0}
    assert len(gone) == 1
    ids_NS = torch.arange(2, 34)[None]
    expected = loss_without(dense, [dense.model.layers[i] for i in gone], ids_NS)
    assert loss_without(short, [], ids_NS) == pytest.approx(expected, abs=1e-5)
    assert len(short.config.layer_types) == 3


def test_layers_that_differ_by_a_period_stay(model_of, text_file, tmp_path):
    # Each block's own kind is in a list, which is cut with the blocks: what stays is as it was.
    model = model_of("gemma2", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    secateur.compress(str(model), tmp_path / "out", recipe_of(text_file, "blocks", 0.25))
    kinds = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.layer_types
    linears = json.loads((tmp_path / "out" / "secateur.json").read_text())["recipe"]["linears"]
    gone = {int(name.split(".")[2]) for name, choice in linears.items() if choice["units"] == 0}
    assert kinds == [kind for i, kind in enumerate(["sliding_attention", "full_attention"] * 2) if i not in gone]


@pytest.mark.parametrize(
    ("family", "units", "sparsity", "says"),
    [
        ("llama", "neurons,heads", 0.9, "is out of reach: with `units` neurons,heads at most"),
        ("gpt2", "heads", 0.1, "no config of .* gives fewer heads than its 4"),
        ("olmo2", "heads", 0.1, "no heads of .* can be told apart"),
    ],
)
def test_what_cannot_be_had(family, units, sparsity, says, model_of, text_file, tmp_path):
    with pytest.raises(UsageError, match=says):
        secateur.compress(str(model_of(family)), tmp_path / "out", recipe_of(text_file, units, sparsity, multiple=8))
    assert not (tmp_path / "out").exists()
