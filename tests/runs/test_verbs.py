"""Every verb of the command line, from Python."""

import pytest

import secateur
from secateur import UsageError


@pytest.mark.usefixtures("small_cache")
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


# --- revisions of a model of the hub

VERBS = {
    "compress": lambda text, **given: secateur.compress(recipe="rtn-8bit", out="out", **given),
    "forecast": lambda text, **given: secateur.forecast(recipe="rtn-8bit", **given),
    "evaluate": lambda text, **given: secateur.evaluate(text=text, **given),
    "generate": lambda text, **given: secateur.generate(prompt="a b", max_new_tokens=1, **given),
    "bench": lambda text, **given: secateur.bench(**given),
    "inspect": lambda text, **given: secateur.inspect(**given),
    "export": lambda text, **given: secateur.export(out="dense", to="dense", **given),
    "load": lambda text, **given: secateur.load(**given),
    "gate": lambda text, **given: secateur.gate(baseline=secateur.Baseline.read("baseline.json"), **given),
    "write_baseline": lambda text, **given: secateur.write_baseline(file="other.json", text=text, **given),
    "sweep": lambda text, **given: secateur.sweep(
        secateur.Sweep(recipes=secateur.parse_recipes("rtn:8"), text=text, **given), "sweep"
    ),
}
COMMANDS = {
    "compress": ["out", "--recipe", "rtn-8bit"],
    "plan": ["--recipe", "rtn-8bit"],
    "eval": [],
    "generate": ["a b"],
    "bench": [],
    "inspect": [],
    "export": ["out", "--to", "dense"],
    "gate": ["--write", "--baseline", "baseline.json"],
    "sweep": ["--recipes", "rtn:8", "--out", "out"],
}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the hub was asked for; nothing can be had there."""
    found = []

    def download(model, trust_remote_code):
        found.append(model)
        raise UsageError("no network here")

    monkeypatch.setattr("secateur.model.source.download", download)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_a_revision(verb, model_of, text_file, asked):
    text = secateur.Text(str(text_file), seq_len=32, windows=8)
    if verb == "gate":
        secateur.write_baseline(str(model_of("llama")), "baseline.json", text)
    with pytest.raises(UsageError, match="no network here"):
        VERBS[verb](text, model="someone/model", revision="v2")
    assert asked == ["someone/model@v2"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_revision(command, says, asked):
    code, _, err = says(command, "someone/model", *COMMANDS[command], "--revision", "v2")
    assert (code, err.count("no network here"), asked) == (2, 1, ["someone/model@v2"])


def test_a_revision_that_makes_no_sense_is_told(model_of, says, asked):
    folder = str(model_of("llama"))
    code, _, err = says("inspect", "someone/model@v1", "--revision", "v2")
    assert (code, err) == (
        2,
        "error: someone/model@v1 and --revision v2 name two revisions: leave one of them out\n",
    )
    for local in (folder, "demo", "some.gguf"):
        with pytest.raises(UsageError, match=r"^`revision` is for a model of the hub, and .* leave it out"):
            secateur.inspect(local, revision="v2")
    with pytest.raises(UsageError, match="`revision` is empty"):
        secateur.load("someone/model", revision="")
    assert asked == []
    with pytest.raises(UsageError, match="no network here"):
        secateur.inspect("someone/model@v2", revision="v2")
    assert asked == ["someone/model@v2"]
