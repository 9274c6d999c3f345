"""Recipe strings: what they mean, the names that recipes get, and the place that is pointed at when one is wrong."""

import re
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries

from secateur.core.registry import FACTORIZERS, PRUNERS, QUANTIZERS, REFINERS
from secateur.errors import UsageError
from secateur.recipes import strings as recipe_spec
from secateur.recipes.built_in import NAMES, built_in
from secateur.recipes.recipe import Calibration, Recipe
from secateur.recipes.strings import parse_recipes

quickly = tries(80)


def names(text):
    return [name for name, _ in parse_recipes(text)]


def only(text):
    [(_, recipe)] = parse_recipes(text)
    return recipe


# --- what is meant


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("wanda:0.5", Recipe("wanda", 0.5)),
        ("wanda:50%", Recipe("wanda", 0.5)),
        ("magnitude:.25", Recipe("magnitude", 0.25)),
        ("spqr(outlier_share=1%)", Recipe(quantize="spqr", quantization={"outlier_share": 0.01})),
        ("sparsegpt:2:4", Recipe("sparsegpt", pattern="2:4")),
        ("sparsegpt:02:04", Recipe("sparsegpt", pattern="2:4")),
        ("wanda:12.5%+dsnot", Recipe("wanda", 0.125, refine="dsnot")),
        ("rtn", Recipe(quantize="rtn")),
        ("wanda:0.5(reconstruct=true)", Recipe("wanda", 0.5, reconstruct=True)),
        (
            "wanda:0.5(reconstruct=true)+rtn:4(format=dense)",
            Recipe("wanda", 0.5, format="dense", quantize="rtn", quantization={"bits": 4}, reconstruct=True),
        ),
        ("spqr:3", Recipe(quantize="spqr", quantization={"bits": 3})),
        ("wanda:0.5(format=dense, dtype=float16)", Recipe("wanda", 0.5, format="dense", dtype="float16")),
        (
            "gptq:4(group_size=128, order=natural, search_range=false, symmetric=true, damping=1e-3)",
            Recipe(
                quantize="gptq",
                quantization={
                    "bits": 4,
                    "group_size": 128,
                    "symmetric": True,
                    "search_range": False,
                    "order": "natural",
                    "damping": 0.001,
                },
            ),
        ),
        ("rtn:8(group_size=row)", Recipe(quantize="rtn", quantization={"bits": 8, "group_size": "row"})),
        # A whole number is a share, too.
        ("spqr(outlier_share=0)", Recipe(quantize="spqr", quantization={"outlier_share": 0.0})),
        (
            " gptq : 4 ( group_size\n=\t64 , format = dense ) +\nwanda : 2 : 4 + dsnot ",
            Recipe(
                "wanda",
                None,
                "2:4",
                "dsnot",
                format="dense",
                quantize="gptq",
                quantization={"bits": 4, "group_size": 64},
            ),
        ),
    ],
)
def test_what_an_item_means(text, recipe):
    assert only(text) == recipe


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("wanda:0.3..0.7", [0.3, 0.4, 0.5, 0.6, 0.7]),
        ("wanda:0.3..0.5/0.05", [0.3, 0.35, 0.4, 0.45, 0.5]),
        ("wanda:0.3...7", [0.3, 0.4, 0.5, 0.6, 0.7]),
        ("wanda: 30 % .. 50% / 10 %", [0.3, 0.4, 0.5]),
        ("wanda:10%..0.3", [0.1, 0.2, 0.3]),
        ("wanda:0.5..0.5", [0.5]),
        ("wanda:0.3..0.9/30%", [0.3, 0.6, 0.9]),
    ],
)
def test_a_range_has_the_sparsities_that_are_written(text, shares):
    """0.1 added up in floats would give 0.30000000000000004."""
    assert [recipe.sparsity for _, recipe in parse_recipes(text)] == shares


def test_the_names_of_a_range_are_short():
    assert names("wanda:30%..50%") == ["wanda:0.3", "wanda:0.4", "wanda:0.5"]
    assert names("wanda:.1..20%") == ["wanda:0.1", "wanda:0.2"]
    assert names("wanda:0.001%..0.003%/0.001%") == ["wanda:0.00001", "wanda:0.00002", "wanda:0.00003"]


@pytest.mark.parametrize(
    ("text", "bits"), [("rtn:2..4", [2, 3, 4]), ("rtn:2..8", [2, 3, 4, 5, 6, 7, 8]), ("rtn:4..4", [4])]
)
def test_a_range_of_bits_is_over_those_that_there_are(text, bits):
    assert [recipe.quantization["bits"] for _, recipe in parse_recipes(text)] == bits


def test_two_ranges_make_every_pair():
    assert names("sparsegpt:0.3..0.4 + gptq:3..4(group_size=64)") == [
        "sparsegpt:0.3+gptq:3(group_size=64)",
        "sparsegpt:0.3+gptq:4(group_size=64)",
        "sparsegpt:0.4+gptq:3(group_size=64)",
        "sparsegpt:0.4+gptq:4(group_size=64)",
    ]


def test_recipes_keep_the_order_of_the_text():
    assert names("spqr:4,wanda:2:4, rtn-8bit,\nmagnitude:0.5") == ["spqr:4", "wanda:2:4", "rtn-8bit", "magnitude:0.5"]


@pytest.mark.parametrize("name", NAMES)
def test_a_built_in_recipe(name):
    assert parse_recipes(f" {name} ") == [(name, built_in(name).recipe)]


@pytest.mark.parametrize("file", ["mine.yaml", "my recipe+2.yml", "out.d/secateur.json"])
def test_a_recipe_file(file, monkeypatch, tmp_path):
    """With whatever it holds, what a recipe string cannot say included."""
    monkeypatch.chdir(tmp_path)
    recipe = Recipe("wanda", 0.5, targets=("*.mlp.*",), calibration=Calibration("docs", 3))
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(recipe.to_yaml())
    assert parse_recipes(f"wanda:0.5, {file} , rtn")[1] == (file, recipe)
    assert parse_recipes(file) == [(file, recipe)]
    assert only(str(tmp_path / file)) == recipe


@pytest.mark.parametrize(
    "more", [{"targets": ("*.mlp.*",)}, {"ignore": ("*.0.*",)}, {"calibration": Calibration(seed=1)}]
)
def test_what_differs_in_one_thing_is_not_the_same(more, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(Recipe("wanda", 0.5, **more).to_yaml())
    assert names("wanda:0.5, mine.yaml") == ["wanda:0.5", "mine.yaml"]


def test_a_new_method_needs_no_change(monkeypatch):
    monkeypatch.setitem(PRUNERS, "newest", type("Newest", (PRUNERS["magnitude"],), {"name": "newest"}))
    assert only("newest:0.5+rtn") == Recipe("newest", 0.5, quantize="rtn")


def test_no_name_means_two_things():
    every = [*PRUNERS, *REFINERS, *QUANTIZERS, *FACTORIZERS, *NAMES]
    assert len(every) == len(set(every))


def test_the_page_about_recipes_is_right(monkeypatch, tmp_path):
    page = (Path(__file__).parents[2] / "docs/recipes.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w*)\n(.*?)```", page, re.DOTALL)
    [grammar] = [text for _, text in blocks if text.startswith("recipes = ")]
    assert textwrap.indent(grammar, "    ") in recipe_spec.__doc__
    [example] = [text for _, text in blocks if text.startswith("wanda")]
    [file] = [text for kind, text in blocks if kind == "yaml"]
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(file)
    assert len(parse_recipes(example)) == 11
    assert only("my.yaml").pattern == "2:4"
    for count, said in (("five", 5), ("three", 3), ("seven", 7), ("six", 6)):
        [string] = re.findall(rf"\| `([^`]+)` \| {count}[ :]", page)
        assert len(parse_recipes(string)) == said
    [wrong] = [text for _, text in blocks if text.startswith("error: ")]
    with pytest.raises(
        UsageError, match=re.escape(wrong.removeprefix("error: ").rstrip().replace("--recipes", "`recipes`"))
    ):
        parse_recipes("wanda:0.5, wandaa:0.6")


# --- names

_FLAGS = {"symmetric": st.booleans(), "search_range": st.booleans()}
_GRAM = {"order": st.sampled_from(["natural", "activation", "permuted"]), "damping": st.floats(1e-300, 1e3)}
_GROUP = {"group_size": st.one_of(st.integers(2, 4096), st.just("row"))}
_SHARE = st.floats(0, 0.2)
_OPTIONS = {
    "rtn": _GROUP | _FLAGS,
    "gptq": _GROUP | _FLAGS | _GRAM,
    "spqr": {
        "group_size": st.integers(2, 4096),
        "search_range": st.booleans(),
        "outlier_threshold": st.floats(1e-300, 1e300),
        "scale_bits": st.integers(1, 8),
        "tile_rows": st.integers(2, 64),
        **_GRAM,
    },
    "squeezellm": {
        "sensitivity": st.sampled_from(["fisher", "hessian"]),
        "outlier_share": _SHARE,
        "sensitive_share": _SHARE,
    },
}
_space = st.sampled_from(["", "", " ", "\n", " \t"])


def test_every_option_is_drawn():
    for method, options in _OPTIONS.items():
        # What excludes others.
        mutual = {"spqr": {"outlier_share"}, "rtn": {"grid"}, "gptq": {"grid"}}.get(method, set())
        assert {"bits", *options, *mutual} == {field.name for field in fields(QUANTIZERS[method])}


@st.composite
def items(draw):
    """An item, and the recipe that it must mean."""
    tokens, recipe = [], {}
    methods = draw(st.sampled_from(["prune", "quantize", "both"]))
    common = draw(st.fixed_dictionaries({}, optional={"format": st.just("dense"), "dtype": st.just("float16")}))

    def brackets(options):
        if not options:
            return []
        inner = []
        for name, value in options.items():
            said = str(value).lower() if isinstance(value, bool) else str(value)
            inner += [",", name, "=", said]
        return ["(", *inner[1:], ")"]

    if methods != "quantize":
        recipe["prune"] = draw(st.sampled_from([name for name in sorted(PRUNERS) if hasattr(PRUNERS[name], "prune")]))
        tokens += [recipe["prune"], ":"]
        share = draw(st.integers(1, 9999))
        kind = draw(st.sampled_from(["share", "percent", "pattern"]))
        if kind == "pattern":
            m = draw(st.integers(2, 32))
            n = draw(st.integers(1, m - 1))
            recipe["pattern"] = f"{n}:{m}"
            tokens += [str(n), ":", str(m)]
        else:
            recipe["sparsity"] = share / 10000  # correctly rounded, as the text is
            tokens += [f"0.{share:04}"] if kind == "share" else [f"{share // 100}.{share % 100:02}", "%"]
        if methods == "prune":
            tokens += brackets(common)
        if draw(st.booleans()):
            recipe["refine"] = "dsnot"
            tokens += ["+", "dsnot"]
    if methods != "prune":
        tokens += ["+"] * bool(tokens)
        recipe["quantize"] = draw(st.sampled_from(sorted(_OPTIONS)))
        options = draw(st.fixed_dictionaries({}, optional=_OPTIONS[recipe["quantize"]]))
        tokens.append(recipe["quantize"])
        recipe["quantization"] = {**options}
        if draw(st.booleans()):
            bits = draw(st.sampled_from([2, 3, 4]))
            recipe["quantization"] = {"bits": bits, **options}
            tokens += [":", str(bits)]
        tokens += brackets(options | common)
    text = "".join(draw(_space) + token for token in tokens) + draw(_space)
    return text, Recipe(**recipe, **common)


@quickly
@given(items())
def test_an_items_name_is_the_same_recipe(item):
    text, recipe = item
    [(name, found)] = parse_recipes(text)
    assert found == recipe
    assert not any(c.isspace() for c in name)
    assert parse_recipes(name) == [(name, recipe)]


# --- what is wrong, and where: the mark is put before the place


@pytest.mark.parametrize(
    ("marked", "words"),
    [
        ("▸", "a method, a built-in recipe or a recipe file is missing at the end"),
        (" \n▸", "a method, a built-in recipe or a recipe file is missing at the end"),
        ("▸, rtn", "a method, a built-in recipe or a recipe file is wanted here, not ','"),
        ("rtn,▸", "a method, a built-in recipe or a recipe file is missing at the end"),
        ("rtn+▸", "a method, a built-in recipe or a recipe file is missing at the end"),
        ("wanda:0.5, ▸wandaa:0.6", "'wandaa' is not known: did you mean 'wanda'?"),
        ("wanda:0.5, ▸spqr-3bits", "'spqr-3bits' is not known: did you mean 'spqr-3bit'?"),
        ("wanda:0.5+▸gtpq", "'gtpq' is not known: did you mean 'gptq'?"),
        ("▸xyz", "'xyz' is not known: it can be alps, coreinfer, cospadi, dern, "),
        ("wanda:0.5+▸3", "a recipe file is wanted here, not '3'"),
        ("wanda:0.5 ▸gptq", "a comma before the next recipe, or '+' before another method, is wanted here, not 'gptq'"),
        ("wanda:0.5▸;rtn", "is wanted here, not ';'"),
        ("rtn(group_size=64)▸)", "is wanted here, not ')'"),
        ("spqr-3bit▸+wanda:0.5", "the built-in recipe 'spqr-3bit' stands alone: a comma or the end is wanted here"),
        ("spqr-3bit▸:4", "the built-in recipe 'spqr-3bit' stands alone"),
        ("wanda:0.5+▸spqr-3bit", "the built-in recipe 'spqr-3bit' stands alone: '+' joins methods"),
        ("▸none.yaml, rtn", "recipe none.yaml cannot be read: "),
        ("rtn, ▸wanda:0.5+a b.json", "recipe wanda:0.5+a b.json cannot be read: "),
        ("wanda:0.5+▸magnitude:0.5", "'magnitude' is a second pruner: a recipe has one at most"),
        ("rtn+▸rtn", "'rtn' is a second quantizer"),
        ("wanda:0.5+dsnot+▸dsnot", "'dsnot' is a second refiner"),
        ("▸dsnot", "'dsnot' refines what a pruner chose: give it behind one, as in wanda:0.5+dsnot"),
        ("rtn+▸dsnot", "'dsnot' refines what a pruner chose"),
        ("wanda:0.5+dsnot▸:3", "'dsnot' has no amount"),
        ("wanda:0.5+dsnot(▸dtype=float16)", "'dtype' is no option of dsnot: it can be cycles, threshold"),
        # amounts of pruners
        ("wanda▸", "how much wanda removes, such as wanda:0.5, wanda:2:4 or wanda:0.3..0.7, is missing at the end"),
        ("wanda▸, rtn", "how much wanda removes, such as wanda:0.5, wanda:2:4 or wanda:0.3..0.7, is wanted here, not ','"),
        ("wanda:▸", "a number, such as 0.5, 50% or 2:4, is missing at the end"),
        ("wanda:▸half", "a number, such as 0.5, 50% or 2:4, is wanted here, not 'half'"),
        ("wanda:▸-0.5", "is wanted here, not '-0.5'"),
        ("wanda:▸1.5", "sparsity 1.5 is not clear without %: write 1.5%, or 0.015"),
        ("wanda:▸50", "sparsity 50 is not clear without %: write 50%, or 0.5"),
        ("wanda:▸100%", "sparsity 1 is outside [0, 1): give the share of weights to remove, like 0.5 or 50%"),
        ("wanda:0.5..▸1.5", "sparsity 1.5 is not clear without %"),
        ("wanda:▸50%..150%", "sparsity 1 is outside [0, 1)"),
        ("wanda:0.1..0.7/▸20", "sparsity 20 is not clear without %: write 20%, or 0.2"),
        ("wanda:▸" + "9" * 299, "sparsity 99999999999999999999… is not clear without %: write it like 50% or 0.5"),
        ("▸wanda:0", "`sparsity` 0 removes nothing: give the share of weights to remove, like 0.5 or 50%"),
        ("▸wanda:0..0.3", "recipe 'wanda:0': `sparsity` 0 removes nothing"),
        ("spqr(outlier_share=▸1)", "`outlier_share` 1 is not possible with spqr: give at least 0 and at most 0.2"),
        ("spqr(outlier_share=▸30%)", "`outlier_share` 0.3 is not possible with spqr: give at least 0 and at most 0.2"),
        ("wanda:▸" + "9" * 5000, "what has 5000 characters is no name or number of a recipe"),
        ("wanda:▸4:2", "pattern 4:2 is not possible: N:M keeps N of every M weights, with 0 < N < M, like 2:4"),
        ("wanda:▸50%:4", "pattern '50%:4' is not understood: use N:M such as 2:4"),
        ("wanda:2:▸", "M of a pattern N:M is missing at the end"),
        ("wanda:0.5▸e-3", "is wanted here, not 'e-3'"),
        ("wanda:0.3..▸", "a number, such as 0.5, 50% or 2:4, is missing at the end"),
        ("wanda:▸0.7..0.3", "the range 0.7..0.3 goes down: give the smaller number first"),
        ("wanda:0.3..▸0.75", "0.75 is not reached from 0.3 in steps of 0.1: give the step, as in 0.3..0.75/0.05"),
        ("wanda:0.3..▸0.7/0.3", "0.7 is not reached from 0.3 in steps of 0.3"),
        ("wanda:0.3..0.7/▸0", "steps of 0 lead nowhere: give more, such as 0.1"),
        ("wanda:0.3..0.7/▸0.0001", "steps of 0.0001 are more than 1000: give a larger one"),
        ("wanda:2:4▸..3:4", "is wanted here, not '.'"),
        # amounts of quantizers
        ("rtn:▸", "a number of bits (2, 3, 4, 5, 6, 7 or 8) is missing at the end"),
        ("rtn:▸four", "a number of bits (2, 3, 4, 5, 6, 7 or 8) is wanted here, not 'four'"),
        ("rtn:▸9", "`bits` 9 is not possible with rtn: give 2, 3, 4, 5, 6, 7 or 8"),
        ("rtn:▸2.5", "2.5 is no number of bits: give 2, 3, 4, 5, 6, 7 or 8"),
        ("rtn:4▸%", "is wanted here, not '%'"),
        ("rtn:2..▸9", "there are no codes of 9 bits: give 2, 3, 4, 5, 6, 7 or 8"),
        ("rtn:▸1..4", "there are no codes of 1 bits: give 2, 3, 4, 5, 6, 7 or 8"),
        ("rtn:▸4..2", "the range 4..2 goes down: give the smaller number first"),
        ("rtn:2..4▸/1", "a range of bits has no step: it is over 2, 3, 4, 5, 6, 7 or 8"),
        ("rtn, squeezellm:▸2..8", "`bits` 5 is not possible with squeezellm: give 2, 3 or 4 (a table of 8 bits takes"),
        # options
        ("gptq:4(▸grop_size=64)", "'grop_size' is no option of gptq: did you mean 'group_size'?"),
        ("rtn:4(▸damping=1)", "'damping' is no option of rtn: it can be dtype, embeddings, format, grid"),
        ("rtn:4(▸targets=x)", "'targets' is no option of rtn"),
        ("wanda:0.5(▸group_size=64)", "'group_size' is no option of wanda: it can be dtype, embeddings, format"),
        ("wanda:0.5(▸pattern=x)", "'pattern' is no option here: the amount stands behind a colon, such as wanda:0.5"),
        ("gptq(▸bits=4)", "'bits' is no option here: the amount stands behind a colon, such as gptq:4"),
        ("gptq(order=natural, ▸order=natural)", "'order' is given twice"),
        ("wanda:0.5+rtn(▸reconstruct=true)", "'reconstruct' is no option of rtn"),
            ("wanda:0.5(reconstruct=▸yes)", "'reconstruct' of the recipe is 'yes', which is not a true or false"),
            ("wanda:0.5(format=dense)+rtn(▸format=dense)", "'format' is given twice"),
        ("gptq(▸)", "an option of gptq is wanted here, not ')'"),
        ("gptq(order▸)", "'=' and what order is to be is wanted here, not ')'"),
        ("gptq(order=▸)", "what order is to be is wanted here, not ')'"),
        ("gptq(order=natural▸", "')' behind the options of gptq, or a comma, is missing at the end"),
        ("gptq(group_size=128▸k)", "')' behind the options of gptq, or a comma, is wanted here, not 'k'"),
        ("gptq(order=▸random)", "`order` random is not possible with gptq: give natural, activation or permuted"),
        ("gptq(damping=▸1e999)", "`damping` inf is not possible with gptq: give more than 0 and less than 10000"),
        ("gptq(symmetric=▸1)", "`symmetric` of gptq is 1, which is not a true or false"),
        ("gptq(group_size=▸1.5)", "`group_size` of gptq is 1.5, which is not a whole number or text"),
        ("wanda:0.5(dtype=▸16)", "'dtype' of the recipe is 16, which is not a text"),
        # what only all parts together show
        ("rtn, ▸wanda:0.5(format=nm)", "recipe 'wanda:0.5(format=nm)': `format` nm needs a `pattern` N:M"),
        ("▸rtn(format=wide)", "recipe 'rtn(format=wide)': format 'wide' is not known: it can be auto, bitmap, dense, nm"),
        (
            "▸spqr(outlier_share=0.1,outlier_threshold=1)",
            "recipe 'spqr(outlier_share=0.1,outlier_threshold=1.0)': `outlier_threshold` and `outlier_share` say the same",
        ),
        # the same twice
        ("wanda:0.5, ▸wanda:50%", "'wanda:0.5' is there twice"),
        ("wanda:0.3..0.5, rtn, ▸wanda:0.4..0.6", "'wanda:0.4' is there twice"),
        ("spqr, ▸spqr:3", "'spqr:3' is the same recipe as 'spqr': drop one"),
        ("rtn-8bit, ▸rtn:8(group_size=64)", "'rtn:8(group_size=64)' is the same recipe as 'rtn-8bit': drop one"),
        ("wanda:2:4, ▸wanda:2:4(format=nm)", "'wanda:2:4(format=nm)' is the same recipe as 'wanda:2:4'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_pointed_at(marked, words):
    with pytest.raises(UsageError) as error:
        parse_recipes(marked.replace("▸", ""))
    line = str(error.value)
    assert line.startswith(f"`recipes`, character {marked.index('▸') + 1} in ")
    where, _, what = line.partition('": ')
    assert what.startswith(words) or what.endswith(words)
    assert "\n" not in line
    # The excerpt shows what stands around the mark.
    before, after = (" ".join(part.split(" ")) for part in marked.replace("\n", "").split("▸"))
    assert f"{before[-5:]}▸{after[:5]}" in where


def test_of_a_long_text_the_surroundings_are_shown():
    text = "wanda:0.5, wanda:0.6, wanda:0.7,\n\n wanda:0.8, wanda:0.9, rtn, wandaa:0.5, sparsegpt:0.5, sparsegpt:0.6"
    with pytest.raises(UsageError) as error:
        parse_recipes(text)
    assert str(error.value) == (
        '`recipes`, character 63 in "…7, wanda:0.8, wanda:0.9, rtn, ▸wandaa:0.5, sparsegpt:0.5, spa…": '
        "'wandaa' is not known: did you mean 'wanda'?"
    )


_PIECES = ["wanda", "rtn", "spqr", "dsnot", "rtn-8bit", "x.yaml", "group_size", "format", "dense", "true", *":+,(=)%/-.", "..",
           "0", "0.5", "0.3", "2", "4", "8", "50", " ", "\n", "e", "é", "\0", "\0.yaml", "٣"]  # fmt: skip


@tries(300)
@given(st.lists(st.sampled_from(_PIECES), max_size=12).map("".join))
def test_any_text_gives_recipes_or_one_line(text):
    try:
        found, wrong = parse_recipes(text), ""
    except UsageError as error:
        found, wrong = [], str(error)
    assert bool(found) != bool(wrong)
    assert "\n" not in wrong
    for name, recipe in found:
        assert parse_recipes(name) == [(name, recipe)]


def test_recipes_that_differ_in_their_goals_are_two(tmp_path):
    for goals in (
        ("target_size: 0.3x", "target_size: 0.4x"),
        ("max_perplexity_rise: 3%", "max_perplexity_rise: 4%"),
        ("prune: wanda\nsparsity: 0.5", "prune: wanda\nsparsity: 0.5\nallocation: owl"),
        ("prune: wanda\nlinears: {a: {sparsity: 0.5}}", "prune: wanda\nlinears: {a: {sparsity: 0.4}}"),
    ):
        for name, goal in zip(("one", "two"), goals, strict=True):
            (tmp_path / f"{name}.yaml").write_text(f"{goal}\n")
        both = ", ".join(str(tmp_path / f"{name}.yaml") for name in ("one", "two"))
        assert len(parse_recipes(both)) == 2
        (tmp_path / "two.yaml").write_text(f"{goals[0]}\n")
        with pytest.raises(UsageError, match="is the same recipe as"):
            parse_recipes(both)
