"""Models in the formats of GPTQ, AWQ and MLX: read to the bit, run packed where a layout of ours holds them, and written."""

import json
import shutil
from pathlib import Path

import foreign_codes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries
from safetensors.torch import load_file, save_file

import secateur
from secateur.checkpoint.export import export
from secateur.checkpoint.inspect import inspect
from secateur.core.quantized import Quantized
from secateur.errors import CheckpointError, UsageError
from secateur.foreign.awq import AWQ, AWQWeight
from secateur.foreign.gptq_format import GPTQ, GPTQWeight, pack
from secateur.foreign.mlx_codes import MLX, MLXCodes
from secateur.formats.layouts.packed_int import Uniform
from secateur.model.source import open_source
from secateur.plugin.packed_modules import packed_linears

LIBRARY = load_file(Path(__file__).parents[1] / "fixtures" / "gptq_awq.safetensors")
CASES = sorted({name.partition(".")[0] for name in LIBRARY})


def case(name):
    parts = {key.partition(".")[2]: tensor for key, tensor in LIBRARY.items() if key.partition(".")[0] == name}
    return parts, parts.pop("expected")


def decoder_of(name):
    return AWQWeight(16) if name == "awq" else GPTQWeight(int(name[0]), 16, int(name[3]), symmetric=False)


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_the_libraries_dequantize(name):
    """GPTQModel's and AutoAWQ's own, see `fixtures/make_gptq_awq.py`."""
    tensors, expected = case(name)
    decoder = decoder_of(name)
    assert torch.equal(decoder.unpack(tensors), expected)
    layout, parts = decoder.ours(tensors)
    assert torch.equal(layout.unpack(parts), expected)
    assert ("order" in parts) == name.endswith("order")
    assert decoder.describe(tensors).count == expected.numel()


@pytest.mark.parametrize("name", [name for name in CASES if name != "awq"])
def test_what_is_written_is_what_the_library_wrote(name):
    tensors, _ = case(name)
    decoder = decoder_of(name)
    weight = decoder.read(tensors)
    if decoder.version == 1 and (weight.codes.zero_OG == 0).any():  # which it borrows from the next one
        with pytest.raises(ValueError, match="zero points of 0"):
            pack(weight, 1)
        return
    again = pack(weight, decoder.version)
    assert set(again) == set(tensors)
    assert all(torch.equal(again[part], tensors[part]) for part in tensors)


def test_all_cases_are_there():
    assert len(CASES) == 17


@tries(60)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    version=st.sampled_from([1, 2]),
    sizes=st.sampled_from([(32, 64, 16), (64, 32, 32), (32, 96, 48)]),
    ordered=st.booleans(),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_gptq_by_the_definition(bits, version, sizes, ordered, symmetric, seed):
    O, I, group = sizes
    group_I = torch.arange(I) // group
    if ordered:
        group_I = group_I[torch.randperm(I, generator=torch.Generator().manual_seed(seed))]
    codes = foreign_codes.random_codes(O, I, group, bits, seed, symmetric)
    tensors, dense = foreign_codes.gptq(*codes, bits, version, group_I)
    decoder = GPTQWeight(bits, group, version, symmetric)
    assert torch.equal(decoder.unpack(tensors), dense)
    weight = decoder.read(tensors)
    assert (weight.codes.zero_OG is None) == bool((codes[1] == 2 ** (bits - 1)).all())
    again = pack(weight, version)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[part], tensors[part]) for part in tensors)


@pytest.mark.parametrize("form", [GPTQ, AWQ])
def test_a_section_without_its_weights_is_refused(form):
    with pytest.raises(CheckpointError, match="but the files hold no qweight"):
        form.packed_weights({"a.weight": torch.ones(2, 2)}, {"bits": 4, "group_size": 32})


def test_without_g_idx_groups_are_in_order():
    tensors, expected = case("4-v2")
    del tensors["g_idx"]
    assert torch.equal(GPTQWeight(4, 16, 2, symmetric=False).unpack(tensors), expected)


def test_groups_of_different_sizes_are_dense():
    tensors, _ = case("4-v2")
    tensors["g_idx"][0] = 3
    decoder = GPTQWeight(4, 16, 2, symmetric=False)
    W_OI = decoder.unpack(tensors)
    assert decoder.ours(tensors) is None
    with pytest.raises(ValueError, match="does not give every group 16"):
        decoder.read(tensors)
    # Column 0 with the grid of group 3.
    q = (tensors["qweight"][0] & 15).float()
    z = torch.stack([(tensors["qzeros"][3] >> 4 * i) & 15 for i in range(8)], 1).flatten().float()
    assert torch.equal(W_OI[:, 0], ((q - z) * tensors["scales"][3].float()).half())


# --- whole folders

SECTIONS = {
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 16,
        "sym": False,
        "desc_act": True,
        "checkpoint_format": "gptq",
    },
    "gptq_v2": {"quant_method": "gptq", "bits": 3, "group_size": -1, "sym": True, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"},
    "mlx": {"bits": 4, "group_size": 32, "model.layers.0.mlp.down_proj": {"bits": 6, "group_size": 32}},
}


def write(kind, source, out):
    section = SECTIONS[kind]
    bits, group = section["bits"], section["group_size"]

    def encode(O, I, seed):
        size = I if group == -1 else group
        group_I = torch.arange(I) // size
        own = bits
        if kind == "mlx":
            own = 6 if (O, I) == (32, 64) and seed == down else bits
            code_OI, _, scale_OG = foreign_codes.random_codes(O, I, size, own, seed)
            return foreign_codes.mlx(code_OI, scale_OG, own, group_I)
        codes = foreign_codes.random_codes(O, I, size, own, seed, section.get("sym", False))
        if kind == "awq":
            return foreign_codes.awq(*codes, group_I)
        if section.get("desc_act"):
            group_I = group_I[torch.randperm(I, generator=torch.Generator().manual_seed(seed))]
        return foreign_codes.gptq(*codes, bits, 1 if section["checkpoint_format"] == "gptq" else 2, group_I)

    names = sorted(load_file(source / "model.safetensors"))
    down = names.index("model.layers.0.mlp.down_proj.weight")
    return foreign_codes.write(source, out, section, encode, "quantization" if kind == "mlx" else "quantization_config")


@pytest.mark.parametrize("kind", SECTIONS)
def test_folders(kind, model_of, tmp_path):
    source, folder = model_of("llama", torch.float16), tmp_path / kind
    dense = write(kind, source, folder)
    opened = open_source(str(folder))
    assert opened.weights.keys() == dense.keys()
    assert all(torch.equal(opened.weights[name], dense[name]) for name in dense)
    assert {linear.layout for linear in inspect(folder).linears} == {kind.partition("_")[0]}
    plain, packed = secateur.load(folder, "dense"), secateur.load(folder)
    parameters = dict(plain.named_parameters())
    assert all(torch.equal(parameters[name], dense[name]) for name in parameters)
    assert len(list(packed_linears(packed))) == (0 if kind == "mlx" else 14)
    ids_NS = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        wanted, logits = plain(ids_NS).logits.float(), packed(ids_NS).logits.float()
    assert (logits - wanted).abs().max() <= wanted.abs().max() / 100
    notes = export(str(folder), tmp_path / "ours", "secateur")
    assert bool(notes) == (kind == "mlx")
    assert not secateur.verify(tmp_path / "ours")
    found = dict(secateur.load(tmp_path / "ours", "dense").named_parameters())
    assert all(torch.equal(found[name], dense[name]) for name in found)
    content = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "quantization" not in content
    export(str(folder), tmp_path / "plain", "dense")
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(stored[name], dense[name]) for name in stored)
    secateur.compress(str(folder), tmp_path / "less", secateur.Recipe(prune="magnitude", sparsity=0.5))
    assert "was quantized before" in json.dumps(json.loads((tmp_path / "less" / "secateur.json").read_text())["notes"])


def test_what_said_how_it_was_packed_does_not_come_along(model_of, tmp_path):
    write("awq", model_of("llama", torch.float16), tmp_path / "awq")
    (tmp_path / "awq" / "quant_config.json").write_text('{"w_bit": 4}')
    export(str(tmp_path / "awq"), tmp_path / "ours", "secateur")
    assert not (tmp_path / "ours" / "quant_config.json").exists()


def test_conv1d_is_refused(model_of, tmp_path):
    """Its weights are kept the other way round, and no section says which way codes are."""
    source, folder = model_of("gpt2", torch.float16), tmp_path / "gptq"
    shutil.copytree(source, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": SECTIONS["gptq_v2"]}))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("h.0.attn.c_proj.weight"))
    O, I = tensors.pop(name).shape
    codes = foreign_codes.random_codes(O, I, I, 3, 0, symmetric=True)
    parts, _ = foreign_codes.gptq(*codes, 3, 2, torch.zeros(I, dtype=torch.int64))
    tensors.update({f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"c_proj.*keeps weights as \[in, out\]"):
        secateur.load(folder, "dense")


# --- hostile ones

DAMAGED = {
    "qweight cut off": ("4-v2", "qweight", lambda t: t[1:], "words for 64 weights"),
    "qweight of bytes": ("4-v2", "qweight", lambda t: t.to(torch.uint8), "'qweight' has dtype"),
    "qweight of one dimension": ("4-v2", "qweight", lambda t: t.flatten(), "'qweight' has dtype"),
    "qzeros cut off": ("4-v2", "qzeros", lambda t: t[:, 1:], "its qzeros"),
    "scales of other columns": ("4-v2", "scales", lambda t: t[:, 1:], "its scales"),
    "scales of other groups": ("4-v2", "scales", lambda t: t[1:], "its"),
    "scales that are infinite": ("4-v2", "scales", lambda t: t / 0, "not finite"),
    "a group that is not there": ("4-v2", "g_idx", lambda t: t + 1, "groups that are not from 0 to 3"),
    "a group below zero": ("4-v2", "g_idx", lambda t: t - 1, "groups that are not from 0 to 3"),
    "groups of too few": ("4-v2", "g_idx", lambda t: t[:32], "words for 32 weights"),
    "groups that are no numbers": ("4-v2", "g_idx", lambda t: t.float(), "'g_idx' has dtype"),
    "words of AWQ cut off": ("awq", "qweight", lambda t: t[:-1], "which is not one of each"),
    "zeros of AWQ cut off": ("awq", "qzeros", lambda t: t[:, 1:], "which is not one of each"),
    "scales of AWQ that are none": ("awq", "scales", lambda t: t * torch.nan, "not finite"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_damaged_is_refused(what):
    name, part, change, message = DAMAGED[what]
    tensors, _ = case(name)
    tensors[part] = change(tensors[part])
    for use in (decoder_of(name).unpack, decoder_of(name).ours, decoder_of(name).describe):
        with pytest.raises(ValueError, match=message):
            use(tensors)
    del tensors[part]
    if part != "g_idx":
        with pytest.raises(ValueError, match=f"'{part}' is missing"):
            decoder_of(name).unpack(tensors)


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
@pytest.mark.parametrize("change", [lambda t: t[1:], lambda t: t[:, 1:], lambda t: t.double(), lambda t: t[None]])
def test_damaged_codes_of_mlx_are_refused(part, change):
    code_OI, _, scale_OG = foreign_codes.random_codes(32, 64, 32, 4, 0)
    tensors, dense = foreign_codes.mlx(code_OI, scale_OG, 4, torch.arange(64) // 32)
    assert torch.equal(MLXCodes(4, 32).unpack(tensors), dense)
    tensors[part] = change(tensors[part])
    with pytest.raises(ValueError, match="its"):
        MLXCodes(4, 32).unpack(tensors)


@pytest.mark.parametrize("version", [1, 2])
def test_zero_points_of_the_other_version_are_refused(version):
    """By which every weight would be off by a scale: gibberish."""
    codes = foreign_codes.random_codes(32, 64, 16, 4, 0, symmetric=True)
    tensors, _ = foreign_codes.gptq(*codes, 4, version, torch.arange(64) // 16)
    with pytest.raises(ValueError, match=f"its qzeros are all {6 + version}, .*but config.json says gptq"):
        GPTQWeight(4, 16, 3 - version, symmetric=True).unpack(tensors)


REFUSED = {
    "5 bits": (GPTQ, {"bits": 5}, "bits 5"),
    "no bits": (GPTQ, {"bits": None}, "bits None"),
    "groups of 0": (GPTQ, {"group_size": 0}, "group_size 0"),
    "marlin's order": (GPTQ, {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "marlin's order, as once said": (GPTQ, {"is_marlin_format": True}, "is_marlin_format True"),
    "words of 64 bits": (GPTQ, {"pack_dtype": "int64"}, "pack_dtype 'int64'"),
    "two conventions": (GPTQ, {"checkpoint_format": "gptq", "format": "gptq_v2"}, "two conventions of zero points"),
    "GEMV order": (AWQ, {"version": "gemv"}, "version 'gemv'"),
    "AWQ of 8 bits": (AWQ, {"bits": 8}, "bits 8"),
    "of llm-awq": (AWQ, {"backend": "llm-awq"}, "backend 'llm-awq'"),
    "MXFP4 of MLX": (MLX, {"mode": "mxfp4"}, "mode 'mxfp4'"),
    "7 bits of MLX": (MLX, {"bits": 7}, "bits 7"),
    "groups of MLX that it has not": (MLX, {"group_size": 48}, "group_size 48"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_read_is_refused(what):
    form, change, message = REFUSED[what]
    names = dict.fromkeys(["a.weight", "a.scales", "a.biases"])
    with pytest.raises(CheckpointError, match=message) as caught:
        form.packed_weights(names, {"bits": 4, "group_size": 32, **change})
    assert "secateur reads" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- writing GPTQ

RECIPES = {
    "3 bits": {"bits": 3, "group_size": 32, "symmetric": True},
    "4 bits": {"bits": 4, "group_size": 16},
    "4 bits a row": {"bits": 4, "group_size": "row"},
    "in another order": {"bits": 4, "group_size": 16, "order": "permuted"},
    "8 bits": {"bits": 8, "group_size": 16},
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("form", ["gptq", "gptq-v1"])
@pytest.mark.parametrize("what", RECIPES)
def test_export_writes_what_the_definition_reads(what, form, model_of, text_file, tmp_path):
    calibration = {"source": str(text_file), "samples": 4, "seq_len": 32}
    recipe = {"quantize": "gptq", "quantization": RECIPES[what], "calibration": calibration}
    source = model_of("llama", torch.float16, num_key_value_heads=4)  # 32 rows, of which 3 bits fill words
    secateur.compress(str(source), tmp_path / "ours", recipe)
    weights = open_source(str(tmp_path / "ours")).weights
    found = [packed.layout.read(packed.tensors(weights.stored)).codes.zero_OG for packed in weights.packed.values()]
    if form == "gptq-v1" and any(zero_OG is not None and (zero_OG == 0).any() for zero_OG in found):
        with pytest.raises(UsageError, match="zero points of 0, which version 1 has no place for"):
            export(str(tmp_path / "ours"), tmp_path / "gptq", form)
        return
    export(str(tmp_path / "ours"), tmp_path / "gptq", form)
    assert not secateur.verify(tmp_path / "gptq")
    section = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert section["checkpoint_format"] == {"gptq": "gptq_v2", "gptq-v1": "gptq"}[form]
    assert section["desc_act"] == (what == "in another order")
    check_transformers(section)
    stored = load_file(tmp_path / "gptq" / "model.safetensors")
    dense = dict(secateur.load(tmp_path / "ours", "dense").named_parameters())
    for name in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        found = by_definition({part: stored[f"{name}.{part}"] for part in GPTQWeight.parts}, section)
        assert torch.equal(found, dense[f"{name}.weight"]), name
    again = dict(secateur.load(tmp_path / "gptq", "dense").named_parameters())
    assert all(torch.equal(again[name], dense[name]) for name in dense)


def by_definition(tensors, section):
    """One weight after the other, by Python's numbers."""
    bits = section["bits"]

    def codes(numbers):
        number = sum((word % 2**32) << 32 * i for i, word in enumerate(numbers))
        return [number >> bits * i & 2**bits - 1 for i in range(32 * len(numbers) // bits)]

    code_OI = [codes(column) for column in tensors["qweight"].T.tolist()]
    zero_GO = [codes(row) for row in tensors["qzeros"].tolist()]
    more = section["checkpoint_format"] == "gptq"
    scale_GO, group_I = tensors["scales"].tolist(), tensors["g_idx"].tolist()
    rows = [
        [(code_OI[o][i] - zero_GO[g][o] - more) * scale_GO[g][o] for i, g in enumerate(group_I)]
        for o in range(len(code_OI))
    ]
    return torch.tensor(rows, dtype=torch.float64).half()


def check_transformers(section):
    """Its own config takes the section, and understands it."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    config = AutoQuantizationConfig.from_dict(dict(section))
    assert type(config).__name__ == "GPTQConfig"
    assert (config.bits, config.group_size, config.desc_act, config.sym) == tuple(
        section[key] for key in ("bits", "group_size", "desc_act", "sym")
    )


def test_linears_that_differ_are_named(model_of, tmp_path):
    """By what GPTQModel and vLLM look up for each module."""
    choices = {"model.layers.0.self_attn.o_proj": {"bits": None}, "model.layers.1.mlp.down_proj": {"bits": 8}}
    recipe = {"quantize": "rtn", "quantization": {"bits": 4, "group_size": 16}}
    source = model_of("llama", torch.float16)
    names = [
        n.removesuffix(".weight") for n in load_file(source / "model.safetensors") if ".layers." in n and "proj" in n
    ]
    recipe["linears"] = {name: {"bits": 4, **choices.get(name, {})} for name in names}
    secateur.compress(str(source), tmp_path / "ours", recipe)
    export(str(tmp_path / "ours"), tmp_path / "gptq", "gptq")
    section = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert section["dynamic"] == {
        r"+:^model\.layers\.1\.mlp\.down_proj$": {"bits": 8, "group_size": 16, "sym": False, "desc_act": False},
        r"-:^model\.layers\.0\.self_attn\.o_proj$": {},
    }
    ours, again = (dict(secateur.load(tmp_path / f, "dense").named_parameters()) for f in ("ours", "gptq"))
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def uniform(**changes):
    I = changes.pop("I", 64)
    options = {
        "bits": 4, "group_size": 16, "code_OK": torch.zeros(32, I, dtype=torch.uint8),
        "scale_OG": torch.ones(32, 4, dtype=torch.bfloat16), "zero_OG": None, **changes,
    }  # fmt: skip
    return Quantized(Uniform(**options), (32, I), torch.bfloat16)


CANNOT = {
    "groups that do not divide": (uniform(group_size=24), "do not divide into groups of 24"),
    "half a word": (uniform(I=60, group_size=15), "half full"),
    "scales beyond float16": (uniform(scale_OG=torch.full((32, 4), 1e-30, dtype=torch.bfloat16)), "float16"),
    "zero points of 0": (uniform(zero_OG=torch.zeros(32, 4, dtype=torch.uint8)), "zero points of 0"),
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_the_format_cannot_hold_is_refused(what):
    weight, message = CANNOT[what]
    with pytest.raises(ValueError, match=message):
        pack(weight, 1)


def test_a_pruned_model_is_refused(packed_of, tmp_path):
    with pytest.raises(UsageError, match="a mask of kept weights, which GPTQ's format does not store; `to='dense'`"):
        export(str(packed_of("llama", "sparse-int")), tmp_path / "out", "gptq")
    with pytest.raises(UsageError, match="not on a uniform grid, and GPTQ's format stores no others"):
        export(str(packed_of("llama", "spqr")), tmp_path / "out", "gptq")
