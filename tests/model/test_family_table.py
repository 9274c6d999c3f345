"""The page of families says what is so."""

import re

import pytest
import transformers
from family_table import FAMILIES, NOT_TRIED, PAGE, WORKS, page, try_all

RELEASE = re.search(r"transformers (\d+\.\d+)", PAGE.read_text(encoding="utf-8"))[1]
# The page is of one release; CI may run others.
same_release = pytest.mark.skipif(
    not transformers.__version__.startswith(f"{RELEASE}."), reason=f"the page is of transformers {RELEASE}"
)
# One of each kind of structure.
SAMPLE = [
    "llama",
    "gpt_neo",
    "xlnet",
    "hrm_text",
    "zamba2",
    "git",
    "olmo_hybrid",
    "falcon_mamba",
    "whisper",
    "mixtral",
    "jetmoe",
]


def named_on(text):
    return re.findall(r"`([\w.-]+)`(?= \||,|$)", text, re.MULTILINE)


@same_release
def test_the_page_names_every_family_once():
    assert sorted(named_on(PAGE.read_text(encoding="utf-8"))) == sorted(FAMILIES)


@pytest.mark.thin(2)
@pytest.mark.parametrize("family", [name for name in SAMPLE if name in FAMILIES])
def test_a_sample_of_the_page_is_so(family):
    (row,) = try_all([family])
    text = PAGE.read_text(encoding="utf-8")
    if row.logits == WORKS:
        assert f"| `{family}` | {row.notes} |" in text
    else:
        assert "mixture of experts" in row.compress
        assert f"`{family}`" in text[text.index("## Refused") : text.index("## Not tried")]


@same_release
@pytest.mark.slow
def test_the_whole_page_is_so():
    rows = list(try_all())
    assert {row.family for row in rows} | set(NOT_TRIED) == set(FAMILIES)
    assert PAGE.read_text(encoding="utf-8") == page(rows)
