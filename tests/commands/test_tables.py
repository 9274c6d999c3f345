"""Tables are whole in a pipe, and give up what they can spare on a narrow screen."""

import io
import re
from functools import partial

import pytest
from rich.console import Console
from rich.text import Text

import secateur
from secateur.recipes.built_in import built_in
from secateur.recipes.recipe import Calibration, Recipe
from secateur.recipes.strings import parse_recipes
from secateur.speed import bench as bench_file
from secateur.terminal.tables import Column, print_table


class Screen(io.StringIO):
    """A terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def shown(columns, rows, width=80, file=None, **options):
    """What a table looks like on a screen of so many characters, or in another file, line by line without colours."""
    file = Screen() if file is None else file
    print_table(Console(file=file, width=width, emoji=False, highlight=False), columns, rows, **options)
    return Text.from_ansi(file.getvalue()).plain.splitlines()


NAMES = [f"model.language_model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qk"]
COLUMNS = [Column("linear", right=False), Column("shape", spare=2), Column("bits"), Column("bytes", spare=1)]
ROWS = [[name, "4096×11008", "4.3125", "123456789"] for name in NAMES]
TOTAL = [None, ["all linears, whose name is long", "", "4.3", "1"]]


@pytest.mark.parametrize("width", [10, 80])
@pytest.mark.parametrize("lines", [False, True])
def test_a_pipe_gets_everything(width, lines):
    long = [[f"{'x' * 500}.{name}", *rest] for name, *rest in ROWS]
    found = shown(COLUMNS, [*long, *TOTAL], width, io.StringIO(), title="t" * 200, lines=lines, dotted=True)
    assert found[0] == "t" * 200
    for row in [*long, TOTAL[1]]:
        assert sum(all(cell in line for cell in row) for line in found) == 1
    assert len({len(line) for line in found[1:]}) == (1 if lines else len({len(line) for line in found[1:]}))


def test_a_wide_screen_gets_everything():
    found = shown(COLUMNS, ROWS, 120, dotted=True)
    assert all(any(cell in line for line in found) for row in ROWS for cell in row)
    assert "shape" in found[1]
    assert not any("begin with" in line for line in found)


def test_what_all_names_begin_with_goes_first():
    found = shown(COLUMNS, [*ROWS, *TOTAL], 80, dotted=True)
    assert found[0] == "all names begin with model.language_model.layers."
    for name in NAMES:
        (line,) = [line for line in found if name.removeprefix("model.language_model.layers.") in line]
        assert "123456789" in line
        assert "4096×11008" in line
    assert any("all linears, whose name is long" in line for line in found)
    assert max(map(len, found)) <= 80


def test_then_columns_go_that_can_be_spared():
    found = shown(COLUMNS, ROWS, 48, dotted=True)
    text = "\n".join(found)
    assert "bytes" in text
    assert "shape" not in text
    assert "4096" not in text
    found = "\n".join(shown(COLUMNS, ROWS, 33, dotted=True))
    assert "4.3125" in found
    assert "bytes" not in found


def test_at_last_cells_go_on_in_the_next_line():
    found = shown(COLUMNS, ROWS, 16, dotted=True)
    assert max(map(len, found[1:])) <= 16
    inside = "".join(re.sub(r"[^\w.]", "", line.split("│")[1]) for line in found if "│" in line)
    assert all(name.removeprefix("model.language_model.layers.") in inside for name in NAMES)
    assert "…" not in "".join(found)


def test_names_that_have_nothing_in_common():
    assert shown(COLUMNS, [["a.b.c", "", "", ""], ["b.c.d", "", "", ""]], 20, dotted=True)[0].startswith("┏")
    for names in (["model.layers.0"], ["model.layers"], ["a", "a"], [], ["model.layers.0", "model.layers"]):
        found = shown([Column("block"), Column("x" * 30, spare=1)], [[name, "1"] for name in names], 20, dotted=True)
        assert all(any(name.rpartition(".")[2] in line for line in found) for name in names)


def test_markup_and_control_characters_are_text():
    found = shown([Column("[red]a")], [["[bold]x\x1b[31m\a"]])
    assert "[red]a" in found[1]
    assert "[bold]x�[31m�" in found[3]


# --- the commands, which write into a pipe here


@pytest.fixture(scope="module")
def packed(model_of, text_file, tmp_path_factory):
    """In a folder whose name is long. Not to be written to."""
    out = tmp_path_factory.mktemp("packed") / ("a-name-of-a-folder-" * 6)
    recipe = Recipe(
        "wanda",
        0.5,
        quantize="spqr",
        quantization={"bits": 3, "group_size": 8},
        calibration=Calibration(str(text_file), 8, 24),
    )
    secateur.compress(str(model_of("llama")), out, recipe)
    return out


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")


def test_inspect(says, packed):
    code, stdout, _ = says("inspect", packed)
    assert code == 0
    for part in ("q_proj", "down_proj"):
        (first, second) = [line for line in stdout.splitlines() if part in line]
        assert f"model.layers.0.{'self_attn' if part == 'q_proj' else 'mlp'}.{part}" in first
        assert "sparse-int" in second
        assert "50.00%" in second
    assert "…" not in stdout


def test_eval(says, packed, model_of, text_file):
    args = ("--data", text_file, "--seq-len", 16, "--windows", 5, "--by-block", "--reference", model_of("llama"))
    code, stdout, _ = says("eval", packed, *args)
    assert code == 0
    (heading,) = [line for line in stdout.splitlines() if str(packed) in line]
    assert str(model_of("llama")) in heading
    assert "same most likely token" in stdout
    assert "model.layers.1 " in stdout
    assert f"5 windows of 16 tokens of {text_file}, with BOS" in stdout.splitlines()


def test_gate(says, packed, text_file, tmp_path):
    baseline = tmp_path / ("baseline-" * 12 + ".json")
    assert says("gate", packed, "--baseline", baseline, "--write", "--data", text_file, "--seq-len", 16)[0] == 0
    code, stdout, _ = says("gate", packed, "--baseline", baseline)
    assert code == 0
    assert f"{packed} against {baseline}, with BOS" in stdout.splitlines()
    (line,) = [line for line in stdout.splitlines() if "perplexity" in line]
    assert line.count("%") == 3


def test_plan_and_recipes(says, model_of):
    code, stdout, _ = says("plan", model_of("llama"), "--quantize", "rtn", "-q")
    assert code == 0
    assert f"{model_of('llama')}, 2 blocks" in stdout.splitlines()
    code, stdout, _ = says("recipes")
    lines = [line.rstrip() for line in stdout.splitlines()]
    for name in ("gptq-4bit-vllm", "rtn-8bit"):
        found = built_in(name)
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert line.endswith(found.good_for)
        assert any(line.strip() == found.costs for line in lines)


def test_the_choices_of_compress(says, model_of, text_file, tmp_path):
    args = ("--prune", "magnitude", "--sparsity", "50%", "--allocation", "owl")
    text = ("--calibration", text_file, "--samples", 8, "--seq-len", 24)
    code, _, stderr = says("compress", model_of("llama"), tmp_path / "out", *args, *text)
    assert code == 0
    (heading,) = [line for line in stderr.splitlines() if re.match(r" *block +q_proj", line)]
    assert "down_proj" in heading


def test_sweep(says, model_of, text_file, tmp_path):
    [(name, _)] = parse_recipes("magnitude:0.5+rtn:4(group_size=16,search_range=false,symmetric=true)")
    text = ("--data", text_file, "--seq-len", 16, "--windows", 5)
    code, stdout, _ = says("sweep", model_of("llama"), "--recipes", name, "--out", tmp_path / "out", *text, "-q")
    assert (code, stdout) == (0, "")
    code, stdout, _ = says("sweep", model_of("llama"), "--recipes", name, "--out", tmp_path / "two", *text)
    assert code == 0
    (line,) = [line for line in stdout.splitlines() if name in line]
    assert "kB" in line
    assert all(heading in stdout for heading in ("bits per weight", "agreement", "seconds"))


@pytest.mark.usefixtures("small_cache")
def test_bench(says, packed, monkeypatch):
    monkeypatch.setattr(bench_file, "bench", partial(bench_file.bench, seconds=0.01))
    code, stdout, _ = says("bench", packed)
    assert code == 0
    (heading, *_) = [line for line in stdout.splitlines() if line.lstrip().startswith("shape")]
    assert heading.split()[-2:] == ["of", "copy"]


def test_colours_that_are_forced_make_no_screen(says, packed, monkeypatch):
    """As CI does."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    forced = Console(emoji=False, highlight=False, force_terminal=True)
    monkeypatch.setattr("secateur.commands.inspect_command.screen", forced)
    code, stdout, _ = says("inspect", packed)
    assert code == 0
    assert len([line for line in stdout.splitlines() if "model.layers.1.self_attn.q_proj" in line]) == 1
