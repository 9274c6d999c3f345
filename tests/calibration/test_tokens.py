"""Cutting text into token windows."""

import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from secateur.calibration import tokens
from secateur.calibration.tokens import Named, windows
from secateur.errors import UsageError


def prose(words, seed=0):
    """Words, spaces, line ends, digits and rare characters, in no order."""
    draw = random.Random(seed)
    parts = ["the", "cat", "sat", " on", "  ", "\n\n", "1234567", "面", "naïve", ", ", ". ", "mat", "s"]
    return "".join(draw.choice(parts) + draw.choice(["", " "]) for _ in range(words))


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([prose(3000, seed=1)], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", model_max_length=64)


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.chars = 0

    def __call__(self, text, **kwargs):
        self.chars += len(text)
        return self.tokenizer(text, **kwargs)


def test_documents_are_laid_end_to_end(tokenizer):
    documents = [prose(40, seed=s) for s in range(5)]
    ids = [token for document in documents for token in tokenizer(document)["input_ids"]]
    ids_KS = windows(documents, tokenizer, 16, 4, named=Named("it"))
    assert ids_KS.dtype == torch.int64
    assert ids_KS.tolist() == [ids[i : i + 16] for i in range(0, 64, 16)]


@pytest.mark.parametrize("count", [1, 32, 250])
def test_the_first_windows_of_a_long_document_are_those_of_the_whole(tokenizer, count):
    text = prose(150_000)
    ids = tokenizer(text)["input_ids"]
    counting = Counting(tokenizer)
    ids_KS = windows([text], counting, 512, count, named=Named("it"))
    assert ids_KS.flatten().tolist() == ids[: 512 * count]
    assert counting.chars < len(text) / 2 or count == 250


@pytest.mark.parametrize("chars", [1, 2])
def test_dense_text_needs_more_than_the_first_cut(tokenizer, monkeypatch, chars):
    monkeypatch.setattr(tokens, "_CHARS_PER_TOKEN", chars)
    monkeypatch.setattr(tokens, "_LEAST_CHARS", 100)
    text = prose(20_000)
    assert (
        windows([text], tokenizer, 100, 30, named=Named("it")).flatten().tolist() == tokenizer(text)["input_ids"][:3000]
    )


def test_no_more_documents_than_needed_are_read(tokenizer):
    def documents():
        yield prose(100)
        yield prose(100)
        raise AssertionError("read on")

    assert windows(documents(), tokenizer, 16, 8, named=Named("it")).shape == (8, 16)


def test_a_seed_draws_windows_in_the_order_of_the_text(tokenizer):
    documents = [prose(3000)]
    total = len(tokenizer(documents[0])["input_ids"]) // 16
    everything_KS = windows(documents, tokenizer, 16, total, named=Named("it"))
    drawn_KS = windows(documents, tokenizer, 16, 20, seed=7, named=Named("it"))
    assert torch.equal(drawn_KS, windows(documents, tokenizer, 16, 20, seed=7, named=Named("it")))
    assert not torch.equal(drawn_KS, windows(documents, tokenizer, 16, 20, seed=8, named=Named("it")))
    assert torch.equal(windows(documents, tokenizer, 16, total, seed=7, named=Named("it")), everything_KS)
    where = [(everything_KS == row_S).all(1).nonzero()[0].item() for row_S in drawn_KS]
    assert where == sorted(set(where))
    assert len(where) == 20
    assert where[-1] > 20


def test_the_tokenizer_does_not_warn_about_length(tokenizer, caplog):
    windows([prose(1000)], tokenizer, 128, 2, named=Named("it"))
    windows([prose(1000)], tokenizer, 128, 2, seed=0, named=Named("it"))
    assert not caplog.records


@pytest.mark.parametrize("seed", [None, 0])
def test_too_little_text(tokenizer, seed):
    text = "the cat sat"
    have = len(tokenizer(text)["input_ids"])
    with pytest.raises(
        UsageError,
        match=rf"few\.txt gives {have} tokens, and 512 are needed \(4 windows of 128\).*`samples` or `seq_len`",
    ):
        windows([text], tokenizer, 128, 4, seed=seed, named=Named("few.txt"))
    with pytest.raises(UsageError, match=r"gives 0 tokens.*lower `windows` or `seq_len`"):
        windows([], tokenizer, 128, 4, seed=seed, named=Named("few.txt", "windows"))


def test_no_windows_at_all(tokenizer):
    with pytest.raises(UsageError, match="0 windows of 128 tokens cannot be had"):
        windows(["text"], tokenizer, 128, 0, named=Named("it"))
