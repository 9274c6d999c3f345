"""`generate` with many prompts at a time."""

import json

import pytest
import torch

import secateur
from secateur.errors import UsageError
from secateur.model import streaming
from secateur.model.source import open_source
from secateur.runs.generate import write_texts
from secateur.runs.prompts import read_prompts

PROMPTS = ["bon", "dun ban bell, kan", "gill fon tack", "bon dun", "fell"]


@pytest.fixture
def folder(packed_of):
    return str(packed_of("llama", "packed-int"))


@pytest.fixture
def single(folder):
    return [secateur.generate(folder, prompt, max_new_tokens=6) for prompt in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_each_is_continued_as_by_itself(folder, single, batch_size):
    assert secateur.generate(folder, PROMPTS, max_new_tokens=6, batch_size=batch_size) == single
    assert secateur.generate(folder, []) == []


def test_a_batch_costs_the_reads_of_one(folder, single, monkeypatch):
    monkeypatch.setattr(streaming, "room_here", lambda *_: 0)
    one = write_texts(folder, PROMPTS[:1], max_new_tokens=6, max_memory="1GiB")
    many = write_texts(folder, PROMPTS, max_new_tokens=6, max_memory="1GiB")
    assert many.texts == single
    assert one.bytes_read > 0
    assert many.bytes_read == one.bytes_read


def test_texts_end_where_they_end(folder):
    """Each with its own token that ends it, and none of what fills rows up behind."""
    found = write_texts(folder, PROMPTS, max_new_tokens=6)
    model = secateur.load(folder)
    tokenizer = open_source(folder).tokenizer()
    first = tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        row = model.generate(first, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, first.shape[1] :]
    model.generation_config.eos_token_id = [int(row[2])]
    ended = write_texts(model, PROMPTS, tokenizer=tokenizer, max_new_tokens=6)
    end = row.tolist().index(row[2]) + 1
    assert ended.texts[1] == tokenizer.decode(row[:end])
    assert ended.tokens < found.tokens == 6 * len(PROMPTS)
    for mine, whole in zip(ended.texts, found.texts, strict=True):
        assert whole.startswith(mine.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_progress(folder):
    seen = []
    write_texts(folder, PROMPTS, max_new_tokens=3, batch_size=2, progress=lambda *each: seen.append(each))
    assert seen[0] == (2, 15)
    assert seen[-1] == (15, 15)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "bon\n\n  \ndun ban\n"),
        ("p.md", "bon\r\ndun ban"),
        ("p.jsonl", '{"prompt": "bon"}\n\n{"prompt": "dun ban"}\n{"prompt": null}\n'),
        ("p.json", '["bon", "dun ban"]'),
        ("p.csv", "prompt,other\nbon,1\ndun ban,2\n"),
    ],
)
def test_files(name, content, tmp_path):
    file = tmp_path / name
    file.write_text(content)
    assert read_prompts(file, "prompt") == ["bon", "dun ban"]


def test_what_is_wrong_with_a_file(tmp_path):
    file = tmp_path / "p.txt"
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_prompts(file, "prompt")
    file.write_text(" \n\n")
    with pytest.raises(UsageError, match="holds no prompts: give one a line"):
        read_prompts(file, "prompt")
    file = tmp_path / "p.jsonl"
    file.write_text('{"text": "bon"}')
    with pytest.raises(UsageError, match=r"line 1 of .* has no field 'prompt'"):
        read_prompts(file, "prompt")
    assert read_prompts(file, "text") == ["bon"]


def test_on_the_command_line(says, folder, single, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    code, out, err = says("generate", folder, "--prompts", file, "--max-new-tokens", 6)
    assert code == 0, err
    assert [json.loads(line) for line in out.splitlines()] == [
        {"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, single, strict=True)
    ]
    assert "5 texts, 30 tokens in " in err
    assert " tokens/s" in err
    for args in ([], ["bon", "--prompts", file]):
        code, _, err = says("generate", folder, *args)
        assert code == 2
        assert "give one of two: a prompt, or --prompts FILE" in err
