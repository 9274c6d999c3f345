"""What registers itself is found by its name, and no other file is imported for it."""

import sys

import pytest

from secateur.core.discovery import Table
from secateur.formats.layouts.layout import LAYOUTS

FILE = """
from discovered import TABLE
TABLE["NAME"] = "NAME"
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of three files, of which the place of two is known."""
    package = tmp_path / "discovered"
    package.mkdir()
    (package / "__init__.py").write_text("TABLE = None\n")
    for name in ("first", "second", "third"):
        (package / f"{name}.py").write_text(FILE.replace("NAME", name))
    monkeypatch.syspath_prepend(str(tmp_path))
    import discovered

    files = {name: f"discovered.{name}" for name in ("first", "second")}
    discovered.TABLE = Table(["discovered"], "secateur.nothing", "things", files)
    yield discovered.TABLE
    for name in [name for name in sys.modules if name.partition(".")[0] == "discovered"]:
        del sys.modules[name]


def imported():
    return {name.partition(".")[2] for name in sys.modules if name.startswith("discovered.")}


def test_a_name_imports_its_own_file(table):
    assert table["second"] == "second"
    assert imported() == {"second"}
    assert "first" in table
    assert imported() == {"first", "second"}


def test_a_name_that_is_not_known_to_be_in_a_file_is_looked_for_in_all(table):
    assert table["third"] == "third"
    assert imported() == {"first", "second", "third"}
    assert "fourth" not in table
    with pytest.raises(KeyError, match="fourth"):
        table["fourth"]


def test_going_through_it_imports_all_in_the_order_of_names(table):
    table["0"] = "own"
    assert table["0"] == "own"
    assert imported() == set()
    assert list(table) == ["0", "first", "second", "third"]
    assert len(table) == 4
    del table["0"]
    assert dict(table) == {name: name for name in ("first", "second", "third")}


def test_layouts_are_in_the_files_where_they_are_looked_for():
    assert len(LAYOUTS._files) >= 15
    assert {name: LAYOUTS[name].__module__ for name in LAYOUTS._files} == LAYOUTS._files
