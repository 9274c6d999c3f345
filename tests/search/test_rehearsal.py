"""What a search makes of a model in memory is what a run makes of it, and its slopes are those of the divergence."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.model.structure import is_transposed
from secateur.search.goals.per_layer import PerLayer, _Curves, _is_enough, _Option
from secateur.search.goals.shapes import sites_of
from secateur.search.rehearsal import Rehearsal
from secateur.structured.sites import Width

TOKENS = torch.arange(2, 34)[None]
HEADS = [Width(2, 2), Width(4, 2)]


def narrower(site, number):
    if site.coupling.kind == "heads":
        return HEADS[number]
    return Width(24 + 16 * number)


@pytest.mark.parametrize(("family", "method"), [("llama", "wanda"), ("llama", "sparsegpt"), ("gpt2", "flap")])
def test_it_makes_what_a_run_makes(family, method, model_of, text_file, tmp_path, monkeypatch):
    kept = {}

    def choose(self, searcher, windows):
        now, wider = {}, {}
        for site in sites_of(searcher):
            kind = [each for each in sites_of(searcher) if each.coupling.kind == site.coupling.kind]
            now[site.name] = narrower(site, kind.index(site))
            if now[site.name] != site.width:
                wider[site.name] = site.width
        rehearsal = Rehearsal.of(searcher, windows)
        rehearsal.ids_NS = windows.ids_NS  # all of them, as a run takes
        rehearsal.make(now, wider)
        kept["model"], kept["now"] = rehearsal.model, now
        kept["divergence"], kept["slopes"] = rehearsal.measure()
        kept["steps"] = {}
        for name in wider:
            linear = rehearsal.model.get_submodule(name)
            change = load_file(rehearsal._file(name))
            W_OI = change["W_OI"].float()
            step = W_OI.T if is_transposed(linear) else W_OI
            found = []
            for sign in (1, -1):
                linear.weight += sign * 1e-2 * step
                if linear.bias is not None:
                    linear.bias += sign * 1e-2 * change["b_O"]
                found.append(rehearsal.measure()[0])
                linear.weight -= sign * 1e-2 * step
                if linear.bias is not None:
                    linear.bias -= sign * 1e-2 * change["b_O"]
            kept["steps"][name] = (found[0] - found[1]) / 2e-2
        with torch.no_grad():
            kept["logits"] = rehearsal.model(TOKENS).logits
        return {name: secateur.Choice(units=width.units, groups=width.groups) for name, width in now.items()}

    monkeypatch.setattr(PerLayer, "choose", choose)
    text = secateur.Calibration(str(text_file), 8, 32)
    units = "neurons,heads" if family == "llama" else "neurons"
    recipe = secateur.Recipe(
        prune=method,
        pattern="structured",
        sparsity=0.2,
        multiple=8,
        units=units,
        widths="per-layer",
        allocation="search",
        calibration=text,
    )
    secateur.compress(str(model_of(family)), tmp_path / "out", recipe)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = small(TOKENS).logits
        dense = AutoModelForCausalLM.from_pretrained(model_of(family), dtype=torch.float32)(TOKENS).logits
    assert (logits - kept["logits"]).abs().max() < 1e-3 * (logits - dense).abs().max()
    assert kept["divergence"] > 0
    assert set(kept["slopes"]) == set(kept["steps"]) != set()
    largest = max(map(abs, kept["steps"].values()))
    for name, slope in kept["slopes"].items():
        assert slope == pytest.approx(kept["steps"][name], rel=0.05, abs=0.02 * largest), name


def test_the_divergence_is_the_obvious_one(model_of, text_file, tmp_path, monkeypatch):
    kept = {}

    def choose(self, searcher, windows):
        rehearsal = Rehearsal.of(searcher, windows)
        kept["of itself"] = rehearsal.measure()
        widths = {site.name: Width(24) for site in sites_of(searcher)}
        rehearsal.make(widths, {})
        kept["found"] = rehearsal.measure()
        dense = AutoModelForCausalLM.from_pretrained(searcher.prepared.source.folder, dtype=torch.float64)
        other = rehearsal.model.double()
        total = 0.0
        with torch.no_grad():
            for ids_S in rehearsal.held_NS:
                p, q = (model(ids_S[None]).logits[0].log_softmax(-1) for model in (dense, other))
                total += (p.exp() * (p - q)).sum(-1).mean().item()
        kept["obvious"] = total / len(rehearsal.held_NS)
        rehearsal.model.float()
        return {name: secateur.Choice(units=width.units) for name, width in widths.items()}

    monkeypatch.setattr(PerLayer, "choose", choose)
    text = secateur.Calibration(str(text_file), 8, 32)
    recipe = secateur.Recipe(
        prune="wanda", pattern="structured", sparsity=0.2, multiple=8, units="neurons", widths="per-layer",
        allocation="search", calibration=text,
    )  # fmt: skip
    secateur.compress(str(model_of("llama")), tmp_path / "out", recipe)
    assert kept["of itself"][0] == pytest.approx(0, abs=1e-6)
    assert kept["of itself"][1] == {}
    # Outcomes beyond the likeliest count as one, which takes a little away.
    assert kept["found"][0] == pytest.approx(kept["obvious"], rel=0.02)
    assert kept["found"][1] == {}


def options_of(full, widths, weights=3):
    return [
        _Option(Width(each), weights * each, weights * (full - each)) for each in sorted({*widths, full}, reverse=True)
    ]


def test_a_factor_is_found_from_a_slope():
    """A cost of c·r², whose slope towards fewer losses is twice what they give back."""
    curves = _Curves({"a": options_of(64, range(8, 64, 8)), "b": options_of(64, range(8, 64, 8))})
    for now in (32, 40):
        wider = {name: curves.wider(name, Width(now)) for name in "ab"}
        gone, less = 3 * (64 - now), 3 * (64 - wider["a"].units)
        assert less <= 0.8 * gone
        curves.learn(
            dict.fromkeys("ab", Width(now)),
            wider,
            {"a": -2 * 5.0 * (gone**2 - less**2), "b": -2 * 7.0 * (gone**2 - less**2)},
        )
        for width in (8, 56):
            option = _Option(Width(width), 3 * width, 3 * (64 - width))
            assert curves.cost("a", option) == pytest.approx(5.0 * option.gone**2)
            assert curves.cost("b", option) == pytest.approx(7.0 * option.gone**2)
    assert curves.cost("a", _Option(Width(64), 192, 0)) == 0
    assert curves.wider("a", Width(64)) is None


def test_noise_does_not_make_a_factor_negative_and_later_measurements_count_for_more():
    curves = _Curves({name: options_of(64, range(8, 64, 8)) for name in "abc"})
    now, wider = dict.fromkeys("abc", Width(32)), dict.fromkeys("abc", Width(40))
    squares = 96**2 - 72**2
    curves.learn(now, wider, {"a": 1.0 * squares, "b": -4.0 * squares, "c": -4.0 * squares})
    option = _Option(Width(32), 96, 96)
    assert 0 < curves.cost("a", option) < curves.cost("b", option)
    curves.learn(now, wider, {"a": -4.0 * squares, "b": -4.0 * squares, "c": -16.0 * squares})
    assert math.sqrt(2 * 8) < curves.cost("c", option) / 96**2 < 8


def test_widths_move_by_steps_that_a_slope_is_good_for():
    curves = _Curves({"a": options_of(1000, range(0, 1000, 10))})
    found = [option.width.units for option in curves.near("a", Width(500))]
    assert min(found) == 250
    assert max(found) == 750
    few = _Curves({"a": options_of(8, [0, 2, 4, 6])})
    assert [option.width.units for option in few.near("a", Width(8))] == [8, 6]
    assert [option.width.units for option in few.near("a", Width(2))] == [4, 2, 0]


def test_a_search_ends_when_two_sets_bring_nothing():
    assert not _is_enough([1.0])
    assert not _is_enough([1.0, 2.0])
    assert not _is_enough([1.0, 0.999, 0.98])
    assert not _is_enough([1.0, 0.98, 0.979])
    assert _is_enough([1.0, 0.995, 0.992])
    assert _is_enough([1.0, 0.5, 0.51, 0.499])
