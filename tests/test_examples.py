"""The examples run, on tiny models; those that are packages are tried where methods and commands are. How the demo fails."""

import json
import runpy
import sys

import processes
import pytest
import yaml
from peft import PeftModel
from smollm2 import ROOT
from transformers import AutoModelForCausalLM

import secateur

EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch, capfd):
    """Run a script of the examples in this process; what it printed."""

    def run(name, *args):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capfd.readouterr().out

    return run


def test_compress_quantize(example, model_of, text_file, tmp_path):
    text = ("--calibration", text_file, "--samples", 4, "--seq-len", 16)
    said = example("compress_quantize.py", model_of("llama"), tmp_path / "out", *text)
    assert said.startswith("14 linears at ")
    assert "problem" not in said
    assert secateur.verify(tmp_path / "out") == []


def test_the_recipe_of_the_script_is_the_built_in_one(example, model_of, text_file, says, tmp_path):
    model = model_of("llama")
    text = ("--calibration", text_file, "--samples", 4, "--seq-len", 16)
    example("compress_quantize.py", model, tmp_path / "script", *text)
    assert says("compress", model, tmp_path / "command", "--recipe", "gptq-4bit", *text, "-q")[0] == 0
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("script", "command")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_load_and_generate(example, packed_of, template, tmp_path):
    folder = packed_of("llama", "packed-int")
    if template is not None:
        folder = tmp_path / "chat"
        secateur.load(packed_of("llama", "packed-int")).save_pretrained(folder)
        for file in packed_of("llama", "packed-int").glob("tokenizer*"):
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "chat_template.jinja").write_text(template)
    assert "MB of weights in memory" in example("load_and_generate.py", folder, "bad", "--max-new-tokens", 4)


def test_lora_on_packed(example, packed_of, text_file, tmp_path):
    folder = packed_of("llama", "packed-int")
    said = example("lora_on_packed.py", folder, text_file, tmp_path / "adapter", "--steps", 2, "--seq-len", 16)
    assert "trainable params" in said
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")


def test_lora_on_too_short_a_text(example, packed_of, tmp_path, capfd):
    (tmp_path / "short.txt").write_text("bad")
    with pytest.raises(SystemExit):
        example("lora_on_packed.py", packed_of("llama", "packed-int"), tmp_path / "short.txt", tmp_path / "adapter")
    assert "less than one window of 256" in capfd.readouterr().err


def test_the_workflow_is_the_one_of_the_page():
    """Its commands are run by `tests/commands/test_ci_docs.py`."""
    workflow = (EXAMPLES / "github-actions.yml").read_text(encoding="utf-8")
    assert workflow.partition("\n")[2] in (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    assert "gate" in yaml.safe_load(workflow)["jobs"]


def test_the_cells_of_the_notebook_run_in_turn(model_of, text_file, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    cells = json.loads((EXAMPLES / "sweep.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(cell.get("outputs", []) == [] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    # On a tiny model, a short text and short windows.
    for there, here in (
        ('"demo"', repr(str(model_of("llama")))),
        ('"docs", seq_len=512, windows=8', f"{str(text_file)!r}, seq_len=16, windows=2"),
    ):
        assert code.count(there) == 1
        code = code.replace(there, here)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "sweep.ipynb", "exec"), {})
    said = capsys.readouterr().out
    assert "rtn:4" in said
    assert "bits a weight, in best" in said
    assert (tmp_path / "report" / "index.html").is_file()
    assert secateur.verify("best") == []


def test_a_step_that_fails_ends_the_demo(tmp_path):
    (tmp_path / "demo-out").write_text("no folder")
    done = processes.file(ROOT / "demo.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.count("\n$ ") == 1
    assert done.stderr.splitlines()[-1].startswith("The demo ends here: exit code 2 of: secateur export demo demo-out/")
