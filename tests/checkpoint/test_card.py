"""The model card: YAML that the hub reads, what was done, figures that were measured, and what is not known."""

import json

import pytest
import yaml

import secateur
from secateur.checkpoint.export import export
from secateur.checkpoint.front_matter import FRONT_MATTER, read_matter, renewed
from secateur.checkpoint.renew_card import renew_card
from secateur.model.source import Source

RECIPE = {"quantize": "rtn", "quantization": {"bits": 4, "group_size": 16}}


def card(folder):
    return (folder / "README.md").read_text()


def matter(folder):
    return yaml.safe_load(FRONT_MATTER.match(card(folder))[1])


def test_what_the_hub_reads(own_model, tmp_path, monkeypatch):
    source = own_model("llama")
    said = {"license": "apache-2.0", "tags": ["chat", "secateur"], "language": ["en"], "pipeline_tag": "summarization"}
    index = [{"name": "theirs", "results": []}]
    (source / "README.md").write_text(f"---\n{yaml.safe_dump({**said, 'model-index': index})}---\n# Theirs\n")
    secateur.compress(str(source), tmp_path / "out", RECIPE)
    assert matter(tmp_path / "out") == {**said, "library_name": "secateur"}  # and no figures of theirs
    monkeypatch.setattr(Source, "hub_name", "someone/model")
    secateur.compress(str(source), tmp_path / "hub", RECIPE)
    assert matter(tmp_path / "hub")["base_model"] == "someone/model"
    monkeypatch.undo()
    export(str(tmp_path / "hub"), tmp_path / "dense", "dense")
    found = matter(tmp_path / "dense")
    assert (found["base_model"], found["library_name"], found["license"]) == (
        "someone/model",
        "transformers",
        "apache-2.0",
    )
    assert card(tmp_path / "dense").endswith("# Theirs\n")
    assert "License: that of its source, apache-2.0." in card(tmp_path / "dense")
    assert not secateur.verify(tmp_path / "dense")


def test_a_license_that_nobody_knows(own_model, tmp_path):
    source = own_model("llama")
    secateur.compress(str(source), tmp_path / "unknown", RECIPE)
    assert matter(tmp_path / "unknown")["license"] == "unknown"
    assert "License: unknown, for its source says none." in card(tmp_path / "unknown")
    (source / "LICENSE.txt").write_text("Do as you like.")
    secateur.compress(str(source), tmp_path / "other", RECIPE)
    assert matter(tmp_path / "other")["license"] == "other"
    assert matter(tmp_path / "other")["license_link"] == "LICENSE.txt"
    assert (tmp_path / "other" / "LICENSE.txt").read_text() == "Do as you like."
    assert "License: that of its source, other (see `LICENSE.txt`)." in card(tmp_path / "other")


def test_what_was_done(own_model, tmp_path):
    secateur.compress(str(own_model("llama")), tmp_path / "out", {**RECIPE, "prune": "magnitude", "sparsity": 0.5})
    text = card(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert "- 50.0% of the weights in its blocks are zero\n" in text
    assert f"- {manifest['bits']:.2f} bits for each weight" in text
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert secateur.recipe(tmp_path / "out" / "secateur.json") == secateur.Recipe.from_dict(recipe)


def test_without_a_card(own_model, says, tmp_path):
    source = own_model("llama")
    (source / "README.md").write_text("# Theirs\n")
    options = ("--quantize", "rtn", "--bits", "4", "--no-card", "--quiet")
    assert says("compress", source, tmp_path / "out", *options)[0] == 0
    assert says("export", tmp_path / "out", tmp_path / "dense", "--to", "dense", "--no-card", "--quiet")[0] == 0
    for folder in ("out", "dense"):
        assert card(tmp_path / folder) == "# Theirs\n"
        assert not secateur.verify(tmp_path / folder)


def test_figures_that_were_measured(own_model, text_file, says, tmp_path):
    out = tmp_path / "out"
    secateur.compress(str(own_model("llama")), out, RECIPE)
    options = ("--data", text_file, "--seq-len", "16", "--quiet")
    assert says("eval", out, *options, "--windows", "2", "--json", tmp_path / "eval.json")[0] == 0
    assert says("gate", out, "--write", *options, "--windows", "12", "--baseline", tmp_path / "gate.json")[0] == 0
    assert says("gate", out, "--baseline", tmp_path / "gate.json", "--json", tmp_path / "again.json", "--quiet")[0] == 0
    measured = json.loads((tmp_path / "eval.json").read_text())["quality"]["perplexity"]
    code, _, stderr = says(
        "card", out, *(x for name in ("eval", "gate", "again") for x in ("--results", tmp_path / f"{name}.json"))
    )
    assert (code, stderr) == (0, f"{out}/README.md is written anew, with 6 figures\n")
    (index,) = matter(out)["model-index"]
    (result,) = index["results"]
    assert result["task"] == {"type": "text-generation"}
    assert result["dataset"]["name"] == text_file.name  # nobody else has the rest of the path
    first = result["metrics"][0]
    assert (first["type"], first["value"]) == ("perplexity", round(measured, 6))
    assert "2 windows of 16 tokens" in first["name"]
    assert f"| Perplexity | {measured:.5g} |" in card(out)
    assert not secateur.verify(out)
    assert renew_card(out) == 0
    assert "model-index" not in matter(out)
    assert card(out).count("written by secateur") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no figures of `eval` or `gate`"),
        ({"text": {}, "model": "/elsewhere/other"}, "holds figures of /elsewhere/other, and not of"),
        ({"text": {}, "model": "out", "quality": {"perplexity": None, "kl": "x"}}, "holds no figure that is a number"),
        (None, "there is no file"),
    ],
)
def test_files_without_figures(content, message, packed_of, tmp_path):
    file = tmp_path / "file.json"
    if content is not None:
        file.write_text(json.dumps(content))
    secateur.compress(str(packed_of("llama", "bitmap")), tmp_path / "out", {"prune": "magnitude", "sparsity": 0.6})
    before = card(tmp_path / "out")
    with pytest.raises(secateur.UsageError, match=message):
        renew_card(tmp_path / "out", [file])
    assert card(tmp_path / "out") == before


def test_a_folder_that_was_changed_keeps_its_card(own_model, tmp_path):
    """Its manifest must not come to say that the change is as it should be."""
    secateur.compress(str(own_model("llama")), tmp_path / "out", RECIPE)
    before = card(tmp_path / "out")
    (tmp_path / "out" / "generation_config.json").write_text("{}")
    with pytest.raises(secateur.CheckpointError, match=r"generation_config.json: was changed"):
        renew_card(tmp_path / "out")
    assert card(tmp_path / "out") == before
    assert secateur.verify(tmp_path / "out")


def test_yaml_that_is_not_to_be_read():
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\n"
    for text in (bomb, "[1, 2]", "a: [", "1: 2", "!!python/object:os.system {}", "a" * 2**17, "\udcff: 1"):
        assert read_matter(text) is None, text[:20]
    assert read_matter("") == {}
    assert read_matter("a: 1") == {"a": 1}


def test_tags_of_any_kind():
    options = {"base_model": None, "library": "secateur", "files": [], "results": []}
    for tags in (None, "x", [1, "secateur"], {"a": 1}):
        assert renewed({"tags": tags}, **options)["tags"] == ["secateur"]
    assert "base_model" not in renewed({}, **options)
    assert renewed({"base_model": "a/b"}, **options)["base_model"] == "a/b"
