"""The pictures of the frontier in README and docs."""

import json
import re
from xml.etree import ElementTree

import pytest
from smollm2 import ROOT

pytest.importorskip("matplotlib")
from benchmarks.frontier import INK, PICTURES, WORDS, draw, frontier


def test_the_frontier_is_of_what_nothing_beats():
    points = [{"bytes": size, "value": value} for size, value in ((1, 9), (2, 5), (3, 5), (4, 7), (5, 4))]
    assert [p["value"] for p in frontier(points, higher=False)] == [9, 5, 4]
    assert [p["value"] for p in frontier(points, higher=True)] == [9]


@pytest.mark.thin(2)
@pytest.mark.parametrize("theme", INK)
@pytest.mark.parametrize("kind", WORDS)
def test_a_picture_says_what_it_shows(kind, theme, tmp_path):
    figures = json.loads((PICTURES / "frontier.json").read_text(encoding="utf-8"))
    assert "benchmarks" in figures["about"]
    draw(kind, figures[kind], theme, tmp_path / "picture.svg")
    said = " ".join(ElementTree.parse(tmp_path / "picture.svg").getroot().itertext())
    assert WORDS[kind][0] in said
    assert WORDS[kind][1] in said
    assert "size on disk, MB" in said
    assert "dense" in said
    there = PICTURES / f"frontier-{kind}-{theme}.svg"
    assert figures[kind]["title"] in there.read_text(encoding="utf-8")


def test_pages_show_a_picture_for_each_kind_of_page():
    for page in ("README.md", "docs/results.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        named = re.findall(r'(?:src|srcset)="([^"]+\.svg)"', text)
        assert named
        assert all(((ROOT / page).parent / name).is_file() for name in named)
        assert sum("dark" in name for name in named) == sum("light" in name for name in named)
