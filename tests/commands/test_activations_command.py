"""Activation sparsity on the command line."""

import json

import pytest


@pytest.fixture(scope="module")
def folder(shared, model_of, text_file):
    import secateur

    recipe = secateur.Recipe(
        activations="teal",
        activation_sparsity=0.3,
        calibration=secateur.Calibration(str(text_file), samples=4, seq_len=32),
    )
    return (
        shared("gated-by-command", lambda out: secateur.compress(str(model_of("llama")), out / "out", recipe)) / "out"
    )


def test_compress_takes_it(says, model_of, text_file, tmp_path, folder):
    options = ["--activations", "teal", "--activation-sparsity", "30%"]
    text = ["--calibration", text_file, "--samples", "4", "--seq-len", "32"]
    code, _, err = says("compress", model_of("llama"), tmp_path / "out", *options, *text)
    assert code == 0, err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text())
    said = config["quantization_config"]["activations"]
    assert (said["level"], said["levels"]) == (0.3, [0.25, 0.3, 0.4, 0.5, 0.65])


def test_compress_refuses_a_share_that_is_none(says, model_of, tmp_path):
    code, _, err = says(
        "compress", model_of("llama"), tmp_path / "out", "--activations", "teal", "--activation-sparsity", "96%"
    )
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "from 0 to 95%" in err


def test_eval_measures_as_if_written_and_says_so(says, folder, text_file, tmp_path):
    options = ["--data", text_file, "--windows", "2", "--seq-len", "32", "--json", tmp_path / "eval.json"]
    code, out, err = says("eval", folder, *options)
    assert code == 0, err
    assert "all but the first 8 tokens of each as if written, with teal" in " ".join(out.split())
    assert "weights read for a token at level 0.3" in " ".join(out.split())
    sparse = json.loads((tmp_path / "eval.json").read_text())
    assert sparse["activations"]["level"] == 0.3
    assert 0.6 < sparse["activations"]["share_read"] < 0.8
    assert says("eval", folder, *options, "--activation-sparsity", "0")[0] == 0
    dense = json.loads((tmp_path / "eval.json").read_text())
    assert dense["activations"] is None
    assert dense["quality"]["perplexity"] != sparse["quality"]["perplexity"]


def test_eval_refuses_what_cannot_be(says, folder, model_of, text_file):
    options = ["--data", text_file, "--windows", "2", "--seq-len", "32"]
    code, _, err = says("eval", folder, *options, "--activation-sparsity", "0.35")
    assert code == 2
    assert "it can be 0.25, 0.3, 0.4, 0.5, 0.65, or 0" in err
    code, _, err = says("eval", model_of("llama"), *options, "--activation-sparsity", "0.4")
    assert code == 2
    assert "no thresholds" in err
    code, _, err = says("eval", folder, *options, "--max-memory", "8GiB")
    assert code == 2
    assert "`max_memory`" in err or "--max-memory" in err


@pytest.mark.usefixtures("small_cache")
def test_bench_counts_what_is_read(folder, model_of):
    import secateur

    model = secateur.load(folder)
    found = {}
    for level in (0, 0.5):
        secateur.activations(model, level)
        found[level] = secateur.bench(model, tokens=[1, 8], seconds=0.001)
    for full, half in zip(found[0].cases, found[0.5].cases, strict=True):
        assert (full.kept, half.kept) == (1.0, 0.5)
        O, I = full.shape
        moved = full.tokens * (O + I) * 4
        read = 0.5 if full.tokens == 1 else 1.0  # with more tokens than four all is read
        assert half.bytes - moved == pytest.approx(read * (full.bytes - moved), rel=0.01)


def test_methods_lists_them(says):
    code, out, _ = says("methods")
    assert code == 0
    assert all(name in out for name in ("teal", "wina", "rsparse", "coreinfer"))
    code, out, _ = says("methods", "rsparse")
    assert code == 0
    assert "--rank-share" in out


def test_recipe_strings_name_them():
    from secateur import parse_recipes

    [(name, recipe), (both, other)] = parse_recipes("teal:40%, gptq:4+rsparse:0.5(rank_share=0.1)")
    assert (name, recipe.activations, recipe.activation_sparsity) == ("teal:0.4", "teal", 0.4)
    assert both == "gptq:4+rsparse:0.5(rank_share=0.1)"
    assert (other.quantize, other.gating) == ("gptq", {"rank_share": 0.1})
