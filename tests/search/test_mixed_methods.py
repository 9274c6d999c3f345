"""A search that may take another quantizer for one linear than for the next."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur import Choice, Recipe, UsageError
from secateur.checkpoint.inspect import inspect
from secateur.checkpoint.verify import verify
from secateur.recipes.plan import plan
from secateur.search.candidates import for_a_target, quick

NO_METHODS = {"target_size": "76%", "embeddings": 16, "head": 16}


@pytest.fixture
def calibration(text_file):
    return secateur.Calibration(source=str(text_file), samples=8, seq_len=32)


def test_trellis_codes_are_tried_where_no_method_is_named(calibration, model_of, tmp_path):
    out = tmp_path / "out"
    model = str(model_of("llama", dtype=torch.bfloat16))
    report = secateur.compress(model, out, Recipe(**NO_METHODS, calibration=calibration))
    assert verify(out) == []
    said = json.loads((out / "secateur.json").read_text())["recipe"]
    coded = {name for name, choice in said["linears"].items() if choice.get("quantize") == "trellis"}
    assert coded
    assert all(said["linears"][name]["bits"] in (2, 3, 4) for name in coded)
    assert {linear.name for linear in inspect(out).linears if linear.layout == "trellis"} == coded
    ids_NS = torch.arange(2, 34)[None]
    packed, dense = (secateur.load(out, backend=backend)(ids_NS).logits for backend in ("cpu", "dense"))
    torch.testing.assert_close(packed, dense, rtol=0.05, atol=0.05)
    again = secateur.compress(model, tmp_path / "again", str(out / "secateur.json"))
    assert again.bytes == report.bytes
    one, two = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_what_is_named_is_what_is_tried(calibration):
    named = Recipe(quantize="gptq", prune="sparsegpt", target_size="45%", calibration=calibration)
    tried = for_a_target(named, plan(named).quantizer)
    assert {choice.quantize for choice in tried} == {None}
    assert {choice.bits for choice in tried if choice.sparsity is None} == {2, 3, 4, 5, 6, 7, 8}


def test_of_equal_bits_only_the_better_code_is_tried():
    open_one = Recipe(target_size="45%")
    tried = for_a_target(open_one, plan(open_one).quantizer, "trellis")
    assert sorted(choice.bits for choice in tried if choice.sparsity is None) == [2, 3, 4, 5, 6, 7, 8]
    assert all(choice.quantize == ("trellis" if choice.bits < 5 else None) for choice in tried if not choice.sparsity)


def test_candidates_are_coded_with_few_states():
    whole = plan(Recipe(quantize="trellis", quantization={"bits": 3}))
    assert quick(whole).quantizer.states == 256
    assert quick(whole).quantizer.bits == 3
    assert whole.quantizer.states == 4096
    other = plan(Recipe(quantize="gptq"))
    assert quick(other) == other


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(None, 8, "trellis"), "trellis with `bits` 8 is chosen for model.x: it can be 2, 3, 4"),
        (
            Choice(0.5, 2, "trellis"),
            "trellis and a sparsity are chosen for model.x: its rotation leaves no weight zero",
        ),
        (Choice(None, 4, "trelis"), "quantization method 'trelis' is not known: did you mean 'trellis'"),
        (Choice(None, None, "trellis"), "trellis with `bits` None is chosen for model.x: it can be 2, 3, 4"),
    ],
)
def test_a_choice_that_its_method_cannot_make(choice, message):
    recipe = Recipe(prune="wanda", quantize="gptq", linears={"model.x": choice})
    with pytest.raises(UsageError, match=re.escape(message)):
        plan(recipe)
