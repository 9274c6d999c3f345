"""Tables of tokens in GGUF files: with the codes that they have, in both directions."""

import json

import pytest
import torch

gguf = pytest.importorskip("gguf")

from tiny_gguf import make_gguf  # noqa: E402 - it needs the package

import secateur  # noqa: E402
from secateur.checkpoint import gguf_export  # noqa: E402
from secateur.errors import UsageError  # noqa: E402
from secateur.foreign.gguf_file import GGUFFile  # noqa: E402
from secateur.model.source import open_source  # noqa: E402

TABLES = ("token_embd.weight", "output.weight")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return {kind: make_gguf(folder / f"{kind}.gguf", kind) for kind in ("Q8_0", "F16")}


def export(folder, made, **options):
    notes = secateur.export(str(folder / "out"), folder / "m.gguf", "gguf", like=made["F16"], **options)
    return notes, GGUFFile(folder / "m.gguf")


def types(file):
    return tuple(file.type(name) for name in TABLES)


def same_weights(folder):
    ours, theirs = (open_source(str(folder / name), dtype=torch.float16).weights for name in ("out", "m.gguf"))
    return all(torch.equal(ours[name], theirs[name].to(ours[name].dtype)) for name in ours)


@pytest.mark.parametrize(
    ("embeddings", "head", "kinds"),
    [
        ("q5_1", "q8_0", ("Q5_1", "Q8_0")),
        ("iq4_nl", 16, ("IQ4_NL", "F16")),
        ("q4_k", 8, ("Q5_0", "Q8_0")),  # rows of 64 weights are no super-blocks
        (6, 3, ("Q8_0", "Q4_0")),
    ],
)
def test_codes_of_tables_are_kept(embeddings, head, kinds, made, tmp_path):
    secateur.compress(str(made["F16"]), tmp_path / "out", {"embeddings": embeddings, "head": head})
    notes, file = export(tmp_path, made)
    assert notes == []
    assert types(file) == kinds
    assert same_weights(tmp_path)


def test_a_type_for_linears_leaves_codes_of_tables_alone(made, tmp_path):
    secateur.compress(str(made["F16"]), tmp_path / "out", {"embeddings": "q4_1", "head": 16})
    _, file = export(tmp_path, made, type="q5_0")
    assert types(file) == ("Q4_1", "Q8_0")  # the head has no codes: Q6_K, which does not divide its rows
    notes, file = export(tmp_path, made, embeddings="q5_1", overwrite=True)
    assert notes == ["model.embed_tokens had other codes and is rounded once more, as Q5_1"]
    assert types(file) == ("Q5_1", "Q5_1")


def test_codes_of_no_type_are_told_of(made, tmp_path, monkeypatch):
    secateur.compress(str(made["F16"]), tmp_path / "out", {"embeddings": 4})
    monkeypatch.setattr(gguf_export, "blocks_of", lambda *_: None)
    notes, file = export(tmp_path, made)
    assert len(notes) == 1
    assert "model.embed_tokens has codes that no type of GGUF holds, and is in 16 bits: `embeddings` Q8_0" in notes[0]
    assert types(file) == ("F16", "F16")
    assert same_weights(tmp_path)


def test_a_file_of_another_model_is_refused(made, tmp_path):
    secateur.compress(str(made["F16"]), tmp_path / "out", {"embeddings": 8})
    other = tmp_path / "other.gguf"
    GGUFFile(made["F16"]).copy(
        other, lambda name: (torch.zeros(1, 256, dtype=torch.uint8), "F32") if name == "output_norm.weight" else None
    )
    with pytest.raises(UsageError, match=r"is not of the same model: model\.norm\.weight is another"):
        secateur.export(str(tmp_path / "out"), tmp_path / "m.gguf", "gguf", like=other)


def test_tables_of_a_file_run_packed(made):
    packed, dense = secateur.load(made["Q8_0"]), secateur.load(made["Q8_0"], "dense")
    ids_S = torch.arange(12)
    assert type(packed.get_input_embeddings()).__name__ == "PackedEmbedding"
    assert type(packed.get_output_embeddings()).__name__ == "PackedPlainLinear"
    assert torch.equal(packed.get_input_embeddings()(ids_S), dense.get_input_embeddings()(ids_S))
    assert [table.layout for table in secateur.inspect(made["Q8_0"]).tables] == ["blocks", "blocks"]


def test_a_search_ends_in_a_file_of_its_types(made, text_file, tmp_path):
    recipe = {
        "quantize": "gptq", "quantization": {"grid": "gguf"}, "target_size": "45%",
        "calibration": {"source": str(text_file), "samples": 4, "seq_len": 32},
    }  # fmt: skip
    secateur.compress(str(made["F16"]), tmp_path / "out", recipe)
    notes, file = export(tmp_path, made)
    assert notes == []
    assert same_weights(tmp_path)
    said = json.loads((tmp_path / "out" / "secateur.json").read_text())["recipe"]
    tables = [said[role] for role in ("embeddings", "head")]
    assert types(file) == tuple("F16" if form == 16 else form.upper() for form in tables)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {f"{each}_proj": f"ffn_{each}" for each in ("gate", "up", "down")}
    for module, choice in said["linears"].items():
        block, linear = module.split(".")[2], module.rpartition(".")[2]
        assert file.type(f"blk.{block}.{names[linear]}.weight") == choice.get("grid", "f16").upper()
    # As large as the folder, but for metadata and the vocabulary.
    weights = sum(file.rows(name).numel() for name in file)
    assert weights <= (tmp_path / "out" / "model.safetensors").stat().st_size
