"""Which parts of a model are its decoder blocks, in models that are more than one list of like blocks."""

import ast
import json
import re

import pytest
import torch
from conftest import INNER, VOCABULARY
from family_table import tiny_config, tiny_model
from methods import prune
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import secateur
from secateur.calibration.kept_windows import calibration_ids
from secateur.checkpoint.export import export
from secateur.checkpoint.inspect import inspect
from secateur.core.patterns import parse_pattern
from secateur.core.stats import InputStats, Level
from secateur.errors import UsageError
from secateur.evaluation.blocks import block_errors
from secateur.model.source import open_source
from secateur.model.structure import build_skeleton, find_blocks
from secateur.pipeline import run as run_module
from secateur.pipeline.recorder import Recorder
from secateur.runs.forecast import forecast

IDS_NS = torch.randint(2, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def saved(tmp_path, tokenizer):
    """`saved("hrm_text", …)`: the folder of a tiny model of that type."""

    def make(family, **options):
        folder = tmp_path / family
        tiny_model(family, **options).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def recipe(text_file):
    def make(**options):
        calibration = secateur.Calibration(source=str(text_file), samples=6, seq_len=24)
        return secateur.Recipe(**{"prune": "wanda", "sparsity": 0.5, "calibration": calibration, **options})

    return make


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def changed(source, out, tmp_path):
    """The weights that differ between a model and what it was compressed to."""
    export(str(out), tmp_path / "dense", "dense")
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (source, tmp_path / "dense"))
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


METHODS = [
    {"prune": "magnitude"},
    {"prune": None, "sparsity": None, "quantize": "rtn"},
    {"prune": "wanda"},
]


# --- the language model of several models


@pytest.mark.thin(2)
@pytest.mark.parametrize("options", METHODS, ids=["magnitude", "rtn", "wanda"])
@pytest.mark.parametrize(
    ("family", "encoder", "decoder"),
    [
        ("gemma3", "vision_tower", "language_model.layers"),
        ("git", "image_encoder", "git.encoder.layer"),
    ],
)
def test_only_the_text_decoder_is_compressed(family, encoder, decoder, options, saved, recipe, tmp_path):
    """The image encoder has the longer list of blocks."""
    vision = tiny_config(CONFIG_MAPPING[family]).vision_config.to_dict()
    vision["num_hidden_layers"] = 5
    source = saved(family, vision_config=vision)
    report = secateur.compress(str(source), tmp_path / "out", recipe(**options))
    found = changed(source, tmp_path / "out", tmp_path)
    assert len(report.linears) == len(found) > 0
    assert all(decoder in linear.name for linear in report.linears)
    manifest = json.loads((tmp_path / "out" / "secateur.json").read_text())
    for notes in (report.notes, manifest["notes"]):
        assert len(notes) == 1
        assert encoder in notes[0]
        assert "text does not run them" in notes[0]


def test_a_note_of_what_is_left_is_kept_when_a_run_is_resumed(saved, recipe, tmp_path, monkeypatch):
    source = saved("git")
    solve = run_module.solve_block_without_inputs
    monkeypatch.setattr(run_module, "solve_block_without_inputs", lambda run, n: solve(run, n) if n == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        secateur.compress(str(source), tmp_path / "out", recipe(prune="magnitude"))
    monkeypatch.undo()
    report = secateur.compress(str(source), tmp_path / "out", recipe(prune="magnitude"), resume=True)
    assert [note.partition(",")[0] for note in report.notes] == ["left as they are"]


def test_without_a_pass_over_text_the_longest_list_of_the_decoder_is_taken(saved, monkeypatch):
    vision = {**tiny_config(CONFIG_MAPPING["got_ocr2"]).vision_config.to_dict(), "num_hidden_layers": 5}
    skeleton = build_skeleton(open_source(str(saved("got_ocr2", vision_config=vision))), torch.float32)
    monkeypatch.setattr(skeleton.model, "forward", lambda **_: 1 / 0)
    found = find_blocks(skeleton)
    assert found.lists == ["model.language_model.layers"]
    assert len(found.modules) == 2
    assert found.unreached is None


# --- blocks that are run more than once, or with something between them


def obvious(source, wanted, order):
    """Masks by running the whole model for each group, in order, and taking all inputs of each linear together."""
    opened = open_source(str(source))
    ids_NS, _, _ = calibration_ids(opened, wanted.calibration, torch.device("cpu"), lambda _: None)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    pattern = parse_pattern(wanted.pattern, wanted.sparsity)
    found = {}
    with torch.no_grad():
        for group in order:
            inputs = []
            linears = [model.get_submodule(name) for name in group]
            handle = linears[0].register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
            model(input_ids=ids_NS, use_cache=False)
            handle.remove()
            x_TI = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
            stats = InputStats.empty(x_TI.shape[1], Level.GRAM)
            stats.add(x_TI)
            for name, linear in zip(group, linears, strict=True):
                pruned = prune(wanted.prune, linear.weight.clone(), stats, pattern)
                linear.weight.copy_(pruned.W_OI)
                found[name] = pruned.W_OI.clone()
    return found


def llama_groups(prefix):
    attention = [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")]
    groups = [attention, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    return [[f"{prefix}.{part}" for part in group] for group in groups]


def hrm_groups():
    found = []
    for stack in ("L", "H"):
        for i in range(2):
            groups = llama_groups(f"model.{stack}_module.layers.{i}")
            groups[0].append(f"model.{stack}_module.layers.{i}.self_attn.gate_proj")
            found += groups
    return found


def xlm_groups():
    found = []
    for i in range(2):
        attention = f"transformer.attentions.{i}"
        found += [[f"{attention}.{part}" for part in ("q_lin", "k_lin", "v_lin")], [f"{attention}.out_lin"]]
        found += [[f"transformer.ffns.{i}.lin1"], [f"transformer.ffns.{i}.lin2"]]
    return found


@pytest.mark.thin(2)
@pytest.mark.parametrize("prune", ["wanda", "sparsegpt"])
@pytest.mark.parametrize(("family", "groups"), [("hrm_text", hrm_groups()), ("xlm", xlm_groups())])
def test_statistics_are_of_all_calls_in_order(family, groups, prune, saved, recipe, tmp_path):
    """HRM runs two stacks of blocks again and again; XLM has two lists that take turns."""
    source, wanted = saved(family), recipe(prune=prune)
    expected = obvious(source, wanted, groups)
    report = secateur.compress(str(source), tmp_path / "out", wanted, batch_tokens=48)
    assert {linear.name for linear in report.linears} == set(expected)
    assert report.notes == []
    export(str(tmp_path / "out"), tmp_path / "dense", "dense")
    found = tensors(tmp_path / "dense")
    same = [((found[f"{name}.weight"] == 0) == (W_OI == 0)).float().mean() for name, W_OI in expected.items()]
    assert min(same) >= 0.998
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        ours, theirs = (model(input_ids=IDS_NS, use_cache=False).logits for model in (packed, plain))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())


@pytest.mark.thin(2)
@pytest.mark.parametrize("family", ["hrm_text", "xlm"])
def test_such_a_run_is_resumed(family, saved, recipe, tmp_path, monkeypatch):
    source = saved(family)
    secateur.compress(str(source), tmp_path / "whole", recipe(prune="sparsegpt"))
    end = Recorder.end_block
    monkeypatch.setattr(Recorder, "end_block", lambda run, n, *args, **k: end(run, n, *args, **k) if n < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        secateur.compress(str(source), tmp_path / "out", recipe(prune="sparsegpt"))
    monkeypatch.undo()
    secateur.compress(str(source), tmp_path / "out", recipe(prune="sparsegpt"), resume=True)
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_such_a_model_is_searched_forecast_and_compared_by_block(saved, recipe, tmp_path):
    source = saved("hrm_text")
    report = secateur.compress(str(source), tmp_path / "owl", recipe(allocation="owl"))
    assert len({round(linear.sparsity, 3) for linear in report.linears}) > 1
    told = forecast(str(source), recipe(), out=tmp_path)
    assert told.blocks == 4
    assert len(inspect(open_source(str(source))).linears) == len(report.linears)
    model, dense = secateur.load(tmp_path / "owl", backend="dense"), secateur.load(source)
    errors = block_errors(model, dense, IDS_NS)
    assert [error.name for error in errors] == [f"model.{s}_module.layers.{i}" for s in "LH" for i in range(2)]
    assert all(0 < error.own < error.carried for error in errors[1:])


def test_such_a_model_has_to_fit_the_memory(saved, recipe, tmp_path):
    with pytest.raises(
        UsageError, match=r"block 0 is run more than once.*loads the model as a whole.*`prune` magnitude"
    ):
        secateur.compress(str(saved("hrm_text")), tmp_path / "out", recipe(), max_memory="1MiB")


@pytest.mark.thin(2)
@pytest.mark.parametrize("options", METHODS[::2], ids=["magnitude", "wanda"])
@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_linears_that_blocks_share_are_left_and_that_is_said(family, options, saved, recipe, tmp_path):
    source = saved(family)
    report = secateur.compress(str(source), tmp_path / "out", recipe(**options))
    assert len(report.notes) == 1
    assert re.match(
        r"left as they are, for several modules share their weights: model\.layers\.\*\.shared", report.notes[0]
    )
    assert not [linear.name for linear in report.linears if ".shared_transf" in linear.name]
    found = changed(source, tmp_path / "out", tmp_path)
    assert len(found) == len(report.linears) > 6
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        ours, theirs = (model(input_ids=IDS_NS, use_cache=False).logits for model in (packed, plain))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())


# --- lists of several kinds of modules


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("family", "options", "linears"),
    [
        ("jamba", {"num_experts": 1}, {"0.mamba.in_proj", "1.self_attn.q_proj", "1.feed_forward.up_proj"}),
        ("recurrent_gemma", {}, {"0.temporal_block.linear_x", "2.temporal_block.q_proj", "0.mlp_block.up_proj"}),
        ("olmo_hybrid", {}, {"0.linear_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"}),
        ("gemma3n_text", {}, {"0.self_attn.q_proj", "1.mlp.up_proj"}),
    ],
)
@pytest.mark.parametrize("prune", ["magnitude", "wanda"])
def test_a_list_of_several_classes_is_one_of_blocks(family, options, linears, prune, saved, recipe, tmp_path):
    ignore = ("*.dt_proj",) if family == "jamba" else ()
    source = saved(family, **options)
    report = secateur.compress(str(source), tmp_path / "out", recipe(prune=prune, ignore=ignore))
    found = {linear.name for linear in report.linears}
    assert {f"model.layers.{name}" for name in linears} <= found
    assert all(name.startswith("model.layers.") for name in found)


@pytest.mark.parametrize("family", ["jetmoe", "longcat_flash"])
def test_a_mixture_of_experts_that_cannot_be_taken_apart_is_called_one(family, saved, recipe, tmp_path):
    with pytest.raises(
        UsageError, match=r"layers\.\d+\.[\w.]+ \(\w+\) holds a mixture of experts in a form of its own"
    ):
        secateur.compress(str(saved(family)), tmp_path / "out", recipe(prune="magnitude"))


def test_bare_linears_in_a_list_are_no_blocks(saved):
    """Gemma 3n has lists of projections that are longer than that of its blocks can be."""
    options = {
        "num_hidden_layers": 2,
        "intermediate_size": [INNER] * 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0] * 2,
    }
    skeleton = build_skeleton(open_source(str(saved("gemma3n_text", **options))), torch.float32)
    assert find_blocks(skeleton).lists == ["model.layers"]


# --- what is read from the config


def test_the_positions_of_mpt_are_heeded(model_of, text_file, tmp_path, says):
    source = model_of("mpt")
    calibration = secateur.Calibration(source=str(text_file), samples=4)
    report = secateur.compress(str(source), tmp_path / "out", secateur.Recipe("wanda", 0.5, calibration=calibration))
    assert report.recipe["calibration"]["seq_len"] == 64
    args = ("--prune", "wanda", "--sparsity", 0.5, "--calibration", text_file, "--seq-len", 65)
    code, _, err = says("compress", source, tmp_path / "long", *args)
    assert (code, "65 is more than the 64 positions" in err) == (2, True)
    code, _, err = says("eval", source, "--data", text_file, "--seq-len", 65)
    assert (code, "longer than the model's 64 positions" in err) == (2, True)


def set_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("llama", "LLaMAForCausalLM"),
        ("llama", "LlamaModel"),
        ("llama-tied", "LlamaModel"),
        ("gpt2", "GPT2Model"),
        ("gpt-neox", "GPTNeoXModel"),
        ("opt", "OPTModel"),
    ],
)
def test_what_transformers_loads_whole_is_accepted(family, architecture, own_model, recipe, tmp_path):
    source = own_model(family)
    set_config(source, architectures=[architecture])
    _, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    assert not info["missing_keys"]
    report = secateur.compress(str(source), tmp_path / "out", recipe())
    assert report.linears
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS_NS).logits
        assert torch.allclose(loaded, secateur.load(tmp_path / "out")(IDS_NS).logits, atol=1e-4)


@pytest.mark.parametrize("use", [lambda f, out: secateur.load(f), lambda f, out: inspect(open_source(str(f)))])
def test_a_decoder_without_its_head_is_refused(use, model_of, tmp_path):
    AutoModelForCausalLM.from_pretrained(model_of("llama")).model.save_pretrained(tmp_path / "base")
    with pytest.raises(UsageError, match=r"is a LlamaModel, a model without the head.*lack lm_head\.weight"):
        use(tmp_path / "base", tmp_path / "out")


def test_a_model_that_runs_by_its_own_code_or_by_a_newer_transformers(own_model):
    source = own_model("llama")
    own = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    for changes, message in (
        ({"model_type": "x", "architectures": ["XForCausalLM"], "auto_map": own}, "give `trust_remote_code=True`"),
        ({"model_type": "x", "architectures": None, "auto_map": own}, "give `trust_remote_code=True`"),
        (
            {"model_type": "llama5", "architectures": ["Llama5ForCausalLM"]},
            r"does not know; .* by 99\.1.*pip install -U",
        ),
        (
            {"model_type": "llama5", "architectures": None},
            r"transformers \d+\.\d+\S*, the one installed, does not know",
        ),
        ({"model_type": "llama5", "architectures": ["Llama5ForCausalLM"], "auto_map": {"AutoConfig": "x.X"}}, "newer"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "is a ViTModel, not a decoder-only language model"),
    ):
        set_config(source, transformers_version="99.1", auto_map=None)
        set_config(source, **changes)
        with pytest.raises(UsageError, match=message) as caught:
            open_source(str(source))
        assert "\n" not in str(caught.value)


def test_code_beside_a_model_that_transformers_knows_is_not_asked_for(own_model):
    source = own_model("llama")
    set_config(source, auto_map={"AutoModelForCausalLM": "modeling_x.XForCausalLM"})
    assert open_source(str(source)).config.model_type == "llama"


# --- advice


def advised(error):
    return tuple(ast.literal_eval(re.search(r"`ignore=(\[.*?\])`", str(error))[1]))


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_the_linears_to_ignore_are_named_together(family, saved, recipe, tmp_path):
    source = saved(family, num_hidden_layers=3)
    with pytest.raises(UsageError, match=r"dt_proj is not reached by ordinary text.*\(3 linears\)$") as caught:
        secateur.compress(str(source), tmp_path / "out", recipe())
    assert advised(caught.value) == ("backbone.layers.*.mixer.dt_proj",)
    report = secateur.compress(str(source), tmp_path / "out", recipe(ignore=advised(caught.value)))
    assert len(report.linears) == 9


def test_the_linears_that_no_pattern_fits_are_named_together(build, recipe, tmp_path):
    config = tiny_config(CONFIG_MAPPING["llama"], intermediate_size=54)
    source = build(tmp_path / "llama", config)
    with pytest.raises(UsageError, match=r"down_proj has 54 input features.*\(2 linears\)$") as caught:
        secateur.compress(str(source), tmp_path / "out", recipe(sparsity=None, pattern="2:4"))
    assert advised(caught.value) == ("model.layers.*.mlp.down_proj",)
    assert secateur.compress(
        str(source), tmp_path / "out", recipe(sparsity=None, pattern="2:4", ignore=advised(caught.value))
    ).linears


def test_a_pattern_that_would_take_others_with_it_is_not_advised(saved, recipe, tmp_path):
    source = saved("mamba", num_hidden_layers=3)
    ignore = ("*.0.mixer.dt_proj",)
    with pytest.raises(UsageError, match=r"\(2 linears\)$") as caught:
        secateur.compress(str(source), tmp_path / "out", recipe(ignore=ignore))
    report = secateur.compress(str(source), tmp_path / "out", recipe(ignore=(*ignore, *advised(caught.value))))
    assert len(report.linears) == 9
