"""A search that finds a type of GGUF's for every linear, the table of embeddings and the head."""

import json

import pytest
import torch

import secateur
from secateur.checkpoint.inspect import inspect
from secateur.checkpoint.verify import verify
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.errors import UsageError
from secateur.formats.layouts.block_types import BLOCK_TYPES
from secateur.formats.layouts.choose import layout_for
from secateur.model.load import load_source
from secateur.model.source import open_source
from secateur.pipeline.prepared import prepare
from secateur.quant import table_codes
from secateur.quant.block_grid import TYPE_GRIDS, grids_for
from secateur.quant.rtn import RTN
from secateur.quant.table_codes import quantize_table, table_bytes
from secateur.recipes.plan import plan
from secateur.search.table_candidates import forms_of, open_tables, table_candidates

BF16, CPU = torch.bfloat16, torch.device("cpu")
IDS_NS = torch.randint(2, 300, (4, 32), generator=torch.Generator().manual_seed(3))
#: Of which only the down projections are whole super-blocks.
SIZES = {"hidden_size": 64, "intermediate_size": 256}


def recipe(text_file, **options):
    calibration = secateur.Calibration(source=str(text_file), samples=8, seq_len=32)
    base = {"quantize": "gptq", "quantization": {"grid": "gguf"}, "calibration": calibration}
    return secateur.Recipe(**{**base, **options})


def features_of(path):
    return {name: tensor.shape[1] for name, tensor in open_source(str(path)).weights.items() if tensor.ndim == 2}


def test_grids_are_those_that_divide_the_rows():
    assert [BLOCK_TYPES[name.upper()].block_size for name in grids_for(512)] == [32, *[256] * 6]
    assert {BLOCK_TYPES[name.upper()].block_size for name in grids_for(576)} == {32}
    assert grids_for(40) == ()
    for features in (512, 576):
        bits = [BLOCK_TYPES[name.upper()].bits_per_weight for name in grids_for(features)]
        assert bits == sorted(bits, reverse=True)
        assert len(set(bits)) == len(bits)  # of two as large the one that loses less


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("share", ["55%", "36%"])
def test_a_size_is_reached_by_types(name, method, share, model_of, text_file, tmp_path):
    path, out = model_of(name, dtype=BF16, **SIZES), tmp_path / "out"
    report = secateur.compress(str(path), out, recipe(text_file, target_size=share, quantize=method))
    dense = prepare(open_source(str(path)), *_planned(text_file)).dense_bytes()
    assert 0.8 * float(share[:-1]) / 100 * dense < report.bytes <= float(share[:-1]) / 100 * dense
    assert verify(out) == []
    said = json.loads((out / "secateur.json").read_text())["recipe"]
    sizes, stored = features_of(path), {linear.name: linear for linear in inspect(out).linears}
    chosen = {name: choice.get("grid") for name, choice in said["linears"].items()}
    assert set(chosen) == set(stored)
    for module, grid in chosen.items():
        assert grid in (None, *grids_for(sizes[f"{module}.weight"]))
        assert stored[module].layout == ("dense" if grid is None else "blocks")
    assert len(set(chosen.values())) > 1
    assert said["embeddings"] in (16, *grids_for(64))
    again = secateur.compress(str(path), tmp_path / "again", str(out / "secateur.json"))
    assert again.bytes == report.bytes
    assert [linear.bits for linear in again.linears] == [linear.bits for linear in report.linears]


def _planned(text_file):
    asked = recipe(text_file, quantization={})
    return asked, plan(asked), CPU


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@torch.no_grad()
def test_what_a_type_does_to_a_table_is_measured_as_it_is_defined(name, model_of, text_file, tmp_path):
    path = model_of(name, **SIZES)
    asked = recipe(text_file, target_size="50%")
    prepared = prepare(open_source(str(path)), *_planned(text_file))
    model = load_source(open_source(str(path)), torch.float32, CPU, apart=True)
    dense = model(IDS_NS).logits.double().log_softmax(-1)
    for module, table in open_tables(prepared, asked).items():
        forms = forms_of(asked, table, model)
        assert forms == grids_for(64)
        found = table_candidates(prepared, model, table, IDS_NS, tmp_path, lambda _: None, forms)
        assert [candidate.choice.grid for candidate in found] == list(forms)
        weight = model.get_submodule(module).weight
        before = weight.clone()
        for candidate in found:
            codes = quantize_table(before, candidate.choice.grid, torch.float32, CPU)
            weight.copy_(codes.dequantize())
            other = model(IDS_NS).logits.double().log_softmax(-1)
            wanted = (dense.exp() * (dense - other)).sum().item() / IDS_NS.numel()
            assert candidate.divergence == pytest.approx(wanted, rel=1e-3, abs=1e-7)
            weight.copy_(before)


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", TYPE_GRIDS)
@pytest.mark.parametrize("features", [64, 512])
def test_a_table_on_a_grid_is_what_rounding_makes_of_it(name, features, monkeypatch):
    W_VI = torch.randn(37, features, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = quantize_table(W_VI, name, BF16, CPU)
    layout = layout_for(weight)
    parts = layout.pack(weight)
    assert {part: tensor.nbytes for part, tensor in parts.items()} == table_bytes(name, (37, features))
    stack = Stack.of([W_VI.float()], InputStats.empty(features, Level.NONE), BF16)
    assert torch.equal(RTN(grid=name).quantize(stack)[0].dequantize(), weight.dequantize())
    monkeypatch.setattr(table_codes, "_ROUNDED", 5 * features)
    assert torch.equal(quantize_table(W_VI, name, BF16, CPU).dequantize(), weight.dequantize())


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_tables_on_a_grid_run_packed(name, model_of, tmp_path):
    path = model_of(name, **SIZES)
    secateur.compress(
        str(path), tmp_path / "out", {"embeddings": "q6_k", **({} if "tied" in name else {"head": "q5_1"})}
    )
    packed, dense = (secateur.load(tmp_path / "out", backend, dtype=torch.float32) for backend in ("auto", "dense"))
    assert type(packed.get_input_embeddings()).__name__ == "PackedEmbedding"
    assert torch.equal(packed.get_input_embeddings()(IDS_NS), dense.get_input_embeddings()(IDS_NS))
    with torch.no_grad():
        one, other = (model(IDS_NS).logits for model in (packed, dense))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    # 64 weights of a row are no whole super-block.
    assert [table.layout for table in inspect(tmp_path / "out").tables] == ["blocks"] * (1 if "tied" in name else 2)
    assert inspect(tmp_path / "out").tables[0].bits == pytest.approx(8.5, abs=0.01)


@pytest.mark.slow
def test_a_limit_of_perplexity_takes_types_too(model_of, text_file, tmp_path):
    path = model_of("llama-tied", dtype=BF16, **SIZES)
    secateur.compress(str(path), tmp_path / "out", recipe(text_file, max_perplexity_rise="20%"))
    said = json.loads((tmp_path / "out" / "secateur.json").read_text())["recipe"]
    assert {choice.get("grid") for choice in said["linears"].values()} <= {None, *grids_for(256), *grids_for(64)}


@pytest.mark.slow
def test_what_it_takes_is_foretold(model_of, text_file, tmp_path):
    path = model_of("llama-tied", dtype=BF16, **SIZES)
    found = secateur.forecast(str(path), recipe(text_file, target_size="50%"), out=tmp_path)
    assert found.seconds["searching"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`grid` gguf leaves the type of every linear to a search: add `target_size`"),
        ({"allocation": "search"}, "`grid` gguf"),
        ({"target_size": "50%", "prune": "wanda"}, "`grid` gguf has a code for every weight"),
        ({"target_size": "50%", "quantization": {"grid": "gguf", "bits": 3}}, "`bits` is decided by `grid` gguf"),
        (
            {"target_size": "50%", "quantization": {"grid": "q4_k"}},
            "finds sparsity and bits of every linear: leave `grid` out",
        ),
        (
            {"allocation": "search", "quantization": {"grid": "q4_k"}},
            "`allocation` search shares bits, which `grid` q4_k decides",
        ),
        ({"linears": {"model.layers.0.mlp.up_proj": secateur.Choice(grid="gguf")}}, "`grid` gguf leaves the type"),
        (
            {"linears": {"model.layers.0.mlp.up_proj": secateur.Choice(grid="q9")}},
            "`grid` q9 is not possible with gptq",
        ),
        ({"embeddings": "q9", "quantization": {}}, "or 16 to leave it as it is, or a grid of GGUF's"),
        ({"embeddings": "gguf", "quantization": {}}, "`embeddings` gguf is not possible"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message, model_of, text_file, tmp_path):
    with pytest.raises(UsageError, match=message):
        secateur.compress(str(model_of("llama", dtype=BF16)), tmp_path / "out", recipe(text_file, **options))
    assert not (tmp_path / "out").exists()


def test_rows_that_no_blocks_divide_are_left_alone(model_of, text_file, tmp_path):
    path = model_of("llama", dtype=BF16, hidden_size=40, intermediate_size=256, head_dim=8)
    secateur.compress(str(path), tmp_path / "out", recipe(text_file, target_size="90%"))
    layouts = {linear.name: linear.layout for linear in inspect(tmp_path / "out").linears}
    assert {layout for name, layout in layouts.items() if "down_proj" not in name} <= {"dense", "blocks"}
    assert layouts["model.layers.0.mlp.up_proj"] == "dense"
    assert "blocks" in {layout for name, layout in layouts.items() if "down_proj" in name}
    with pytest.raises(
        UsageError, match="`embeddings` q6_k does not fit rows of 40 weights, which are not whole blocks of 32"
    ):
        secateur.compress(str(path), tmp_path / "other", {"embeddings": "q6_k"})
