"""Runs whose target is the dense model's outputs, against a slow and obvious one, and however they are carried out.

O: output features, I: input features, T: tokens, N: windows, S: tokens of a window.
"""

import json
from dataclasses import replace

import mixtures
import pytest
import torch
from conftest import FAMILIES
from methods import prune as prune_by
from safetensors.torch import load_file
from test_resume import contents
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.calibration.text import read_text
from secateur.calibration.tokens import Named, windows
from secateur.core.dense_target import DAMPINGS
from secateur.core.patterns import parse_pattern
from secateur.core.stats import InputStats, Level
from secateur.errors import UsageError
from secateur.memory.footprint import Settings
from secateur.model.structure import weight_matrix
from secateur.pipeline import run as run_module
from secateur.runs import forecast as forecast_module
from secateur.unfinished import kept_inputs
from secateur.walking import walker
from secateur.walking.capture import NotInTurn

pytestmark = pytest.mark.usefixtures("dense_backend")

SAMPLES, SEQ_LEN = 10, 24


def recipe(text, **options):
    calibration = secateur.Calibration(source=str(text), samples=SAMPLES, seq_len=SEQ_LEN)
    given = {"prune": "sparsegpt", "sparsity": 0.5, "format": "dense", "match_dense": True, "calibration": calibration}
    return secateur.Recipe(**{**given, **options})


def damped(G_II, damping):
    diagonal_I = G_II.diagonal()
    return G_II + torch.diag(torch.where(diagonal_I <= 0, diagonal_I.mean(), 0.0) + damping * diagonal_I.mean())


def slow_target(W_OI, x_NSI, dense_NSI):
    """W* in float64: damping and share from even windows serve odd ones best, and the other way round, on average."""
    x_NSI, dense_NSI, W_OI = x_NSI.double(), dense_NSI.double(), W_OI.double()

    def step(x_TI, dense_TI, damping):
        return torch.linalg.solve(damped(x_TI.T @ x_TI, damping), x_TI.T @ (dense_TI - x_TI) @ W_OI.T).T

    halves = [(x_NSI[i::2].flatten(0, 1), dense_NSI[i::2].flatten(0, 1)) for i in range(2)]
    best = (0.0, 0.0, DAMPINGS[0])
    for damping in DAMPINGS:
        gain = cost = 0.0
        for fitted, (x_TI, dense_TI) in zip(halves, halves[::-1], strict=True):
            moved_TO = x_TI @ step(*fitted, damping).T
            gain += (moved_TO * ((dense_TI - x_TI) @ W_OI.T)).sum().item()
            cost += moved_TO.square().sum().item()
        share = min(max(gain / cost, 0.0), 1.0) if cost else 0.0
        best = max(best, (share * (2 * gain - share * cost), share, damping), key=lambda each: each[0])
    _, share, damping = best
    return W_OI + share * step(x_NSI.flatten(0, 1), dense_NSI.flatten(0, 1), damping), share


def ids_of(source, text):
    """The calibration windows."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    return windows(read_text(str(text)), tokenizer, SEQ_LEN, SAMPLES, seed=0, bos=True, named=Named("it"))


@torch.no_grad()
def reference(source, wanted, groups, prefix):
    """As anyone would first write it: for each group of linears run the model as it is by then, and the dense one beside it."""
    model, dense = (AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32) for _ in range(2))
    ids_NS = ids_of(source, wanted.calibration.source)
    pattern = parse_pattern(wanted.pattern, wanted.sparsity)
    weights, shares = {}, {}
    for block in range(model.config.num_hidden_layers):
        for group in groups:
            names = [f"{prefix}.{block}.{part}" for part in group]
            both = []
            for each in (model, dense):
                inputs = []
                first = each.get_submodule(names[0])
                handle = first.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
                each(input_ids=ids_NS, use_cache=False)
                handle.remove()
                both.append(inputs[0].reshape(SAMPLES, SEQ_LEN, -1))
            stats = InputStats.empty(both[0].shape[-1], Level.GRAM)
            stats.add(both[0].flatten(0, 1))
            for name in names:
                W_OI = weight_matrix(model.get_submodule(name))
                target_OI, shares[name] = slow_target(W_OI, *both)
                weights[name] = prune_by(wanted.prune, target_OI.float(), stats, pattern).W_OI
                W_OI.copy_(weights[name])
    return weights, shares


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_run_does_what_the_obvious_one_does(name, model_of, text_file, tmp_path):
    family = FAMILIES[name]
    expected, shares = reference(model_of(name), recipe(text_file), family.groups, family.prefix)
    report = secateur.compress(str(model_of(name)), tmp_path / "out", recipe(text_file), batch_tokens=3 * SEQ_LEN)
    found = load_file(tmp_path / "out" / "model.safetensors")
    both = [
        (found[f"{key}.weight"].T if name == "gpt2" else found[f"{key}.weight"], W_OI) for key, W_OI in expected.items()
    ]
    all_found, all_expected = (torch.cat([each.flatten() for each in side]) for side in zip(*both, strict=True))
    assert ((all_found == 0) == (all_expected == 0)).float().mean() >= 0.999
    assert torch.linalg.norm(all_found - all_expected) < 0.03 * torch.linalg.norm(all_expected)
    told = {linear.name: linear for linear in report.linears}
    assert any(share > 0 for share in shares.values())
    for key, share in shares.items():
        assert told[key].match_share == pytest.approx(share, abs=0.05)
    manifest = json.loads((tmp_path / "out" / "secateur.json").read_text())
    for linear in report.linears:
        said = manifest["linears"][linear.name]
        assert (said["match_share"], said["match_damping"]) == (linear.match_share, linear.match_damping)
        assert "damping" not in said


def test_where_nothing_is_lost_before_nothing_is_corrected(model_of, text_file, tmp_path):
    """The first group of the first block sees what the dense model's does, and becomes what it does without."""
    report = secateur.compress(str(model_of("llama")), tmp_path / "with", recipe(text_file))
    secateur.compress(str(model_of("llama")), tmp_path / "without", recipe(text_file, match_dense=False))
    first = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert [linear.match_share for linear in report.linears[:3]] == [0, 0, 0]
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("with", "without"))
    assert all(torch.allclose(one[f"{name}.weight"], other[f"{name}.weight"], atol=1e-5) for name in first)
    assert not torch.allclose(one["model.layers.1.mlp.down_proj.weight"], other["model.layers.1.mlp.down_proj.weight"])
    manifest = json.loads((tmp_path / "without" / "secateur.json").read_text())
    assert not {"match_share", "match_damping"} & manifest["linears"][first[0]].keys()


def test_a_matched_model_is_nearer_to_the_dense_one(model_of, text_file, tmp_path):
    """On the text that it was calibrated on, which is what is promised."""
    source = model_of("llama", num_hidden_layers=4)
    dense = secateur.load(str(source))
    ids_NS = ids_of(source, text_file)
    away = {}
    for match in (False, True):
        out = tmp_path / f"{match}"
        secateur.compress(str(source), out, recipe(text_file, match_dense=match))
        with torch.no_grad():
            away[match] = (secateur.load(out).model(ids_NS)[0] - dense.model(ids_NS)[0]).square().sum().item()
    assert away[True] < away[False]


# --- however it is carried out

WAYS = [(True, "device"), (False, "device"), (False, "host"), (False, "file")]


class StopError(Exception):
    pass


@pytest.mark.thin(3)
@pytest.mark.parametrize(("pause", "hidden"), WAYS)
def test_how_a_run_is_carried_out_does_not_change_it(pause, hidden, model_of, text_file, monkeypatch, tmp_path):
    """Nor does an interruption, where the inputs of both models are kept and where they are not."""
    source, wanted, batch = str(model_of("llama", num_hidden_layers=4)), recipe(text_file), 2 * SEQ_LEN
    secateur.compress(source, tmp_path / "plain", wanted, batch_tokens=batch)
    monkeypatch.setattr(run_module, "choose_settings", lambda *_: Settings(batch, pause, hidden))
    secateur.compress(source, tmp_path / "out", wanted)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    solve_block = run_module.solve_block

    def stop(run, journey, number):
        if number == 3:
            raise StopError
        solve_block(run, journey, number)

    for every in (-1.0, 1e9):
        monkeypatch.setattr(kept_inputs, "_HIDDEN_EVERY", every)
        monkeypatch.setattr(kept_inputs, "_HIDDEN_SHARE", 0)
        monkeypatch.setattr(run_module, "solve_block", stop)
        with pytest.raises(StopError):
            secateur.compress(source, tmp_path / "resumed", wanted, overwrite=True)
        kept = sorted(file.name for file in (tmp_path / "resumed.partial").glob("hidden-*-dense"))
        assert bool(kept) == (every < 0 or hidden == "file")
        monkeypatch.setattr(run_module, "solve_block", solve_block)
        secateur.compress(source, tmp_path / "resumed", wanted, resume=True, overwrite=True)
        assert contents(tmp_path / "resumed") == contents(tmp_path / "plain")


@pytest.mark.thin(2)
@pytest.mark.parametrize("damage", ["cut off", "gone"])
def test_damaged_inputs_of_the_dense_model_are_done_without(damage, model_of, text_file, monkeypatch, tmp_path):
    source, wanted = str(model_of("llama", num_hidden_layers=4)), recipe(text_file)
    secateur.compress(source, tmp_path / "plain", wanted)
    monkeypatch.setattr(kept_inputs, "_HIDDEN_EVERY", -1.0)
    monkeypatch.setattr(kept_inputs, "_HIDDEN_SHARE", 0)
    solve_block = run_module.solve_block

    def stop(run, journey, number):
        if number == 3:
            raise StopError
        solve_block(run, journey, number)

    monkeypatch.setattr(run_module, "solve_block", stop)
    with pytest.raises(StopError):
        secateur.compress(source, tmp_path / "out", wanted)
    for file in (tmp_path / "out.partial").glob("hidden-*-dense"):
        file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[:-4])
    monkeypatch.setattr(run_module, "solve_block", solve_block)
    again = []
    run_again = run_module.run_again
    monkeypatch.setattr(run_module, "run_again", lambda *args: (again.append(args[-1]), run_again(*args)))
    secateur.compress(source, tmp_path / "out", wanted, resume=True)
    assert again == [0, 1, 2]
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_blocks_that_are_not_run_in_turn(model_of, text_file, monkeypatch, tmp_path):
    """The whole body has a twin then: the same but for the order of sums, an interruption in between or not."""
    source, wanted = str(model_of("llama")), recipe(text_file)
    secateur.compress(source, tmp_path / "in-turn", wanted)

    def refuse(*_):
        raise NotInTurn("they are not")

    monkeypatch.setattr(walker, "BlockCalls", refuse)
    secateur.compress(source, tmp_path / "out", wanted)
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("in-turn", "out"))
    assert all(torch.allclose(one[name], other[name], atol=2e-3) for name in one)
    end = run_module.Recorder.end_block

    def stop(recorder, number, *args):
        end(recorder, number, *args)
        raise StopError

    monkeypatch.setattr(run_module.Recorder, "end_block", stop)
    with pytest.raises(StopError):
        secateur.compress(source, tmp_path / "resumed", wanted)
    monkeypatch.setattr(run_module.Recorder, "end_block", end)
    secateur.compress(source, tmp_path / "resumed", wanted, resume=True)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "out")


# --- mixtures of experts


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text"])
def test_experts_are_matched_however_they_are_visited(name, build, text_file, monkeypatch, tmp_path):
    source = str(build(tmp_path / "source", mixtures.config_of(name)))
    wanted, batch = recipe(text_file), 2 * SEQ_LEN
    report = secateur.compress(source, tmp_path / "plain", wanted, batch_tokens=batch)
    experts = [linear for linear in report.linears if ".experts." in linear.name]
    shares = [linear.match_share for linear in experts]
    if name == "llama4_text":  # what the router's scores scale is zero where the dense model's sends a token elsewhere
        assert shares == [None] * len(experts)
    else:
        assert sum(bool(share) for share in shares) > len(experts) / 4
    for pause, hidden, at_once in ((False, "device", 1), (False, "file", 16), (True, "device", 3)):
        monkeypatch.setattr(
            run_module, "choose_settings", lambda *_, said=(pause, hidden, at_once): Settings(batch, *said)
        )
        out = tmp_path / f"{pause}-{at_once}"
        secateur.compress(source, out, wanted)
        if name == "llama4_text":  # its experts are multiplied all at once, and BLAS may round by how many they are
            now, plain = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "plain"))
            torch.testing.assert_close(now, plain, rtol=1e-5, atol=1e-6)
        else:
            assert contents(out) == contents(tmp_path / "plain")


@torch.no_grad()
def test_experts_are_matched_on_the_tokens_that_they_are_sent(build, text_file, tmp_path):
    """The inputs of an expert are those of the compressed model's router; what the dense expert reads of the same tokens is its
    target, also of tokens that the dense model's router sends elsewhere.
    """
    config = mixtures.config_of("mixtral", num_hidden_layers=1)
    source = build(tmp_path / "source", config)
    # Only what is before the experts and one expert's last projection become something else.
    wanted = recipe(text_file, targets=("*.o_proj", "*.experts.1.*"), sparsity=0.7)
    wanted = replace(wanted, calibration=replace(wanted.calibration, expert_tokens=0))
    report = secateur.compress(str(source), tmp_path / "out", wanted)
    seen = {linear.name.rpartition(".")[2]: linear for linear in report.linears}
    ids_NS = ids_of(source, text_file)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, experts_implementation="eager")
    found = secateur.load(tmp_path / "out")
    inputs, routed = {}, {}
    for key, model in (("dense", dense), ("found", found)):
        block = model.model.layers[0].mlp
        block.register_forward_pre_hook(lambda _, args, key=key: inputs.__setitem__(key, args[0]))
        block.experts.register_forward_pre_hook(lambda _, args, key=key: routed.__setitem__(key, args[1]))
        model(ids_NS)
    sent_NS = (routed["found"] == 1).any(-1).view(SAMPLES, SEQ_LEN)
    assert not torch.equal(routed["found"], routed["dense"])
    first = seen.get("w1") or seen["gate_proj"]
    assert first.borrowed == 0
    W_OI = dense.model.layers[0].mlp.experts.gate_up_proj[1]
    half = W_OI[: len(W_OI) // 2]
    _, share = slow_target_of_tokens(half, inputs["found"], inputs["dense"], sent_NS)
    assert first.match_share == pytest.approx(share, abs=0.03)


def slow_target_of_tokens(W_OI, x_NSI, dense_NSI, sent_NS):
    """The same as `slow_target` of some tokens of each window."""
    halves = [(x_NSI[i::2][sent_NS[i::2]].double(), dense_NSI[i::2][sent_NS[i::2]].double()) for i in range(2)]
    W_OI = W_OI.double()
    best = (0.0, 0.0)
    for damping in DAMPINGS:
        gain = cost = 0.0
        for (x_TI, dense_TI), (y_TI, other_TI) in zip(halves, halves[::-1], strict=True):
            step_OI = torch.linalg.solve(damped(x_TI.T @ x_TI, damping), x_TI.T @ (dense_TI - x_TI) @ W_OI.T).T
            gain += ((y_TI @ step_OI.T) * ((other_TI - y_TI) @ W_OI.T)).sum().item()
            cost += (y_TI @ step_OI.T).square().sum().item()
        share = min(max(gain / cost, 0.0), 1.0)
        best = max(best, (share * (2 * gain - share * cost), share))
    return best


# --- what is asked for


@pytest.mark.parametrize(
    "options",
    [
        {"prune": "wanda"},
        {"prune": "magnitude"},
        {"prune": "", "sparsity": None, "quantize": "rtn"},
        {"prune": "", "sparsity": None, "quantize": "squeezellm"},
        {"prune": "wanda", "refine": "dsnot", "quantize": "rtn"},
    ],
)
def test_methods_that_do_not_look_at_the_gram_matrix_are_refused(options, text_file, tmp_path):
    with pytest.raises(
        UsageError, match=r"^`match_dense` needs the inputs' Gram matrix, which .* does not look at: alps"
    ):
        secateur.compress("demo", tmp_path / "out", recipe(text_file, **options))


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "options",
    [
        {"prune": "wanda", "reconstruct": True},
        {"prune": "alps", "sparsity": None, "pattern": "2:4"},
        {"prune": "", "sparsity": None, "quantize": "gptq", "format": "auto"},
        {"prune": "sparsegpt", "quantize": "spqr", "format": "auto"},
        {"allocation": "search"},
        {"sparsity": None, "target_size": "40%", "format": "auto", "quantize": "gptq"},
    ],
)
def test_all_others_can_be_matched(options, model_of, text_file, tmp_path):
    report = secateur.compress(str(model_of("llama")), tmp_path / "out", recipe(text_file, **options))
    assert any(linear.match_share for linear in report.linears)
    assert all(linear.error < 1 for linear in report.linears)


def test_one_window_is_too_few_to_be_held_out(model_of, text_file, tmp_path):
    wanted = recipe(text_file)
    wanted = replace(wanted, calibration=replace(wanted.calibration, samples=1))
    report = secateur.compress(str(model_of("llama")), tmp_path / "out", wanted)
    assert {linear.match_share for linear in report.linears} == {0.0}


def test_it_is_said_in_every_way(says, model_of, text_file, tmp_path):
    text = ["--calibration", text_file, "--samples", 4, "--seq-len", 16]
    code, _, _ = says("compress", model_of("llama"), tmp_path / "a", "--quantize", "gptq", "--match-dense", *text)
    assert code == 0
    asked = json.loads((tmp_path / "a" / "secateur.json").read_text())["recipe"]
    assert asked["match_dense"] is True
    assert secateur.Recipe.from_yaml(secateur.Recipe.from_dict(asked).to_yaml()).match_dense
    code, _, said = says("compress", model_of("llama"), tmp_path / "b", "--quantize", "rtn", "--match-dense", *text)
    assert code == 2
    assert "--match-dense needs the inputs' Gram matrix" in said


def test_its_memory_is_foretold(model_of, text_file, monkeypatch):
    """Two streams, and for each group of linears a Gram matrix and a drift of each half of the windows and of all."""
    needs = []

    def choose(measure, *_):
        needs.append(measure(True))
        return Settings(64, True, "device")

    monkeypatch.setattr(forecast_module, "choose_settings", choose)
    source = str(model_of("llama"))
    scratch = [secateur.forecast(source, recipe(text_file, match_dense=match)).scratch for match in (False, True)]
    without, matched = needs
    assert scratch[1] - scratch[0] == 2 * without.waiting
    assert matched.waiting == 2 * without.waiting == 2 * 4 * SAMPLES * SEQ_LEN * 32
    for one, other in zip(without.groups, matched.groups, strict=True):
        features = round((one.stats / 4 + 1) ** 0.5 - 1)
        assert one.stats == 4 * features * (features + 2)
        assert other.stats == 4 * features * (6 * features + 2)
        assert other.solve >= one.solve
    for pause, hidden in WAYS[:3]:
        settings = Settings(64, pause, hidden)
        assert replace(matched, base=without.base).peaks(settings)[0] > without.peaks(settings)[0]
