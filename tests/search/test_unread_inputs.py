"""Sharing between linears what is not read for a token."""

import pytest
import torch

import secateur
from secateur.calibration.effects import Effects, gather_effects
from secateur.gates.running import as_if_written, gates_of
from secateur.search.goals.unread_inputs import _smallest


@pytest.fixture(scope="module")
def recipe(text_file):
    return secateur.Recipe(
        activations="teal", allocation="search", calibration=secateur.Calibration(str(text_file), samples=8, seq_len=32)
    )


@pytest.fixture(scope="module")
def found(shared, model_of, recipe):
    folder = shared("searched-gates", lambda out: secateur.compress(str(model_of("llama")), out / "out", recipe))
    return folder / "out"


def test_shares_come_to_the_level(found):
    gates = gates_of(secateur.load(found))
    sizes = {tuple(gate._input.linears): gate._features * gate._outputs for gate in gates.gates}
    for number, level in enumerate(gates.section.levels):
        shares = {each.linears: each.shares_L[number] for each in gates.section.inputs}
        mean = sum(shares[name] * size for name, size in sizes.items()) / sum(sizes.values())
        assert mean == pytest.approx(level, abs=1e-6)
        assert len(set(shares.values())) > 1
        # All that read an input have one choice.
        assert (
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.k_proj",
            "model.layers.0.self_attn.v_proj",
        ) in shares


def test_they_read_what_the_level_says(found):
    model = secateur.load(found)
    ids = torch.randint(2, 300, (4, 40), generator=torch.Generator().manual_seed(3))
    with as_if_written(model), torch.no_grad():
        model(input_ids=ids)
    assert gates_of(model).share_read == pytest.approx(0.5, abs=0.1)


def test_the_recipe_that_was_found_is_repeated_without_a_search(found, model_of, tmp_path):
    again = secateur.Recipe.read(found / "secateur.json")
    assert all(len(choice.unread) == 4 for choice in again.linears.values())
    secateur.compress(str(model_of("llama")), tmp_path / "out", secateur.Recipe.from_yaml(again.to_yaml()))
    assert (tmp_path / "out" / "config.json").read_bytes() == (found / "config.json").read_bytes()


def test_a_choice_needs_a_share_for_each_level(found, model_of, tmp_path):
    content = secateur.Recipe.read(found / "secateur.json").to_dict()
    content["activation_sparsity"] = 0.3
    with pytest.raises(secateur.UsageError, match="has 4 shares, and there are 5 levels"):
        secateur.compress(str(model_of("llama")), tmp_path / "out", content)
    content["linears"] = {name: {"unread": [0.5, "a"]} for name in content["linears"]}
    with pytest.raises(secateur.UsageError, match="must be a list of shares"):
        secateur.Recipe.from_dict(content)


def test_it_goes_with_quantization(model_of, recipe, tmp_path):
    from dataclasses import replace

    both = replace(recipe, quantize="rtn", quantization={"bits": 4, "group_size": 16})
    report = secateur.compress(str(model_of("llama")), tmp_path / "out", both)
    assert {linear.layout for linear in report.linears} == {"columns-int"}
    assert gates_of(secateur.load(tmp_path / "out")) is not None


@pytest.fixture
def gathered(model_of, tmp_path):
    model = secateur.load(model_of("llama"), dtype=torch.float32)
    names = [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv"]
    ids = torch.randint(2, 300, (3, 24), generator=torch.Generator().manual_seed(0))
    return model, names, gather_effects(model, ids, names, tmp_path, 0, lambda *_: None)


def test_inputs_left_out_cost_what_their_weights_do(gathered):
    """Leaving an input out everywhere is to remove its column."""
    model, names, effects = gathered
    assert effects.by_input(names) == [names]
    weights = {names[0]: model.get_submodule(names[0]).weight.detach()}
    columns = torch.arange(32) < 5
    removed = weights[names[0]] * columns
    [expected] = effects.divergence(names[0], [removed])
    [cost] = effects.without(weights, lambda x: [columns.expand_as(x)], first=0)
    assert cost == pytest.approx(expected, rel=1e-5)
    [behind] = effects.without(weights, lambda x: [columns.expand_as(x)], first=12)
    assert 0 < behind < cost
    assert effects.without(weights, lambda x: [torch.zeros_like(x, dtype=torch.bool)], first=0) == [0.0]


def test_all_that_read_an_input_count_together(gathered):
    model, names, effects = gathered
    weights = {name: model.get_submodule(name).weight.detach() for name in names}
    twice = {names[0]: 2 * weights[names[0]]}

    def half(x):
        return [x.abs() < x.abs().median()]

    [one], [double] = effects.without({names[0]: weights[names[0]]}, half, 8), effects.without(twice, half, 8)
    assert double == pytest.approx(4 * one, rel=1e-4)
    [together] = effects.without(weights, half, 8)
    assert together > 0
    assert isinstance(effects, Effects)


@pytest.mark.parametrize("by_token", [False, True])
def test_what_is_tried_is_the_smallest(by_token):
    x_TI = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    for share, mask_TI in zip((0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95), _smallest(x_TI, None, by_token), strict=True):
        assert mask_TI.float().mean().item() == pytest.approx(share, abs=0.002)
        groups = zip(x_TI.abs(), mask_TI, strict=True) if by_token else [(x_TI.abs(), mask_TI)]
        assert all(size[mask].max() <= size[~mask].min() for size, mask in groups)
        if by_token:
            assert len(set(mask_TI.sum(1).tolist())) == 1
