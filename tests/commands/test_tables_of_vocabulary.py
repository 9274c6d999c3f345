"""What the commands say of quantized embeddings and heads."""

import json

import pytest
import torch

from secateur.speed.bench import bench

BF16 = torch.bfloat16


@pytest.fixture
def run(says, model_of, text_file, tmp_path):
    """Run `compress` on a tiny model with more options, calibrated on little text."""

    def compress(name, *options):
        text = ["--calibration", text_file, "--samples", 4, "--seq-len", 32]
        return says("compress", model_of(name, dtype=BF16), tmp_path / "out", *options, *text)

    return compress


@pytest.mark.usefixtures("small_cache")
def test_embeddings_and_head_alone(run, says, tmp_path):
    code, _, err = run("llama", "--embeddings", 8, "--head", 4)
    assert code == 0
    assert "compressed linears" not in err
    assert [line.split()[-2] for line in err.splitlines() if "bits per weight, " in line][-1] == "4.64"
    code, out, _ = says("inspect", tmp_path / "out")
    rows = {line.split()[1]: line.split() for line in out.splitlines() if "packed-int" in line}
    assert set(rows) == {"model.embed_tokens", "lm_head"}
    assert code == 0
    code, out, _ = says("inspect", tmp_path / "out", "--json")
    assert [table["layout"] for table in json.loads(out)["tables"]] == ["packed-int", "packed-int"]
    assert says("verify", tmp_path / "out")[0] == 0
    [case] = bench(str(tmp_path / "out"), seconds=0.01).cases  # rows of embeddings are looked up
    assert case.linears == 1


def test_what_is_tied_is_one_tensor(run):
    code, _, err = run("llama-tied", "--head", 6)
    assert code == 2
    said = err.splitlines()[-1]
    assert "--head 6: the head of" in said
    assert said.endswith("is its table of embeddings, one tensor: give --embeddings, too")
    code, _, err = run("llama-tied", "--embeddings", 8, "--head", 6)
    assert code == 0
    assert "model.embed_tokens and the head are one tensor: it gets the 8 bits asked for one of them" in err


@pytest.mark.parametrize("option", ["--embeddings", "--head"])
def test_bits_that_there_are_not(run, option):
    for bits in (1, 9, 0, -4):
        code, _, err = run("llama", option, bits)
        assert code == 2
        assert f"{option} {bits} is not possible: give 2 to 8 bits, or 16 to leave it as it is" in err
    code, _, err = run("llama", option, 16)
    assert code == 2
    assert "no method is given" in err


def test_plan_foretells_the_size(run, says, model_of, text_file, tmp_path):
    options = ["--quantize", "gptq", "--bits", 4, "--group-size", 16, "--embeddings", 8, "--head", 6]
    text = ["--calibration", text_file, "--samples", 4, "--seq-len", 32]
    code, out, _ = says("plan", model_of("llama", dtype=BF16), *options, *text, "--json")
    assert code == 0
    assert run("llama", *options)[0] == 0
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert json.loads(out)["disk"] == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize("to", ["dense", "secateur"])
def test_exports_of_them(run, says, tmp_path, to):
    assert run("llama-tied", "--embeddings", 5)[0] == 0
    assert says("export", tmp_path / "out", tmp_path / to, "--to", to)[0] == 0
    assert says("verify", tmp_path / to)[0] == 0
