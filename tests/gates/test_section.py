"""What a config says of activation sparsity, and what is refused of it."""

import copy
import json
import math

import pytest
import torch
from tiny import make_source, reseal, set_json

import secateur
from secateur.errors import CheckpointError
from secateur.folder.reader import read_json
from secateur.gates.section import GatedInput, Section, levels_for, parse_section

SECTION = Section(
    "teal",
    "threshold",
    (0.25, 0.5),
    0.5,
    (GatedInput(("a.q", "a.k"), (0.2, 0.5), (0.1, 0.4)), GatedInput(("a.o",), (0.3, 0.5), (0.0, 1.5))),
)


def test_it_reads_what_it_writes():
    said = json.loads(json.dumps(SECTION.to_dict()))
    assert parse_section(said) == SECTION
    largest = Section("wina", "largest", (0.5,), 0.0, (GatedInput(("a",), (0.5,)),))
    assert parse_section(json.loads(json.dumps(largest.to_dict()))) == largest
    assert parse_section(None) is None
    assert levels_for(0.3) == (0.25, 0.3, 0.4, 0.5, 0.65)
    assert levels_for(0) == levels_for(0.5) == (0.25, 0.4, 0.5, 0.65)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ((), []),
        ((), "teal"),
        (("levels",), [0.5, 0.25]),
        (("levels",), [0.25, 0.96]),
        (("levels",), [0.25, "0.5"]),
        (("levels",), [0.25]),
        (("level",), 0.3),
        (("level",), math.nan),
        (("rule",), "guess"),
        (("dense_tokens",), 4),
        (("dense_tokens",), None),
        (("inputs",), {}),
        (("inputs", 0, "linears"), []),
        (("inputs", 0, "linears"), [3]),
        (("inputs", 0, "linears"), ["a.o"]),
        (("inputs", 0, "shares"), [0.2, 1.5]),
        (("inputs", 0, "shares"), [True, 0.5]),
        (("inputs", 0, "thresholds"), [0.2]),
        (("inputs", 0, "thresholds"), [-0.1, 0.2]),
        (("inputs", 0, "thresholds"), [0.1, math.inf]),
        (("inputs", 0), None),
    ],
)
def test_what_makes_no_sense_is_refused(where, value):
    said = copy.deepcopy(SECTION.to_dict())
    if where:
        owner = said
        for key in where[:-1]:
            owner = owner[key]
        owner[where[-1]] = value
    else:
        said = value
    with pytest.raises(CheckpointError, match="'activations' of the checkpoint's quantization_config"):
        parse_section(said)


@pytest.fixture
def folder(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a b <s> b " * 200)
    calibration = secateur.Calibration(source=str(text), samples=4, seq_len=12)
    recipe = secateur.Recipe(activations="rsparse", gating={"rank_share": 0.6}, calibration=calibration)
    secateur.compress(str(make_source(tmp_path / "source")), tmp_path / "out", recipe)
    return tmp_path / "out"


def change(folder, spoil):
    set_json(folder / "config.json", lambda content: spoil(content["quantization_config"]["activations"]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda said: said["inputs"][0]["linears"].append("model.layers.7.mlp.up_proj"), "no such linear"),
        (lambda said: said["inputs"][0]["linears"].append("model.norm"), "no such linear"),
        (lambda said: said.update(levels=[]), "makes no sense"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(folder, spoil, message):
    change(folder, spoil)
    with pytest.raises(CheckpointError, match=message):
        secateur.load(folder)


def test_damaged_tensors_are_refused(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("activation_left"))
    for damage in (tensors[name][:-1], tensors[name] * math.nan, torch.zeros_like(tensors[name], dtype=torch.int32)):
        save_file({**tensors, name: damage.contiguous()}, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="activation_left"):
            secateur.load(folder)


def test_verify_finds_a_sound_folder_sound_and_names_what_is_wrong(folder, says):
    assert says("verify", folder)[0] == 0
    change(folder, lambda said: said.update(rule="guess"))
    reseal(folder)
    code, out, err = says("verify", folder)
    assert code == 1
    assert "'activations'" in out + err
    assert read_json(folder / "config.json")["quantization_config"]["layout_version"] == 1
