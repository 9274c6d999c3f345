"""What earlier versions wrote stays readable: tests/fixtures/layout_v1 has every layout of version 1 (make_layouts.py)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.folder.reader import read_json
from secateur.formats.layouts import LAYOUTS
from secateur.model.source import open_source

pytestmark = pytest.mark.usefixtures("dense_backend")

FOLDER = Path(__file__).parents[1] / "fixtures" / "layout_v1"


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "expected.safetensors")


def test_the_fixture_has_every_layout():
    entries = read_json(FOLDER / "config.json")["quantization_config"]["modules"].values()
    assert {entry["layout"] for entry in entries} == set(LAYOUTS)
    assert {entry["codes"]["layout"] for entry in entries if "codes" in entry} == {"packed-int", "spqr", "codebook"}


def test_every_weight_is_unpacked_as_it_was(expected):
    weights = open_source(str(FOLDER)).weights
    assert set(weights.packed) == set(expected)
    for name, wanted in expected.items():
        assert weights[name].dtype == wanted.dtype
        assert torch.equal(weights[name], wanted), name


@pytest.mark.parametrize("load", [secateur.load, AutoModelForCausalLM.from_pretrained])
def test_the_model_loads(load, expected):
    state = load(FOLDER).state_dict()
    for name, wanted in expected.items():
        assert torch.equal(state[name], wanted), name
