"""Mixtures of experts from folder to folder: every expert is compressed, by its own tokens, and routers stay as they are."""

import json
import re
import shutil

import mixtures
import pytest
import torch
from mixtures import KINDS, MIXTURES, known
from safetensors.torch import load_file, save_file
from test_resume import contents, in_a_process
from transformers import AutoModelForCausalLM

import secateur
from secateur.checkpoint.inspect import inspect
from secateur.errors import CheckpointError, SecateurError, UsageError
from secateur.memory.footprint import Settings
from secateur.pipeline import run as run_module
from secateur.plugin.packed_modules import packed_linears

IDS_NS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(3))
SAMPLES, SEQ_LEN = 8, 32
WAYS = {
    "bitmap": {"prune": "sparsegpt", "sparsity": 0.5},
    "nm": {"prune": "wanda", "pattern": "2:4"},
    "packed-int": {"quantize": "gptq", "quantization": {"bits": 4, "group_size": 16}},
    "spqr": {"quantize": "spqr", "quantization": {"bits": 3, "group_size": 16}},
    "codebook": {"quantize": "squeezellm", "quantization": {"bits": 3}},
    "trellis": {"quantize": "trellis", "quantization": {"bits": 3}},
    "ternary-dict": {"quantize": "ternary"},
    "sparse-int": {
        "prune": "wanda",
        "sparsity": 0.5,
        "quantize": "gptq",
        "quantization": {"bits": 4, "group_size": 16},
    },
}


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


@pytest.fixture(scope="module")
def recipe(text_file):
    def make(way="packed-int", expert_tokens=None, expert_inputs="routed", **more):
        calibration = secateur.Calibration(
            str(text_file), SAMPLES, SEQ_LEN, expert_tokens=expert_tokens, expert_inputs=expert_inputs
        )
        return secateur.Recipe(**{**WAYS[way], **more}, calibration=calibration)

    return make


@pytest.fixture(scope="module")
def made(source, recipe, tmp_path_factory):
    """`made("mixtral", "bitmap")`: the compressed folder, and the report. Not to be written to."""
    known_ones = {}

    def make(name, way="packed-int"):
        if (name, way) not in known_ones:
            out = tmp_path_factory.mktemp(name) / "out"
            known_ones[name, way] = out, secateur.compress(str(source(name)), out, recipe(way))
        return known_ones[name, way]

    return make


@torch.no_grad()
def logits(model):
    return model(IDS_NS, use_cache=False).logits.float()


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def tensors_in(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


# Each kind of mixture and each way once or twice.
EVERY = [
    *zip(known(KINDS), WAYS, strict=False),
    *(("qwen3_moe", way) for way in ("ternary-dict", "sparse-int")),
    ("gpt_oss", "codebook"),  # its experts' weights lie transposed in memory, and so would their gradients
]
SLOW = [
    pytest.param(name, way, marks=pytest.mark.slow)
    for name in known(MIXTURES)
    for way in WAYS
    if (name, way) not in EVERY
]


@pytest.mark.parametrize(("name", "way"), [*EVERY, *SLOW])
def test_every_way_to_load_says_the_same(name, way, made, tmp_path):
    folder, _ = made(name, way)
    wanted = logits(secateur.load(folder, "dense"))
    packed = secateur.load(folder)
    theirs, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with secateur.backend("dense"):
        dense, told_dense = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not [key for info in (told, told_dense) for key in ("missing_keys", "unexpected_keys") if info[key]]
    assert torch.equal(logits(dense), wanted)
    same(logits(packed), wanted)
    same(logits(theirs), wanted)
    experts = [n for n, _ in packed_linears(packed) if ".experts." in n]
    assert len(experts) == sum(".experts." in linear.name for linear in made(name, way)[1].linears)
    assert type(dense.get_submodule(experts[0].rsplit(".", 2)[0])).__module__.startswith("transformers.")
    # What is saved again is what was read, whether it was packed or dense in memory.
    stored = tensors_in(folder)
    for number, model in enumerate((packed, theirs, dense)):
        model.save_pretrained(tmp_path / str(number))
        again = tensors_in(tmp_path / str(number))
        same(logits(secateur.load(tmp_path / str(number), "dense")), wanted)
        assert sum(t.nbytes for t in again.values()) == sum(t.nbytes for t in stored.values())


@pytest.mark.parametrize("name", known(KINDS))
def test_every_expert_is_compressed_and_the_routers_are_not(name, made, source):
    folder, report = made(name)
    before, after = tensors_in(source(name)), tensors_in(folder)
    experts = [linear for linear in report.linears if re.search(r"experts\.\d+\.", linear.name)]
    projections = {linear.name.rpartition(".")[2] for linear in experts}
    assert len(experts) == len(projections) * len({linear.name.rpartition(".")[0] for linear in experts})
    assert {linear.layout for linear in experts} == {"packed-int"}
    assert all(linear.tokens is not None and linear.error < 0.1 for linear in experts)
    on_disk = MIXTURES[name][2]
    assert any(re.search(rf"experts\.3\.{on_disk or 'up_proj'}\.weight\.\w+$", key) for key in after)
    kept = [
        key
        for key in before
        if re.search(r"(router|gate)\.(weight|bias)|correction_bias|_bias$|shared_expert_gate", key)
    ]
    kept = [key for key in kept if "experts." not in key or key.endswith("_bias")]
    assert kept
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert secateur.verify(folder) == []


def test_config_names_experts_by_pattern(made):
    modules = json.loads((made("mixtral")[0] / "config.json").read_text())["quantization_config"]["modules"]
    assert "model.layers.*.block_sparse_moe.experts.*.w1" in modules
    assert len(modules) == 7


def test_each_expert_is_solved_by_its_own_tokens(source, recipe, tmp_path):
    """The error that is told is that of the expert's tokens, as the stock model routes them."""
    folder = source("qwen3_moe")
    report = secateur.compress(str(folder), tmp_path / "out", recipe("nm", expert_tokens=0))
    model = AutoModelForCausalLM.from_pretrained(folder)
    first = [
        linear for linear in report.linears if "layers.0.mlp.experts" in linear.name and "gate_proj" in linear.name
    ]
    total = SAMPLES * SEQ_LEN * model.config.num_experts_per_tok
    assert sum(linear.tokens for linear in first) == total
    assert all(linear.borrowed == 0 for linear in report.linears)
    assert len({linear.tokens for linear in first}) > 1


def test_a_floor_of_tokens(source, recipe, tmp_path):
    report = secateur.compress(str(source("qwen3_moe")), tmp_path / "out", recipe(expert_tokens=160))
    experts = [linear for linear in report.linears if ".experts." in linear.name]
    assert all(linear.tokens + linear.borrowed >= 160 for linear in experts)
    assert any(linear.borrowed for linear in experts)
    assert all(linear.borrowed == 0 for linear in report.linears if ".experts." not in linear.name)


def test_all_tokens_and_gate_weights(source, recipe, tmp_path):
    every = secateur.compress(str(source("qwen3_moe")), tmp_path / "all", recipe(expert_inputs="all"))
    experts = [linear for linear in every.linears if ".experts." in linear.name]
    assert all(linear.tokens + linear.borrowed == SAMPLES * SEQ_LEN for linear in experts)
    secateur.compress(str(source("qwen3_moe")), tmp_path / "gate", recipe(expert_inputs="gate", expert_tokens=0))
    secateur.compress(str(source("qwen3_moe")), tmp_path / "routed", recipe(expert_tokens=0))
    gate, routed = tensors_in(tmp_path / "gate"), tensors_in(tmp_path / "routed")
    changed = {key for key in gate if not torch.equal(gate[key], routed[key])}
    assert any(".experts." in key for key in changed)
    assert not any("layers.0.self_attn" in key for key in changed)


def test_an_expert_that_sees_nothing_is_compressed_and_named(build, recipe, tmp_path, says):
    """A router that never chooses it, and no floor."""
    folder = build(tmp_path / "source", mixtures.config_of("deepseek_v3"))
    stored = load_file(folder / "model.safetensors")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    stored[bias][5] = -1e9
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    for way in ("packed-int", "bitmap", "nm"):
        out = tmp_path / way
        report = secateur.compress(str(folder), out, recipe(way, expert_tokens=0))
        starved = [linear for linear in report.linears if ".experts.5." in linear.name]
        assert [linear.tokens for linear in starved] == [0, 0, 0]
        assert {linear.error_kind for linear in starved} == {"weights"}
        assert all(0 < linear.error < 0.6 for linear in starved)
        # Gate and up in one note; and the router takes no expert of the group that this one spoils.
        assert sum("no calibration token reaches it" in note for note in report.notes) == 2 * 2
        assert json.loads((out / "secateur.json").read_text())["linears"][starved[0].name]["tokens"] == 0
        assert torch.isfinite(logits(secateur.load(out))).all()
    code, said, _ = says("inspect", tmp_path / "nm")
    assert code == 0
    assert (
        "experts that no calibration token reached, compressed by their weights alone: "
        "model.layers.1.mlp.experts.4, model.layers.1.mlp.experts.5" in said
    )
    # With the floor it sees some.
    report = secateur.compress(str(folder), tmp_path / "floor", recipe(expert_tokens=64))
    starved = [linear for linear in report.linears if ".experts.5." in linear.name]
    assert all(linear.tokens == 0 and linear.borrowed >= 64 for linear in starved)
    assert report.notes == []
    code, said, _ = says("inspect", tmp_path / "floor")
    assert "fewer tokens of their own than borrowed ones: model.layers.1.mlp.experts" in said


def test_inspect_has_a_row_for_all_experts(made, says):
    code, said, _ = says("inspect", made("mixtral")[0])
    assert code == 0
    assert re.search(r"layers\.0\.mlp\.experts\.\*\.w1 .* 4 of 16×32 .* packed-int", said)
    assert "experts.0." not in said.partition("all linears")[0]
    found = inspect(str(made("mixtral")[0]))
    assert {linear.name: linear for linear in found.linears} == {
        linear.name: linear for linear in made("mixtral")[1].linears
    }


# --- how a run is carried out


VISITS = {"qwen2_moe": (True, "device", 3), "deepseek_v3": (False, "device", 1), "llama4_text": (False, "file", 16)}


@pytest.mark.parametrize(
    ("name", "pause", "hidden", "experts"),
    [
        pytest.param(
            name, *way, marks=[pytest.mark.slow] * (way != VISITS[name])
        )  # by default each way and family once
        for name in VISITS
        for way in VISITS.values()
    ],
)
def test_how_experts_are_visited_does_not_change_them(
    name, pause, hidden, experts, source, recipe, monkeypatch, tmp_path
):
    batch = 2 * SEQ_LEN
    secateur.compress(str(source(name)), tmp_path / "plain", recipe("bitmap"), batch_tokens=batch)
    monkeypatch.setattr(run_module, "choose_settings", lambda *_: Settings(batch, pause, hidden, experts))
    secateur.compress(str(source(name)), tmp_path / "out", recipe("bitmap"))
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("form", ["auto", "dense"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(name, form, source, recipe, monkeypatch, tmp_path):
    class StopError(Exception):
        pass

    wanted = recipe("bitmap", format=form)
    secateur.compress(str(source(name)), tmp_path / "whole", wanted)
    solve_block = run_module.solve_block

    def stop(run, journey, number):
        if number == 1:
            raise StopError
        solve_block(run, journey, number)

    monkeypatch.setattr(run_module, "solve_block", stop)
    with pytest.raises(StopError):
        secateur.compress(str(source(name)), tmp_path / "out", wanted)
    monkeypatch.setattr(run_module, "solve_block", solve_block)
    secateur.compress(str(source(name)), tmp_path / "out", wanted, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_processes_share_the_experts(source, text_file, tmp_path):
    calibration = {"source": str(text_file), "samples": SAMPLES, "seq_len": SEQ_LEN}
    job = {
        "what": "ranks",
        "model": str(source("qwen3_moe")),
        "recipe": {"prune": "sparsegpt", "sparsity": 0.5, "calibration": calibration},
        "runs": [[size, str(tmp_path / str(size))] for size in (1, 3)],
    }
    _, found = in_a_process(job)
    assert found == [[[0], [0] * 3]]
    folders = [tmp_path / str(size) for size in (1, 3)]
    said = [json.loads((folder / "secateur.json").read_text())["linears"] for folder in folders]
    assert all({n: (e["tokens"], e["borrowed"]) for n, e in each.items()} == {
        n: (e["tokens"], e["borrowed"]) for n, e in said[0].items()
    } for each in said)  # fmt: skip
    with secateur.backend("dense"):
        models = [secateur.load(folder) for folder in folders]
    masks = [torch.cat([p.flatten() == 0 for p in model.parameters()]) for model in models]
    assert all((mask == masks[0]).float().mean() >= 0.999 for mask in masks[1:])


def test_memory_of_one_expert_at_a_time(source, recipe, tmp_path, monkeypatch):
    """While one expert is solved, the weights of others are in no memory."""
    seen = []
    solve = run_module.solve_stage

    def look(run, gathered):
        solve(run, gathered)
        there = {
            name.split(".experts.")[1].split(".")[0]
            for name in run.prepared.of_experts
            if not run.prepared.linear(name).weight.is_meta
        }
        seen.append(there)

    monkeypatch.setattr(run_module, "solve_stage", look)
    secateur.compress(str(source("qwen3_moe")), tmp_path / "out", recipe("nm"))
    assert max(map(len, seen)) <= 2
    assert {len(there) for there in seen} >= {1}


def test_plan_tells_what_a_mixture_takes(source, recipe):
    told = secateur.forecast(str(source("deepseek_v3")), recipe("nm"))
    assert told.blocks == 2
    assert told.disk > 0


# --- what fits together


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text", "mixtral"])
@pytest.mark.parametrize("to", ["dense", "secateur"])
def test_export(name, to, made, source, tmp_path):
    secateur.export(str(made(name)[0]), tmp_path / "out", to)
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    same(logits(model), logits(secateur.load(made(name)[0], "dense")))
    if to == "dense":
        assert tensors_in(tmp_path / "out").keys() == tensors_in(source(name)).keys()
    assert secateur.verify(tmp_path / "out") == []


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["gpt_oss", "qwen2_moe"])
def test_some_experts_left_alone(name, source, recipe, tmp_path):
    """Those stay dense beside packed ones, in a family that fuses them and in one that does not."""
    secateur.compress(str(source(name)), tmp_path / "out", recipe(ignore=("*.experts.1.*", "*.down_proj")))
    wanted = logits(secateur.load(tmp_path / "out", "dense"))
    assert secateur.verify(tmp_path / "out") == []
    for model in (
        secateur.load(tmp_path / "out"),
        *(AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)[:1]),
    ):
        same(logits(model), wanted)
        model.save_pretrained(tmp_path / "again")
        same(logits(secateur.load(tmp_path / "again", "dense")), wanted)
        shutil.rmtree(tmp_path / "again")


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_no_expert_is_packed(name, source, recipe, tmp_path):
    secateur.compress(str(source(name)), tmp_path / "out", recipe(targets=("*.self_attn.*",)))
    before, after = tensors_in(source(name)), tensors_in(tmp_path / "out")
    experts = [key for key in before if "experts" in key]
    assert all(torch.equal(before[key], after[key]) for key in experts)
    same(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(secateur.load(tmp_path / "out", "dense"))
    )


def test_a_compressed_mixture_is_compressed_again(made, recipe, tmp_path):
    report = secateur.compress(str(made("gpt_oss", "bitmap")[0]), tmp_path / "out", recipe())
    assert {linear.layout for linear in report.linears} == {"packed-int"}
    assert torch.isfinite(logits(secateur.load(tmp_path / "out"))).all()


def test_layers_that_the_model_does_not_have_are_kept(source, recipe, tmp_path):
    """Checkpoints of DeepSeek have one more layer, with experts of its own, that predicts several tokens at once."""
    folder = tmp_path / "source"
    shutil.copytree(source("deepseek_v3"), folder)
    stored = load_file(folder / "model.safetensors")
    more = {key.replace("layers.1.", "layers.2."): t.clone() for key, t in stored.items() if "layers.1." in key}
    save_file({**stored, **more}, folder / "model.safetensors", {"format": "pt"})
    report = secateur.compress(str(folder), tmp_path / "out", recipe())
    assert not [linear for linear in report.linears if "layers.2." in linear.name]
    after = tensors_in(tmp_path / "out")
    assert all(torch.equal(after[key], tensor) for key, tensor in more.items())
    wanted = logits(secateur.load(tmp_path / "out", "dense"))
    same(logits(secateur.load(tmp_path / "out")), wanted)
    same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), wanted)
    assert secateur.verify(tmp_path / "out") == []


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tied, source, recipe, tmp_path):
    folder = source("qwen3_moe", tie_word_embeddings=tied)
    secateur.compress(str(folder), tmp_path / "out", recipe("nm"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    same(logits(model), logits(secateur.load(tmp_path / "out", "dense")))


@pytest.mark.parametrize("spoil", ["missing", "count"])
def test_a_damaged_mixture(spoil, made, tmp_path):
    folder = tmp_path / "spoiled"
    shutil.copytree(made("qwen3_moe")[0], folder)
    stored = tensors_in(folder)
    if spoil == "missing":
        key = next(key for key in stored if "layers.1.mlp.experts.4.up_proj.weight." in key)
        del stored[key]
        wanted = r"layers\.1\.mlp\.experts\.4\.up_proj"
    else:
        config = json.loads((folder / "config.json").read_text())
        for name in ("num_experts", "num_local_experts"):
            if name in config:
                config[name] = 7
        (folder / "config.json").write_text(json.dumps(config))
        wanted = r"(experts\.6\.|mlp\.gate\.weight)"
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=wanted):
        secateur.load(folder)
    with pytest.raises((CheckpointError, RuntimeError), match=wanted):
        AutoModelForCausalLM.from_pretrained(folder)
    assert any(re.search(wanted, str(problem)) for problem in secateur.verify(folder))


def test_a_fused_tensor_with_too_few_experts(source, tmp_path, recipe):
    folder = tmp_path / "source"
    shutil.copytree(source("gpt_oss"), folder)
    stored = load_file(folder / "model.safetensors")
    key = "model.layers.1.mlp.experts.down_proj"
    stored[key] = stored[key][:3].clone()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"experts\.down_proj is \[3, 16, 32\] in the checkpoint, and has no expert 3"
    ):
        secateur.compress(str(folder), tmp_path / "out", recipe())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"expert_tokens": -1}, "`expert_tokens` is -1: it must be at least 0"),
        ({"expert_inputs": "some"}, "`expert_inputs` 'some' is not known: it can be routed, gate, all"),
    ],
)
def test_options_that_cannot_be(options, wanted):
    with pytest.raises(UsageError, match=re.escape(wanted)):
        secateur.Calibration(**options)


def test_flags_reach_the_recipe(source, text_file, says, tmp_path):
    given = ["--calibration", text_file, "--samples", SAMPLES, "--seq-len", SEQ_LEN, "--expert-tokens", 100]
    code, _, _ = says(
        "compress", source("qwen3_moe"), tmp_path / "out", "--prune", "wanda", "--sparsity", 0.5, *given,
        "--expert-inputs", "gate",
    )  # fmt: skip
    assert code == 0
    calibration = json.loads((tmp_path / "out" / "secateur.json").read_text())["recipe"]["calibration"]
    assert calibration["expert_tokens"] == 100
    assert calibration["expert_inputs"] == "gate"


def test_compressed_tensors(source, recipe, tmp_path):
    options = {"bits": 4, "group_size": 16, "symmetric": True}
    secateur.compress(str(source("mixtral")), tmp_path / "out", recipe(quantization=options))
    secateur.export(str(tmp_path / "out"), tmp_path / "exported", "compressed-tensors")
    section = json.loads((tmp_path / "exported" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.gate" in section["ignore"]
    assert not any(".experts." in name for name in section["ignore"])
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    same(logits(model), logits(secateur.load(tmp_path / "out", "dense")))


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("qwen3_moe", {}, "its experts have zero points"),
        ("gpt_oss", {"symmetric": True}, "hold a layer's experts in one tensor"),
        ("granitemoe", {"symmetric": True}, "hold a layer's experts in one tensor"),
    ],
)
def test_compressed_tensors_that_nobody_would_read(name, options, wanted, source, recipe, tmp_path):
    quantization = {"bits": 4, "group_size": 16, **options}
    secateur.compress(str(source(name)), tmp_path / "out", recipe(quantization=quantization))
    with pytest.raises(SecateurError, match=wanted):
        secateur.export(str(tmp_path / "out"), tmp_path / "exported", "compressed-tensors")
    assert not (tmp_path / "exported").exists()
