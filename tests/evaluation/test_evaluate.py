"""What is measured beside perplexity: windows that overlap, bits per byte, batches, and errors block by block."""

import copy
import json
import math

import pytest
import torch
from conftest import FAMILIES, HIDDEN, VOCABULARY
from transformers import AutoModelForCausalLM

import secateur
from secateur.calibration.tokens import hash_of
from secateur.errors import UsageError
from secateur.evaluation.blocks import block_errors
from secateur.evaluation.eval_text import Text, scored_bytes
from secateur.evaluation.perplexity import measure, scored_predictions
from secateur.evaluation.quality import Runner, bits_per_byte, evaluate

S = 16


@pytest.fixture(scope="module")
def llama(model_of):
    return AutoModelForCausalLM.from_pretrained(model_of("llama"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def damaged(llama):
    """The same with another second block."""
    model = copy.deepcopy(llama)
    torch.manual_seed(1)
    for parameter in model.model.layers[1].parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="module")
def ids_KS():
    return torch.randint(VOCABULARY, (5, S), generator=torch.Generator().manual_seed(0))


# --- windows that overlap


def text_of(tokens):
    return torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def slow_losses(model, ids_N, stride):
    """Of each token but the first: its loss in float64 after the context that it has, given as (position, loss)."""
    double = copy.deepcopy(model).double()
    found = []
    for position in range(1, len(ids_N)):
        # The first window that has it: those begin at multiples of the stride.
        window = max(0, math.ceil((position - S + 1) / stride))
        context = ids_N[window * stride : position]
        logits_V = double(context[None]).logits[0, -1]
        found.append((position, -logits_V.log_softmax(0)[ids_N[position]].item()))
    return found


@pytest.mark.parametrize("stride", [1, 5, 15])
def test_each_token_is_scored_once_after_the_context_of_the_first_window_that_has_it(llama, stride):
    K = 5
    ids_N = text_of(S + stride * (K - 1))
    quality = measure(llama, ids_N.unfold(0, S, stride), stride=stride)
    slow = slow_losses(llama, ids_N, stride)
    assert quality.tokens == len(slow) == len(ids_N) - 1
    found = [
        (k * stride + p + 1, loss)
        for k, row_P in enumerate(quality.scores.loss_KP.tolist())
        for p, loss in enumerate(row_P)
        if not math.isnan(loss)
    ]
    assert [position for position, _ in found] == [position for position, _ in slow]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in slow], rel=1e-4)
    assert quality.loss == pytest.approx(math.fsum(loss for _, loss in slow) / len(slow), rel=1e-5)


def test_a_stride_of_a_whole_window_is_no_stride(llama, ids_KS):
    assert measure(llama, ids_KS, stride=S) == measure(llama, ids_KS)
    assert scored_predictions(5, S, S) == scored_predictions(5, S, None) == [S - 1] * 5


def test_windows_of_a_text_begin_a_stride_apart(tokenizer, text_file):
    ids = tokenizer(text_file.read_text()).input_ids
    plain = Text(str(text_file), 16, 4, 5, bos=False).cut(tokenizer).ids_KS
    assert plain.tolist() == [ids[k * 5 : k * 5 + 16] for k in range(4)]
    assert hash_of(plain) != hash_of(Text(str(text_file), 16, 4, bos=False).cut(tokenizer).ids_KS)
    apart = Text(str(text_file), 16, 4, 5).cut(tokenizer).ids_KS
    assert apart.tolist() == [[0, *ids[1 + k * 5 : 16 + k * 5]] for k in range(4)]
    # Fifteen tokens of text are all that a window has room for.
    for stride in (None, 15, 16):
        beside = Text(str(text_file), 16, 4, stride).cut(tokenizer).ids_KS
        assert beside.tolist() == [[0, *ids[1 + k * 15 : 16 + k * 15]] for k in range(4)]


@pytest.mark.parametrize("stride", [0, 17])
def test_a_stride_that_leaves_out_tokens(stride, says):
    with pytest.raises(UsageError, match=f"`stride` {stride} would leave out tokens: give 1 to `seq_len`, which is 16"):
        Text(seq_len=16, stride=stride)
    code, _, err = says("eval", "demo", "--seq-len", 16, "--stride", stride)
    assert code == 2
    assert "Traceback" not in err


# --- means, intervals and batches


@pytest.mark.parametrize("stride", [None, 5])
def test_means_over_windows_and_positions(llama, damaged, stride):
    ids_KS = text_of(100).unfold(0, S, stride or S)[:4]
    scores = measure(damaged, ids_KS, llama, stride=stride).scores
    assert set(scores.windows()) == set(scores.positions()) == {"loss", "reference_loss", "kl", "agreement"}
    assert scores.count_K.tolist() == scored_predictions(4, S, stride)
    for name, values_KP in scores.given().items():
        rows = [[v for v in row if not math.isnan(v)] for row in values_KP.tolist()]
        assert scores.windows()[name] == pytest.approx([math.fsum(row) / len(row) for row in rows])
        columns = [[v for v in column if not math.isnan(v)] for column in values_KP.T.tolist()]
        assert scores.positions()[name] == pytest.approx([math.fsum(c) / len(c) for c in columns])


def test_an_interval_holds_its_figure(llama, damaged, ids_KS):
    found = measure(damaged, ids_KS, llama)
    assert found.perplexity_interval[0] < found.perplexity < found.perplexity_interval[1]
    assert 0 <= found.kl_interval[0] < found.kl < found.kl_interval[1]
    assert found.agreement_interval[0] <= found.agreement <= found.agreement_interval[1]
    alone = measure(damaged, ids_KS[:1], llama)
    assert (alone.perplexity_interval, alone.kl_interval, alone.agreement_interval) == (None, None, None)


@pytest.mark.parametrize("stride", [None, 5])
@pytest.mark.parametrize("batch_tokens", [1, 2 * S, 2 * S + 1, 1000])
def test_batches_give_the_figures_of_windows_one_by_one(llama, damaged, batch_tokens, stride):
    ids_KS = text_of(100).unfold(0, S, stride or S)[:5]
    seen = []
    with damaged.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    ):
        found = measure(damaged, ids_KS, llama, stride=stride, batch_tokens=batch_tokens)
    assert seen == {1: [1] * 5, 2 * S: [2, 2, 1], 2 * S + 1: [2, 2, 1], 1000: [5]}[batch_tokens]
    alone = measure(damaged, ids_KS, llama, stride=stride)
    assert found.agreement == alone.agreement
    for name, values_KP in found.scores.given().items():
        torch.testing.assert_close(values_KP, alone.scores.given()[name], rtol=1e-4, atol=1e-5, equal_nan=True)


# --- bits per byte


def test_bits_per_byte_by_hand(model_of, tmp_path, tokenizer):
    """The tokenizer has no token for 面: it is three, one for each byte."""
    content = "bon 面面 käse dun"
    (tmp_path / "text.txt").write_text(content, encoding="utf-8")
    S = len(tokenizer(content).input_ids)
    assert len(content) < S
    found = evaluate(str(model_of("llama")), text=Text(str(tmp_path / "text.txt"), S, 1))
    # The first token, <s>, stands for no byte, and is not scored.
    size = len(content.encode())
    assert found.text["bytes"] == size == 20
    bits = found.quality.loss / math.log(2) * (S - 1)
    assert found.bits_per_byte == pytest.approx(bits / size, rel=1e-12)
    assert found.reference_bits_per_byte is None


def test_the_bytes_of_windows_are_those_of_their_scored_tokens(tokenizer, text_file):
    for stride in (None, 7):
        ids_KS = Text(str(text_file), 16, 6, stride).cut(tokenizer).ids_KS
        K, S = ids_KS.shape
        scored = [ids_S[S - n :] for ids_S, n in zip(ids_KS.tolist(), scored_predictions(K, S, stride), strict=True)]
        assert scored_bytes(tokenizer, ids_KS, stride, [0]) == sum(len(tokenizer.decode(ids)) for ids in scored)


def test_a_character_that_an_edge_cuts_counts_as_three_bytes(tokenizer):
    ids = tokenizer("a面a", add_special_tokens=False).input_ids
    assert len(ids) == 5
    # a, and two of the character's bytes: a is not scored.
    assert scored_bytes(tokenizer, torch.tensor([ids[:3]]), None) == 3
    assert scored_bytes(tokenizer, torch.tensor([ids]), None) == 4


def test_text_that_stands_for_no_bytes(says, model_of, tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("</s>" * 20)
    args = ("eval", model_of("llama"), "--data", tmp_path / "text.txt", "--seq-len", 8, "--windows", 1)
    code, out, _ = says(*args, "--json", "-")
    assert code == 0
    assert json.loads(out)["bits_per_byte"] is None
    assert says(*args)[0] == 0
    quality = evaluate(str(model_of("llama")), text=Text(str(tmp_path / "text.txt"), 8, 1)).quality
    assert math.isnan(bits_per_byte(quality.loss, quality.tokens, 0))


def test_the_reference_has_the_figures_that_it_has_alone(says, model_of, text_file, tmp_path):
    """Its bits per byte and interval too, be it run or kept; and the table shows them."""
    model, dense = str(model_of("gpt2")), str(model_of("llama"))
    text = Text(str(text_file), 16, 6)
    alone = evaluate(dense, text=text)
    for cache in (None, tmp_path / "kept"):
        found = evaluate(model, dense, text, cache=cache)
        assert found.reference_bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-6)
        assert found.quality.reference_perplexity_interval == pytest.approx(alone.quality.perplexity_interval, rel=1e-6)
    code, out, _ = says("eval", model, "--reference", dense, "--data", text_file, "--seq-len", 16, "--windows", 6)
    assert code == 0
    low, high = alone.quality.perplexity_interval
    assert f"{alone.quality.perplexity:.3f} ({low:.2f} to {high:.2f})" in " ".join(out.split())
    assert f"{alone.bits_per_byte:.4f}" in out
    overlapping = evaluate(model, dense, Text(str(text_file), 16, 6, 4))
    assert overlapping.quality.reference_perplexity_interval is None


# --- block by block


def slow_blocks(model, dense, ids_KS):
    """Own and carried errors in float64, from what goes into and comes out of each Llama block."""

    def run(each, ids_S):
        """What goes into each block, what else, and what comes out."""
        seen = []
        hooks = [
            block.register_forward_hook(
                lambda _, args, kwargs, out: seen.append((args[0], kwargs, out)), with_kwargs=True
            )
            for block in each.model.layers
        ]
        each(ids_S[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        return seen

    model, dense = copy.deepcopy(model).double(), copy.deepcopy(dense).double()
    sums = [[0.0, 0.0, 0.0] for _ in model.model.layers]
    for ids_S in ids_KS:
        compressed = run(model, ids_S)
        for number, (h, kwargs, out) in enumerate(run(dense, ids_S)):
            own = model.model.layers[number](h, **kwargs)
            for i, difference in enumerate((own - out, compressed[number][2] - out, out)):
                sums[number][i] += (difference**2).sum().item()
    return [(own / norm, carried / norm) for own, carried, norm in sums]


@torch.no_grad()
def test_block_errors_against_float64(llama, ids_KS):
    model = copy.deepcopy(llama)
    torch.manual_seed(2)
    for parameter in model.model.layers.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    found = block_errors(model, llama, ids_KS)
    assert [block.name for block in found] == ["model.layers.0", "model.layers.1"]
    for block, (own, carried) in zip(found, slow_blocks(model, llama, ids_KS), strict=True):
        assert block.own == pytest.approx(own, rel=1e-3)
        assert block.carried == pytest.approx(carried, rel=1e-3)
    # The first block's inputs are the same in both.
    assert found[0].own == pytest.approx(found[0].carried)
    assert found[1].own < found[1].carried


BY_BLOCK = ["llama", "gemma3", "cohere", "opt", "gpt2", "gpt-neox", "falcon", "bloom"]


@pytest.mark.thin(2)
@pytest.mark.parametrize("family", BY_BLOCK)
@pytest.mark.parametrize("spoiled", [None, 0, 1])
def test_one_damaged_block(family, spoiled, model_of, ids_KS):
    dense = AutoModelForCausalLM.from_pretrained(model_of(family), dtype=torch.float32)
    model = copy.deepcopy(dense)
    if spoiled is not None:
        torch.manual_seed(4)
        for parameter in model.get_submodule(f"{FAMILIES[family].prefix}.{spoiled}").parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    found = block_errors(model, dense, ids_KS)
    assert [block.name for block in found] == [f"{FAMILIES[family].prefix}.{i}" for i in (0, 1)]
    for number, block in enumerate(found):
        assert (block.own > 0) == (number == spoiled)
        assert (block.carried > 0) == (spoiled is not None and number >= spoiled)


@pytest.mark.parametrize(
    ("family", "options"), [("qwen2", {}), ("llama", {"num_hidden_layers": 3}), ("llama", {"hidden_size": 2 * HIDDEN})]
)
def test_models_with_other_blocks_cannot_be_compared(family, options, says, model_of, text_file):
    args = ("--data", text_file, "--seq-len", 16, "--windows", 2, "--by-block")
    code, out, err = says("eval", model_of("llama"), "--reference", model_of(family, **options), *args)
    assert (code, out) == (2, "")
    assert err == ("error: --by-block compares block with block: the reference must be the model that was compressed\n")


def test_blocks_of_a_packed_checkpoint(says, model_of, text_file, tmp_path):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    recipe = secateur.Recipe("magnitude", 0.5, ignore=("model.layers.0.*",))
    secateur.compress(str(model_of("llama")), out, recipe)
    args = ("--data", text_file, "--seq-len", 16, "--windows", 3, "--by-block")
    code, told, err = says("eval", out, "--reference", model_of("llama"), *args, "--json", figures)
    assert code == 0, err
    first, second = json.loads(figures.read_text())["blocks"]
    assert first["own"] == first["carried"] == 0
    assert second["own"] == second["carried"] > 0.01
    assert f"{second['own']:.2e}" in told


@pytest.mark.parametrize(("option", "more"), [("--by-block", []), ("--reference-cache", ["cache"])])
def test_what_needs_a_reference(option, more, says, model_of):
    code, out, err = says("eval", model_of("llama"), option, *more)
    assert (code, out, err) == (2, "", f"error: {option} needs a --reference to compare with\n")


# --- the command line


def test_eval_with_everything(says, model_of, text_file, tmp_path):
    out, cache = tmp_path / "out", tmp_path / "cache"
    secateur.compress(str(model_of("llama")), out, secateur.Recipe("magnitude", 0.5))
    options = ("--data", text_file, "--seq-len", 16, "--windows", 6, "--stride", 8, "--batch-tokens", 32)
    args = ("eval", out, "--reference", model_of("llama"), *options)
    live, cached, again = (
        json.loads(says(*args, *more, "--json", "-")[1])
        for more in ((), *[("--reference-cache", cache, "--cache-tokens", 0)] * 2)
    )
    for found in (cached, again):
        assert found["quality"] == live["quality"]
        assert found["per_window"] == live["per_window"]
    assert len(list(cache.glob("*/*.safetensors"))) == 6
    assert live["text"]["stride"] == 8
    assert live["quality"]["tokens"] == 15 + 5 * 8
    assert len(live["per_window"]["kl"]) == 6
    assert len(live["per_position"]["loss"]) == 15
    code, told, _ = says(*args, "--reference-cache", cache)
    assert code == 0
    assert "6 windows of 16 tokens" in told
    assert "8 apart" in told
    # Of 64 of 320 tokens less divergence is known.
    short = evaluate(str(out), str(model_of("llama")), Text(str(text_file), 16, 6, 8), cache=cache, cache_tokens=64)
    assert 0 < short.quality.kl < live["quality"]["kl"]
    assert short.cache_tokens == 64


def test_the_cache_tells_models_apart_by_their_files(model_of, text_file, tmp_path):
    text = Text(str(text_file), 16, 2)
    for family in ("llama", "qwen2", "llama"):
        evaluate(str(model_of("llama")), str(model_of(family)), text, cache=tmp_path)
    evaluate(str(model_of("llama")), str(model_of("llama")), text, cache=tmp_path, runner=Runner("bfloat16"))
    assert len(list(tmp_path.iterdir())) == 3
