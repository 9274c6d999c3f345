"""The command line: what it prints where, what it exits with, and one line for everything that can go wrong."""

import json
import re
import signal
import subprocess
import sys

import processes
import pytest
import torch
import yaml
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import secateur
import secateur.model.load
from secateur.errors import Interrupted
from secateur.folder.writer import write_manifest
from secateur.pipeline.recorder import Recorder
from secateur.recipes.recipe import Calibration, Recipe


@pytest.fixture
def fails(says):
    """Run a command that must fail with this exit code and one line on standard error; the line."""

    def run(code, *args):
        found, out, err = says(*args)
        assert (found, out) == (code, ""), err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, err
        assert "Traceback" not in err
        assert err.endswith(f"{lines[0]}\n")
        return lines[0].removeprefix("error: ")

    return run


@pytest.fixture
def text_options(text_file):
    return ["--calibration", text_file, "--samples", 12, "--seq-len", 24]


@pytest.fixture(scope="module")
def pruned(model_of, text_file, tmp_path_factory):
    """A tiny Llama at 50 % by Wanda, in the layout `bitmap`. Not to be written to."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    calibration = Calibration(str(text_file), 12, 24)
    secateur.compress(str(model_of("llama")), out, Recipe("wanda", 0.5, calibration=calibration))
    return out


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- what each command does


def test_version():
    found = subprocess.run([sys.executable, "-m", "secateur", "--version"], capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == (f"secateur {secateur.__version__}\n", "")


def test_help_names_every_command(says):
    code, out, _ = says("--help")
    assert code == 0
    assert all(command in out for command in ("compress", "eval", "inspect", "export", "generate"))


def test_compress_tells_of_every_block_in_plain_lines(says, model_of, text_options, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = says(
        "compress", model_of("llama"), out, "--prune", "sparsegpt", "--pattern", "2:4", *text_options
    )
    assert (code, stdout) == (0, "")
    assert "\x1b" not in stderr
    lines = stderr.splitlines()
    for block in (1, 2):
        (line,) = [line for line in lines if line.startswith(f"block {block} of 2: ")]
        assert re.search(
            r"7 linears, largest error \d\.\d\de[+-]\d\d in model\.layers\.\d\.\S+, \d+ s left, peak memory", line
        )
    assert lines[0] == "opening the model"
    size = (out / "model.safetensors").stat().st_size
    table = " ".join(re.sub("[│┃]", " ", stderr).split())
    assert f"kB {size / 1000:.1f} kB (" in table
    for row in (
        r"bits per weight, whole model [\d.]+ [\d.]+ ",
        r"bits per weight, 14 compressed linears 17\.\d+ ",
        r"weights removed, 14 compressed linears 50\.00% ",
        r"perplexity not measured ",
        r"time [\d.]+ s peak memory [\d.]+ [MG]B ",
    ):
        assert re.search(row, table), row
    assert table.count("error, model.layers.") == 3
    assert lines[-4:] == [
        "next:",
        f"  secateur eval {out} --reference {model_of('llama')}",
        f"  secateur generate {out} 'The capital of France is'",
        f"  secateur export {out} {out}-dense --to dense",
    ]


def test_compress_quietly(says, model_of, text_options, tmp_path):
    args = ("compress", model_of("llama"), tmp_path / "out", "--prune", "wanda", "--sparsity", 0.5, *text_options)
    assert says(*args, "--quiet") == (0, "", "")
    assert (tmp_path / "out" / "secateur.json").exists()


def test_compress_reports_as_json(says, model_of, text_options, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = says(
        "compress", model_of("llama"), out, "--prune", "wanda", "--sparsity", 0.5, *text_options, "--json"
    )
    assert code == 0
    assert "block 2 of 2" in stderr
    report = json.loads(stdout)
    assert report["out"] == str(out)
    assert report["sparsity"] == 0.5
    assert len(report["linears"]) == 14
    assert report["bytes"] == (out / "model.safetensors").stat().st_size
    assert report["parameters"] == AutoModelForCausalLM.from_pretrained(model_of("llama")).num_parameters()
    assert report["seconds"] > 0
    assert report["peak_bytes"] > 10**8
    linear = report["linears"][0]
    assert linear["name"] == "model.layers.0.self_attn.q_proj"
    assert linear["shape"] == [32, 32]
    assert linear["layout"] == "bitmap"


def test_eval(says, pruned, model_of, text_file, tmp_path):
    figures = tmp_path / "figures.json"
    options = ("--data", text_file, "--seq-len", 32, "--windows", 3)
    code, stdout, _ = says("eval", pruned, "--reference", model_of("llama"), *options, "--json", figures)
    assert code == 0
    assert "KL divergence" in stdout
    assert "same most likely token" in stdout
    found = json.loads(figures.read_text())
    quality = found["quality"]
    assert quality["perplexity"] > 1
    assert quality["kl"] > 0
    assert 0 < quality["agreement"] <= 1
    assert f"{quality['perplexity']:.3f}" in stdout
    assert found["size"]["bytes"] == (pruned / "model.safetensors").stat().st_size
    assert found["size"]["bits_per_weight"] < found["reference_size"]["bits_per_weight"]

    code, alone, _ = says("eval", pruned, *options, "--json", "-")
    assert code == 0
    assert json.loads(alone)["quality"]["perplexity"] == pytest.approx(quality["perplexity"], rel=1e-5)
    assert says("eval", pruned, *options, "--quiet")[:2] == (0, "")
    code, same, _ = says("eval", pruned, "--reference", pruned, *options, "--json", "-")
    assert json.loads(same)["quality"]["kl"] == pytest.approx(0, abs=1e-6)
    assert json.loads(same)["quality"]["agreement"] == 1


def test_inspect(says, pruned, model_of):
    code, table, _ = says("inspect", pruned)
    assert code == 0
    assert table.count("50.00%") == 15
    assert "all linears" in table
    code, stdout, stderr = says("inspect", pruned, "--json")
    assert (code, stderr) == (0, "")
    found = json.loads(stdout)
    manifest = json.loads((pruned / "secateur.json").read_text())
    assert found["sparsity"] == 0.5
    assert {linear["name"]: linear["error"] for linear in found["linears"]} == {
        name: entry["error"] for name, entry in manifest["linears"].items()
    }
    assert found["linear_bytes"] == sum(entry["bytes"] for entry in manifest["linears"].values())
    assert found["parameters"] == manifest["parameters"]
    # A dense model has no errors on record; JSON has no NaN.
    dense = json.loads(says("inspect", model_of("llama"), "--json")[1])
    assert {linear["error"] for linear in dense["linears"]} == {None}
    assert {linear["layout"] for linear in dense["linears"]} == {"dense"}
    assert dense["sparsity"] == 0


def test_export(says, pruned, tmp_path):
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    code, stdout, stderr = says("export", pruned, dense, "--to", "dense")
    assert (code, stdout) == (0, "")
    assert stderr == f"{pruned} is written as dense to {dense}\n"
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    assert says("export", dense, packed, "--to", "secateur", "--quiet") == (0, "", "")
    before, after = load_file(pruned / "model.safetensors"), load_file(packed / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (packed / "config.json").read_bytes() == (pruned / "config.json").read_bytes()


def test_generate(says, pruned):
    args = ("generate", pruned, "bon dun", "--max-new-tokens", 8)
    code, text, _ = says(*args)
    assert code == 0
    assert text.endswith("\n")
    assert not text.startswith("bon dun")
    assert says(*args)[1] == text
    warm = [says(*args, "--temperature", 1.5, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_generate_by_the_chat_template(says, own_model):
    source = own_model("llama")
    template = "{{ '<s>' }}{% for message in messages %}{{ message['content'] }}.{% endfor %}"
    (source / "chat_template.jinja").write_text(template)
    code, chat, _ = says("generate", source, "bon dun", "--chat", "--max-new-tokens", 8)
    assert code == 0
    # The template's text is taken as it stands, without the token that the tokenizer puts before other texts.
    content = json.loads((source / "tokenizer.json").read_text())
    content["post_processor"] = None
    (source / "tokenizer.json").write_text(json.dumps(content))
    assert says("generate", source, "<s>bon dun.", "--max-new-tokens", 8)[1] == chat


# --- what can go wrong: the request


def test_generate_without_a_chat_template(fails, pruned):
    assert "has no chat template: leave --chat out" in fails(2, "generate", pruned, "bon", "--chat")


def test_an_empty_prompt(fails, own_model):
    source = own_model("llama")
    content = json.loads((source / "tokenizer.json").read_text())
    content["post_processor"] = None  # which puts a token before every text
    (source / "tokenizer.json").write_text(json.dumps(content))
    assert fails(2, "generate", source, "") == "the prompt is empty: give at least one word"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prune", "wanda", "--sparsity", "100%"], r"sparsity 1 is outside \[0, 1\)"),
        (["--prune", "wanda", "--sparsity", "-0.1"], r"sparsity -0\.1 is outside \[0, 1\)"),
        (["--prune", "wanda", "--sparsity", "nan"], "--sparsity 'nan' is not a share: write it like 50% or 0.5"),
        (["--prune", "wanda", "--pattern", "5:4"], "pattern 5:4 is not possible: .* like 2:4"),
        (["--prune", "wanda", "--pattern", "2-4"], "pattern '2-4' is not understood: use N:M"),
        (["--prune", "wanda", "--pattern", "2:4", "--sparsity", "0.6"], "means a sparsity of 0.5, but .* says 0.6"),
        (["--prune", "wanda"], "how much to prune is not said: give --sparsity"),
        (["--sparsity", "0.5"], "no method is given: --prune can be alps, flap, magnitude, sparsegpt, tyr, wanda"),
        (
            ["--prune", "sparsgpt", "--sparsity", "0.5"],
            "pruning method 'sparsgpt' is not known: did you mean 'sparsegpt'?",
        ),
        (
            ["--prune", "xyz", "--sparsity", "0.5"],
            "'xyz' is not known: it can be alps, flap, magnitude, sparsegpt, tyr, wanda",
        ),
        (["--quantize", "rtn", "--reconstruct"], "--reconstruct says how to prune, but no method is given"),
        (["--prune", "wanda", "--sparsity", "0.5", "--refine", "dsnt"], "refiner 'dsnt' .* did you mean 'dsnot'"),
        (["--prune", "wanda", "--sparsity", "0.5", "--format", "bitmask"], "format 'bitmask' .* did you mean 'bitmap'"),
        (["--prune", "wanda", "--sparsity", "0.5", "--format", "nm"], "--format nm needs a --pattern N:M"),
        (["--prune", "wanda", "--sparsity", "0.5", "--dtype", "bf16"], "dtype 'bf16' is not known: .*bfloat16"),
        (
            ["--prune", "wanda", "--sparsity", "0.5", "--device", "nonsense"],
            "--device nonsense cannot be used here: .+",
        ),
        (["--prune", "wanda", "--sparsity", "0.5", "--samples", "0"], "samples is 0: it must be at least 1"),
        (["--prune", "wanda", "--sparsity", "0.5", "--seq-len", "65"], "--seq-len 65 is more than the 64 positions"),
        (["--prune", "wanda", "--sparsity", "0.5", "--targets", "*.fc9"], r"--targets '\*\.fc9' matches none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_request_that_cannot_be_met(options, message, fails, model_of, text_file, tmp_path):
    line = fails(2, "compress", model_of("llama"), tmp_path / "out", *options, "--calibration", text_file, "--quiet")
    assert re.search(message, line), line
    assert list(tmp_path.iterdir()) == []


def test_a_cuda_that_is_not_there(fails, model_of, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("it is there")
    line = fails(
        2, "compress", model_of("llama"), tmp_path / "out", "--prune", "wanda", "--sparsity", 0.5, "--device", "cuda"
    )
    assert line.startswith("--device cuda cannot be used here: ")


@pytest.mark.parametrize("command", ["eval", "generate"])
@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_device_or_dtype_that_makes_no_sense(command, kind, fails, pruned, model_of):
    model = pruned if kind == "packed" else model_of("llama")
    args = (command, model, *(["bon"] if command == "generate" else ["--seq-len", 16, "--windows", 1]))
    assert fails(2, *args, "--device", "nonsense").startswith("--device nonsense cannot be used here: ")
    assert "--dtype 'float31' is not known: it can be auto, bfloat16" in fails(2, *args, "--dtype", "float31")


def test_other_words_that_are_not_known(fails, pruned, tmp_path):
    assert (
        "--to 'onnx' is not known: it can be dense, secateur, compressed-tensors, gptq, gptq-v1, mlx, spqr, decilm, gguf"
        in fails(2, "export", pruned, tmp_path / "o", "--to", "onnx")
    )
    assert "backend 'fast' is not known" in fails(2, "generate", pruned, "bon", "--backend", "fast")
    assert "--data self" in fails(2, "eval", pruned, "--data", "self")


@pytest.mark.parametrize(
    "args", [["compress", "a", "b", "--sparcity", "0.5"], ["compres", "a", "b"], ["compress", "a"]]
)
def test_options_and_commands_that_do_not_exist(args, says):
    code, out, err = says(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(r"no such option: --sparcity|no command 'compres': did you mean|missing argument 'out'", err)


def test_groups_that_do_not_divide(fails, model_of, text_options, tmp_path):
    source = model_of("llama", intermediate_size=36)
    args = ("compress", source, tmp_path / "out", "--prune", "wanda", "--pattern", "4:8", *text_options, "--quiet")
    line = fails(2, *args)
    assert line.startswith("model.layers.0.mlp.down_proj has 36 input features, which do not divide into groups of 8")
    assert "--ignore 'model.layers.*.mlp.down_proj' (2 linears)" in line
    assert list(tmp_path.iterdir()) == []


def test_groups_that_do_not_divide_can_be_ignored(says, model_of, text_options, tmp_path):
    source = model_of("llama", intermediate_size=36)
    args = ("compress", source, tmp_path / "out", "--prune", "wanda", "--pattern", "4:8", *text_options, "--quiet")
    assert says(*args, "--ignore", "*.down_proj") == (0, "", "")


# --- what can go wrong: the model


@pytest.mark.parametrize("model", ["no/such/folder/here", "./nothing", "/nothing", "nothing.gguf", "no model at all!"])
def test_no_such_model(model, fails, tmp_path):
    for args in (
        ("compress", model, tmp_path / "out", "--prune", "magnitude", "--sparsity", 0.5, "-q"),
        ("inspect", model),
    ):
        assert fails(2, *args).startswith("no such model: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["nobody-at-all/no-such-model", "no-such-model"])
def test_no_such_model_on_the_hub(model, fails, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "is not a folder or .gguf file here, and could not be had from the hub: " in fails(2, "inspect", model)


def test_a_folder_without_weights(fails, own_model):
    source = own_model("llama")
    (source / "model.safetensors").unlink()
    assert "holds no weights: no model.safetensors" in fails(1, "inspect", source)
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "pytorch_model.bin, a pickle, which secateur never opens" in fails(1, "inspect", source)
    (source / "config.json").unlink()
    assert "is not a model: it has no config.json" in fails(1, "inspect", source)


def test_a_file_in_place_of_a_folder(fails, text_file):
    assert "is a file, but not a .gguf" in fails(2, "inspect", text_file)


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"model_type": "nothing-like-it"}', '{"model_type": 3}'])
def test_a_damaged_config(config, fails, own_model):
    source = own_model("llama")
    (source / "config.json").write_text(config)
    assert re.search(r"not valid JSON|not hold a JSON object|no 'model_type'|of type 'nothing", fails(
        2 if "nothing" in config else 1, "inspect", source
    ))  # fmt: skip


@pytest.mark.parametrize("left", [0.99, 0.5, 0])
def test_a_truncated_shard(left, fails, own_model, text_options, tmp_path):
    source = own_model("llama")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    args = ("compress", source, tmp_path / "out", "--prune", "wanda", "--sparsity", 0.5, *text_options, "--quiet")
    assert f"{file} is truncated or not a safetensors file" in fails(1, *args)
    assert not (tmp_path / "out").exists()


def test_a_missing_shard(fails, build, tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=320, **FAMILIES["llama"].options)
    source = build(tmp_path / "sharded", config, shard="60KB")
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    assert f"{shards[1]} is missing: model.safetensors.index.json names it" in fails(1, "inspect", source)


def test_a_model_that_is_not_a_decoder(fails, own_model, tmp_path):
    source = own_model("llama")
    content = json.loads((source / "config.json").read_text())
    for changes, message in (
        (
            {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"},
            "is a T5ForConditionalGeneration, not a decoder",
        ),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "is a BertForMaskedLM, not a decoder-only"),
        ({"architectures": ["ViTModel"], "model_type": "vit"}, "is a ViTModel, not a decoder-only"),
        ({"architectures": None, "model_type": "vit"}, "is of type 'vit', which transformers does not offer"),
    ):
        (source / "config.json").write_text(json.dumps({**content, **changes}))
        line = fails(2, "compress", source, tmp_path / "out", "--prune", "wanda", "--sparsity", 0.5, "-q")
        assert message in line


def test_missing_tensors_and_other_shapes(fails, own_model, text_options, tmp_path):
    source = own_model("llama")
    content = json.loads((source / "config.json").read_text())
    args = ("compress", source, tmp_path / "out", "--prune", "magnitude", "--sparsity", 0.5, "-q")
    (source / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 3}))
    assert re.search(r"lacks 9 of the model's tensors, such as model\.layers\.2\..*incomplete", fails(1, *args))
    (source / "config.json").write_text(json.dumps({**content, "intermediate_size": 48}))
    line = fails(1, *args)
    assert re.search(r"gate_proj\.weight is \[64, 32\] in the checkpoint, but \[48, 32\] in the model", line)


def test_a_missing_head_of_a_model_that_is_not_tied(fails, own_model, tmp_path):
    source = own_model("llama")
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for args in (
        ("compress", source, tmp_path / "out", "--prune", "magnitude", "--sparsity", 0.5, "-q"),
        ("inspect", source),
    ):
        assert "lacks 1 of the model's tensors, such as lm_head.weight: its files are incomplete" in fails(1, *args)


# --- what can go wrong: the text


def test_calibration_text_that_cannot_be_had(fails, model_of, tmp_path):
    def line(path, *more):
        args = ("--prune", "wanda", "--sparsity", 0.5, "--calibration", path, *more, "--quiet")
        return fails(2, "compress", model_of("llama"), tmp_path / "out", *args)

    missing, empty, short = tmp_path / "missing.txt", tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.touch()
    short.write_text("bon dun bon")
    assert line(missing) == f"no such file: {missing}"
    assert line(empty) == f"{empty} holds no text: give one that is not empty"
    found = re.fullmatch(
        rf"--calibration {short} gives (\d+) tokens, and 229 are needed \(12 windows of 20\): give more text, or lower "
        "--samples or --seq-len",
        line(short, "--samples", 12, "--seq-len", 20),
    )
    assert found
    assert 2 < int(found[1]) < 12
    (tmp_path / "binary.txt").write_bytes(b"caf\xe9")
    assert "is not text in a known encoding" in line(tmp_path / "binary.txt")
    assert not (tmp_path / "out").exists()


# --- recipes


RECIPES = [
    Recipe(),
    Recipe("wanda", 0.5),
    Recipe("sparsegpt", None, "2:4", "dsnot", ("*.mlp.*", "*.v_proj"), ("*.0.*",), "nm", "float16"),
    Recipe("magnitude", 0.0, calibration=Calibration("docs", 3, 5, 7, "body")),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_survives_yaml_and_json(recipe, tmp_path):
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    for dump in (yaml.safe_dump, json.dumps, lambda content: json.dumps({"recipe": content, "linears": {}})):
        (tmp_path / "recipe").write_text(dump(recipe.to_dict()))
        assert Recipe.read(tmp_path / "recipe") == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sparcity: 0.5", "recipe.yaml: the recipe has an unknown key 'sparcity': did you mean 'sparsity'?"),
        (
            "nonsense: 0.5",
            "recipe.yaml: the recipe has an unknown key 'nonsense': it can be activation_sparsity, activations, ",
        ),
        ("{quantize: rtn, quantization: {bitz: 3}}", "recipe.yaml: `bitz` is not an option of rtn, which has --bits, "),
        ("sparsity: half", "'sparsity' of the recipe: 'half' is not a share: write it like 50% or 0.5"),
        ("sparsity: true", "'sparsity' of the recipe is True"),
        ("prune: 3", "'prune' of the recipe is 3, which is not a text"),
        ("targets: '*.mlp.*'", "'targets' of the recipe must be a list of patterns"),
        ("ignore: [1]", "'ignore' of the recipe must be a list of patterns"),
        ("calibration: docs", "the recipe's calibration must be a mapping"),
        ("calibration: {sample: 3}", "the recipe's calibration has an unknown key 'sample'"),
        ("calibration: {samples: 2.5}", "'samples' of the recipe's calibration is 2.5, which is not a whole number"),
        ("calibration: {samples: 0}", "samples is 0: it must be at least 1"),
        ("- prune", "the recipe must be a mapping"),
        ("", "the recipe must be a mapping"),
        ("a: [", "is not valid YAML"),
        ("pattern: !!python/object/apply:os.system [true]", "is not valid YAML"),
    ],
)
def test_a_bad_recipe(content, message, fails, model_of, tmp_path):
    (tmp_path / "recipe.yaml").write_text(content)
    line = fails(2, "compress", model_of("llama"), tmp_path / "out", "--recipe", tmp_path / "recipe.yaml", "--quiet")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_no_method_at_all_is_told_what_to_begin_with(fails, model_of, tmp_path):
    line = fails(2, "compress", model_of("llama"), tmp_path / "out")
    assert line.startswith("no method is given: --prune can be alps, ")
    assert line.endswith("; to begin with: --recipe spqr-4bit")


def test_a_folder_of_ours_is_a_recipe(says, fails, pruned, model_of, tmp_path):
    args = ("compress", model_of("llama"), tmp_path / "out", "--quiet", "--recipe")
    assert says(*args, pruned) == (0, "", "")
    assert files(tmp_path / "out") == files(pruned)
    (tmp_path / "empty").mkdir()
    line = fails(2, *args, tmp_path / "empty", "--overwrite")
    assert line == (
        f"--recipe {tmp_path / 'empty'} is a folder without secateur.json: give one that secateur made, or a file"
    )


def test_the_best_device_is_found(says, pruned, tmp_path, monkeypatch):
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert secateur.model.load.open_device("auto").type == expected
    seen = []
    monkeypatch.setattr("secateur.runs.generate.generate", lambda *_, **given: seen.append(given["device"]) or "")
    for more in ([], ["--device", "auto"], ["--device", "cpu"]):
        assert says("generate", pruned, "bon", *more)[0] == 0
    assert seen == [expected, expected, "cpu"]


def test_json_goes_to_a_file_or_to_standard_output(says, fails, pruned, tmp_path):
    file = tmp_path / "found.json"
    for command in (["inspect", pruned], ["methods"], ["methods", "gptq"], ["recipes"], ["recipes", "rtn-4bit"]):
        code, bare, _ = says(*command, "--json")
        assert (code, bare) == (0, says(*command, "--json", "-")[1])
        code, table, _ = says(*command, "--json", file)
        assert code == 0
        assert table
        assert json.loads(file.read_text()) == json.loads(bare)
    assert json.loads(says("inspect", "--json", "-", pruned)[1])
    # What used to be a flag may stand before a name.
    assert fails(2, "methods", "--json", "gptq") == "--json takes a file ('-': standard output): write `gptq --json -`"
    assert "write `rtn-4bit --json -`" in fails(2, "recipes", "--json", "rtn-4bit")
    assert fails(2, "inspect", "--json", pruned) == (
        f"--json takes a file ('-': standard output), and took {pruned} for it: write `{pruned} --json -`"
    )


def test_a_recipe_that_is_not_there(fails, model_of, tmp_path):
    line = fails(2, "compress", model_of("llama"), tmp_path / "out", "--recipe", tmp_path / "no.yaml", "--quiet")
    assert f"recipe {tmp_path / 'no.yaml'} cannot be read" in line


def test_a_manifest_is_a_recipe_that_gives_the_same_bytes(says, model_of, text_options, tmp_path):
    first, again, other = tmp_path / "first", tmp_path / "again", tmp_path / "other"
    options = ["--prune", "sparsegpt", "--sparsity", 0.6, "--refine", "dsnot", "--ignore", "*.0.mlp.*", "--seed", 3]
    model = model_of("gpt2")
    assert says("compress", model, first, *options, *text_options, "--dtype", "bfloat16", "-q")[0] == 0
    assert says("compress", model, again, "--recipe", first / "secateur.json", "-q") == (0, "", "")
    assert files(first) == files(again)
    # Options stand above the recipe.
    more = ["--recipe", first / "secateur.json", "--sparsity", 0.25, "--samples", 6, "--ignore", "*.c_attn", "-q"]
    assert says("compress", model, other, *more)[0] == 0
    found = json.loads((other / "secateur.json").read_text())["recipe"]
    before = json.loads((first / "secateur.json").read_text())["recipe"]
    assert found == {
        **before,
        "sparsity": 0.25,
        "ignore": ["*.c_attn"],
        "calibration": {**before["calibration"], "samples": 6},
    }


# --- the output folder


def test_an_output_that_exists(says, fails, model_of, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    write_manifest(out, {})
    written = files(out)
    args = ("compress", model_of("llama"), out, "--prune", "magnitude", "--sparsity", 0.5, "--quiet")
    assert f"{out} exists already: choose another folder, or give --overwrite" in fails(2, *args)
    assert files(out) == written
    # A run that fails leaves what was there.
    assert "no such file" in fails(2, *args[:4], "wanda", *args[5:], "--calibration", "/no.txt", "--overwrite")
    assert files(out) == written
    assert says(*args, "--overwrite") == (0, "", "")
    assert "precious" not in files(out)
    assert "model.safetensors" in files(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for other in ("export", "compress"):
        options = ["--to", "dense"] if other == "export" else ["--prune", "magnitude", "--sparsity", 0.5]
        assert "exists already" in fails(2, other, model_of("llama"), out, *options)


def test_debug_shows_where_it_went_wrong(says, model_of, tmp_path):
    args = ("compress", model_of("llama"), tmp_path / "out", "--prune", "wanda", "--sparsity", "150%", "--debug")
    code, out, err = says(*args)
    assert (code, out) == (2, "")
    assert "Traceback" in err
    assert "patterns.py" in err
    assert "sparsity 1.5 is outside" in err


def test_what_nobody_foresaw_is_one_line_too(fails, says, model_of, tmp_path, monkeypatch):
    def break_down(*_, **__):
        raise RuntimeError("first line\nsecond [line]")

    monkeypatch.setattr("secateur.runs.compress.compress", break_down)
    args = ("compress", model_of("llama"), tmp_path / "out", "--prune", "wanda", "--sparsity", "0.5")
    assert fails(1, *args) == "RuntimeError: first line second [line] (run again with --debug for details)"


# A method that takes its time, so that the signal finds the walk half way. What a shell starts behind its back has SIGINT
# ignored, and so have its children, the tests among them.
_SLOW = """
    import signal
    import time

    signal.signal(signal.SIGINT, signal.default_int_handler)
    import secateur.recipes.methods
    from secateur import cli
    from secateur.core.stats import Level
    from secateur.core.registry import PRUNERS, pruner

    @pruner
    class Slow(PRUNERS["wanda"]):
        name = "slow"

        def prune(self, stack, pattern):
            time.sleep(0.3)
            return super().prune(stack, pattern)

    cli.main()
"""


@pytest.mark.thin(2)
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_can_be_resumed(sent, says, fails, model_of, text_options, tmp_path):
    source = model_of("llama", num_hidden_layers=20)
    args = ["compress", source, tmp_path / "out", "--prune", "slow", "--sparsity", 0.5, *text_options]
    process = processes.Process.of_code(_SLOW, *args)
    process.wait_for("\nblock 2 of 20")
    process.send_signal(sent)
    done = process.end(timeout=60)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    left = done.stderr.splitlines()[-1]
    partial = tmp_path / "out.partial"
    assert re.fullmatch(
        rf"interrupted: [2-4] blocks are kept in {re.escape(str(partial))}: run again with --resume to go on", left
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]

    args[4] = "wanda"
    message = fails(2, *args)
    assert re.fullmatch(
        rf"{re.escape(str(partial))} holds a run that was interrupted after [2-4] blocks: give --resume to go on with it, "
        "or --overwrite to begin again",
        message,
    )
    message = fails(2, *args, "--resume")
    assert message == (
        f'{partial} was begun with another recipe prune, "slow" and not "wanda": give what it was begun with, '
        "or --overwrite to begin again"
    )
    assert says(*args, "--overwrite")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_interrupted_before_its_first_block_leaves_nothing(says, model_of, text_options, tmp_path, monkeypatch):
    def interrupt(*_):
        raise Interrupted

    monkeypatch.setattr(Recorder, "write_outside", interrupt)
    code, _, told = says(
        "compress", model_of("llama"), tmp_path / "out", "--prune", "wanda", "--sparsity", 0.5, *text_options
    )
    assert code == 130
    assert told.splitlines()[-1] == "interrupted: nothing is left behind"
    assert list(tmp_path.iterdir()) == []
