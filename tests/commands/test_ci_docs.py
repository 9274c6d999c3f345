"""The examples of docs/ci.md are run, on a tiny model, so that they stay true."""

import os
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from tiny import set_json

import secateur
from secateur.evaluation.eval_text import Text
from secateur.evaluation.gate.baseline import Baseline, write_baseline

pytest_plugins = "pytester"

PAGE = Path(__file__).parents[2] / "docs" / "ci.md"


def blocks(language):
    """The code of that language on the page."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [code for its, code in found if its == language]


GITHUB, GITLAB = (yaml.safe_load(block) for block in blocks("yaml"))
GITLAB = GITLAB["gate"]
STEPS = GITHUB["jobs"]["gate"]["steps"]


def commands(lines):
    """Those of secateur among lines of shell."""
    return [line for line in lines if line.startswith("secateur ")]


GITHUB_COMMANDS = commands(line for step in STEPS for line in step.get("run", "").splitlines())
GITLAB_COMMANDS = commands(GITLAB["script"])
PLAIN_COMMANDS = commands(line for block in blocks("") for line in block.splitlines())


@pytest.fixture
def project(model_of, text_file, tmp_path, monkeypatch):
    """A folder with what the examples suppose: a recipe, and a baseline of what it gave."""
    monkeypatch.chdir(tmp_path)
    # Long enough for the windows that the command takes by default.
    model = str(model_of("llama", max_position_embeddings=1024))
    monkeypatch.setenv("MODEL", model)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    Path("compress.yaml").write_text("prune: magnitude\nsparsity: 0.5\n")
    secateur.compress(model, "before", secateur.Recipe(prune="magnitude", sparsity=0.5))
    write_baseline("before", Path("baseline.json"), Text(str(text_file), 24, 8))
    return tmp_path


@pytest.fixture
def sh(says):
    """Run a line as a shell would; its exit code."""

    def run(line):
        words = shlex.split(os.path.expandvars(line), comments=True)
        assert words.pop(0) == "secateur"
        code, _, err = says(*words)
        assert "Traceback" not in err
        return code

    return run


@pytest.mark.thin(2)
@pytest.mark.parametrize("lines", [GITHUB_COMMANDS, GITLAB_COMMANDS], ids=["github", "gitlab"])
@pytest.mark.parametrize("regression", [False, True])
def test_the_pipelines_run(lines, regression, project, sh):
    assert [line.split()[1] for line in lines] == ["compress", "gate"]
    if regression:
        set_json(project / "baseline.json", lambda content: content["size"].update(bytes=1000))
    assert [sh(line) for line in lines] == [0, int(regression)]
    suite = ElementTree.parse(project / "gate.xml").getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("2", str(int(regression)))


def test_what_the_pipelines_keep_is_what_the_gate_writes(project, sh):
    for line in GITHUB_COMMANDS:
        sh(line)
    (upload,) = [step for step in STEPS if "upload-artifact" in step.get("uses", "")]
    assert upload["if"] == "always()"
    assert (project / upload["with"]["path"]).is_file()
    assert (project / "summary.md").read_text().startswith("### secateur gate: passed")
    (project / "gate.xml").unlink()
    for line in GITLAB_COMMANDS:
        sh(line + " --overwrite" * ("compress" in line))
    artifacts = GITLAB["artifacts"]
    assert artifacts["when"] == "always"
    assert all((project / name).is_file() for name in [*artifacts["paths"], artifacts["reports"]["junit"]])


def test_the_pipelines_are_of_the_form_that_is_read():
    """YAML takes `on:` for a truth value; so does everyone who parses it for GitHub."""
    assert set(GITHUB) == {"name", True, "jobs"}
    assert all(("uses" in step) != ("run" in step) for step in STEPS)
    assert set(GITLAB) == {"image", "rules", "variables", "cache", "before_script", "script", "artifacts"}
    assert all(isinstance(line, str) for line in GITLAB["before_script"] + GITLAB["script"])
    install = next(step["run"] for step in STEPS if step.get("name") == "Install").splitlines()
    assert install == GITLAB["before_script"]


def test_the_other_commands_run_in_their_order(project, sh, model_of):
    """A baseline is written, and compared with; MODEL is the dense one."""
    assert len(PLAIN_COMMANDS) == 3
    sh(GITHUB_COMMANDS[0])
    (project / "baseline.json").unlink()
    model = os.environ["MODEL"]
    lines = [line.replace(" MODEL ", f" {model} ").replace("--max-kl 0.5", "--max-kl 9") for line in PLAIN_COMMANDS]
    # A random model agrees with nobody.
    lines = [line.replace("--min-agreement 70%", "--min-agreement 0%") for line in lines]
    assert [sh(line) for line in lines] == [0, 0, 0]
    kept = Baseline.read(project / "baseline.json")
    assert (kept.text.data, kept.text.windows, kept.text.seq_len) == ("docs", 16, 512)
    assert len(list((project / ".cache" / "reference").glob("*/*.safetensors"))) == 16


def test_the_test_runs(pytester, project, sh):
    sh(GITHUB_COMMANDS[0])
    (example,) = blocks("python")
    (project / "OUT").rename(pytester.path / "OUT")
    (project / "baseline.json").rename(pytester.path / "baseline.json")
    os.chdir(pytester.path)
    pytester.makepyfile(example)
    run = pytester.inline_run("-p", "no:cacheprovider")
    assert tuple(map(len, run.listoutcomes())) == (1, 0, 0)


def test_the_figures_of_the_page_are_those_of_the_program():
    """Defaults, and the fewest windows."""
    from secateur.evaluation.gate.baseline import TEXT
    from secateur.evaluation.gate.tolerances import Tolerances
    from secateur.evaluation.uncertainty import fewest_windows

    page, default = PAGE.read_text(encoding="utf-8"), Tolerances()
    assert f"`--max-perplexity-rise` (default {default.perplexity_rise:.0%})".replace("%", " %") in page
    assert f"`--max-size-rise` (default {default.size_rise:.1%})".replace("%", " %") in page
    assert f"`--confidence` (default {default.confidence:.0%})".replace("%", " %") in page
    assert f"fewer than {fewest_windows(default.confidence)} nothing" in page
    assert f"{TEXT.windows} of {TEXT.seq_len} tokens are the default" in page
