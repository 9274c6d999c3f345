"""Every verb of the command line, from Python."""

import pytest

import secateur
from secateur import UsageError


def test_from_a_model_to_figures_in_python(model_of, text_file, tmp_path):
    model, out = str(model_of("llama")), tmp_path / "out"
    text = secateur.Text(str(text_file), seq_len=32, windows=8)
    recipe = secateur.Recipe.from_yaml("quantize: rtn\nquantization: {bits: 8}")
    secateur.compress(model, out, recipe)
    found = secateur.evaluate(str(out), model, text)
    assert found.quality.kl < 0.01
    assert secateur.inspect(out).linears[0].layout == "packed-int"
    baseline = str(tmp_path / "baseline.json")
    secateur.write_baseline(model, baseline, text)
    assert secateur.gate(str(out), secateur.Baseline.read(baseline), secateur.Tolerances(perplexity_rise=0.5)).passed
    secateur.export(str(out), tmp_path / "dense", "dense")
    prompt = text_file.read_text()[:20]
    written = [secateur.generate(str(folder), prompt, max_new_tokens=4) for folder in (out, tmp_path / "dense")]
    assert written[0] == written[1]
    assert secateur.bench(str(out), seconds=0.01).cases


def test_recipes_by_name_and_as_text():
    assert secateur.recipe("rtn-8bit") == secateur.Recipe.from_yaml(secateur.recipe("rtn-8bit").to_yaml())
    assert [name for name, _ in secateur.parse_recipes("rtn:4, wanda:0.5")] == ["rtn:4", "wanda:0.5"]
    for text, says in (
        ("prune: [", "the recipe is not valid YAML"),
        ("prune: wanda\nprune: alps", "has the key 'prune' twice"),
        ("prun: wanda", "prun"),
    ):
        with pytest.raises(UsageError, match=says):
            secateur.Recipe.from_yaml(text)
