"""QuantMoE-Bench's rules and scorers: as figures of `experts`, against the obvious ones, and as a recipe.

L: layers, E: experts.
"""

import json

import mixtures
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from secateur.calibration.kept_windows import calibration_ids
from secateur.errors import UsageError
from secateur.experts.bit_rules import bits_by_rules, outlier_score
from secateur.formats.stored_weights import Entries, find_entry
from secateur.model.source import open_source
from secateur.recipes.recipe import Calibration, Recipe
from secateur.runs.expert_use import expert_use, recipe_of_rules


def test_a_linear_is_scored_by_the_weight_that_lies_farthest_out():
    W_OI = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    W_OI[:, 3] = 0
    rows = W_OI.double().abs().tolist()
    columns = [[row[i] for row in rows] for i in range(5)]
    wanted = max(max(column) / (sum(column) / 7) for column in columns if sum(column))
    assert outlier_score(W_OI) == pytest.approx(wanted, rel=1e-6)
    assert outlier_score(torch.full((4, 3), -2.0)) == pytest.approx(1)
    assert outlier_score(torch.zeros(4, 3)) == 0
    W_OI[2, 1] = 100
    assert outlier_score(W_OI) > 6.5


@given(st.integers(1, 20), st.integers(1, 9), st.floats(2, 4), st.integers(0, 1000))
def test_bits_keep_to_the_mean_and_to_the_rules(L, E, mean, seed):
    draw = torch.Generator().manual_seed(seed)
    share_LE = torch.rand(L, E, generator=draw).tolist()
    importance_L = torch.rand(L, generator=draw).tolist()
    found = torch.tensor(bits_by_rules(share_LE, importance_L, mean))
    assert found.shape == (L, E)
    assert set(found.unique().tolist()) <= {2, 4}
    taken = int((found == 4).sum())
    assert taken == int((mean - 2) / 2 * L * E + 1e-9)
    first = 0
    while first < L and (found[first] == 4).all():
        first += 1
    counts = (found == 4).sum(1)
    for share_E, bits_E in zip(share_LE, found.tolist(), strict=True):
        more = [s for s, bits in zip(share_E, bits_E, strict=True) if bits == 4]
        less = [s for s, bits in zip(share_E, bits_E, strict=True) if bits == 2]
        assert not more or not less or min(more) >= max(less)
    rest = counts[first:]
    if len(rest):
        assert rest.max() - rest.min() <= 1 or rest.max() == E
        ahead = [importance_L[first + i] for i, n in enumerate(rest.tolist()) if n == rest.max()]
        behind = [importance_L[first + i] for i, n in enumerate(rest.tolist()) if n < rest.max()]
        assert not behind or rest.max() == E or min(ahead) >= max(behind)


def test_the_first_of_many_layers_come_first():
    share_LE = [[0.1, 0.4, 0.3, 0.2]] * 16
    found = bits_by_rules(share_LE, [0.5] * 16, 2.75)
    assert found[:2] == [[4] * 4] * 2
    assert found[2:] == [[2, 4, 2, 2]] * 14 or sum(map(sum, found)) == 2.75 * 64
    assert bits_by_rules(share_LE, [0.5] * 16, 2) == [[2] * 4] * 16
    assert bits_by_rules(share_LE, [0.5] * 16, 4) == [[4] * 4] * 16
    [few, *others] = bits_by_rules(share_LE, [0.0, *range(15)], 2.1)
    assert few == [2] * 4  # of three there are not enough for a whole layer
    assert [row[1] for row in others] == [2] * 12 + [4] * 3


@pytest.fixture(scope="module")
def source(build, tmp_path_factory):
    return build(tmp_path_factory.mktemp("moe") / "source", mixtures.config_of("qwen3_moe"))


@pytest.fixture(scope="module")
def used(source, text_file):
    return expert_use(str(source), Calibration(str(text_file), 4, 32), scores=["frequency"])


@torch.no_grad()
def test_figures_are_those_of_the_model(source, used, text_file):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    opened = open_source(str(source))
    ids_NS, *_ = calibration_ids(opened, Calibration(str(text_file), 4, 32), torch.device("cpu"), lambda _: None)
    assert used.tokens == ids_NS.numel()
    seen = {}
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda _, args, out, i=i: seen.update({i: (args[0], out[0] if isinstance(out, tuple) else out)})
        )
    model(ids_NS)
    for i, layer in enumerate(used.layers):
        before, after = (x.double() for x in seen[i])
        alike = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        assert layer.importance == pytest.approx(float(1 - alike.mean()), rel=1e-4)
        assert layer.linears == ["gate_proj", "up_proj", "down_proj"]
    for layer in used.layers:
        wanted = [
            max(outlier_score(opened.weights[f"{layer.name}.{e}.{linear}.weight"]) for linear in layer.linears)
            for e in range(6)
        ]
        assert layer.outliers == pytest.approx(wanted)


def test_rules_become_a_recipe(says, source, used, text_file, tmp_path):
    text = ("--data", text_file, "--windows", 4, "--seq-len", 32)
    file = tmp_path / "rules.yaml"
    code, out, err = says("experts", source, *text, "--scores", "frequency", "--recipe", file, "--bits", 3)
    assert code == 0, err
    assert "importance" in out
    assert Recipe.read(file) == recipe_of_rules(used, 3.0)
    code, _, err = says("compress", source, tmp_path / "out", "--recipe", file, "--group-size", 8,
                        "--calibration", text_file, "--samples", 4, "--seq-len", 32, "--quiet")  # fmt: skip
    assert code == 0, err
    linears = json.loads((tmp_path / "out" / "secateur.json").read_text())["linears"]
    modules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules"]
    bits = {name: find_entry(Entries(modules), name)["bits"] for name in linears}
    for layer in used.layers:
        mine = [{bits.pop(f"{layer.name}.{e}.{linear}") for linear in layer.linears} for e in range(len(layer.share))]
        assert all(len(each) == 1 for each in mine)
        assert sum(sum(each) for each in mine) == 3 * 6
        order = sorted(range(6), key=lambda e: -layer.share[e])
        assert mine[order[0]] == {4}
    assert set(bits.values()) == {4}


def test_bits_that_no_expert_has(used):
    with pytest.raises(UsageError, match=r"`bits` 4\.5: by the rules, experts have 2 to 4 bits"):
        recipe_of_rules(used, 4.5)
