"""The pages are true where a machine can tell: links lead somewhere, figures of the README are the benchmarks', and so on."""

import re
import subprocess
import sys

import pytest
import yaml
from smollm2 import ROOT

import secateur

PAGES = [page for page in sorted(ROOT.rglob("*.md")) if not {".venv", "build", "demo-out"} & set(page.parts)]
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def text_of(path):
    return (ROOT / path).read_text(encoding="utf-8")


def anchors(text):
    """Of the headings, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_readme_is_short_and_its_figures_are_the_benchmarks():
    readme = text_of("README.md")
    assert len(readme.splitlines()) <= 160
    measured = text_of("benchmarks/README.md")
    rows = [line for line in readme.splitlines() if line.startswith("|") and "→" in line]
    figures = {figure for row in rows for figure in re.findall(r"\d+(?:\.\d+)?", row.partition("bfloat16")[2])}
    assert len(figures) > 8
    assert [figure for figure in figures - {"4"} if not re.search(rf"\b{re.escape(figure)}\b", measured)] == []


@pytest.mark.parametrize("page", ["README.md", "docs/command-line.md", "docs/tutorial.md", "demo.py"])
def test_options_on_the_pages_are_those_of_the_commands(page):
    """What help and parser know: a renamed option would leave the pages behind."""
    from secateur.commands.command import build
    from secateur.commands.find_commands import find

    for name, rest in re.findall(r"secateur ([a-z]+) ([^\n`|]*)", text_of(page)):
        if find(name) is None or name == "run":
            continue
        known = {option for each in build(name).params for option in (*each.opts, *each.secondary_opts)}
        said = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest.partition("#")[0]))
        assert said <= known, (name, said - known)


def test_every_variable_that_is_read_stands_on_the_page():
    page = text_of("docs/environment.md")
    read = re.compile(r"environ(?:\.get|\.setdefault|\.pop)?[\[(]\s*\"(\w+)\"|getenv\(\"(\w+)\"")
    names = {
        name for file in (ROOT / "secateur").rglob("*.py") for found in read.findall(file.read_text()) for name in found
    }
    assert sorted(name for name in names - {""} if f"`{name}`" not in page) == []


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="the site needs mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    made = (tmp_path / "site" / "reference" / "api.html").read_text(encoding="utf-8")
    assert [name for name in secateur.__all__ if not name.startswith("__") and f'.{name}"' not in made] == []
    assert "--sparsity" in (tmp_path / "site" / "reference" / "commands.html").read_text(encoding="utf-8")


def test_forms_and_workflows_parse():
    files = sorted((ROOT / ".github").rglob("*.yml"))
    assert len(files) > 4
    assert all(isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict) for file in files)
    assert yaml.safe_load(text_of("CITATION.cff"))["cff-version"] == "1.2.0"


def test_what_a_newcomer_needs_stands_on_the_first_screen():
    """The three tasks of CONTRIBUTING, each by the command that it names."""
    section = text_of("CONTRIBUTING.md").partition("## What a newcomer has to find")[2].partition("\n## ")[0]
    tasks = re.findall(r"^\| ([^|]+) \| `(secateur [^`]+)` \| the first screen \|$", section, re.MULTILINE)
    assert len(tasks) == 3
    first_screen = "\n".join(text_of("README.md").splitlines()[:40])
    assert [task for task, command in tasks if command not in first_screen] == []
