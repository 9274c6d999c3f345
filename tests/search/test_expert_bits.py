"""Bits for each expert by MC#'s programme, and sizes that are said in bits of a weight."""

import mixtures
import pytest

import secateur
from secateur import Calibration, Recipe, UsageError
from secateur.checkpoint.inspect import inspect
from secateur.search.goal import goal_of
from secateur.search.goals.expert_bits import ExpertBits, _bits_of, _Seen
from secateur.search.goals.target_size import parse_target


@pytest.fixture(scope="module")
def source(build, tmp_path_factory):
    options = {"num_experts": 8, "moe_intermediate_size": 64, "hidden_size": 64}
    return build(tmp_path_factory.mktemp("mc") / "source", mixtures.config_of("qwen3_moe", **options))


def recipe(text_file, **more):
    calibration = Calibration(str(text_file), samples=8, seq_len=32)
    return Recipe(quantize="gptq", quantization={"group_size": "row"}, calibration=calibration, **more)


def test_a_size_in_bits_is_that_of_all_that_bits_are_found_for(source, text_file, tmp_path):
    assert parse_target("2.5bit").bits == 2.5
    for wrong in ("0bit", "16bit", "99bits"):
        with pytest.raises(UsageError, match="is no number of bits to reach"):
            parse_target(wrong)
    report = secateur.compress(
        str(source), tmp_path / "out", recipe(text_file, target_size="5bit", embeddings=16, head=16)
    )
    assert 3.5 < report.bits <= 5


def test_each_expert_has_bits_of_its_own_and_others_have_four(source, text_file, tmp_path):
    wanted = recipe(text_file, target_size="4.6bit", allocation="mc", embeddings=16, head=16)
    assert isinstance(goal_of(wanted), ExpertBits)
    report = secateur.compress(str(source), tmp_path / "out", wanted)
    bits = {linear.name: report.recipe["linears"][linear.name]["bits"] for linear in report.linears}
    experts = {name: each for name, each in bits.items() if ".experts." in name}
    assert {each for name, each in bits.items() if name not in experts} == {4}
    for layer in range(2):
        of_layer = {name: each for name, each in experts.items() if f"layers.{layer}." in name}
        owners = {}
        for name, each in of_layer.items():
            owners.setdefault(name.rsplit(".", 1)[0], set()).add(each)
        assert len(owners) == 8
        assert all(len(each) == 1 for each in owners.values())
        assert len(set.union(*owners.values())) > 1
        assert 2 < sum(next(iter(each)) for each in owners.values()) / 8 < 4
    assert report.bits <= 4.6
    assert {linear.layout for linear in inspect(tmp_path / "out").linears} == {"packed-int"}


def test_what_the_router_thinks_of_an_expert_is_what_it_gets():
    layer = [_Seen(n, w, [4.0, 2.0, 1.0], [20, 30, 40]) for n, w in ((100, 0.6), (50, 0.5), (10, 0.5), (0, 0.0))]
    assert _bits_of(layer, 160, [2, 3, 4]) == [4, 4, 4, 3]  # one has three
    assert _bits_of(layer, 85, [2, 3, 4]) == [2, 2, 2, 2]
    found = _bits_of(layer, 120, [2, 3, 4])
    assert sum(found) == 12
    assert found == sorted(found, reverse=True)
    # One that is never chosen is taken to be as the mean of the others.
    assert _bits_of(layer, 135, [2, 3, 4])[3] <= 3


def test_what_cannot_be_shared_out_is_refused(source, model_of, text_file, tmp_path):
    for more, says in (
        ({"allocation": "mc"}, "give `target_size`"),
        ({"allocation": "mc", "target_size": "3bit", "share_choice": "layer"}, "leave `share_choice` layer out"),
        ({"allocation": "mc", "target_size": "3bit", "prune": "wanda"}, "leave `prune` out"),
    ):
        with pytest.raises(UsageError, match=says):
            goal_of(recipe(text_file, **more))
    with pytest.raises(UsageError, match="is for mixtures of experts"):
        secateur.compress(
            str(model_of("llama")), tmp_path / "a", recipe(text_file, allocation="mc", target_size="4bit")
        )
    with pytest.raises(UsageError, match="for experts, which take"):
        secateur.compress(
            str(source), tmp_path / "b", recipe(text_file, allocation="mc", target_size="2bit", embeddings=16, head=16)
        )
