"""Sharing a budget between linears: the arithmetic against exhaustive search, and what a user gets of it."""

import itertools
import json
import math
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries
from safetensors.torch import load_file
from transformers import AutoTokenizer

import secateur
from secateur import Calibration, Choice, Recipe, UsageError
from secateur.calibration.effects import gather_effects
from secateur.evaluation.uncertainty import interval
from secateur.pipeline.prepared import Prepared
from secateur.recipes.plan import plan
from secateur.search import searcher
from secateur.search.budget import share_sparsity
from secateur.search.goal import goal_of
from secateur.search.goals import perplexity_rise
from secateur.search.goals.owl import by_outliers
from secateur.search.goals.perplexity_rise import next_allowed, parse_rise
from secateur.search.goals.target_size import parse_target
from secateur.search.outliers import outlier_share
from secateur.solvers.knapsack import choose

quickly = tries(60)


# --- the knapsack


def exhaustive(costs, sizes, budget):
    """The least cost of all choices within the budget."""
    choices = itertools.product(*(range(len(cost)) for cost in costs))
    within = [c for c in choices if sum(s[i] for s, i in zip(sizes, c, strict=True)) <= budget]
    return min(sum(cost[i] for cost, i in zip(costs, c, strict=True)) for c in within)


def drawn(seed, linears, candidates):
    rng = np.random.default_rng(seed)
    sizes = [np.sort(rng.uniform(1, 100, candidates)).tolist() for _ in range(linears)]
    costs = [np.sort(rng.exponential(1, candidates))[::-1].tolist() for _ in range(linears)]
    return costs, sizes


@quickly
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.floats(0, 1))
def test_the_knapsack_is_within_one_swap_of_the_best_choice(seed, linears, candidates, share):
    costs, sizes = drawn(seed, linears, candidates)
    least, most = sum(s[0] for s in sizes), sum(s[-1] for s in sizes)
    budget = least + share * (most - least)
    chosen = choose(costs, sizes, budget)
    assert sum(s[i] for s, i in zip(sizes, chosen, strict=True)) <= budget
    found, best = sum(c[i] for c, i in zip(costs, chosen, strict=True)), exhaustive(costs, sizes, budget)
    assert best - 1e-9 <= found <= best + max(c[0] - c[-1] for c in costs) + 1e-9


@quickly
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 5), st.integers(0, 20))
def test_the_knapsack_is_exact_for_convex_costs_at_equal_steps(seed, linears, candidates, steps):
    rng = np.random.default_rng(seed)
    sizes = [list(range(candidates)) for _ in range(linears)]
    gains = [np.sort(rng.exponential(1, candidates - 1))[::-1] for _ in range(linears)]
    costs = [(10 - np.append(0, np.cumsum(gain))).tolist() for gain in gains]
    chosen = choose(costs, sizes, steps)
    found = sum(c[i] for c, i in zip(costs, chosen, strict=True))
    assert found == pytest.approx(exhaustive(costs, sizes, steps))


def test_the_knapsack_takes_the_cheapest_where_all_fits_and_refuses_what_cannot_fit():
    assert choose([[3, 1, 1], [2, 5]], [[1, 9, 7], [4, 1]], 100) == [2, 0]
    with pytest.raises(ValueError, match="the smallest candidates take 2"):
        choose([[3, 1], [2, 5]], [[1, 9], [4, 1]], 1.5)
    assert choose([[1e300, 0.0]], [[1.0, 2.0]], 1.0) == [0]


# --- sparsities


@quickly
@given(st.integers(0, 10**6), st.integers(1, 8), st.floats(0.01, 0.99))
def test_shared_sparsities_sum_to_the_total(seed, linears, where):
    rng = np.random.default_rng(seed)
    levels = np.sort(rng.uniform(0.05, 0.95, 4)).tolist()
    costs = [np.sort(rng.exponential(1, 4)).tolist() for _ in range(linears)]
    weights = rng.integers(1, 5000, linears).tolist()
    total = levels[0] + where * (levels[-1] - levels[0])
    found = share_sparsity(levels, costs, weights, total)
    assert all(levels[0] - 1e-12 <= share <= levels[-1] + 1e-12 for share in found)
    assert np.average(found, weights=weights) == pytest.approx(total, abs=1e-9)


def test_the_linear_that_suffers_less_loses_more():
    levels = [0.2, 0.4, 0.6, 0.8]
    costs = [[1, 2, 4, 8], [0.1, 0.2, 0.4, 0.8], [1, 2, 4, 8]]
    one, easy, other = share_sparsity(levels, costs, [100, 100, 100], 0.5)
    assert easy > one + 0.2
    assert one == pytest.approx(other, abs=0.01)

    # Against all that is on a grid: nothing of the same total costs less.
    def price(shares):
        return sum(math.exp(np.interp(s, levels, np.log(c))) for s, c in zip(shares, costs, strict=True))

    grid = np.linspace(0.2, 0.8, 31)
    best = min(price((a, b, 1.5 - a - b)) for a in grid for b in grid if 0.2 <= 1.5 - a - b <= 0.8)
    assert price((one, easy, other)) <= best + 1e-3


def test_owl_is_its_papers_formula():
    # Shares 0, 0.01, 0.04 of blocks of one size, stretched to 0.16, around a mean sparsity of 0.7.
    stretched = np.array([0, 0.01, 0.04]) / 0.04 * 0.16
    expected = 1 - (stretched - stretched.mean() + 0.3)
    assert by_outliers([0, 0.01, 0.04], [10, 10, 10], 0.7) == pytest.approx(expected.tolist())
    assert by_outliers([0.2, 0.2], [10, 30], 0.5) == [0.5, 0.5]


@quickly
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), min_size=1, max_size=9), st.floats(0.01, 0.98))
def test_owl_keeps_the_total_and_the_range(blocks, total):
    shares, weights = zip(*blocks, strict=True)
    found = by_outliers(shares, weights, total)
    assert all(-1e-9 <= share < 1 for share in found)
    assert max(found) - min(found) <= 0.16 + 1e-9
    assert np.average(found, weights=weights) == pytest.approx(total, abs=1e-9)


def test_outliers_are_over_five_times_the_mean():
    score_OI = torch.ones(10, 10)
    score_OI[0, :3] = 100
    assert outlier_share(score_OI) == pytest.approx(0.03)


# --- what a change does to the predictions


@torch.no_grad()
def true_divergence(model, ids_NS, W_OI, change_OI):
    """KL(before ‖ after) of a change of one weight, in nats a token, by running the model twice."""
    before = model(ids_NS).logits.double().log_softmax(-1)
    W_OI += change_OI
    after = model(ids_NS).logits.double().log_softmax(-1)
    W_OI -= change_OI
    return (before.exp() * (before - after)).sum(-1).mean().item()


def test_effects_are_the_divergence_of_small_changes(model_of, tmp_path):
    model = secateur.load(model_of("llama"))
    ids_NS = torch.randint(0, model.config.vocab_size, (24, 48), generator=torch.Generator().manual_seed(3))
    names = ["model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.gate_proj"]
    effects = gather_effects(model, ids_NS, names, tmp_path, 0, lambda *_: None)
    generator = torch.Generator().manual_seed(1)
    for name in names:
        W_OI = model.get_submodule(name).weight
        change_OI = 0.02 * W_OI.std() * torch.randn(W_OI.shape, generator=generator)
        true = true_divergence(model, ids_NS, W_OI, change_OI)
        [twice, found, nothing] = effects.divergence(name, [2 * change_OI, change_OI, 0 * change_OI])
        assert found == pytest.approx(true, rel=0.35), name
        assert twice == pytest.approx(4 * found, rel=1e-4)
        assert nothing == 0


# --- what a user gets


@pytest.fixture
def base(text_file):
    return Recipe("sparsegpt", 0.5, calibration=Calibration(str(text_file), samples=8, seq_len=32))


def weight_files(folder):
    return {file.name: file.read_bytes() for file in Path(folder).glob("*.safetensors")}


@pytest.mark.parametrize(
    ("allocation", "prune"),
    [
        *[("owl", "wanda"), ("owl", "alps"), ("search", "sparsegpt"), ("search", "magnitude")],
        *[pytest.param("owl", prune, marks=pytest.mark.slow) for prune in ("sparsegpt", "magnitude")],
        *[pytest.param("search", prune, marks=pytest.mark.slow) for prune in ("wanda", "alps")],
    ],
)
def test_the_total_is_kept_and_the_manifest_repeats_the_run(allocation, prune, base, model_of, tmp_path):
    model = str(model_of("llama"))
    recipe = replace(base, prune=prune, allocation=allocation)
    report = secateur.compress(model, tmp_path / "out", recipe)
    # Magnitude and Wanda remove whole weights of every row, and never more than asked.
    inputs = min(linear.shape[1] for linear in report.linears)
    assert 0.5 - (1 / inputs if prune in ("magnitude", "wanda") else 0.005) < report.sparsity <= 0.5 + 1e-9
    shares = {linear.sparsity for linear in report.linears}
    assert len(shares) > 1
    kept = Recipe.read(tmp_path / "out" / "secateur.json")
    assert set(kept.linears) == {linear.name for linear in report.linears}
    weights = {linear.name: math.prod(linear.shape) for linear in report.linears}
    chosen = [kept.linears[name].sparsity for name in weights]
    assert np.average(chosen, weights=list(weights.values())) == pytest.approx(0.5, abs=1e-9)
    stages = []
    secateur.compress(model, tmp_path / "again", kept, progress=lambda step: stages.append(step.stage))
    assert not any("searching" in stage for stage in stages)
    assert weight_files(tmp_path / "again") == weight_files(tmp_path / "out")
    secateur.compress(model, tmp_path / "anew", recipe)
    assert weight_files(tmp_path / "anew") == weight_files(tmp_path / "out")


def test_bits_are_shared_within_the_size_of_the_uniform_recipe(base, model_of, tmp_path):
    recipe = Recipe(quantize="rtn", quantization={"bits": 3}, calibration=base.calibration)
    uniform = secateur.compress(str(model_of("llama")), tmp_path / "uniform", recipe)
    found = secateur.compress(str(model_of("llama")), tmp_path / "out", replace(recipe, allocation="search"))
    assert sum(linear.bytes for linear in found.linears) <= sum(linear.bytes for linear in uniform.linears)
    kept = Recipe.read(tmp_path / "out" / "secateur.json")
    assert len({choice.bits for choice in kept.linears.values()}) > 1


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "methods",
    [
        {},
        {"quantize": "gptq"},
        pytest.param({"quantize": "spqr"}, marks=pytest.mark.slow),
        pytest.param({"quantize": "squeezellm"}, marks=pytest.mark.slow),
        {"quantize": "trellis"},
        {"prune": "sparsegpt"},
        {"prune": "wanda", "quantize": "rtn"},
    ],
    ids=str,
)
def test_a_target_size_is_met(methods, base, model_of, tmp_path):
    model = str(model_of("llama"))
    dense = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    recipe = Recipe(**methods, calibration=base.calibration, target_size=f"{int(dense * 0.8)}")
    report = secateur.compress(model, tmp_path / "out", recipe)
    assert report.bytes <= 0.8 * dense
    kept = Recipe.read(tmp_path / "out" / "secateur.json")
    assert (kept.prune, kept.quantize) == (
        (methods.get("prune", ""), methods.get("quantize")) if methods else ("sparsegpt", "gptq")
    )
    again = secateur.compress(model, tmp_path / "again", kept)
    assert again.bytes == report.bytes
    assert weight_files(tmp_path / "again") == weight_files(tmp_path / "out")


def test_a_target_that_cannot_be_met_says_the_smallest_size_that_can(base, model_of, tmp_path):
    model = str(model_of("llama"))

    def wanted(size):
        return Recipe(calibration=base.calibration, target_size=size)

    # Headers tell that, before any text is read.
    with pytest.raises(UsageError, match=r"but [\d.]+ \w+ \(0\.\d+x\) are not compressed") as error:
        secateur.compress(model, tmp_path / "out", Recipe(calibration=Calibration("missing.txt"), target_size="0.001x"))
    outside = float(str(error.value).split("(")[1].split("x")[0])
    with pytest.raises(UsageError, match=r"are not compressed"):
        secateur.forecast(model, wanted(f"{outside - 0.001:.3f}x"), out=tmp_path)
    with pytest.raises(UsageError, match=r"the smallest that these methods reach is [\d.]+ \w+ \((0\.\d+)x\)") as error:
        secateur.compress(model, tmp_path / "out", wanted(f"{outside + 0.002:.3f}x"))
    smallest = float(str(error.value).split("(")[1].split("x")[0])
    assert not (tmp_path / "out").exists()
    report = secateur.compress(
        model, tmp_path / "out", Recipe(calibration=base.calibration, target_size=f"{smallest + 0.002}x")
    )
    assert report.bytes > 0
    with pytest.raises(UsageError, match=r"which the dense model of .* does not exceed"):
        secateur.compress(model, tmp_path / "other", Recipe(calibration=base.calibration, target_size="1TB"))


def test_a_rise_in_perplexity_is_kept(base, text_file, model_of, tmp_path):
    model = str(model_of("llama"))
    recipe = Recipe(quantize="gptq", calibration=base.calibration, max_perplexity_rise="2%")
    stages = []
    report = secateur.compress(model, tmp_path / "out", recipe, progress=lambda step: stages.append(step.stage))
    measured = [re.match(r"model \d: perplexity (.*)%, at most (.*)%, on", s) for s in stages if s.startswith("model ")]
    assert measured
    assert all(float(found[1]) <= float(found[2]) for found in measured)
    assert min(float(found[2]) for found in measured) <= 2
    assert report.bytes < report.source_bytes
    hard = replace(recipe, max_perplexity_rise="0.0000001%")
    with pytest.raises(UsageError, match=r"`max_perplexity_rise` 0.0000001% cannot be kept .*: (more is|the least)"):
        secateur.compress(model, tmp_path / "other", hard)
    tokens = len(AutoTokenizer.from_pretrained(model)(text_file.read_text(encoding="utf-8"))["input_ids"])
    many = replace(recipe, calibration=replace(recipe.calibration, samples=tokens // 31))
    with pytest.raises(UsageError, match=r"measures on \d+ windows besides those of `samples`: .* gives \d+ tokens"):
        secateur.compress(model, tmp_path / "other", many)


@pytest.mark.parametrize(("spread", "windows"), [(0.001, 4), (0.1, 8)])
def test_a_rise_is_as_much_as_it_may_be(spread, windows, monkeypatch):
    """The upper end of an interval, on all windows where half of them leave it open whether it is within the limit."""
    rise_K = torch.tensor([0.01, 0.03] * 4, dtype=torch.float64) + spread * torch.tensor([1.0, -1] * 4)
    asked = []

    def losses(model, ids_NS, bos):
        asked.append(len(ids_NS))
        return 2 + rise_K[ids_NS[:, 0]], torch.full((len(ids_NS),), 15)

    monkeypatch.setattr(perplexity_rise, "_losses", losses)
    ids_NS = torch.arange(8)[:, None].expand(8, 16)
    text = perplexity_rise._Text(ids_NS, [], 0.05, torch.full((8,), 2.0, dtype=torch.float64), torch.full((8,), 15))
    risen, most = text.rise(None)
    assert sum(asked) == windows
    assert risen == pytest.approx(0.02)
    assert most == pytest.approx(interval(15 * rise_K[:windows], [15] * windows)[1])
    assert most > risen
    assert replace(text, ids_NS=ids_NS[:1]).rise(None) == pytest.approx((0.01 + spread,) * 2)  # nothing to tell by


def test_what_to_allow_next_is_in_proportion_or_between():
    assert next_allowed(0.03, (0.02, 0.01), None) == pytest.approx(0.06)
    assert next_allowed(0.03, None, (0.02, 0.06)) == pytest.approx(0.01)
    assert next_allowed(0.03, (0.02, 0.01), (0.06, 0.05)) == pytest.approx(0.04)
    # Never by leaps: what was measured on few windows may be nothing.
    assert next_allowed(0.03, (0.02, -0.001), None) == pytest.approx(0.08)
    assert next_allowed(0.03, None, (0.02, 9.0)) == pytest.approx(0.002)


def test_a_resumed_run_does_not_search_again(base, model_of, tmp_path):
    model, stages = str(model_of("llama")), []

    def stop(step):
        stages.append(step.stage)
        if step.stage == "compressing" and step.block == 1:
            raise KeyboardInterrupt

    recipe = replace(base, allocation="search")
    with pytest.raises(KeyboardInterrupt):
        secateur.compress(model, tmp_path / "out", recipe, progress=stop)
    assert any("searching" in stage for stage in stages)
    stages.clear()
    secateur.compress(model, tmp_path / "out", recipe, resume=True, progress=lambda step: stages.append(step.stage))
    assert not any("searching" in stage for stage in stages)
    whole = secateur.compress(model, tmp_path / "whole", recipe)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "whole")
    assert whole.recipe == Recipe.read(tmp_path / "out" / "secateur.json").to_dict()


@pytest.mark.slow
def test_a_run_that_made_models_and_computed_gradients_is_resumed(base, model_of, tmp_path):
    model = str(model_of("llama"))
    recipe = Recipe(quantize="squeezellm", calibration=base.calibration, max_perplexity_rise="20%")

    def stop(step):
        if step.stage == "compressing" and step.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        secateur.compress(model, tmp_path / "out", recipe, progress=stop)
    secateur.compress(model, tmp_path / "out", recipe, resume=True)
    secateur.compress(model, tmp_path / "whole", recipe)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prune": "wanda", "sparsity": 0.5, "allocation": "owel"},
            "allocation 'owel' is not known: did you mean 'owl'",
        ),
        (
            {"prune": "wanda", "pattern": "2:4", "allocation": "search"},
            "needs an unstructured mask: `pattern` 2:4 removes",
        ),
        ({"quantize": "rtn", "allocation": "owl"}, "`allocation` owl shares a sparsity, but no method is given"),
        ({"prune": "wanda", "sparsity": 0.0, "allocation": "owl"}, "`sparsity` 0 removes nothing"),
        ({"allocation": "search"}, "no method is given"),
        ({"target_size": "small"}, "`target_size` 'small' is not a size: write it like 0.35x"),
        ({"target_size": "1.2x"}, "`target_size` 1.2x is not between 0 and 1 times"),
        ({"target_size": "120%"}, "`target_size` 120% is not between 0 and 1 times .* like 0.35x or 35%"),
        ({"target_size": "x%"}, "`target_size` 'x%' is not a share"),
        ({"target_size": "0"}, "`target_size` 0 is no size to reach"),
        ({"max_perplexity_rise": "3"}, "`max_perplexity_rise` 3 is not clear without %: write 3%, or 0.03"),
        ({"max_perplexity_rise": 1}, "`max_perplexity_rise` 1 is not clear without %: write 1%, or 0.01"),
        ({"target_size": "0.5x", "max_perplexity_rise": "3%"}, "each say how small: give one of them"),
        ({"target_size": "0.5x", "prune": "wanda", "sparsity": 0.5}, "finds sparsity and bits .* leave `sparsity` out"),
        ({"target_size": "0.5x", "quantize": "rtn", "quantization": {"bits": 4}}, "leave `bits` out"),
        ({"target_size": "0.5x", "allocation": "owl"}, "is reached by a search: leave `allocation` owl out"),
        ({"max_perplexity_rise": "-1%"}, "`max_perplexity_rise` '-1%' is not a rise: write it like 3%"),
        ({"max_perplexity_rise": "0"}, "is not a rise"),
        ({"quantize": "rtn", "linears": {"a": Choice(0.5)}}, "a sparsity is chosen for a, but no method is given"),
        (
            {"prune": "wanda", "sparsity": 0.5, "linears": {"a": Choice(None, 4)}},
            "bits are chosen for a, but no method",
        ),
        ({"prune": "wanda", "linears": {"a": Choice(1.5)}}, "sparsity 1.5 is outside"),
    ],
    ids=str,
)
def test_a_goal_that_makes_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        check(Recipe(**options))


def check(recipe):
    plan(recipe)
    goal_of(recipe)


def test_words_for_goals():
    assert parse_target("0.35x").in_bytes(1000) == 350
    assert parse_target("35%").in_bytes(1000) == parse_target(" 35 % ").in_bytes(1000) == 350
    assert parse_target("2kB").in_bytes(10**9) == 2000
    assert parse_rise("3%") == pytest.approx(0.03)
    assert parse_rise("0.03") == pytest.approx(0.03)


def test_choices_survive_files_and_are_checked(tmp_path, model_of, base):
    recipe = replace(base, linears={"model.layers.0.mlp.up_proj": Choice(0.25), "x": Choice()})
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert Recipe.read(tmp_path / "r.yaml") == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    with pytest.raises(UsageError, match="the recipe chooses for x, which is none of the linears to compress"):
        secateur.compress(str(model_of("llama")), tmp_path / "out", recipe)
    for content, message in (
        ({"linears": []}, "must be a mapping of names"),
        ({"linears": {"a": 3}}, "choice for a must be a mapping"),
        (
            {"linears": {"a": {"sparsity": "x"}}},
            "'sparsity' of the choice for a: 'x' is not a share: write it like 50%",
        ),
        ({"linears": {"a": {"bit": 3}}}, "choice for a has an unknown key 'bit'"),
    ):
        with pytest.raises(UsageError, match=message):
            Recipe.from_dict(content)


def test_linears_for_which_nothing_is_chosen_are_left_alone(base, model_of, tmp_path):
    model = model_of("llama")
    name = "model.layers.1.mlp.up_proj"
    recipe = replace(base, linears={name: Choice(), "model.layers.0.mlp.up_proj": Choice(0.25)})
    report = secateur.compress(str(model), tmp_path / "out", recipe)
    shares = {linear.name: linear.sparsity for linear in report.linears}
    assert name not in shares
    assert shares["model.layers.0.mlp.up_proj"] == pytest.approx(0.25, abs=0.02)
    assert shares["model.layers.0.mlp.gate_proj"] == pytest.approx(0.5, abs=0.02)
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"],
        load_file(model / "model.safetensors")[f"{name}.weight"],
    )


@pytest.mark.parametrize(
    ("options", "slack"),
    [
        ({"prune": "sparsegpt", "sparsity": 0.5, "allocation": "search"}, 0.05),
        ({"prune": "magnitude", "sparsity": 0.5, "allocation": "owl"}, 0.05),
        pytest.param({"quantize": "squeezellm", "allocation": "search"}, 0.05, marks=pytest.mark.slow),
        pytest.param({"target_size": "0.7x"}, 0.05, marks=pytest.mark.slow),
        # At most the dense model.
        pytest.param({"quantize": "rtn", "max_perplexity_rise": "20%"}, 10.0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_search_is_foretold(options, slack, base, model_of, tmp_path):
    model = str(model_of("llama"))
    recipe = Recipe(**options, calibration=base.calibration)
    told = secateur.forecast(model, recipe, out=tmp_path)
    assert list(tmp_path.iterdir()) == []
    report = secateur.compress(model, tmp_path / "out", recipe)
    assert set(report.phases) == set(told.seconds)
    assert min(report.phases["searching"], told.seconds["searching"]) > 0
    assert told.disk == pytest.approx(report.bytes, rel=slack)
    assert told.disk >= 0.95 * report.bytes


@pytest.mark.parametrize(
    "run", [secateur.compress, lambda model, out, *args, **options: secateur.forecast(model, *args, **options)]
)
def test_a_search_keeps_to_the_memory(run, base, model_of, tmp_path, monkeypatch):
    monkeypatch.setattr(Prepared, "whole_memory", 10**15)
    recipe = replace(base, allocation="search")
    with pytest.raises(UsageError, match=r"a search loads the model as a whole, and `max_memory` .* give .* or search"):
        run(str(model_of("llama")), tmp_path / "out", recipe, max_memory="20GiB")
    assert not (tmp_path / "out").exists()
    run(str(model_of("llama")), tmp_path / "out", replace(base, allocation="owl"), max_memory="20GiB")


def test_of_a_size_only_what_is_near_is_tried(base, model_of, tmp_path, monkeypatch):
    tried = {}

    def solve(plan, problems, stats, pruned):
        shares = plan.pruning.pattern.sparsity if plan.pruning else None, plan.quantizer and plan.quantizer.bits
        tried.setdefault(problems[0].name, []).append(shares)
        return whole(plan, problems, stats, pruned)

    whole = searcher.solve
    monkeypatch.setattr(searcher, "solve", solve)
    model = str(model_of("llama"))
    with pytest.raises(UsageError) as error:
        secateur.compress(model, tmp_path / "out", Recipe(calibration=base.calibration, target_size="0.001x"))
    least = float(str(error.value).split("(")[1].split("x")[0]) + 0.002  # next to nothing for linears
    # Of 32 bits, 0.9x is beyond all that is tried once the tables of the vocabulary are in codes.
    for size, near in (("0.9x", [(None, 7), (None, 8)]), (f"{least:.3f}x", [(0.9, 3), (None, 2)])):
        with suppress(UsageError):  # the smaller one cannot be met
            secateur.compress(model, tmp_path / size, Recipe(calibration=base.calibration, target_size=size))
        first, *others = tried.values()
        assert len(first) == 10
        assert others
        assert all(each == near for each in others)
        tried.clear()


def test_what_was_chosen_is_shown(says, text_file, model_of, tmp_path):
    options = ["--calibration", text_file, "--samples", 8, "--seq-len", 32]
    chosen = ["--prune", "wanda", "--sparsity", 0.5, "--allocation", "owl"]
    code, _, err = says("compress", model_of("llama"), tmp_path / "out", *chosen, *options)
    assert code == 0
    lines = err[err.index("removed, and bits per weight, of each linear") :].splitlines()
    assert lines[1].split() == ["block", *(f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down"))]
    for number in (0, 1):
        words = lines[2 + number].split()
        assert words[0] == str(number)
        assert [float(word.rstrip("%")) for word in words[1::2]] == pytest.approx([50] * 7, abs=10)
    code, _, err = says("compress", model_of("llama"), tmp_path / "plain", *chosen[:-2], *options)
    assert "of each linear" not in err


@pytest.mark.thin(2)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_heat_map_is_drawn(suffix, base, model_of, tmp_path):
    from secateur.report.choice_plot import plot_choices

    report = secateur.compress(str(model_of("llama")), tmp_path / "out", replace(base, allocation="owl"))
    plot_choices(report.linears, tmp_path / f"map{suffix}", "out")
    content = (tmp_path / f"map{suffix}").read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    with pytest.raises(UsageError, match=r"must end in \.png or .svg"):
        plot_choices(report.linears, tmp_path / "map.pdf", "out")


def test_figures_in_the_heat_map_can_be_read(model_of, monkeypatch, tmp_path):
    """The contrast of each with its cell is 4.5 or more, as WCAG asks for."""
    from matplotlib.axes import Axes
    from matplotlib.colors import to_rgb

    from secateur.report.choice_plot import plot_choices

    def luminance(colour):
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    inks, write = [], Axes.text

    def note(axes, x, y, said, **options):
        image = axes.images[0]
        ground = image.cmap(image.norm(image.get_array()[y, x]))
        low, high = sorted(luminance(colour) + 0.05 for colour in (ground[:3], options["color"]))
        assert high / low >= 4.5
        inks.append(options["color"])
        return write(axes, x, y, said, **options)

    report = secateur.compress(str(model_of("llama")), tmp_path / "out", Recipe("magnitude", 0.5))
    monkeypatch.setattr(Axes, "text", note)
    linears = [replace(linear, sparsity=i / 20, bits=2 + i / 2) for i, linear in enumerate(report.linears)]
    plot_choices(linears, tmp_path / "map.png", "out")
    assert set(inks) == {"black", "white"}
