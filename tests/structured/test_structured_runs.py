"""Runs with a structured pattern: what is written, opened, compressed again, planned and refused."""

import json

import processes
import pytest
import torch
from breaking_off import compress_in_two_runs
from safetensors.torch import load_file
from tiny_gguf import make_gguf
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import UsageError
from secateur.runs.forecast import forecast


def recipe_of(text_file, method="wanda", sparsity=0.25, **more):
    text = secateur.Calibration(str(text_file), 8, 32)
    more = {"multiple": 8, **more}
    return secateur.Recipe(prune=method, pattern="structured", sparsity=sparsity, calibration=text, **more)


_STOCK = """
import sys
sys.modules["secateur"] = None  # an import of it fails
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("bans dell")["input_ids"]])
with torch.no_grad():
    logits = model(ids).logits[0, -1].tolist()
    ids = model.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    print(json.dumps([model.config.intermediate_size, logits, ids]))
"""


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_stock_transformers_opens_it(family, model_of, text_file, tmp_path):
    secateur.compress(str(model_of(family)), tmp_path / "out", recipe_of(text_file))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    done = processes.script(_STOCK, tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    width, logits, ids = json.loads(done.stdout)
    assert width < 64
    model = secateur.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(
            model(torch.tensor(ids)[:, :-4]).logits[0, -1], torch.tensor(logits), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "flap", "tyr"])
def test_every_method_removes_as_much(method, model_of, text_file, tmp_path):
    report = secateur.compress(str(model_of("llama")), tmp_path / "out", recipe_of(text_file, method))
    before, after = report.structure["weights"]
    assert 1 - after / before == pytest.approx(0.25, abs=0.04)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for name, p in model.named_parameters() if "layers" in name and p.ndim == 2) == after
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert {linear.shape for linear in report.linears} == {tuple(model.model.layers[0].mlp.down_proj.weight.shape)}
    inspected = secateur.inspect(tmp_path / "out")
    assert inspected.parameters == report.parameters
    assert all(linear.error >= 0 for linear in inspected.linears if "down_proj" in linear.name)


def test_a_bias_makes_up_for_what_goes(model_of, text_file, tmp_path):
    model = model_of("opt")
    secateur.compress(str(model), tmp_path / "flap", recipe_of(text_file, "flap", refit=False))
    secateur.compress(str(model), tmp_path / "wanda", recipe_of(text_file, "wanda", refit=False))
    bias = "model.decoder.layers.0.fc2.bias"
    dense, flap, wanda = (load_file(f / "model.safetensors") for f in (model, tmp_path / "flap", tmp_path / "wanda"))
    assert torch.equal(dense[bias], wanda[bias])
    assert not torch.equal(dense[bias], flap[bias])
    # The first block's inputs are those of the dense model: its outputs keep their mean.
    told = {m: json.loads((tmp_path / m / "secateur.json").read_text())["linears"] for m in ("flap", "wanda")}
    assert all(linears["model.decoder.layers.0.fc2"]["shape"][1] < 64 for linears in told.values())


def test_the_bias_of_a_resumed_run_is_its_own(model_of, text_file, tmp_path, monkeypatch):
    model, recipe = str(model_of("opt", num_hidden_layers=3)), recipe_of(text_file, "flap")
    secateur.compress(model, tmp_path / "whole", recipe)
    compress_in_two_runs(model, tmp_path / "out", recipe, monkeypatch)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_result_is_compressed_again(model_of, text_file, tmp_path):
    secateur.compress(str(model_of("llama")), tmp_path / "out", recipe_of(text_file, multiple=16))
    text = secateur.Calibration(str(text_file), 8, 32)
    again = secateur.Recipe(quantize="gptq", quantization={"bits": 4, "group_size": 16}, calibration=text)
    secateur.compress(str(tmp_path / "out"), tmp_path / "out4", again)
    assert secateur.verify(tmp_path / "out4") == []
    secateur.compress(str(tmp_path / "out"), tmp_path / "narrower", recipe_of(text_file, multiple=4))
    widths = [json.loads((tmp_path / f / "config.json").read_text())["intermediate_size"] for f in ("out", "narrower")]
    assert widths[1] < widths[0]


def test_a_packed_model_gets_narrower(packed_of, text_file, tmp_path):
    secateur.compress(str(packed_of("llama", "packed-int")), tmp_path / "out", recipe_of(text_file))
    assert secateur.verify(tmp_path / "out") == []
    secateur.compress(
        str(packed_of("llama", "bitmap")), tmp_path / "short", recipe_of(text_file, units="blocks", sparsity=0.5)
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "short").config.num_hidden_layers == 1


def test_weights_alone_need_no_text(model_of, tmp_path):
    recipe = secateur.Recipe(prune="magnitude", pattern="structured", sparsity=0.25, multiple=8, refit=False)
    report = secateur.compress(str(model_of("qwen3")), tmp_path / "out", recipe)
    assert report.calibration == {"level": "none"}
    assert secateur.verify(tmp_path / "out") == []


@pytest.mark.parametrize("units", ["neurons", "blocks"])
def test_a_gguf_file_gets_narrower_or_shorter(units, text_file, tmp_path):
    model = make_gguf(tmp_path / "model.gguf", "F16")
    recipe = recipe_of(text_file, units=units, sparsity=0.25 if units == "neurons" else 0.5)
    secateur.compress(str(model), tmp_path / "out", recipe)
    assert secateur.verify(tmp_path / "out") == []
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.intermediate_size, config.num_hidden_layers) == ((56, 2) if units == "neurons" else (96, 1))


def test_plan_tells_the_size(model_of, text_file, tmp_path):
    model = str(model_of("llama", num_hidden_layers=4))
    told = forecast(model, recipe_of(text_file), out=tmp_path)
    report = secateur.compress(model, tmp_path / "out", recipe_of(text_file))
    assert told.disk == pytest.approx(report.bytes, rel=2e-3)


def test_a_smaller_memory_gives_the_same_bytes(model_of, text_file, tmp_path):
    model = str(model_of("llama"))
    for name, tokens in (("all", None), ("few", 32)):
        secateur.compress(model, tmp_path / name, recipe_of(text_file), batch_tokens=tokens)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("all", "few"))
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_refit_makes_the_error_smaller(model_of, text_file, tmp_path):
    errors = []
    for refit in (True, False):
        recipe = recipe_of(text_file, refit=refit)
        report = secateur.compress(str(model_of("llama")), tmp_path / str(refit), recipe)
        errors.append(report.linears[0].error)
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"multiple": 64}, "`multiple` 64 leaves nothing to choose: model.layers.0.mlp.down_proj reads 64 neurons"),
        ({"multiple": 0}, "`multiple` is 0: it must be at least 1"),
        ({"sparsity": 0.9}, "sparsity 0.9 would leave no neurons: they are 67% of the weights of the blocks"),
        ({"sparsity": 0.001}, "sparsity 0.001 removes nothing: neurons go in steps of"),
        ({"sparsity": 1.5}, "sparsity 1.5 is outside"),
        ({"sparsity": None}, "how much to prune is not said"),
        ({"units": "neuron"}, "`units` 'neuron' is not possible: it can be neurons, heads, blocks"),
        ({"units": "neurons,neurons"}, "is not possible: it can be neurons, heads, blocks"),
        ({"prune": "alps"}, "alps compares single weights, and `pattern` structured whole units: `prune` can be flap"),
        ({"refine": "dsnot"}, "`refine` does not go together with `pattern` structured: leave it out"),
        ({"reconstruct": True}, "`reconstruct` does not go together"),
        ({"match_dense": True}, "`match_dense` does not go together"),
        ({"quantize": "gptq"}, "`quantize` does not go together with `pattern` structured: compress the result again"),
        ({"ignore": ("*.0.*",)}, "`ignore` does not go together"),
        ({"format": "bitmap"}, "`format` bitmap is for single weights"),
        ({"allocation": "owl"}, "`allocation` owl is for single weights"),
        ({"pattern": "2:4", "sparsity": None}, "`multiple` is for `pattern` structured: add that, or leave it out"),
        (
            {"pattern": "2:4", "sparsity": None, "multiple": None, "units": "heads"},
            "`units` is for `pattern` structured",
        ),
        ({"pattern": None, "multiple": None, "refit": False}, "`refit` is for `pattern` structured"),
        ({"pattern": None, "multiple": None, "prune": "flap"}, "flap removes whole units: add `pattern` structured"),
        ({"linears": {"model.layers.0.mlp.up_proj": secateur.Choice(units=32)}}, "whose units are not understood"),
        (
            {"linears": {"model.layers.0.mlp.down_proj": secateur.Choice(units=32)}},
            "transformers builds all blocks alike",
        ),
    ],
)
def test_bad_input_is_told_in_a_line(options, says, model_of, text_file, tmp_path):
    method = options.pop("prune", "wanda")
    given = {"prune": method, "pattern": "structured", "sparsity": 0.25, "multiple": 8, **options}
    recipe = secateur.Recipe(calibration=secateur.Calibration(str(text_file), 8, 32), **given)
    with pytest.raises(UsageError) as error:
        secateur.compress(str(model_of("llama")), tmp_path / "out", recipe)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_shared_keys_and_values_are_left_alone(model_of, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.structured.structure_of.shares_keys", lambda _: True)
    with pytest.raises(UsageError, match="gives fewer heads"):
        secateur.compress(str(model_of("llama")), tmp_path / "out", recipe_of(text_file, units="heads"))


def test_the_command_line(model_of, text_file, tmp_path, says):
    options = ["--pattern", "structured", "--sparsity", "25%", "--multiple", "8", "--calibration", text_file]
    options += ["--samples", "8", "--seq-len", "32"]
    code, _, err = says("compress", model_of("llama"), tmp_path / "out", "--prune", "wanda", *options)
    assert code == 0
    assert "neurons of a block" in err
    assert "weights of the blocks' linears" in err
    code, _, err = says(
        "compress", model_of("llama"), tmp_path / "no", "--prune", "wanda", *options[:4], "--multiple", "64"
    )
    assert code == 2
    assert "--multiple 64 leaves nothing to choose" in err


def test_a_task_chooses_the_neurons(model_of, text_file, tmp_path, says):
    """As SEAP does: the text that a model is calibrated on is the task's."""
    words = text_file.read_text(encoding="utf-8").split()
    kept = []
    for name, part in (("one", words[:400]), ("other", words[-400:])):
        lines = [json.dumps({"question": " ".join(part[i : i + 40])}) for i in range(0, len(part), 40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        options = [
            "--pattern",
            "structured",
            "--sparsity",
            "25%",
            "--multiple",
            "8",
            "--samples",
            "4",
            "--seq-len",
            "32",
        ]
        options += ["--calibration", tmp_path / f"{name}.jsonl", "--text-field", "question"]
        code, _, _ = says("compress", model_of("llama"), tmp_path / name, "--prune", "wanda", *options)
        assert code == 0
        kept.append(load_file(tmp_path / name / "model.safetensors")["model.layers.0.mlp.gate_proj.weight"])
    assert kept[0].shape == kept[1].shape
    assert not torch.equal(*kept)
