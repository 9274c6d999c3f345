"""Dictionaries that linears of several blocks share: learned as the equations say, written once, read from everywhere.

O: output features, I: input features, K: atoms, T: tokens.
"""

import json
import shutil
from dataclasses import replace
from unittest import mock

import mixtures
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_factorize_pipeline import computes_what_dense_does
from transformers import AutoModelForCausalLM

import secateur
from secateur.checkpoint.inspect import inspect
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.errors import CheckpointError
from secateur.factorize.cospadi import CoSpaDi
from secateur.memory.footprint import Settings
from secateur.model import streaming
from secateur.model.source import open_source
from secateur.model.structure import build_skeleton, find_blocks
from secateur.pipeline import run as run_module
from secateur.pipeline import shared_dictionaries
from secateur.pipeline.recorder import Recorder
from secateur.recipes.recipe import Calibration, Recipe
from secateur.runs.forecast import forecast
from secateur.structured.shorten import without_blocks
from secateur.unfinished import kept_inputs
from secateur.walking import walker
from secateur.walking.capture import NotInTurn

BLOCKS, TOGETHER, SIZE = 5, 2, 0.5
OPTIONS = {"size": SIZE, "iterations": 2, "dictionary_blocks": TOGETHER}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def recipe_of(text_file, **options):
    calibration = Calibration(str(text_file), 8, 24)
    return Recipe(factorize="cospadi", factorization={**OPTIONS, **options}, calibration=calibration)


@pytest.fixture(scope="module")
def model(model_of):
    return model_of("llama", dtype=torch.bfloat16, num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def made(model, text_file, tmp_path_factory):
    """The packed folder, the dense one and the report. Not to be written to."""
    folder, recipe = tmp_path_factory.mktemp("shared"), recipe_of(text_file)
    report = secateur.compress(str(model), folder / "packed", recipe)
    secateur.compress(str(model), folder / "dense", replace(recipe, format="dense"))
    return folder / "packed", folder / "dense", report


def stored(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def number_of(name):
    return int(name.split(".layers.")[1].split(".")[0])


def test_each_dictionary_is_stored_once(made):
    packed, _, report = made
    tensors = stored(packed)
    with_atoms = sorted({number_of(name) for name in tensors if ".atoms_" in name})
    assert with_atoms == [0, 2, 4]  # the last block has nobody to share with
    modules = json.loads((packed / "config.json").read_text())["quantization_config"]["modules"]
    lenders = {number_of(name): entry.get("atoms_block") for name, entry in modules.items()}
    assert lenders == {0: None, 1: 0, 2: None, 3: 2, 4: None}
    for pair in ((0, 1), (2, 3), (4,)):
        for projection in PROJECTIONS:
            both = [each for each in report.linears if number_of(each.name) in pair and projection in each.name]
            assert len(both) == len(pair)
            taken = sum(each.bytes for each in both)
            told = [t.nbytes for name, t in tensors.items() if number_of_or_none(name) in pair and projection in name]
            assert taken == sum(told)
            O, I = both[0].shape
            room = SIZE * 2 * O * I * len(pair)
            K = len(tensors[f"{both[0].name}.weight.atoms_values"])
            # One more atom, and what outputs take of it, would be too much.
            assert taken <= room < taken + 50 * len(pair) + 2 * (2 * I + 2 * O * len(pair) + O * len(pair))
            assert all(0 < each.error < 1 for each in both)
            assert O * len(pair) >= K


def number_of_or_none(name):
    return number_of(name) if ".layers." in name else None


def test_every_reader_finds_the_same_weights(made, tmp_path):
    packed, dense, report = made
    expected = stored(dense)
    with secateur.backend("dense"):
        models = [secateur.load(packed), AutoModelForCausalLM.from_pretrained(packed, dtype="auto")]
    for each in models:
        found = {name: parameter.detach() for name, parameter in each.named_parameters()}
        assert all(torch.equal(found[name], expected[name]) for name in found)
    models.append(secateur.load(packed))
    before = stored(packed)
    for i, each in enumerate(models):
        each.save_pretrained(tmp_path / f"{i}")
        again = stored(tmp_path / f"{i}")
        assert again.keys() == before.keys()
        assert all(torch.equal(again[name], before[name]) for name in before)
    computes_what_dense_does(packed, dense)
    assert secateur.verify(packed) == []
    assert inspect(open_source(str(packed))).linears == report.linears
    secateur.export(packed, tmp_path / "exported", "dense")
    exported = stored(tmp_path / "exported")
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


def test_a_model_without_the_lender_keeps_what_it_lent(made):
    found = secateur.load(made[0])
    name = "model.layers.0.self_attn.q_proj"
    found.set_submodule(name, torch.nn.Identity())
    state, _ = found.hf_quantizer.get_state_dict_and_metadata(found)
    lent = stored(made[0])[f"{name}.weight.atoms_values"]
    assert torch.equal(state["model.layers.1.self_attn.q_proj.weight.atoms_values"], lent)
    assert "model.layers.1.self_attn.k_proj.weight.atoms_values" not in state


def test_blocks_that_are_read_when_they_run(made, monkeypatch):
    tokens = torch.arange(5, 17)[None]
    wanted = secateur.load(made[0])(tokens).logits
    monkeypatch.setattr(streaming, "room_here", lambda *_: 0)
    assert torch.equal(secateur.load(made[0], max_memory="1GiB")(tokens).logits, wanted)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stats_of(x_TI):
    stats = InputStats.empty(x_TI.shape[1], Level.GRAM)
    stats.add(x_TI)
    return stats


def test_it_is_learned_for_all_weights_by_all_inputs():
    """The same as one linear's whose rows are those of both, and which reads the inputs of both."""
    I = 20
    inputs = [draw(200, I, seed=1) * torch.linspace(0.1, 2, I), draw(100, I, seed=2) * torch.linspace(3, 0.2, I)]
    weights = [draw(24, I, seed=3), draw(24, I, seed=4)]
    method = CoSpaDi(size=0.6, iterations=3)
    learned = method.learn(Stack.of(weights, stats_of(inputs[0]) + stats_of(inputs[1])))
    [twin] = method.factorize(Stack.of([torch.cat(weights)], stats_of(torch.cat(inputs))))
    K = len(learned.values())
    assert abs(len(twin.codes.atoms.values()) - K) <= 1  # what shapes take is counted for each linear
    many = CoSpaDi(size=0.6, iterations=3).atoms((48, I), 1)
    assert K in (many, many - 1)
    if many == K:
        torch.testing.assert_close(learned.values(), twin.codes.atoms.values(), atol=2e-3, rtol=0)


def test_what_is_gathered_is_what_the_dense_blocks_read(model_of, text_file, tmp_path, monkeypatch):
    """The second dictionary sees compressed blocks before its own, and dense ones among its own."""
    model = model_of("llama", num_hidden_layers=BLOCKS)  # in float32, which is run without rounding
    seen, ids, whole = {}, [], shared_dictionaries._look_ahead

    def look(journey, numbers, owners):
        found = whole(journey, numbers, owners)
        ids.append(journey.ids_NS)
        seen[numbers.start] = {owner: stats.gram() for key, stats in found.items() for owner in key}
        return found

    monkeypatch.setattr(shared_dictionaries, "_look_ahead", look)
    secateur.compress(str(model), tmp_path / "out", replace(recipe_of(text_file), format="dense"))
    assert sorted(seen) == [0, 2]
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    short = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    dense.model.layers[0], dense.model.layers[1] = short.model.layers[0], short.model.layers[1]
    grams = {}

    def watch(name):
        def hook(module, args):
            x_TI = args[0].flatten(0, -2)
            grams[name] = grams.get(name, 0) + x_TI.T @ x_TI

        return hook

    names = ["model.layers.2.self_attn.k_proj", "model.layers.2.mlp.down_proj"]
    for name in names:
        for each in (name, name.replace("2", "3")):
            dense.get_submodule(each).register_forward_pre_hook(watch(name))
    with torch.no_grad():
        dense(ids[0])
    for name in names:
        torch.testing.assert_close(seen[2][name], grams[name], rtol=1e-3, atol=1e-3 * grams[name].abs().max().item())


class StopError(Exception):
    pass


def stopped(model, recipe, out, after):
    """Leave a run where it has that many blocks done."""
    solve = run_module.solve_block

    def stopping(run, journey, number):
        if number == after:
            raise StopError
        solve(run, journey, number)

    with mock.patch.object(run_module, "solve_block", stopping), pytest.raises(StopError):
        secateur.compress(str(model), out, recipe)


@pytest.mark.thin(2)
@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_that_is_resumed_has_the_same_bytes(after, always, model, text_file, made, monkeypatch, tmp_path):
    if always:
        monkeypatch.setattr(kept_inputs, "_HIDDEN_EVERY", -1.0)
        monkeypatch.setattr(kept_inputs, "_HIDDEN_SHARE", 0)
    stopped(model, recipe_of(text_file), tmp_path / "out", after)
    secateur.compress(str(model), tmp_path / "out", recipe_of(text_file), resume=True)
    found = stored(tmp_path / "out")
    assert all(torch.equal(tensor, found[name]) for name, tensor in stored(made[0]).items())


def test_a_run_that_is_resumed_reads_each_dictionary_once(model, text_file, tmp_path, monkeypatch):
    """Three blocks are run again, two of which borrow, and a fourth borrows as it is solved."""
    recipe = recipe_of(text_file, dictionary_blocks=4)
    secateur.compress(str(model), tmp_path / "whole", recipe)
    stopped(model, recipe, tmp_path / "out", 3)
    read, whole = [], Recorder.stored_atoms
    monkeypatch.setattr(Recorder, "stored_atoms", lambda self, name: read.append(name) or whole(self, name))
    secateur.compress(str(model), tmp_path / "out", recipe, resume=True)
    assert len(read) == len(PROJECTIONS) == len(set(read))
    found = stored(tmp_path / "out")
    assert all(torch.equal(tensor, found[name]) for name, tensor in stored(tmp_path / "whole").items())


@pytest.mark.slow
def test_memory_is_kept_to_and_the_result_is_the_same(model, text_file, made, tmp_path, monkeypatch):
    """Inputs in files, and batches that begin again, come to the same bytes."""
    few = Settings(48, False, "file")
    monkeypatch.setattr(run_module, "choose_settings", lambda *_: few)
    secateur.compress(str(model), tmp_path / "files", recipe_of(text_file))
    monkeypatch.setattr(run_module, "choose_settings", lambda *_: replace(few, pause=True, hidden="device"))
    secateur.compress(str(model), tmp_path / "memory", recipe_of(text_file))
    first, second = stored(tmp_path / "files"), stored(tmp_path / "memory")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_it_is_foretold(model, text_file, made, tmp_path):
    found = forecast(str(model), recipe_of(text_file), out=tmp_path)
    size = sum(file.stat().st_size for file in made[0].glob("*.safetensors"))
    assert found.disk == pytest.approx(size, rel=0.03)


def test_with_what_else_a_recipe_says(model_of, text_file, tmp_path):
    recipe = replace(recipe_of(text_file, damping="auto", dictionary_bits=8, coefficient_bits=4), match_dense=True)
    report = secateur.compress(str(model_of("gpt2", dtype=torch.float16)), tmp_path / "out", recipe)
    assert all({"damping", "match_share"} <= linear.chosen().keys() for linear in report.linears)
    assert secateur.verify(tmp_path / "out") == []
    assert any("atoms_codes" in name for name in stored(tmp_path / "out"))
    assert sum(each.bits * each.shape[0] * each.shape[1] for each in report.linears) <= 16 * SIZE * sum(
        each.shape[0] * each.shape[1] for each in report.linears
    )


def test_experts_have_their_own(build, text_file, tmp_path):
    source = build(tmp_path / "moe", mixtures.config_of("qwen2_moe", num_hidden_layers=2))
    secateur.compress(str(source), tmp_path / "out", recipe_of(text_file))
    lent = {name for name in stored(tmp_path / "out") if ".atoms_" in name}
    assert any(".layers.1." in name and ".experts." in name for name in lent)
    assert not any(".layers.1." in name and "self_attn" in name for name in lent)
    assert secateur.verify(tmp_path / "out") == []


def test_blocks_can_go_from_what_shares(made):
    """The first of a pair goes: what it lent stays readable, by the names that blocks have then."""
    source = open_source(str(made[0]))
    skeleton = build_skeleton(source, torch.float32)
    short, dense = without_blocks(source, skeleton, find_blocks(skeleton), [0, 2]), stored(made[1])
    for after, before in {0: 1, 1: 3, 2: 4}.items():
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(short.weights[name.format(after)], dense[name.format(before)])
    assert not any("atoms" in name for name in short.weights)


def own(folder, name, change):
    """A copy of a folder whose config is changed."""
    shutil.copytree(folder, name)
    config = json.loads((name / "config.json").read_text())
    change(config["quantization_config"]["modules"])
    (name / "config.json").write_text(json.dumps(config))
    return name


BORROWER, LENDER = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj"
HOSTILE = {
    "itself": (1, "has parts in common with model.layers.1.mlp.up_proj.weight, says config.json, and that has none"),
    "another that borrows": (3, "has none of them"),
    "none": (77, "has none of them"),
    "huge": (10**30, "has none of them"),
    "negative": (-1, "atoms_block is -1"),
    "a word": ("0", "atoms_block is '0'"),
    "yes": (True, "atoms_block is True"),
    "half": (0.5, "atoms_block is 0.5"),
    "a list": ([0], r"atoms_block is \[0\]"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_said_of_the_lender_is_checked(name, made, tmp_path):
    value, says = HOSTILE[name]
    folder = own(made[0], tmp_path / "own", lambda modules: modules[BORROWER].update(atoms_block=value))
    for read in (secateur.load, open_source):
        with pytest.raises(CheckpointError, match=says):
            read(str(folder))


def test_atoms_of_another_shape_are_refused(made, tmp_path):
    folder = own(made[0], tmp_path / "own", lambda modules: None)
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    key = f"{LENDER}.weight.atoms_values"
    tensors[key] = tensors[key][:, :-1].contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.layers.[01].mlp.up_proj.weight.*whose product is no"):
        secateur.load(folder)


def test_models_whose_blocks_do_not_run_in_turn_are_refused(says, model, text_file, monkeypatch, tmp_path):
    def refuse(*_):
        raise NotInTurn("they are not")

    monkeypatch.setattr(walker, "BlockCalls", refuse)
    flags = [
        "--factorize",
        "cospadi",
        "--dictionary-blocks",
        2,
        "--calibration",
        text_file,
        "--samples",
        4,
        "--seq-len",
        24,
    ]
    code, out, err = says("compress", model, tmp_path / "out", *flags)
    assert (code, out) == (2, "")
    assert "do not run one after the other, as --dictionary-blocks 2 needs it: give 1" in err
    code, _, err = says("compress", model, tmp_path / "out", *flags[:3], 0)
    assert code == 2
    assert "--dictionary-blocks" in err
