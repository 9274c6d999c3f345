"""The report of a sweep: which points are its frontier, the figures of the table, and the page as a browser shows it."""

import csv
import dataclasses
import itertools
import json
import math
import random
import re
import shutil
from html.parser import HTMLParser

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import SecateurError, UsageError
from secateur.recipes.recipe import Recipe
from secateur.report.report_data import grid
from secateur.report.report_page import page as html_of
from secateur.report.report_points import entries, frontier, perplexity_limit
from secateur.report.sweep_report import write_report
from secateur.report.sweep_result import LinearPoint, Measured, Point, SweepResult

HOSTILE = "</script><img src=x onerror=alert(1)>&amp;\"'"
KINDS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
PARAMETERS = 134_515_008
# Name, pruner, sparsity, quantizer, bits of a code, group size; what it does to the perplexity is made up.
CHOICES = [
    ("rtn-8b-g64", "", 0.0, "rtn", 8, 64, 1.003),
    ("gptq-4b-g64", "", 0.0, "gptq", 4, 64, 1.136),
    ("spqr-3b-g16", "", 0.0, "spqr", 3, 16, 1.216),
    ("gptq-3b-g64", "", 0.0, "gptq", 3, 64, 1.645),
    ("rtn-2b-g64", "", 0.0, "rtn", 2, 64, 2635.0),
    ("wanda-50", "wanda", 0.5, None, 16, 0, 2.31),
    ("sparsegpt-50", "sparsegpt", 0.5, None, 16, 0, 1.942),
    ("sparsegpt-50-gptq-4b-g64", "sparsegpt", 0.5, "gptq", 4, 64, 2.186),
]


def plausible(recipes=8, blocks=30, failed=()):
    """A made-up sweep of a Llama with `blocks` blocks of seven linears; the recipes of the indices in `failed` did not work."""
    draw = random.Random(0)
    points = []
    for i, choice in zip(range(recipes), itertools.cycle(CHOICES), strict=False):
        name, prune, sparsity, quantize, code_bits, group, factor = choice
        recipe = Recipe(
            prune=prune,
            sparsity=sparsity or None,
            quantize=quantize,
            quantization={"bits": code_bits, "group_size": group} if quantize else {},
        )
        turn = i // len(CHOICES)  # more recipes than there are choices: a little different each time
        name += f"-v{turn + 1}" if turn else ""
        command = f"secateur compress demo out/{name} " + " ".join(
            f"--{key} {value}"
            for key, value in {"prune": prune, "sparsity": sparsity, "quantize": quantize, "bits": code_bits}.items()
            if value
        )
        point = Point(name, recipe.to_dict(), command)
        if i in failed:
            points.append(dataclasses.replace(point, failure="the Gram matrix of block 3 cannot be factorised"))
            continue
        bits = (1 - sparsity) * code_bits + (32 / group if group else 0) + (1 if sparsity else 0) + 0.05 * turn
        linears = {}
        for block, (kind, (rows, columns)) in itertools.product(range(blocks), KINDS.items()):
            noise = draw.lognormvariate(0, 0.5) * (1 + 3 * math.exp(-block)) * (2 if "v_proj" in kind else 1)
            linears[f"model.layers.{block}.{kind}"] = LinearPoint(
                sparsity=sparsity * (1 + 0.002 * draw.random()),
                bits=bits * (1 + 0.02 * draw.random()),
                bytes=round(rows * columns * bits / 8),
                error=1e-3 * min(factor, 100) ** 2 * noise,
            )
        size = round(56_623_104 + (PARAMETERS - 28_311_552) * bits / 8)
        points.append(
            dataclasses.replace(
                point,
                measured=_measured(size, 27.85 * factor * (1 + 0.01 * turn), math.log(factor)),
                sparsity=sparsity,
                bits=bits,
                seconds=20 + 60 * draw.random(),
                peak_bytes=round(1.4e9 * (1 + draw.random())),
                linears=linears,
            )
        )
    return SweepResult(
        secateur="0.1.0",
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        parameters=PARAMETERS,
        text={"data": "wikitext2", "sha256": "5a" * 32, "seq_len": 1024, "stride": 512, "windows": 24, "tokens": 12800},
        machine={"device": "cpu", "threads": 2, "dtype": "float32", "torch": "2.13.0", "transformers": "5.23.0"},
        date="2026-11-23",
        dense=dataclasses.replace(
            _measured(2 * PARAMETERS, 27.85, 0.0), kl=None, kl_interval=None, agreement=None, agreement_interval=None
        ),
        points=tuple(points),
    )


def _measured(size, perplexity, kl):
    agreement = math.exp(-0.6 * min(kl, 5))
    return Measured(
        bytes=size,
        bits_per_weight=8 * size / PARAMETERS,
        perplexity=perplexity,
        perplexity_interval=(perplexity / 1.06, perplexity * 1.06),
        bits_per_byte=math.log2(perplexity) / 4.3 if math.isfinite(perplexity) else math.inf,
        seconds=21.5,
        kl=kl,
        kl_interval=(0.95 * kl, 1.05 * kl),
        agreement=agreement,
        agreement_interval=(agreement - 0.01, min(agreement + 0.01, 1)),
    )


def changed(result, index, **changes):
    """The same sweep with another point at an index; `measured` names what changes in what was measured."""
    point = result.points[index]
    if "measured" in changes:
        changes["measured"] = dataclasses.replace(point.measured, **changes["measured"])
    points = list(result.points)
    points[index] = dataclasses.replace(point, **changes)
    return dataclasses.replace(result, points=tuple(points))


def hostile():
    """A sweep whose every text tries to be markup."""
    result = changed(
        plausible(2, 2, failed={1}),
        0,
        name=HOSTILE,
        command=HOSTILE,
        recipe={"prune": HOSTILE, "calibration": {"source": HOSTILE}},
        linears={HOSTILE: LinearPoint(0.5, 4.0, 10, 0.1)},
    )
    result = changed(result, 1, name=HOSTILE + "2", failure=HOSTILE)
    return dataclasses.replace(
        result,
        model=HOSTILE,
        secateur=HOSTILE,
        date=HOSTILE,
        text={**result.text, "data": HOSTILE, "sha256": HOSTILE},
        machine={HOSTILE: HOSTILE},
    )


# --- the frontier

_COORDINATES = st.sampled_from([1.0, 2.0, 2.5, 3.0, 1e300, math.inf, -math.inf, math.nan]) | st.floats()


@given(st.lists(st.tuples(_COORDINATES, _COORDINATES), max_size=12))
def test_the_frontier_is_what_brute_force_finds(places):
    def dominates(a, b):
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    finite = {i: place for i, place in enumerate(places) if all(map(math.isfinite, place))}
    expected = {i for i, place in finite.items() if not any(dominates(other, place) for other in finite.values())}
    found = frontier(places)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert [places[i][0] for i in found] == sorted(places[i][0] for i in found)


def test_a_recipe_that_the_dense_model_beats_is_not_on_the_frontier():
    result = changed(plausible(2, 2), 0, measured={"bytes": 10**9})
    result = changed(result, 1, measured={"bytes": 10**9})
    assert "No recipe lies on the frontier" in html_of(result)
    assert embedded(result)["frontiers"]["bytes"]["perplexity"] == [0]


def test_more_agreement_is_better_and_more_perplexity_worse():
    result = plausible(3, 2)
    # By perplexity point 1 beats point 2 of the same size, by agreement it is the other way round.
    result = changed(result, 0, measured={"bytes": 100, "perplexity": 30.0, "agreement": 0.5})
    result = changed(result, 1, measured={"bytes": 100, "perplexity": 40.0, "agreement": 0.6})
    result = changed(result, 2, measured={"bytes": 90, "perplexity": 50.0, "agreement": 0.4})
    frontiers = embedded(result)["frontiers"]["bytes"]
    assert frontiers["perplexity"] == [3, 1, 0]
    assert frontiers["agreement"] == [3, 2, 0]


def test_a_plot_ends_below_perplexities_that_ruin_it_if_they_are_few():
    assert perplexity_limit(entries(plausible(8))) == pytest.approx(278.5)
    assert perplexity_limit(entries(plausible(4))) == math.inf  # none is far
    ruined = plausible(4, 2)
    for i in range(3):
        ruined = changed(ruined, i, measured={"perplexity": math.inf})
    assert perplexity_limit(entries(ruined)) == math.inf


# --- the files


def embedded(result):
    """The data that the page's scripts read."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html_of(result))[1])


def table(folder):
    with (folder / "points.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_a_row_with_every_number_for_dense_and_each_point(tmp_path):
    result = plausible(8, 2, failed={6})
    result = changed(result, 1, measured={"perplexity": math.inf, "kl": None, "kl_interval": None})
    write_report(result, tmp_path)
    dense, *rows = table(tmp_path)
    assert [dense["name"], dense["method"], dense["kl"], dense["sparsity"]] == ["dense model", "dense", "", ""]
    assert float(dense["perplexity"]) == result.dense.perplexity
    assert [row["name"] for row in rows] == [point.name for point in result.points]
    assert [row["method"] for row in rows] == ["quantize"] * 5 + ["prune", "prune", "both"]

    point, row = result.points[3], rows[3]
    measured = point.measured
    assert {key: float(row[key]) for key in row if key not in ("name", "method", "command", "failure")} == {
        "bytes": measured.bytes,
        "bits_per_weight": measured.bits_per_weight,
        "perplexity": measured.perplexity,
        "perplexity_low": measured.perplexity_interval[0],
        "perplexity_high": measured.perplexity_interval[1],
        "bits_per_byte": measured.bits_per_byte,
        "kl": measured.kl,
        "kl_low": measured.kl_interval[0],
        "kl_high": measured.kl_interval[1],
        "agreement": measured.agreement,
        "agreement_low": measured.agreement_interval[0],
        "agreement_high": measured.agreement_interval[1],
        "evaluation_seconds": measured.seconds,
        "sparsity": point.sparsity,
        "linear_bits": point.bits,
        "linears": len(point.linears),
        "compression_seconds": point.seconds,
        "peak_bytes": point.peak_bytes,
    }
    assert row["command"] == point.command
    assert [rows[1]["perplexity"], rows[1]["kl"], rows[1]["kl_low"]] == ["inf", "", ""]
    failed = {key: value for key, value in rows[6].items() if value}
    assert failed == {
        "name": "sparsegpt-50",
        "method": "prune",
        "command": result.points[6].command,
        "failure": "the Gram matrix of block 3 cannot be factorised",
    }


def test_the_plot_is_a_picture(tmp_path):
    image = pytest.importorskip("PIL.Image")
    write_report(plausible(8, 2, failed={6}), tmp_path)
    with image.open(tmp_path / "frontier.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        # All of the four families are in it.
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=2**24)}
    assert {(0xD5, 0x5E, 0), (0, 0x72, 0xB2), (0, 0x9E, 0x73), (0x33, 0x33, 0x33)} <= colours


def test_long_names_leave_room_for_the_plot(tmp_path, recwarn):
    result = changed(plausible(3, 2), 0, name="a-long-name-" * 20)
    write_report(dataclasses.replace(result, model="/home/someone/" + "models" * 50), tmp_path)
    assert [str(warning.message) for warning in recwarn if "layout" in str(warning.message)] == []


def test_without_matplotlib_the_other_files_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.report.bench_plot.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"frontier.png needs matplotlib.*: pip install 'secateur\[sweep\]'"):
        write_report(plausible(2, 2), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index.html", "points.csv"]


@pytest.mark.parametrize("name", ["index.html", "points.csv", "frontier.png"])
def test_a_file_that_cannot_be_written_is_named(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(SecateurError, match=f"{re.escape(str(tmp_path / name))}: Is a directory"):
        write_report(plausible(2, 2), tmp_path)


def test_a_model_whose_path_is_no_text_has_a_report(tmp_path):
    result = dataclasses.replace(plausible(2, 2), model="models/\udcff$x$")
    write_report(result, tmp_path)
    assert "<h1>models/?$x$</h1>" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("recipes", "blocks"), [(8, 30), (20, 80)])
def test_the_page_is_small(recipes, blocks):
    result = plausible(recipes, blocks)
    data = embedded(result)
    assert [len(entry["linears"]["error"]) for entry in data["entries"][1:]] == [7 * blocks] * recipes
    assert len(html_of(result).encode()) < 1_000_000


def test_a_result_that_was_saved_has_the_same_report(tmp_path):
    result = changed(plausible(4, 2, failed={3}), 1, measured={"perplexity": math.inf})
    (tmp_path / "saved.json").write_text(result.to_json())
    assert html_of(SweepResult.read(tmp_path / "saved.json")) == html_of(result)


# --- the page as text


class Page(HTMLParser):
    """What a browser without JavaScript makes of a page: its elements with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self._inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.texts.append(data)

    def handle_endtag(self, tag):
        self._inside = None

    @property
    def text(self):
        return "".join(self.texts)


def test_the_page_refers_to_nothing_but_the_files_beside_it():
    page = Page(html_of(plausible(2, 2)))
    places = {value for _, attributes in page.elements for key, value in attributes.items() if key in ("href", "src")}
    assert {place for place in places if not place.startswith("#")} == {"points.csv", "frontier.png", "data:,"}
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    # Styles and handlers in attributes would be refused by that policy.
    assert not [key for _, attributes in page.elements for key in attributes if key == "style" or key.startswith("on")]


def test_names_are_text_and_never_markup():
    result = hostile()
    page = Page(html_of(result))
    assert "img" not in [tag for tag, _ in page.elements]
    assert [a.get("type") for tag, a in page.elements if tag == "script"] == ["application/json", "module"]
    # Model, two names in table and recipe each, commands, failures and so on.
    assert page.text.count(HOSTILE) >= 10
    data = embedded(result)
    assert [entry["name"] for entry in data["entries"]] == ["dense model", HOSTILE, HOSTILE + "2"]
    assert data["grid"]["names"] == [HOSTILE]


def test_numbers_recipes_and_failures_can_be_read_without_javascript():
    result = changed(plausible(3, 2, failed={2}), 0, measured={"perplexity": math.inf})
    page = Page(html_of(result))
    assert "noscript" in [tag for tag, _ in page.elements]
    assert "need JavaScript, which is off" in page.text
    text = page.text
    # In bits per weight and perplexity: of the dense model, of the others; the interval; what failed.
    for shown in ("269.0 MB", "16.00", "27.85", "26.27 – 29.52", "6.92", "31.64", "∞", "92.63 %", "134,515,008"):
        assert shown in text
    assert "failed: the Gram matrix of block 3 cannot be factorised" in text
    assert text.count(result.points[2].command) == 1
    assert "1 of" not in text


@pytest.mark.parametrize(
    ("result", "summary"),
    [
        (plausible(8, 2, failed={6}), "4 of 8 recipes lie on the frontier of size and perplexity, from rtn-2b-g64 "),
        (plausible(8, 2, failed={6}), "; the dense model has perplexity 27.85 at 269.0 MB; 1 failed."),
        (plausible(1, 2), "The one recipe lies on the frontier of size and perplexity, rtn-8b-g64 "),
        (changed(plausible(2, 2), 1, measured={"perplexity": math.inf}), "Of 2 recipes one lies on the frontier "),
        (plausible(3, 2, failed={0, 1, 2}), "All 3 recipes failed; the dense model has perplexity 27.85 at 269.0 MB."),
        (plausible(1, 2, failed={0}), "The one recipe failed; "),
        (plausible(0), "No recipe was run yet; the dense model has perplexity 27.85 at 269.0 MB."),
    ],
)
def test_the_summary_says_what_came_out(result, summary):
    assert summary in Page(html_of(result)).text


def test_linears_are_found_by_block_and_kind():
    names = [
        "model.layers.0.attn.q",
        "model.layers.0.mlp.up",
        "model.layers.10.attn.q",
        "model.layers.2.attn.q",
        "head.out",
    ]
    assert grid(names) == {
        "rows": ["q", "up", "out"],
        "columns": ["0", "2", "10", "–"],
        "names": names,
        "row": [0, 1, 0, 0, 2],
        "column": [0, 0, 2, 1, 3],
    }


def test_kinds_with_the_same_end_keep_as_much_of_their_names_as_they_need():
    names = ["h.0.mlp.experts.0.w", "h.0.mlp.experts.1.w", "h.0.attn.w", "vision.0.attn.w"]
    assert grid(names)["rows"] == ["0.w", "1.w", "h.*.attn.w", "vision.*.attn.w"]
    assert grid([]) == {"rows": [], "columns": [], "names": [], "row": [], "column": []}


# --- the page in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if program is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def show(browser, tmp_path):
    """`show(result)` opens its page from disk. That it asks for nothing and that nothing goes wrong in it is always checked."""
    contexts, requests, problems = [], [], []

    def opened(result, width=1280, script=None, **options):
        (tmp_path / "index.html").write_text(html_of(result), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        if script:
            page.add_init_script(script)
        page.goto((tmp_path / "index.html").as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert set(requests) == {(tmp_path / "index.html").as_uri()}
    assert problems == []


def point_of(page, index):
    """The point of an entry in the plot: 0 is the dense model, 1 the first recipe."""
    return page.locator(f'#plot .point[data-index="{index}"]')


def entry_of(page):
    """What is shown of the chosen entry."""
    return page.locator("#recipes .entry:visible")


def test_the_plot_has_a_point_for_each_recipe_that_worked_and_the_dense_model(show):
    result = plausible(8, 3, failed={6})
    page = show(result)
    assert page.title() == f"{result.model}: sweep of 2026-11-23"
    assert page.locator("#plot .point").count() == 8
    assert point_of(page, 7).count() == 0
    # The dense model, rtn-8b, gptq-4b, gptq-3b and rtn-2b: four pieces, of which the last leads beyond the range.
    assert page.locator("#plot .frontier").count() == 4
    assert page.locator("#plot .frontier.beyond").count() == 1
    labels = page.locator("#plot .label").all_text_contents()
    assert sorted(labels) == sorted(
        ["dense model", *(p.name for i, p in enumerate(result.points) if i not in (4, 6)), "rtn-2b-g64 (73,380 ↑)"]
    )
    # Without the limit, the far point lies within the range.
    page.get_by_role("button", name="Show the whole range").click()
    assert "rtn-2b-g64" in page.locator("#plot .label").all_text_contents()
    assert page.locator("#plot .beyond").count() == 0


def test_labels_do_not_overlap(show):
    page = show(plausible(20, 1))
    boxes = page.locator("#plot .label").evaluate_all(
        "labels => labels.map(label => label.getBBox()).map(({ x, y, width, height }) => [x, x + width, y, y + height])"
    )
    assert len(boxes) > 10
    for a, b in itertools.combinations(boxes, 2):
        # Boxes of letters have a pixel to spare.
        assert a[1] <= b[0] + 1 or b[1] <= a[0] + 1 or a[3] <= b[2] + 1 or b[3] <= a[2] + 1


def test_a_click_on_a_point_shows_its_recipe(show):
    result = plausible(8, 3)
    page = show(result)
    for index in (2, 6, 8):
        point_of(page, index).click()
        assert point_of(page, index).get_attribute("aria-pressed") == "true"
        command, recipe = entry_of(page).locator("pre").all_text_contents()
        assert command == result.points[index - 1].command
        assert yaml.safe_load(recipe) == yaml.safe_load(Recipe.from_dict(result.points[index - 1].recipe).to_yaml())
        assert page.locator("tbody tr.chosen a").text_content() == result.points[index - 1].name
    assert "60.88" in entry_of(page).locator("dl").text_content()


def test_every_point_of_a_plot_on_a_phone_can_be_tapped(show):
    page = show(plausible(8, 2), width=390, has_touch=True, is_mobile=True)
    for index in range(9):
        point_of(page, index).tap()
        assert entry_of(page).get_attribute("id") == f"entry-{index}"


def test_a_point_can_be_chosen_by_keyboard(show):
    page = show(plausible(8, 3))
    point_of(page, 3).focus()
    page.keyboard.press("Enter")
    assert entry_of(page).get_attribute("id") == "entry-3"
    # It keeps the focus, so that the next one is one key away: by size spqr-3b comes before rtn-8b.
    assert page.evaluate("document.activeElement.dataset.index") == "3"
    page.keyboard.press("Tab")
    page.keyboard.press(" ")
    assert entry_of(page).get_attribute("id") == "entry-1"


def test_a_name_in_the_table_and_the_menu_choose_too(show):
    page = show(plausible(8, 3, failed={6}))
    page.locator("#row-2 a").click()
    assert entry_of(page).get_attribute("id") == "entry-2"
    assert page.locator("#recipe-choice").input_value() == "2"
    page.locator("#recipe-choice").select_option("sparsegpt-50")
    assert "the Gram matrix of block 3 cannot be factorised" in entry_of(page).text_content()
    assert page.locator("#maps svg").count() == 0
    assert "There are no figures of linears of sparsegpt-50." in page.locator("#maps-note").text_content()


def test_axes_can_be_chosen(show):
    page = show(plausible(8, 3))
    assert "Size on disk: 116.4 MB. Perplexity: 31.64, interval 29.85 to 33.54" in point_of(page, 2).get_attribute(
        "aria-label"
    )
    page.get_by_label("bits per weight", exact=True).check(force=True)
    page.get_by_label("same token", exact=True).check(force=True)
    label = point_of(page, 2).get_attribute("aria-label")
    assert "Bits per weight: 6.92" in label
    assert "Same most likely token: 92.6" in label
    # More is better: the dense model is at the top.
    assert point_of(page, 0).bounding_box()["y"] == min(point_of(page, i).bounding_box()["y"] for i in range(9))
    page.get_by_label("KL divergence", exact=True).check(force=True)
    assert "log scale" in page.locator("#plot").text_content()
    assert "dense model (0 ↓)" in page.locator("#plot .label").all_text_contents()


def test_heat_maps_tell_each_linear_by_pointer_and_keyboard(show):
    result = plausible(8, 3)
    page = show(result)
    page.locator("#recipe-choice").select_option("sparsegpt-50-gptq-4b-g64")
    titles = page.locator("#maps h3").all_text_contents()
    assert titles == ["Sparsity", "Error of the output, log scale"]
    assert page.locator("#maps .cell").count() == 2 * 21
    kinds = [kind.split(".")[1] for kind in KINDS]
    assert page.locator("#maps svg").first.locator("text").all_text_contents() == [*kinds, "0", "1", "2", "block"]
    # Cells are in the order of the model: the first block's last linear.
    page.locator("#maps svg").nth(1).locator(".cell").nth(6).hover(force=True)
    linear = result.points[7].linears["model.layers.0.mlp.down_proj"]
    tip = page.locator("#tip")
    assert tip.locator("b").text_content() == "model.layers.0.mlp.down_proj"
    assert f"{linear.bytes:,} bytes" in tip.text_content()
    told = re.search(r"error ([\d.e-]+)sparsity ([\d.]+) %, ([\d.]+) bits", tip.text_content())
    assert [float(number) for number in told.groups()] == pytest.approx(
        [linear.error, 100 * linear.sparsity, linear.bits], rel=1e-3
    )
    page.locator(".map .grid").first.focus()
    for key, name in (
        ("ArrowRight", "1.self_attn.q_proj"),
        ("ArrowDown", "1.self_attn.k_proj"),
        ("ArrowUp", "1.self_attn.q_proj"),
    ):
        page.keyboard.press(key)
        assert tip.locator("b").text_content() == f"model.layers.{name}"
    # Only quantized: sparsity says nothing.
    page.locator("#recipe-choice").select_option("gptq-4b-g64")
    assert page.locator("#maps h3").first.text_content() == "Bits per weight"


def test_linears_that_a_recipe_leaves_alone_are_empty_cells(show):
    result = plausible(2, 2)
    some = {name: linear for name, linear in result.points[1].linears.items() if "q_proj" in name}
    page = show(changed(result, 1, linears={**some, "lm_head": LinearPoint(0, 8.0, 9, math.inf)}))
    page.locator("#recipe-choice").select_option("gptq-4b-g64")
    assert page.locator(".map").first.locator(".cell").count() == 15
    assert page.locator(".map").first.locator(".cell.absent").count() == 12
    assert page.locator(".map").first.locator("text").all_text_contents()[-4:] == ["0", "1", "–", "block"]
    page.locator(".map").first.locator(".cell.absent").first.hover(force=True)
    assert page.locator("#tip").text_content() == "model.layers.0.self_attn.k_projnot compressed by this recipe"
    page.locator(".map").nth(1).locator(".cell").last.hover(force=True)
    assert "error ∞" in page.locator("#tip").text_content()


def test_colours_compare_between_recipes_when_asked(show):
    page = show(plausible(8, 2))
    own = page.locator(".ramp.error").text_content()
    page.get_by_label("Same colours for all recipes").check()
    assert page.locator(".ramp.error").text_content() != own
    common = page.locator(".ramp.error").text_content()
    page.locator("#recipe-choice").select_option("rtn-2b-g64")
    assert page.locator(".ramp.error").text_content() == common


def test_recipe_and_command_can_be_copied(show):
    result = plausible(3, 2)
    page = show(result, permissions=["clipboard-read", "clipboard-write"])
    point_of(page, 2).click()
    for number, text in enumerate((result.points[1].command, Recipe.from_dict(result.points[1].recipe).to_yaml())):
        button = entry_of(page).locator(".copy").nth(number)
        button.click()
        page.wait_for_function("button => button.textContent === 'Copied'", arg=button.element_handle())
        assert page.evaluate("navigator.clipboard.readText()") == text


def test_copying_works_without_the_clipboard_interface(show):
    # As in browsers that give a page from disk none.
    page = show(
        plausible(3, 2),
        script="""
        Object.defineProperty(navigator, "clipboard", { value: undefined });
        document.addEventListener("copy", (event) => { window.copied = event.target.value; });
        """,
    )
    entry_of(page).locator(".copy").first.click()
    page.wait_for_function("window.copied !== undefined")
    assert page.evaluate("window.copied") == entry_of(page).locator("pre").first.text_content()
    assert entry_of(page).locator(".copy").first.text_content() == "Copied"


def test_the_table_sorts_by_any_column_and_failures_stay_last(show):
    result = changed(plausible(8, 2, failed={0}), 3, measured={"perplexity": math.inf})
    page = show(result)
    names = page.locator("tbody th a")
    given_order = names.all_text_contents()
    heading = page.locator("thead th", has_text="Perplexity")
    assert heading.get_attribute("aria-sort") == "none"
    measured = {p.name: p.measured.perplexity for p in result.points if p.measured} | {"dense model": 27.85}
    rising = sorted(measured, key=measured.get)
    for order, expected in (
        ("ascending", [*rising, "rtn-8b-g64"]),
        ("descending", [*rising[::-1], "rtn-8b-g64"]),
        ("none", given_order),
    ):
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == order
        assert names.all_text_contents() == expected
    page.locator("thead th").first.get_by_role("button").click()
    assert names.all_text_contents() == sorted(given_order)
    page.locator("thead th", has_text="Size").get_by_role("button").click()
    assert page.locator('thead th[aria-sort="ascending"]').count() == 1


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_fits_its_width(show, width):
    result = plausible(20, 80, failed={3})
    result = changed(result, 0, name="a-very-long-name-" * 8, command="secateur compress " + "x" * 300)
    result = changed(result, 3, failure="f" * 300)
    result = dataclasses.replace(result, model="/home/someone/" + "models-of-all-kinds" * 10)
    page = show(result, width=width, is_mobile=width < 1000, has_touch=width < 1000)
    for index in (1, 4):
        page.locator(f"#row-{index} a").click()
        assert page.evaluate("document.documentElement.scrollWidth") == width
    # The table is wider than a phone, and scrolls for itself.
    scroll = page.locator("#figures .scroll")
    assert width > 1000 or scroll.evaluate("e => e.scrollWidth > e.clientWidth")


def test_a_tap_tells_a_linear_and_the_next_tap_elsewhere_takes_it_away(show):
    page = show(plausible(2, 30), width=390, has_touch=True, is_mobile=True)
    point_of(page, 2).tap()  # which has the focus then, and loses it
    page.locator(".map").first.locator(".cell").nth(3).tap(force=True)
    assert page.locator("#tip b").text_content() == "model.layers.0.self_attn.o_proj"
    assert page.locator("#tip").is_visible()
    page.locator("#figures h2").tap()
    assert page.locator("#tip").is_hidden()


def test_the_system_decides_between_light_and_dark_until_the_reader_does(show):
    def brightness(page):
        # Of page and text, as the browser computes them: light-dark() is resolved only when it paints.
        colours = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        return [sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 765 for colour in colours]

    light, dark = (show(plausible(2, 2), color_scheme=scheme) for scheme in ("light", "dark"))
    assert brightness(light)[0] > 0.9 > 0.2 > brightness(light)[1]
    assert brightness(dark)[0] < 0.2 < 0.8 < brightness(dark)[1]
    for page, scheme, other in ((light, light, dark), (dark, dark, light)):
        assert scheme is page
        before, opposite = brightness(page), brightness(other)
        page.locator("#theme").click()
        assert brightness(page) == opposite
        page.reload()
        assert brightness(page) == opposite
        page.locator("#theme").click()
        assert brightness(page) == before


def test_a_browser_shows_hostile_names_as_they_are(show):
    page = show(hostile())
    assert page.locator("h1").text_content() == HOSTILE
    assert page.locator("img").count() == 0
    assert page.locator("#plot .label", has_text=HOSTILE).count() == 1
    point_of(page, 1).hover()
    assert page.locator("#tip b").text_content() == HOSTILE
    page.locator(".map .cell").first.hover(force=True)
    assert page.locator("#tip b").text_content() == HOSTILE
    page.locator("#recipe-choice").select_option("2")
    assert entry_of(page).locator(".failure").text_content() == HOSTILE
    assert page.locator("img").count() == 0


def test_without_javascript_all_recipes_are_shown(show):
    page = show(plausible(3, 2), java_script_enabled=False)
    assert page.locator("tbody tr:visible").count() == 4
    assert page.locator(".entry pre:visible").count() == 6
    assert page.locator("#linears").is_hidden()


def test_only_one_point(show):
    page = show(plausible(1, 1))
    assert page.locator("#plot .point").count() == 2
    assert page.locator("#plot .frontier").count() == 1


def test_no_point_at_all(show):
    page = show(plausible(0))
    assert page.locator("#plot .point").count() == 1
    assert entry_of(page).locator("h3").text_content() == "dense model"


def test_all_points_failed(show):
    page = show(plausible(3, 2, failed={0, 1, 2}))
    assert page.locator("#plot .point").count() == 1
    assert page.locator("#linears").count() == 0
    assert "3 recipes failed: see the table." in page.locator("#plot-note").text_content()
    assert "the Gram matrix" in entry_of(page).text_content()
    for quality in ("KL divergence", "same token"):
        page.get_by_label(quality, exact=True).check(force=True)
        assert page.locator("#plot .point").count() == 1


def test_a_quality_that_nothing_was_measured_on_is_not_offered(show):
    result = plausible(2, 2)
    for i in range(2):
        result = changed(result, i, measured={"kl": None, "kl_interval": None})
    page = show(result)
    assert page.locator("#quality-choice label").all_text_contents() == ["perplexity", "same token"]


def test_a_point_without_a_figure_is_left_out_of_its_plot(show):
    page = show(changed(plausible(3, 2), 0, measured={"kl": None, "kl_interval": None}))
    page.get_by_label("KL divergence", exact=True).check(force=True)
    assert page.locator("#plot .point").count() == 3
    assert "1 recipe without this figure." in page.locator("#plot-note").text_content()


def test_an_infinite_perplexity_is_at_the_edge_and_out_of_the_range(show):
    ruined = {"perplexity": math.inf, "perplexity_interval": (math.inf, math.inf)}
    page = show(changed(plausible(3, 2), 2, measured=ruined))
    assert "spqr-3b-g16 (∞ ↑)" in page.locator("#plot .label").all_text_contents()
    assert point_of(page, 3).bounding_box()["y"] < point_of(page, 2).bounding_box()["y"]
    point_of(page, 3).click()
    assert "∞" in entry_of(page).locator("dl").text_content()
    # As if it were not there: the range ends where gptq-4b's interval does.
    ticks = [float(text) for text in page.locator("#plot .tick").first.locator("text").all_text_contents()]
    assert 30 < max(ticks) < 40
    result = changed(changed(changed(plausible(3, 2), 2, measured=ruined), 1, measured=ruined), 0, measured=ruined)
    assert show(result).locator("#plot .point").count() == 4


def test_points_of_the_same_size_and_quality(show):
    same = {"bytes": 10**8, "bits_per_weight": 6.0, "perplexity": 30.0, "perplexity_interval": (30.0, 30.0)}
    result = plausible(3, 2)
    for i in range(3):
        result = changed(result, i, measured=same)
    result = dataclasses.replace(result, dense=dataclasses.replace(result.dense, **same))
    page = show(result)
    assert page.locator("#plot .point").count() == 4
    assert "NaN" not in page.locator("#plot").inner_html()


def test_without_figures_of_linears_there_are_no_heat_maps(show):
    result = plausible(2, 2)
    for i in range(2):
        result = changed(result, i, linears={})
    assert show(result).locator("#linears").count() == 0
