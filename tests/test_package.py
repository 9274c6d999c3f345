"""What is installed, and how: extras, versions, and what goes into a wheel and an sdist."""

import re
from pathlib import Path

import pytest
import yaml
from test_rooms import FILES

import secateur

ROOT = Path(__file__).parent.parent
ALIASES = {"data": "hub", "bench": "plots"}


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_extras_are_called_after_what_they_are_for(project):
    extras = project["optional-dependencies"]
    assert {"experts", "hub", "plots", "sweep", "tasks", "all"} <= extras.keys()
    assert extras["all"] == ["secateur[hub,plots,sweep,experts,tasks]"]
    assert all(extras[old] == [f"secateur[{new}]"] for old, new in ALIASES.items())


def test_who_is_told_to_install_an_extra_is_told_one_that_there_is(project):
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*"), *FILES.values()]
    named = {
        extra
        for page in pages
        if page.suffix in (".md", ".py", ".yml", ".ipynb")
        for extras in re.findall(r"(?:secateur|'\.)\[([a-z,]+)\]", page.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    }
    assert {"hub", "plots", "sweep", "tasks"} <= named
    assert named <= project["optional-dependencies"].keys() - ALIASES.keys()


def test_the_version_stands_in_one_place(project):
    assert "version" in project["dynamic"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    changes = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert str(cited) == secateur.__version__
    assert changes[0] in ("Unreleased", secateur.__version__)


def test_metadata(project):
    assert "Operating System :: POSIX" in project["classifiers"]
    assert "quantization" in project["keywords"]
    assert project["requires-python"] == ">=3.10"
