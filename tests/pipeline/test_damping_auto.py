"""Runs whose damping is chosen by held-out windows: what is said of it, and that how they are carried out does not matter."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_resume import contents

import secateur
from secateur.core.damping import TRIED
from secateur.errors import UsageError
from secateur.memory.footprint import Settings
from secateur.pipeline import run as run_module
from secateur.recipes.command_line import flags_of
from secateur.recipes.strings import parse_recipes

SAMPLES, SEQ_LEN = 6, 24


def recipe(text, **options):
    calibration = secateur.Calibration(source=str(text), samples=SAMPLES, seq_len=SEQ_LEN)
    given = {"prune": "sparsegpt", "sparsity": 0.5, "pruning": {"damping": "auto"}, "calibration": calibration}
    return secateur.Recipe(**{**given, **options})


OTHERS = {
    "alps": {"prune": "alps", "pattern": "2:4", "sparsity": None},
    "gptq": {"prune": "", "sparsity": None, "pruning": {}, "quantize": "gptq", "quantization": {"damping": "auto"}},
    "spqr": {"prune": "", "sparsity": None, "pruning": {}, "quantize": "spqr", "quantization": {"damping": "auto"}},
    "trellis": {
        "prune": "",
        "sparsity": None,
        "pruning": {},
        "quantize": "trellis",
        "quantization": {"damping": "auto"},
    },
    "both": {"quantize": "gptq", "quantization": {"damping": "auto"}},
    "one of both": {"quantize": "gptq", "quantization": {"damping": 0.02}},
    "matched": {"match_dense": True},
    "reconstructed": {"prune": "wanda", "pruning": {}, "reconstruct": True},
}


@pytest.mark.thin(4)
@pytest.mark.parametrize("name", OTHERS)
def test_the_manifest_says_which_was_chosen(name, model_of, text_file, tmp_path):
    report = secateur.compress(str(model_of("llama")), tmp_path / "out", recipe(text_file, **OTHERS[name]))
    manifest = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert all(linear.damping in TRIED for linear in report.linears)
    assert [manifest["linears"][linear.name]["damping"] for linear in report.linears] == [
        linear.damping for linear in report.linears
    ]
    again = secateur.compress(str(model_of("llama")), tmp_path / "again", str(tmp_path / "out" / "secateur.json"))
    assert [linear.damping for linear in again.linears] == [linear.damping for linear in report.linears]
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_a_linear_becomes_what_the_number_makes_of_it(model_of, text_file, tmp_path):
    """The first group of a model sees the same inputs whatever becomes of the others."""
    report = secateur.compress(str(model_of("llama")), tmp_path / "auto", recipe(text_file, format="dense"))
    found = load_file(tmp_path / "auto" / "model.safetensors")
    for linear in report.linears[:3]:
        fixed = recipe(text_file, format="dense", pruning={"damping": linear.damping})
        secateur.compress(str(model_of("llama")), tmp_path / linear.name, fixed)
        wanted = load_file(tmp_path / linear.name / "model.safetensors")[f"{linear.name}.weight"]
        assert torch.allclose(found[f"{linear.name}.weight"], wanted, atol=1e-4)
    manifest = json.loads((tmp_path / linear.name / "secateur.json").read_text())
    assert "damping" not in manifest["linears"][linear.name]


@pytest.mark.parametrize(("pause", "hidden"), [(True, "device"), (False, "file")])
def test_how_a_run_is_carried_out_does_not_change_it(pause, hidden, model_of, text_file, monkeypatch, tmp_path):
    batch = 2 * SEQ_LEN
    secateur.compress(str(model_of("llama")), tmp_path / "plain", recipe(text_file), batch_tokens=batch)
    monkeypatch.setattr(run_module, "choose_settings", lambda *_: Settings(batch, pause, hidden))
    secateur.compress(str(model_of("llama")), tmp_path / "out", recipe(text_file))
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_a_search_compares_with_the_default(model_of, text_file, tmp_path):
    report = secateur.compress(str(model_of("llama")), tmp_path / "out", recipe(text_file, allocation="search"))
    assert all(linear.damping in TRIED for linear in report.linears)


def test_it_is_said_in_every_way(says, model_of, text_file, tmp_path):
    text = ["--calibration", text_file, "--samples", 4, "--seq-len", 16, "--prune", "sparsegpt", "--sparsity", 0.5]
    for said, wanted in (("auto", "auto"), ("0.05", 0.05), ("1", 1.0), ("1e-2", 0.01)):
        code, _, _ = says("compress", model_of("llama"), tmp_path / said, *text, "--damping", said)
        assert code == 0
        asked = json.loads((tmp_path / said / "secateur.json").read_text())["recipe"]
        assert asked["pruning"]["damping"] == wanted
    for said in ("often", "nan", "0", "-1", "inf"):
        code, _, told = says("compress", model_of("llama"), tmp_path / "bad", *text, f"--damping={said}")
        assert code == 2
        assert "give more than 0 and less than 10000 or 'auto'" in told
    ((name, found),) = parse_recipes("gptq:3(damping=auto, match_dense=true)")
    assert name == "gptq:3(damping=auto,match_dense=true)"
    assert (found.quantization, found.match_dense) == ({"bits": 3, "damping": "auto"}, True)
    assert parse_recipes(name)[0][1] == found
    assert flags_of(found) == ["--quantize", "gptq", "--match-dense", "--bits", "3", "--damping", "auto"]
    with pytest.raises(UsageError, match="not a true or false"):
        parse_recipes("gptq:3(match_dense=often)")
