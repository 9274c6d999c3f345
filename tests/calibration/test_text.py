"""Reading text from files, folders, data sets and CPython itself."""

import gzip
import json
import logging
import sys

import pytest

from secateur.calibration.text import read_text
from secateur.calibration.text_files import _CHUNK_BYTES
from secateur.calibration.text_rows import chat_template
from secateur.errors import SecateurError, UsageError


@pytest.fixture
def no_retries(monkeypatch):
    """A hub that answers nothing, at once."""
    datasets = pytest.importorskip("datasets")

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\n(no route)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)


def put(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param("Käse\nund 面\n".encode(), id="utf-8"),
        pytest.param("Käse\nund 面\n".encode("utf-8-sig"), id="utf-8 with mark"),
        pytest.param(b"\xff\xfe" + "Käse\nund 面\n".encode("utf-16-le"), id="utf-16-le"),
        pytest.param(b"\xfe\xff" + "Käse\nund 面\n".encode("utf-16-be"), id="utf-16-be"),
        pytest.param(b"\xff\xfe\0\0" + "Käse\nund 面\n".encode("utf-32-le"), id="utf-32-le"),
        pytest.param("Käse\r\nund 面\r".encode(), id="other line ends"),
    ],
)
def test_a_text_file_is_one_document(tmp_path, raw):
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    assert read_text(str(path)) == ["Käse\nund 面\n"]
    assert read_text(str(path), max_chars=6) == ["Käse\nu"]


def test_characters_and_line_ends_may_straddle_chunks(tmp_path):
    text = "a" * (_CHUNK_BYTES - 1) + "面" + "b" * (_CHUNK_BYTES - 3) + "\r\nend"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert read_text(str(path)) == [text.replace("\r\n", "\n")]


@pytest.mark.parametrize(
    ("raw", "byte", "encoding"),
    [
        (b"caf\xe9 au lait", 3, "UTF-8"),
        (b"a" * (_CHUNK_BYTES - 1) + b"\xe9\xa0", _CHUNK_BYTES - 1, "UTF-8"),
        (b"\xef\xbb\xbfcaf\xe9 au lait", 6, "UTF-8"),
        ("no mark".encode("utf-16-le"), 1, "UTF-8"),
        (b"\xff\xfea\0b", 4, "UTF-16"),
        (b"\xff\xfea\0\x00\xdcb\0", 4, "UTF-16"),
    ],
)
def test_an_unknown_encoding_is_located(tmp_path, raw, byte, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    with pytest.raises(UsageError, match=rf"a\.txt .* byte {byte} is not {encoding} text"):
        read_text(str(path))


def test_jsonl_has_a_document_a_line(tmp_path):
    path = put(
        tmp_path / "a.jsonl", {"text": "one", "body": "I"}, {"text": "two\u2028lines", "body": "II"}, {"text": None}
    )
    assert read_text(path) == ["one", "two\u2028lines"]
    assert read_text(path, max_chars=5) == ["one", "tw"]
    with pytest.raises(
        UsageError, match=r"line 1 of .*a\.jsonl has no field 'content': it has 'text', 'body'.*`text_field`"
    ):
        read_text(path, "content")
    with pytest.raises(UsageError, match=r"line 3 of .* has no field 'body': it has 'text'"):
        read_text(path, "body")


def test_jsonl_stops_reading_when_it_has_enough(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\nbad\n')
    assert read_text(str(path), max_chars=4) == ["good"]
    with pytest.raises(UsageError, match=r"line 3 of .*a\.jsonl is not valid JSON"):
        read_text(str(path))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('["text"]', r"line 1 of .* is not an object"),
        ('{"text": 3}', r"field 'text' of line 1 of .* holds int, not text"),
        ("{}", r"line 1 of .* has no field 'text': it has none"),
        ("[" * 200_000, r"line 1 of .* is not valid JSON"),
        ('{"text": "  "}', r"holds no text"),
    ],
)
def test_jsonl_of_something_else(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(UsageError, match=problem):
        read_text(str(path))


def test_half_a_surrogate_pair_does_not_reach_the_tokenizer(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "half \\ud83d pair, \\ud83d\\ude00"}\n')
    assert read_text(str(path)) == ["half ? pair, 😀"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), path)
    assert read_text(path) == ["one", "two"]
    assert read_text(path, max_chars=2) == ["on"]
    with pytest.raises(UsageError, match=r"a\.parquet has no field 'body': it has 'text', 'n'"):
        read_text(path, "body")
    with pytest.raises(UsageError, match=r"field 'n' of .* holds int, not text"):
        read_text(path, "n")
    (tmp_path / "b.parquet").write_text("not at all")
    with pytest.raises(UsageError, match=r"b\.parquet is damaged or not a Parquet file"):
        read_text(str(tmp_path / "b.parquet"))


def test_the_reference_text_of_cpython():
    documents = read_text("docs")
    assert len(documents) > 50
    assert sum(map(len, documents)) > 300_000
    assert read_text("docs", max_chars=100) == [documents[0][:100]]


@pytest.mark.parametrize(
    "spec", ["missing.txt", "some/where/missing.jsonl", "./missing", "/nowhere", "a/b/c", "x.parquet:train"]
)
def test_no_such_file(spec):
    with pytest.raises(UsageError, match=f"no such file: {spec}"):
        read_text(spec)


@pytest.mark.parametrize("spec", ["two words", "a:b:c:d", "wikitext2:a:b", "x" * 5000 + "!"])
def test_not_a_spec(spec):
    with pytest.raises(UsageError, match="is not a text"):
        read_text(spec)


def test_an_empty_spec():
    with pytest.raises(UsageError, match="the name of a text is empty"):
        read_text("")


def test_empty_and_unknown_files(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text(" \n")
        with pytest.raises(UsageError, match="holds no text"):
            read_text(str(tmp_path / name))
    (tmp_path / "a.pdf").write_text("text")
    with pytest.raises(UsageError, match=r"a\.pdf is of no known kind: text is read from \.txt, \.md, \.jsonl"):
        read_text(str(tmp_path / "a.pdf"))


def test_an_existing_file_wins_over_a_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    assert len(read_text("docs")) > 50, "a folder does not"
    (tmp_path / "c4").write_text("text")
    with pytest.raises(UsageError, match="c4 is of no known kind"):
        read_text("c4")


def test_a_folder_through_datasets(tmp_path):
    pytest.importorskip("datasets")
    put(tmp_path / "train.jsonl", {"text": "one"}, {"text": ""}, {"text": "two"})
    put(tmp_path / "test.jsonl", {"text": "three"})
    folder = str(tmp_path)
    assert read_text(folder) == ["one", "two"]
    assert read_text(f"{folder}:default:train", max_chars=5) == ["one", "tw"]
    assert read_text(f"{folder}:test") == read_text(f"{folder}::test") == ["three"]
    with pytest.raises(UsageError, match=r"has no field 'body': it has 'text'"):
        read_text(folder, "body")
    with pytest.raises(UsageError, match=r"cannot be read as asked: .*validation"):
        read_text(f"{folder}:validation")
    with pytest.raises(UsageError, match=r"cannot be read as asked: .*other"):
        read_text(f"{folder}:other")


def test_short_names_of_data_sets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split))
        assert streaming
        return iter([{"text": " = Title = \n"}, {"text": ""}, {"text": " Words . \n"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_text("wikitext2") == [" = Title = \n\n\n\n\n Words . \n"]
    assert read_text("c4", held_out=True) == [" = Title = \n", " Words . \n"]
    read_text("wikitext2", held_out=True)
    read_text("wikitext2:validation", held_out=True)
    read_text("org/name:en:train")
    read_text("name:en")
    read_text("name:test")
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ("allenai/c4", "en", "validation"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "validation"),
        ("org/name", "en", "train"),
        ("name", "en", "train"),
        ("name", None, "test"),
    ]


@pytest.mark.usefixtures("no_retries")
def test_the_hub_cannot_be_reached():
    level = logging.getLogger("huggingface_hub").level
    with pytest.raises(
        SecateurError, match=r"data set allenai/c4 cannot be read: .* \(no route\); check the name"
    ) as error:
        read_text("c4")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1
    assert logging.getLogger("huggingface_hub").level == level


@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.parquet").write_bytes(b"")
    spec = {"datasets": "wikitext2", "pyarrow": str(tmp_path / "a.parquet")}[package]
    with pytest.raises(UsageError, match=rf'{package}.*pip install "secateur\[hub\]"'):
        read_text(spec)


# --- other kinds of files


CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


def spoken(messages):
    return "".join(f"<{each['role']}>{each['content']}" for each in messages)


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.md", "# One\n\ntwo", ["# One\n\ntwo"]),
        ("a.json", '["one", {"text": "two"}, {"text": null}]', ["one", "two"]),
        ("a.csv", 'id,text\n1,"one, and\nmore"\n2,two\n3,\n', ["one, and\nmore", "two"]),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ("a.jsonl", json.dumps({"messages": CHAT}) + "\n", ["<user>one<assistant>two"]),
        ("a.json", json.dumps([CHAT, {"messages": CHAT[:1]}, {"text": "plain"}]), [spoken(CHAT), "<user>one", "plain"]),
    ],
)
def test_other_kinds_of_files(name, content, documents, tmp_path):
    (tmp_path / name).write_text(content)
    assert read_text(str(tmp_path / name), template=spoken) == documents
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    assert read_text(str(tmp_path / f"{name}.gz"), template=spoken) == documents


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", '{"text": "one"}', r"a\.json holds no list"),
        ("a.json", "[1]", r"item 1 of .*a\.json is not an object"),
        ("a.json", "[", r"a\.json is not valid JSON"),
        ("a.csv", "id,body\n1,x\n", r"a\.csv has no field 'text': it has 'id', 'body'"),
        ("a.csv", 'text\n"one', r"a\.csv is not a table"),
        ("a.jsonl", json.dumps({"messages": CHAT}), r"field 'messages' of line 1 of .* holds a chat"),
        ("a.txt.gz", "not gzip", r"a\.txt\.gz cannot be read"),
        ("a.doc", "text", r"is of no known kind: text is read from \.txt, \.md"),
    ],
)
def test_files_that_are_not_what_their_names_say(name, content, says, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=says):
        read_text(str(tmp_path / name))


def test_several_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "c, d.md"):
        (tmp_path / name).write_text(name)
    assert read_text("*.txt") == ["a.txt", "b.txt"]
    assert read_text("b.txt, a.txt") == ["b.txt", "a.txt"]
    assert read_text("b.txt,c*.md", max_chars=7) == ["b.txt", "c,"]
    assert read_text("c, d.md") == ["c, d.md"], "a name with a comma in it is a file's if there is one"
    with pytest.raises(UsageError, match=r"no file is called like \*\.md2"):
        read_text("a.txt,*.md2")
    with pytest.raises(UsageError, match="no such file: none"):
        read_text("a.txt,none")


class Speaker:
    """As much of a tokenizer as a template needs: it puts `^` before every text."""

    chat_template = "some"

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [0] * add_special_tokens + [ord(c) for c in text]}

    def decode(self, ids):
        return "".join("^" if id == 0 else chr(id) for id in ids)

    def apply_chat_template(self, messages, tokenize):
        if messages[0]["role"] != "user":
            raise ValueError("the first\nis the user")
        return "^" + spoken(messages)


def test_chats_go_through_the_models_template():
    template = chat_template(Speaker())
    assert template(CHAT) == spoken(CHAT), "what the tokenizer puts before a text is not there twice"
    with pytest.raises(UsageError, match=r"the model's chat template refuses .*: .*the first"):
        template(CHAT[1:])
    plain = Speaker()
    plain.chat_template = None
    with pytest.raises(UsageError, match="the model has no chat template"):
        chat_template(plain)(CHAT)
