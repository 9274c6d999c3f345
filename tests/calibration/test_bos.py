"""Windows begin with the token that the tokenizer puts before a text, where it puts one; and what is measured on them."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import VOCABULARY, prose
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import secateur
from secateur.calibration import kept_windows, sampling
from secateur.calibration.fisher import fisher
from secateur.calibration.kept_windows import calibration_ids
from secateur.calibration.tokens import Named, bos_ids, cut, hash_of, windows
from secateur.errors import UsageError
from secateur.evaluation.eval_text import Text, scored_bytes
from secateur.evaluation.gate.baseline import Baseline, write_baseline
from secateur.evaluation.gate.gate import gate
from secateur.evaluation.perplexity import CutText, measure
from secateur.evaluation.quality import evaluate
from secateur.evaluation.reference import keep_reference
from secateur.folder.manifest import MANIFEST_NAME
from secateur.folder.reader import read_json
from secateur.model.load import load_source
from secateur.model.source import open_source
from secateur.recipes.command_line import flags_of
from secateur.recipes.recipe import Calibration, Recipe
from secateur.runs.sweep import Sweep, sweep
from secateur.search import searcher

SPECIAL = ["<s>", "</s>", "[CLS]", "[SEP]", "[gMASK]", "<sop>"]


def tokenizer_with(template, letters="abcdefghijklmnopqrstuvwxyz .,\n", **special):
    """A tokenizer of letters, that puts around a text what its template says."""
    ids = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    bpe = Tokenizer(models.BPE(ids, []))
    bpe.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    bpe.decoder = decoders.Fuse()
    bpe.add_special_tokens(SPECIAL)
    if template:
        bpe.post_processor = processors.TemplateProcessing(template, special_tokens=[(t, ids[t]) for t in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


KINDS = {
    "BOS": ("<s> $A", [0]),
    "BOS and EOS": ("<s> $A </s>", [0]),
    "EOS": ("$A </s>", []),
    "like BERT": ("[CLS] $A [SEP]", [2]),
    "like GLM": ("[gMASK] <sop> $A", [4, 5]),
    "like XLNet": ("$A [SEP] [CLS]", []),
    "none": (None, []),
}


@pytest.mark.parametrize(("template", "expected"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("named", [{}, {"bos_token": "<s>", "eos_token": "</s>"}])
def test_what_a_tokenizer_puts_before_a_text(template, expected, named):
    assert bos_ids(tokenizer_with(template, **named)) == expected


def test_a_tokenizer_that_does_not_know_the_letter():
    assert bos_ids(tokenizer_with("<s> $A </s>", letters="0123456789")) == [0]
    assert bos_ids(tokenizer_with("<s> $A </s>", letters="\n\t")) == [0]
    assert bos_ids(tokenizer_with("$A </s>", letters="\n\t")) == []


@pytest.mark.parametrize("add", [True, False])
def test_what_it_does_counts_and_not_its_flag(add, tmp_path):
    """The flag of a file is taken for its word by tokenizers of some classes only."""
    tokenizer_with("<s> $A", bos_token="<s>").save_pretrained(tmp_path)
    config = read_json(tmp_path / "tokenizer_config.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": add}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert bos_ids(tokenizer) == [0] * (tokenizer("b").input_ids[0] == 0)


# --- windows


DOCUMENTS = [prose(n, seed=n) for n in (30, 1, 12, 60, 3, 80)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seq_len", [7, 16, 33])
def test_windows_begin_with_it_and_together_are_the_text(kind, seq_len):
    template, begin = KINDS[kind]
    tokenizer = tokenizer_with(template)
    stream = [id for document in DOCUMENTS for id in tokenizer(document).input_ids]
    rows = windows(DOCUMENTS, tokenizer, seq_len, 1, seed=0, bos=True, named=Named("it")).tolist()
    assert rows[0][: len(begin)] == begin
    total = len(cut(stream, begin, seq_len))
    rows = windows(DOCUMENTS, tokenizer, seq_len, total, bos=True, named=Named("it")).tolist()
    assert {len(row) for row in rows} == {seq_len}
    assert all(row[: len(begin)] == begin for row in rows)
    # Twice nowhere; and without it, nothing of the text is lost or doubled.
    assert not begin or all(row[len(begin) : 2 * len(begin)] != begin for row in rows)
    text = [id for row in rows for id in row if id not in begin]
    expected = [id for id in stream if id not in begin]
    assert text == expected[: len(text)]
    assert len(expected) - len(text) < seq_len
    # All drawn are all there are, and some drawn are some of them.
    assert windows(DOCUMENTS, tokenizer, seq_len, total, seed=1, bos=True, named=Named("it")).tolist() == rows
    drawn = windows(DOCUMENTS, tokenizer, seq_len, 4, seed=1, bos=True, named=Named("it")).tolist()
    assert [rows.index(row) for row in drawn] == sorted({rows.index(row) for row in drawn})


@pytest.mark.parametrize("kind", ["EOS", "none"])
@pytest.mark.parametrize("seed", [None, 3])
def test_nothing_changes_where_a_tokenizer_puts_nothing_before_a_text(kind, seed):
    tokenizer = tokenizer_with(KINDS[kind][0], bos_token="<s>")
    options = {"seed": seed, "named": Named("it")}
    with_bos, without = (windows(DOCUMENTS, tokenizer, 16, 9, bos=bos, **options) for bos in (True, False))
    assert torch.equal(with_bos, without)


@pytest.mark.parametrize("stride", [1, 5, 14, 15, 16])
@pytest.mark.parametrize("kind", ["BOS", "like GLM"])
def test_windows_that_overlap_begin_with_it_too(kind, stride):
    template, begin = KINDS[kind]
    tokenizer = tokenizer_with(template)
    ids = tokenizer(DOCUMENTS[3]).input_ids[len(begin) :]
    found = windows(DOCUMENTS[3:4], tokenizer, 16, 5, stride=stride, bos=True, named=Named("it")).tolist()
    step = min(stride, 16 - len(begin))
    assert found == [begin + ids[k * step : k * step + 16 - len(begin)] for k in range(5)]


def test_too_little_text_for_windows_that_begin_with_it():
    tokenizer = tokenizer_with("<s> $A")
    assert windows(["abcdefg" * 4], tokenizer, 8, 4, bos=True, named=Named("it")).shape == (4, 8)  # 1 + 4 · 7 tokens
    with pytest.raises(UsageError, match=r"it gives 28 tokens, and 29 are needed \(4 windows of 8\)"):
        windows(["abcdefg" * 3 + "abcdef"], tokenizer, 8, 4, bos=True, named=Named("it"))
    for seq_len, template in ((1, "<s> $A"), (2, "[gMASK] <sop> $A")):
        with pytest.raises(UsageError, match=rf"`seq_len` {seq_len} leaves no room .* give {seq_len + 1} at least"):
            windows(["abc"], tokenizer_with(template), seq_len, 1, bos=True, named=Named("it"))


# --- what is measured


@pytest.fixture(scope="module")
def llama(model_of):
    return secateur.load(model_of("llama"))


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory):
    """Documents so short that most windows hold the beginnings of some."""
    path = tmp_path_factory.mktemp("short") / "short.jsonl"
    path.write_text("".join(json.dumps({"text": prose(4, seed=n)}) + "\n" for n in range(80)))
    return path


@torch.no_grad()
def slow_loss(model, ids_KS, bos=()):
    """In float64, token by token, and how many there are."""
    losses = []
    for ids_S in ids_KS:
        log_p_SV = model(ids_S[None]).logits[0].double().log_softmax(1)
        losses += [-log_p_SV[i - 1, ids_S[i]].item() for i in range(1, len(ids_S)) if ids_S[i] not in bos]
    return math.fsum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("bos", [True, False])
def test_it_is_never_scored(bos, llama, model_of, tokenizer, short_documents, tmp_path):
    text = Text(str(short_documents), 16, 12, bos=bos)
    ids_KS = text.cut(tokenizer).ids_KS
    assert (ids_KS[:, 0] == 0).all() == bos
    assert (ids_KS[:, 1:] == 0).sum() > 8
    found = evaluate(str(model_of("llama")), text=text)
    loss, count = slow_loss(llama, ids_KS, [0] if bos else [])
    assert found.text["bos"] is bos
    assert (found.quality.loss, found.quality.tokens) == (pytest.approx(loss, rel=1e-5), count)
    assert found.quality.perplexity_interval is not None
    # Without it in the middle, all text of the windows is scored.
    if bos:
        shown = "".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in ids_KS)
        assert found.text["bytes"] == len(shown.encode())
    assert found.bits_per_byte == pytest.approx(loss * count / math.log(2) / found.text["bytes"], rel=1e-5)
    # The same where the model is its own reference, and where that is kept.
    for cache in (None, tmp_path / "cache"):
        again = evaluate(str(model_of("llama")), str(model_of("llama")), text, cache=cache).quality
        assert (again.loss, again.reference_perplexity) == (found.quality.loss, found.quality.perplexity)
        assert again.tokens == count
        assert again.kl == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bos", [[0], [4, 5]])
def test_kept_predictions_are_scored_alike(bos, llama, tmp_path):
    ids_KS = torch.randint(6, VOCABULARY, (5, 20), generator=torch.Generator().manual_seed(0))
    ids_KS[:, : len(bos)] = torch.tensor(bos)
    ids_KS[2, 9 : 9 + len(bos)] = torch.tensor(bos)
    found = measure(llama, ids_KS, bos=bos)
    assert found.tokens == 5 * (20 - len(bos)) - len(bos)
    assert found.perplexity_interval is not None
    kept = keep_reference(tmp_path, {}, lambda: llama, CutText(ids_KS, bos=bos))
    assert kept.quality() == found
    assert kept.quality().scores.count_K.tolist() == found.scores.count_K.tolist()
    # The same tokens read as text are another thing.
    other = keep_reference(tmp_path, {}, lambda: llama, CutText(ids_KS))
    assert other.folder != kept.folder
    assert other.quality().tokens == 5 * 19


@pytest.mark.parametrize("stride", [None, 7])
def test_the_bytes_of_words_that_begin_a_window_are_counted_whole(stride, tmp_path):
    """Decoders that leave out a text's first space do so for each window, if it is decoded alone."""
    letters = "abcdefghijklmnopqrstuvwxyz.,\n"
    ids = {token: i for i, token in enumerate(["<s>", "▁", *letters])}
    bpe = Tokenizer(models.BPE(ids, []))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("", "isolated")]
    )
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bpe.add_special_tokens(["<s>"])
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")
    content = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 8
    found = windows([content], tokenizer, 16, 9, stride=stride, bos=True, named=Named("it"))
    assert (found[1:, 1] == ids["▁"]).any()
    text = len(content[: 14 + 8 * (stride or 15)])
    assert scored_bytes(tokenizer, found, stride, [0]) == text


@pytest.mark.parametrize("bos", [True, False])
def test_eval_says_how_windows_begin(bos, says, model_of, text_file):
    args = ("eval", model_of("llama"), "--data", text_file, "--seq-len", 16, "--windows", 4)
    args += () if bos else ("--no-bos",)
    code, out, _ = says(*args)
    assert code == 0
    assert f"4 windows of 16 tokens of {text_file}, {'with' if bos else 'without'} BOS" in " ".join(out.split())
    content = json.loads(says(*args, "--json", "-")[1])
    ids_KS = Text(str(text_file), 16, 4, bos=bos).cut(AutoTokenizer.from_pretrained(model_of("llama"))).ids_KS
    assert (content["text"]["bos"], content["text"]["sha256"]) == (bos, hash_of(ids_KS))


# --- the gate


TEXT = {"seq_len": 24, "windows": 8}


def old(file):
    """A baseline as it was written before there was `bos`."""
    content = json.loads(file.read_text())
    assert content["text"].pop("bos") is False
    file.write_text(json.dumps(content))
    return file


def test_an_old_baseline_is_compared_with_as_it_was_measured(says, model_of, text_file, tmp_path):
    model, file = str(model_of("llama")), tmp_path / "baseline.json"
    write_baseline(model, file, Text(str(text_file), **TEXT, bos=False))
    found = gate(model, Baseline.read(old(file)))
    assert found.passed
    assert found.checks[0].change == 0
    assert found.evaluation.text["bos"] is False
    code, out, err = says("gate", model, "--baseline", file, "--no-bos")
    assert (code, "without BOS" in " ".join(out.split())) == (0, True), err
    code, _, err = says("gate", model, "--baseline", file, "--bos")
    assert code == 2
    assert "was measured on windows without BOS: leave --bos out, or write another baseline" in " ".join(err.split())


def test_a_baseline_says_how_windows_begin(says, model_of, text_file, tmp_path):
    model, file = str(model_of("llama")), tmp_path / "baseline.json"
    args = ("gate", model, "--baseline", file)
    text = ("--data", text_file, "--seq-len", 24, "--windows", 8)
    code, _, err = says(*args, *text, "--write")
    assert (code, "on windows with BOS" in " ".join(err.split())) == (0, True)
    assert read_json(file)["text"]["bos"] is True
    summary = tmp_path / "summary.md"
    code, out, _ = says(*args, "--markdown", summary)
    assert (code, "with BOS" in " ".join(out.split())) == (0, True)
    assert "on windows with BOS" in summary.read_text()
    code, _, err = says(*args, "--no-bos")
    assert code == 2
    assert "was measured on windows with BOS: leave --no-bos out, or write another baseline" in " ".join(err.split())
    assert says(*args, *text, "--no-bos", "--write", "--overwrite")[0] == 0
    assert read_json(file)["text"]["bos"] is False
    assert says(*args)[0] == 0


def test_a_tokenizer_that_adds_none_is_no_matter(says, own_model, text_file, tmp_path):
    """What the option says makes no difference then, and no refusal."""
    model, file = own_model("llama"), tmp_path / "baseline.json"
    unbegun(model)
    text = ("--data", text_file, "--seq-len", 24, "--windows", 8)
    assert says("gate", model, "--baseline", file, *text, "--write")[0] == 0
    assert read_json(file)["text"]["bos"] is False
    for more in ((), ("--bos",), ("--no-bos",)):
        assert says("gate", model, "--baseline", file, *more)[0] == 0


def unbegun(folder):
    """Let a model's tokenizer put nothing before a text."""
    content = read_json(folder / "tokenizer.json")
    (folder / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    return folder


@pytest.mark.parametrize("bos", ["yes", None, 1])
def test_a_baseline_whose_bos_is_no_answer(bos, says, model_of, text_file, tmp_path):
    file = tmp_path / "baseline.json"
    write_baseline(str(model_of("llama")), file, Text(str(text_file), **TEXT))
    content = read_json(file)
    file.write_text(json.dumps({**content, "text": {**content["text"], "bos": bos}}))
    code, _, err = says("gate", model_of("llama"), "--baseline", file)
    assert (code, "is damaged: write it again" in " ".join(err.split())) == (1, True)


# --- calibration


def settings(source, bos=True, **options):
    return Calibration(str(source), **{"samples": 6, "seq_len": 24, **options}, bos=bos)


def ids_of(model, wanted):
    return calibration_ids(open_source(str(model)), wanted, torch.device("cpu"), lambda _: None)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("seed", [0, 5])
def test_calibration_windows_begin_with_it(bos, seed, model_of, tokenizer, text_file):
    ids_NS, said, begin = ids_of(model_of("llama"), settings(text_file, bos, seed=seed))
    assert begin == [0] * bos
    assert said.bos is bos
    ids = tokenizer(text_file.read_text()).input_ids
    rows = cut(ids, begin, 24)
    found = [rows.index(row) for row in ids_NS.tolist()]
    assert found == sorted(set(found))
    assert all(row[0] == 0 for row in ids_NS.tolist()) == bos


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sampling, "TEXT_TOKENS", 10)


@pytest.mark.parametrize("template", [["<s>"], ["<s>", "</s>"], []])
def test_text_that_the_model_wrote_begins_as_it_was_sampled(template, cache, own_model):
    model = own_model("llama")
    unbegun(model)
    if template:
        tokenizer = AutoTokenizer.from_pretrained(model)
        pieces = " ".join([*template, "$A"])
        specials = list(zip(template, tokenizer.convert_tokens_to_ids(template), strict=True))
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(pieces, special_tokens=specials)
        tokenizer.save_pretrained(model)
    # Where the tokenizer puts nothing before a text, a model begins one with its BOS all the same.
    start = tokenizer.convert_tokens_to_ids(template) if template else [0]
    for _ in range(2):  # written, and kept
        ids_NS, _, begin = ids_of(model, settings("self", samples=5))
        assert begin == (start if template else [])
        assert all(row[at : at + len(start)] == start for row in ids_NS.tolist() for at in (0, 10, 20))
    plain_NS, _, begin = ids_of(model, settings("self", False, samples=5))
    assert begin == []
    flat = plain_NS.flatten().tolist()
    assert {flat[at] for at in range(0, 120, 10)} == {0}
    assert not (plain_NS[:, 0] == 0).all()
    # What fits has the same text either way.
    if len(start) == 1:
        same = [ids_of(model, settings("self", bos, samples=5, seq_len=20))[0] for bos in (True, False)]
        assert torch.equal(*same)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_writes_in_half_precision_where_the_processor_computes_in_it(
    native, stored, cache, model_of, monkeypatch
):
    used = []

    def load(source, dtype, device):
        used.append(dtype)
        return load_source(source, dtype, device)

    monkeypatch.setattr(kept_windows, "load_source", load)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    ids_of(model_of("llama", stored), settings("self", samples=5))
    assert used == [torch.bfloat16 if native else torch.float32]


@pytest.mark.parametrize("source", ["text", "self"])
@pytest.mark.parametrize("bos", [True, False])
def test_a_run_says_how_windows_began(source, bos, says, model_of, text_file, tmp_path):
    text = ("--calibration", text_file if source == "text" else "self", "--samples", 4, "--seq-len", 16)
    args = ("compress", model_of("llama"), tmp_path / "out", "--prune", "wanda", "--sparsity", 0.5, *text, "--json")
    code, out, err = says(*args, *(() if bos else ("--no-bos",)))
    assert code == 0, err
    manifest = read_json(tmp_path / "out" / MANIFEST_NAME)
    assert manifest["calibration"]["bos"] is json.loads(out)["calibration"]["bos"] is bos
    assert manifest["recipe"]["calibration"]["bos"] is bos


def test_a_recipe_asks_for_it_and_a_run_tells_whether_it_was(says, own_model, text_file, tmp_path):
    """So that the recipe in a manifest is right for another model, too."""
    unbegun(own_model("llama"))
    out = tmp_path / "out"
    text = ("--calibration", text_file, "--samples", 4, "--seq-len", 16)
    assert says("compress", tmp_path / "own-llama", out, "--prune", "wanda", "--sparsity", 0.5, *text)[0] == 0
    manifest = read_json(out / MANIFEST_NAME)
    assert (manifest["calibration"]["bos"], manifest["recipe"]["calibration"]["bos"]) == (False, True)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_an_old_manifest_repeats_its_run(says, model_of, text_file, tmp_path):
    model = model_of("llama")
    text = ("--calibration", text_file, "--samples", 4, "--seq-len", 16)
    wanda = ("--prune", "wanda", "--sparsity", 0.5, *text)
    assert says("compress", model, tmp_path / "plain", *wanda, "--no-bos")[0] == 0
    assert says("compress", model, tmp_path / "begun", *wanda)[0] == 0
    manifest = read_json(tmp_path / "plain" / MANIFEST_NAME)
    del manifest["recipe"]["calibration"]["bos"]
    (tmp_path / "old.json").write_text(json.dumps(manifest))
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(manifest["recipe"]))
    for name, expected in (("old.json", "plain"), ("own.yaml", "begun")):
        assert says("compress", model, tmp_path / name[:3], "--recipe", tmp_path / name)[0] == 0
        assert weights(tmp_path / name[:3]) == weights(tmp_path / expected)
    assert weights(tmp_path / "plain") != weights(tmp_path / "begun")
    # Options stand above it.
    assert says("compress", model, tmp_path / "more", "--recipe", tmp_path / "old.json", "--bos")[0] == 0
    assert read_json(tmp_path / "more" / MANIFEST_NAME)["calibration"]["bos"] is True


def test_the_recipe_file_and_flags_have_it():
    recipe = Recipe("wanda", 0.5, calibration=Calibration("docs", bos=False))
    assert flags_of(recipe)[-1] == "--no-bos"
    assert yaml.safe_load(recipe.to_yaml())["calibration"] == {"source": "docs", "bos": False}
    assert Recipe.from_dict({"calibration": {"source": "docs"}}).calibration.bos is True
    with pytest.raises(UsageError, match=r"'bos' of the recipe's calibration is 'no', which is not a true or false"):
        Recipe.from_dict({"calibration": {"bos": "no"}})


# --- gradients


def test_squared_gradients_are_of_text(llama, model_of):
    ids_NS = torch.randint(6, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    ids_NS[:, 0] = ids_NS[1, 5] = ids_NS[2, 11] = 0
    name = "model.layers.0.mlp.down_proj"
    found = fisher(llama, ids_NS, [name], bos=[0])[name]
    slow = secateur.load(model_of("llama"))
    linear = slow.get_submodule(name).requires_grad_(True)
    expected = torch.zeros_like(found)
    for ids_S in ids_NS:
        slow.zero_grad()
        log_p_SV = slow(ids_S[None]).logits[0].double().log_softmax(1)
        losses = [-log_p_SV[i - 1, ids_S[i]] for i in range(1, 12) if ids_S[i] != 0]
        (sum(losses) / len(losses)).backward()
        expected += linear.weight.grad.square() / 3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)
    assert not torch.allclose(fisher(llama, ids_NS, [name])[name], expected, rtol=1e-2)


def test_effects_are_measured_on_pieces_that_begin_with_it(model_of, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(searcher, "WINDOW", 10)
    seen = []
    real = searcher.gather_effects

    def looking(model, ids_NS, *more):
        seen.append(ids_NS)
        return real(model, ids_NS, *more)

    monkeypatch.setattr(searcher, "gather_effects", looking)
    for bos in (True, False):
        recipe = Recipe("wanda", 0.5, allocation="search", calibration=settings(text_file, bos, samples=4))
        secateur.compress(str(model_of("llama")), tmp_path / f"out-{bos}", recipe)
    with_bos, without = seen
    windows_NS = [
        ids_of(model_of("llama"), settings(text_file, bos, samples=4))[0].flip(0)[:2] for bos in (True, False)
    ]
    assert (with_bos[:, 0] == 0).all()
    assert with_bos.tolist() == [[0, *row[1 + at : 10 + at]] for row in windows_NS[0].tolist() for at in (0, 9)]
    assert without.tolist() == [row[at : at + 10] for row in windows_NS[1].tolist() for at in (0, 10)]


# --- a sweep


@pytest.mark.slow
def test_a_sweep_begins_windows_alike(model_of, text_file, tmp_path):
    recipes = [("wanda", replace(Recipe("wanda", 0.5), calibration=settings(text_file)))]
    for bos in (True, False):
        asked = Sweep(str(model_of("llama")), recipes, Text(str(text_file), **TEXT, bos=bos), keep_models=True)
        result = sweep(asked, tmp_path / f"out-{bos}")
        assert result.text["bos"] is bos
        (folder,) = (tmp_path / f"out-{bos}" / "models").iterdir()
        alone = evaluate(str(folder), str(model_of("llama")), asked.text)
        assert result.points[0].measured.perplexity == alone.quality.perplexity
        assert result.points[0].measured.bits_per_byte == alone.bits_per_byte
        assert result.dense.perplexity == alone.quality.reference_perplexity
        assert f"{'with' if bos else 'without'} BOS" in (tmp_path / f"out-{bos}" / "index.html").read_text()


def test_one_option_is_for_calibration_and_text(says, model_of, text_file, tmp_path):
    args = ("sweep", model_of("llama"), "--recipes", "wanda:0.5", "--calibration", text_file, "--samples", 4)
    args += (
        "--calibration-seq-len",
        16,
        "--data",
        text_file,
        "--seq-len",
        24,
        "--windows",
        4,
        "--out",
        tmp_path / "out",
    )
    assert says(*args, "--no-bos")[0] == 0
    content = read_json(tmp_path / "out" / "sweep.json")
    assert content["text"]["bos"] is content["points"][0]["recipe"]["calibration"]["bos"] is False
    assert "--no-bos" in content["points"][0]["command"]
    shutil.rmtree(tmp_path / "out")
    assert says(*args)[0] == 0
    content = read_json(tmp_path / "out" / "sweep.json")
    assert content["text"]["bos"] is content["points"][0]["recipe"]["calibration"]["bos"] is True
