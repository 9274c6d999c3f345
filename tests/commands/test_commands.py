"""Commands are found, listed and called one by one; what is wrong on a command line is said in one line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import typer

import secateur
from secateur import cli
from secateur.commands.command import build
from secateur.commands.find_commands import find, names
from secateur.commands.spelling import as_flags

ROOT = Path(secateur.__file__).parent.parent
COMMANDS = ROOT / "secateur" / "commands"


@pytest.fixture
def refused(says):
    """The line about a command line that is wrong."""

    def run(*args):
        code, out, err = says(*args)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return run


def test_commands_are_listed_in_the_order_of_work(says):
    expected = [
        "compress",
        "plan",
        "recipes",
        "methods",
        "eval",
        "gate",
        "sweep",
        "inspect",
        "probe",
        "experts",
        "verify",
        "bench",
    ]
    expected += ["export", "card", "push", "generate", "run", "compare", "cache", "doctor"]
    assert names() == expected
    code, out, _ = says("--help")
    assert code == 0
    assert re.findall(r"^│ (\w+) ", out, re.MULTILINE) == expected


@pytest.mark.parametrize("name", names())
def test_a_command_is_a_small_file(name):
    text = (COMMANDS / f"{name}_command.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 160
    assert find(name).help == build(name).help
    assert len((ROOT / "secateur" / "cli.py").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--nope"], "no such option: --nope; see `.* --help`"),
        (["nope"], "there is no command 'nope': it can be bench, .*"),
        (["inspekt", "x"], "there is no command 'inspekt': did you mean 'inspect'\\?"),
        (["eval"], "missing argument '(model|MODEL)'; see `.* eval --help`"),
        (["sweep", "x"], "missing option '--recipes'; see .*"),
        (["eval", "x", "--windows", "0"], "invalid value for '--windows': .*1.*; see .*"),
        (["eval", "x", "--windows", "some"], "invalid value for '--windows': .*integer.*; see .*"),
        (["generate", "x", "y", "--temperature", "-1"], "invalid value for '--temperature': .*0.*; see .*"),
        (["eval", "x", "--wndows", "3"], "no such option: --wndows .*--windows.*; see .*"),
        (["eval", "x", "--windows"], "option '--windows' requires an argument.*"),
        (["eval", "x", "y"], "got unexpected extra argument.*y.*; see .*"),
        (["run"], "missing argument '(command|COMMAND)[.]*'; see .*"),
        (["compress", "x", "y", "--bits", "few"], "invalid value for '--bits': .*; see .*"),
        (["verify", ""], "OUT is empty: .*"),
    ],
)
def test_wrong_usage_is_one_line(args, said, refused):
    assert re.fullmatch(said, refused(*args))


def test_no_arguments_show_the_help(says):
    code, out, err = says()
    assert code in (0, 2)  # by the release of typer
    assert "Usage:" in out + err
    assert "error" not in err


def test_a_choice_that_there_is_not(capfd):
    from enum import Enum

    app = typer.Typer()

    @app.command()
    def main(colour: Enum("Colour", {"red": "red", "blue": "blue"}) = "red"):
        pass

    assert cli.run(lambda **options: app(["--colour", "green"], **options)) == 2
    line = capfd.readouterr().err
    assert line.startswith("error: invalid value for '--colour': ")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        ("eval", "`seq_len` 1 is too short", "--seq-len 1 is too short"),
        ("eval", "leave `bos=False` out", "leave --no-bos out"),
        ("eval", "give `overwrite=True` or `nope='x y'`", "give --overwrite or `nope='x y'`"),
        ("export", "`to='dense'` writes any model", "--to dense writes any model"),
        ("compress", "`ignore=['a.*.b', 'c']` (3 linears)", "--ignore 'a.*.b' --ignore c (3 linears)"),
        ("eval", "`cache` needs `reference`", "--reference-cache needs --reference"),
        ("gate", "`perplexity_rise` -1", "--max-perplexity-rise -1"),
        ("sweep", "`source` self", "--calibration self"),
        ("compress", "`source` self", "--calibration self"),
        ("compress", "`calibration` self", "--calibration self"),
        ("compress", "`out` is `nothing`", "OUT is `nothing`"),
        (None, "`group_size` 3 in `secateur run`", "--group-size 3 in `secateur run`"),
    ],
)
def test_messages_name_flags(command, text, said):
    assert as_flags(text, command) == said


def test_debug_shows_the_traceback(says, tmp_path):
    code, _, err = says("inspect", tmp_path / "nothing", "--debug")
    assert (code, "Traceback" in err) == (2, True)
    code, _, err = says("inspect", tmp_path / "nothing")
    assert (code, "Traceback" in err) == (2, False)


def run(code, **env):
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize(("option", "most"), [("--version", 10), ("--help", 45)])
def test_what_needs_no_torch_does_without(option, most):
    found = run(f"""
import sys
sys.argv = ["secateur", {option!r}]
from secateur.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
ours = [name for name in sys.modules if name.partition(".")[0] == "secateur"]
assert len(ours) <= {most}, ours
assert not {{"torch", "transformers"}} & set(sys.modules)
""")
    assert found.returncode == 0, found.stderr


@pytest.fixture(scope="module")
def with_a_command(tmp_path_factory):
    """A folder with the package of `examples/custom_command` as pip installs it."""
    site = tmp_path_factory.mktemp("site")
    example = ROOT / "examples" / "custom_command"
    (site / "custom_command.py").write_bytes((example / "custom_command.py").read_bytes())
    about = site / "secateur_custom_command-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: secateur-custom-command\nVersion: 0.1\n")
    entries = re.search(r'entry-points\."(.*)"\]\n(\w+) = "(\w+)"', (example / "pyproject.toml").read_text())
    group, name, module = entries.groups()
    broken = "broken = no_such_module\n"
    (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n{broken}unnamed = {module}\n")
    return site


def test_a_package_of_somebody_else_adds_a_command(with_a_command, model_of):
    """One file outside the package: it is in the help, has options, and its errors name them."""

    def call(*args):
        return processes.command(*args, path=[with_a_command])

    listed = call("--help")
    assert listed.returncode == 0
    assert "List the linears of MODEL that take most bytes." in listed.stdout
    assert "'broken' of no_such_module cannot be loaded: No module named 'no_such_module'" in listed.stderr
    made = call("largest", model_of("llama"), "--count", 2)
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.count("model.layers.") == 2
    wrong = call("largest", model_of("llama"), "--count", 0)
    assert (wrong.returncode, wrong.stderr) == (2, "error: --count 0 lists nothing: give 1 or more\n")
    broken = call("broken")
    assert (broken.returncode, broken.stderr.count("\n")) == (1, 1)
    unnamed = call("unnamed")
    assert "custom_command registers no command 'unnamed'" in unnamed.stderr
