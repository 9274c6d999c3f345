"""A layout of a new family of codes, a foreign format and a backend, each one file of another package, work like ours."""

import json
from pathlib import Path

import processes
import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
TOYS = ROOT / "tests" / "toys"
ENTRY_POINTS = """
[secateur.methods]
powers = powers
[secateur.layouts]
powers = powers
[secateur.foreign]
rows_of_bytes = rows_of_bytes
broken = no_such_module
[secateur.backends]
slow = slow
"""


@pytest.fixture
def run(tmp_path):
    """Runs Python, where such packages are installed, and returns what it prints."""
    told = tmp_path / "site" / "toys-1.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1\n")
    (told / "entry_points.txt").write_text(ENTRY_POINTS)

    def run(code, *arguments):
        done = processes.script(code, *arguments, cwd=tmp_path, path=[TOYS, told.parent])
        assert done.returncode == 0, done.stderr
        assert "the formats of no_such_module cannot be loaded" in done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


LAYOUT = """
import json, sys, torch, secateur
from secateur.checkpoint.export import export
from secateur.checkpoint.inspect import inspect
from secateur.evaluation.quality import Text, evaluate
from secateur.model.source import open_source
from secateur.plugin.packed_modules import packed_linears
from transformers import AutoModelForCausalLM

source, text, out = sys.argv[1:]
calibration = secateur.Calibration(text, 4, 32)
recipe = secateur.Recipe(quantize="powers-of-two", quantization={"bits": 5}, calibration=calibration)
report = secateur.compress(source, out, recipe)
export(out, out + "-dense", "dense")
export(out, out + "-again", "secateur")
x = torch.arange(8)[None]
logits, backends = [], []
for load in (
    lambda: secateur.load(out, "torch"), lambda: secateur.load(out, "slow"), lambda: secateur.load(out, "auto"),
    lambda: AutoModelForCausalLM.from_pretrained(out), lambda: secateur.load(out, "dense"),
    lambda: secateur.load(out + "-dense"), lambda: secateur.load(out + "-again", "torch"),
):
    model = load()
    logits.append(model(x).logits.detach())
    backends.append(sorted({m.prepared.backend.name for _, m in packed_linears(model)}))
AutoModelForCausalLM.from_pretrained(out).save_pretrained(out + "-saved")
try:
    secateur.load(out, "cpu")
    refused = ""
except secateur.UsageError as error:
    refused = str(error)
print(json.dumps({
    "layouts": sorted({linear.layout for linear in inspect(open_source(out)).linears}),
    "same": [linear.bits for linear in report.linears] == [linear.bits for linear in inspect(open_source(out)).linears],
    "problems": [str(p) for folder in (out, out + "-dense", out + "-again") for p in secateur.verify(folder)],
    "perplexity": [evaluate(folder, text=Text(text, seq_len=32)).quality.perplexity for folder in (out, out + "-dense")],
    "error": max((a - logits[0]).abs().max().item() for a in logits),
    "backends": backends,
    "refused": refused,
}))
"""


def test_a_family_of_codes_of_another_package(run, model_of, text_file, tmp_path):
    found = run(LAYOUT, model_of("llama"), text_file, tmp_path / "out")
    print(found)
    assert found["layouts"] == ["powers"]
    assert found["same"]
    assert found["problems"] == []
    assert found["perplexity"][0] == pytest.approx(found["perplexity"][1], rel=1e-5)
    assert found["error"] < 1e-4
    assert found["backends"] == [["torch"], ["slow"], ["slow"], ["slow"], [], [], ["torch"]]
    assert "it has no kernel for this layout, which backends 'dense' and 'torch' take" in found["refused"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layouts = [{**entry} for entry in config["quantization_config"]["modules"].values()]
    assert {"layout": "powers", "bits": 5, "dtype": "float32"} in layouts
    stored, saved, again = (
        load_file(tmp_path / f"out{name}" / "model.safetensors") for name in ("", "-saved", "-again")
    )
    assert stored.keys() == saved.keys() == again.keys()
    assert all((stored[name] == saved[name]).all() and (stored[name] == again[name]).all() for name in stored)


FOREIGN = """
import json, sys, torch, secateur
from secateur.checkpoint.export import export
from secateur.checkpoint.inspect import inspect
from secateur.model.source import open_source

folder = sys.argv[1]
export(folder, folder + "-ours", "secateur")
x = torch.arange(8)[None]
one, other = (secateur.load(path)(x).logits for path in (folder, folder + "-ours"))
print(json.dumps({
    "layouts": [sorted({l.layout for l in inspect(open_source(path)).linears}) for path in (folder, folder + "-ours")],
    "error": (one - other).abs().max().item(),
    "problems": [str(problem) for problem in secateur.verify(folder + "-ours")],
}))
"""


def test_a_foreign_format_of_another_package(run, model_of, tmp_path):
    source, folder = model_of("llama"), tmp_path / "foreign"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        W_OI = stored.pop(name)
        scale_O = (W_OI.abs().amax(1) / 100).half()
        module = name.removesuffix(".weight")
        stored[f"{module}.q"] = (W_OI / scale_O.float()[:, None] + 128).round().byte()
        stored[f"{module}.s"] = scale_O
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "rows-of-bytes"}
    (folder / "config.json").write_text(json.dumps(config))
    found = run(FOREIGN, folder)
    assert found == {
        "layouts": [["rows-of-bytes"], ["packed-int"]],
        "error": pytest.approx(0, abs=1e-4),
        "problems": [],
    }
