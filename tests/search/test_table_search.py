"""A search that finds bits for the table of embeddings and the head, too."""

import json

import pytest
import torch

import secateur
from secateur.checkpoint.inspect import inspect
from secateur.checkpoint.verify import verify
from secateur.model.load import load_source
from secateur.model.source import open_source
from secateur.pipeline.prepared import prepare
from secateur.quant.table_codes import quantize_table
from secateur.recipes.plan import plan
from secateur.search.table_candidates import BITS, open_tables, table_candidates

IDS_NS = torch.randint(2, 300, (4, 32), generator=torch.Generator().manual_seed(3))
BF16 = torch.bfloat16


def recipe(text_file, **options):
    calibration = secateur.Calibration(source=str(text_file), samples=8, seq_len=32)
    return secateur.Recipe(
        **{"quantize": "gptq", "quantization": {"group_size": 16}, "calibration": calibration, **options}
    )


def prepared_of(path, asked):
    return prepare(open_source(str(path)), asked, plan(asked), torch.device("cpu"))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3", "gpt2"])
@torch.no_grad()
def test_what_a_table_does_is_measured_as_it_is_defined(name, model_of, text_file, tmp_path):
    path = model_of(name)
    asked = recipe(text_file, target_size="50%")
    prepared = prepared_of(path, recipe(text_file))
    model = load_source(open_source(str(path)), torch.float32, torch.device("cpu"), apart=True)
    tables = open_tables(prepared, asked)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert [table.role for table in tables.values()] == (["embeddings"] if tied else ["embeddings", "head"])
    dense = model(IDS_NS).logits.double().log_softmax(-1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for module, table in tables.items():
        found = table_candidates(prepared, model, table, IDS_NS, tmp_path, lambda _: None)
        assert [candidate.choice.bits for candidate in found] == list(BITS)
        assert [c.bytes for c in found] == sorted((c.bytes for c in found), reverse=True)
        for candidate in found:
            W_VI = before[table.weight]
            codes = quantize_table(W_VI, candidate.choice.bits, torch.float32, torch.device("cpu"))
            model.get_submodule(module).weight.copy_(codes.dequantize())
            other = model(IDS_NS).logits.double().log_softmax(-1)
            wanted = (dense.exp() * (dense - other)).sum().item() / IDS_NS.numel()
            assert candidate.divergence == pytest.approx(wanted, rel=1e-3, abs=1e-7)
            model.get_submodule(module).weight.copy_(W_VI)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_only_a_target_leaves_tables_open(model_of, text_file):
    prepared = prepared_of(model_of("llama"), recipe(text_file))
    assert open_tables(prepared, recipe(text_file, allocation="search")) == {}
    assert (
        open_tables(prepared, recipe(text_file, target_size="50%", quantize=None, quantization={}, prune="wanda")) == {}
    )
    left = open_tables(prepared, recipe(text_file, target_size="50%", head=16))
    assert [table.role for table in left.values()] == ["embeddings"]


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("llama-tied", "62%"),
        *[
            pytest.param(*rest, marks=pytest.mark.slow)
            for rest in (("llama", "62%"), ("llama", "85%"), ("llama-tied", "85%"))
        ],
    ],
)
def test_a_size_is_reached_with_tables_in_it(name, share, model_of, text_file, tmp_path):
    path, out = model_of(name, dtype=BF16), tmp_path / "out"
    report = secateur.compress(str(path), out, recipe(text_file, target_size=share))
    prepared = prepared_of(path, recipe(text_file))
    assert (
        0.8 * float(share[:-1]) / 100 * prepared.dense_bytes()
        < report.bytes
        <= float(share[:-1]) / 100 * prepared.dense_bytes()
    )
    assert verify(out) == []
    said = json.loads((out / "secateur.json").read_text())
    assert said["recipe"]["embeddings"] in (*BITS, 16)
    tables = {table.name: round(table.bits) for table in inspect(out).tables}
    assert set(said.get("tables", {})) == {name for name, bits in tables.items() if bits < 16}
    # What was found is repeated by the manifest alone.
    again = secateur.compress(str(path), tmp_path / "again", str(out / "secateur.json"))
    assert again.bytes == report.bytes


def test_bits_that_are_given_are_kept_to(model_of, text_file, tmp_path):
    path = model_of("llama", dtype=BF16)
    secateur.compress(str(path), tmp_path / "out", recipe(text_file, target_size="75%", embeddings=16, head=8))
    said = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert (said["recipe"]["embeddings"], said["recipe"]["head"]) == (16, 8)
    assert list(said["tables"]) == ["lm_head"]


@pytest.mark.slow
def test_a_limit_of_perplexity_takes_tables_too(model_of, text_file, tmp_path):
    path = model_of("llama-tied", dtype=BF16)
    asked = recipe(text_file, max_perplexity_rise="20%")
    secateur.compress(str(path), tmp_path / "out", asked)
    assert json.loads((tmp_path / "out" / "secateur.json").read_text())["recipe"]["embeddings"] in BITS
