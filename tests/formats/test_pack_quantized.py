"""The format pack-quantized: what we write runs in transformers with the real compressed-tensors and holds our weights to the
bit; what it and its older releases write is read to their bits; nothing hostile is believed.

`fixtures/make_pack_quantized.py` made the folders with three releases; `dense.safetensors.expected` beside each holds what the
same release decompressed.

O: output features, I: input features, G: groups of a row.
"""

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from random_examples import tries
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import secateur
from secateur.checkpoint.export import export
from secateur.core.quantized import Outliers, Quantized
from secateur.errors import CheckpointError
from secateur.foreign.compressed_tensors import CompressedTensors
from secateur.foreign.pack_quantized import PackQuantized, Scheme, pack, packed_weights, quantization_config
from secateur.formats.layouts.codebook import Table
from secateur.formats.layouts.packed_int import Uniform
from secateur.formats.stored_weights import open_weights

FOLDERS = sorted((Path(__file__).parents[1] / "fixtures" / "pack_quantized").iterdir())
EACH = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, FP16, FP32]
UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"


def round_to_grid(W_OI, bits, group_size, symmetric):
    """A weight with the nearest codes on a grid from the least to the greatest weight of each group."""
    (O, I), levels = W_OI.shape, 2**bits - 1
    size = min(group_size, I)
    W_OGS = W_OI.float().view(O, -1, size)
    low_OG, high_OG = W_OGS.amin(2).clamp(max=0), W_OGS.amax(2).clamp(min=0)
    if symmetric:
        high_OG = torch.maximum(-low_OG, high_OG)
        low_OG = -high_OG
    scale_OG = ((high_OG - low_OG) / levels).to(FP16 if W_OI.dtype == FP32 else W_OI.dtype)
    zero_OG = torch.full_like(low_OG, (levels + 1) // 2) if symmetric else (-low_OG / scale_OG.float()).round()
    code_OI = (W_OGS / scale_OG.float()[..., None] + zero_OG[..., None]).round().clamp(0, levels).to(torch.uint8)
    zero = None if symmetric else zero_OG.to(torch.uint8)
    return Quantized(Uniform(bits, group_size, code_OI.view(O, I), scale_OG, zero), (O, I), W_OI.dtype)


def random_weight(O, I, bits, group_size, symmetric, dtype, seed):
    """Every code and zero point there is, and scales of every magnitude that 16 bits have."""
    draw = torch.Generator().manual_seed(seed)
    half = FP16 if dtype == FP32 else dtype
    G = -(-I // group_size)
    code_OI, zero_OG = (
        torch.randint(0, 2**bits, shape, generator=draw, dtype=torch.uint8) for shape in ((O, I), (O, G))
    )
    inf = torch.tensor(torch.inf, dtype=half).view(torch.int16).item()
    scale_OG = torch.randint(1, inf, (O, G), generator=draw, dtype=torch.int16).view(half)
    codes = Uniform(bits, group_size, code_OI, scale_OG, None if symmetric else zero_OG)
    return Quantized(codes, (O, I), dtype)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def reader_of(*weights):
    return PackQuantized(tuple(Scheme.of(weight) for weight in weights))


@pytest.fixture(scope="module")
def library():
    """compressed-tensors' own compressor, and a function that makes one of its schemes from one of ours."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationScheme

    def scheme_of(weight):
        group = next(iter(quantization_config({"a": Scheme.of(weight)}, [])["config_groups"].values()))
        return QuantizationScheme.model_validate(group)

    return compressors.BaseCompressor.get_value_from_registry("pack-quantized"), scheme_of


# --- what we write, in the hands of others


def block_linears(tensors):
    return [name for name in tensors if ".layers." in name and tensors[name].ndim == 2]


def write_packed(folder, out, grid_of, left=()):
    """A model with its linears packed, in a folder of its own; gives back the dense weights that they stand for."""
    dense, stored, schemes = load_file(folder / "model.safetensors"), {}, {}
    for name, tensor in dense.items():
        module = name.removesuffix(".weight")
        if name not in block_linears(dense) or module in left:
            stored[name] = tensor
            continue
        weight = round_to_grid(tensor, *grid_of(module))
        stored.update({f"{module}.{part}": value for part, value in pack(weight).items()})
        schemes[module] = Scheme.of(weight)
        dense[name] = weight.dequantize()
    shutil.copytree(folder, out)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = quantization_config(schemes, ["lm_head", *left])
    (out / "config.json").write_text(json.dumps(config))
    return dense


def check_logits(folder, out, dense):
    """Stock transformers computes the same from the packed folder as from the dense weights."""
    ids_NS = torch.arange(2, 26).view(2, 12)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    plain.load_state_dict(dense)
    packed = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    with torch.no_grad():
        logits, wanted = packed(ids_NS).logits, plain(ids_NS).logits
    assert wanted.std() > 0.1
    assert same(logits, wanted)


# By default 4 bits in every way, and other numbers of bits in two that have nothing in common.
_WAYS = list(product([16, 64], [True, False], [FP32, BF16]))
_LOADED = {bits: _WAYS if bits == 4 else [_WAYS[bits % 4], _WAYS[7 - bits % 4]] for bits in range(2, 9)}


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "dtype"),
    [
        pytest.param(bits, *way, marks=[pytest.mark.slow] * (way not in _LOADED[bits]))
        for bits in range(2, 9)
        for way in _WAYS
    ],
    ids=str,
)
@pytest.mark.usefixtures("library")
def test_transformers_loads_and_runs_it(bits, group_size, symmetric, dtype, model_of, tmp_path):
    folder = model_of("llama", dtype)
    dense = write_packed(folder, tmp_path / "packed", lambda _: (bits, group_size, symmetric))
    check_logits(folder, tmp_path / "packed", dense)
    weights = open_weights(tmp_path / "packed", json.loads((tmp_path / "packed" / "config.json").read_text()))
    assert weights.keys() == dense.keys()
    assert all(same(weights[name], dense[name]) for name in dense)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt"])
def test_a_head_comes_along_where_it_can(name, model_of, text_file, tmp_path):
    calibration = secateur.Calibration(source=str(text_file), samples=8, seq_len=32)
    options = {"bits": 4, "group_size": 16, "symmetric": True}
    recipe = secateur.Recipe(quantize="gptq", quantization=options, embeddings=8, head=8, calibration=calibration)
    secateur.compress(str(model_of(name, BF16)), tmp_path / "out", recipe)
    export(str(tmp_path / "out"), tmp_path / "theirs", "compressed-tensors")
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    tied = name != "llama"
    packed = {key for key in stored if key.endswith("weight_packed") and ".layers." not in key}
    assert packed == (set() if tied else {"lm_head.weight_packed"})
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"), secateur.load(tmp_path / "out", "dense")
    ids_NS = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        assert same(theirs(ids_NS).logits, ours(ids_NS).logits)


@pytest.mark.usefixtures("library")
def test_transformers_runs_several_schemes_and_a_linear_left_dense(model_of, tmp_path):
    """Linears of 32 inputs per channel, of 64 in two groups, and some of 8 bits."""
    folder, left = model_of("llama", FP16), ["model.layers.1.self_attn.o_proj"]
    dense = write_packed(
        folder, tmp_path / "packed", lambda module: (8 if "attn" in module else 4, 32, True), left=left
    )
    section = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert len(section["config_groups"]) == 3
    check_logits(folder, tmp_path / "packed", dense)


SHAPES = st.sampled_from([(1, 1), (3, 8), (9, 12), (17, 33), (36, 20), (25, 64)])


@tries(120)
@given(
    shape=SHAPES,
    bits=st.integers(2, 8),
    groups=st.integers(1, 5),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
@example(shape=(64, 256), bits=4, groups=2, symmetric=False, dtype=BF16, seed=0)
@example(shape=(64, 256), bits=8, groups=2, symmetric=False, dtype=FP16, seed=0)
def test_compressed_tensors_decompresses_our_bits(library, shape, bits, groups, symmetric, dtype, seed):
    """And so do we. Any scale will do: those whose products overflow or underflow too."""
    compressor, scheme_of = library
    O, I = shape
    group_size = I // groups if I % groups == 0 else I + groups
    weight = random_weight(O, I, bits, group_size, symmetric, dtype, seed)
    parts, dense = pack(weight), weight.dequantize()
    assert same(reader_of(weight).unpack(parts), dense)
    if symmetric or O > 8:  # 0.20 fails at a single word of zero points
        assert same(compressor.decompress(parts, scheme_of(weight))["weight"], dense)


@tries(60)
@given(
    O=st.integers(1, 40),
    G=st.integers(1, 6),
    size=st.integers(1, 20),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_scales_and_zero_points_come_back(O, G, size, bits, symmetric, dtype, seed):
    weight = random_weight(O, G * size, bits, size, symmetric, dtype, seed)
    parts = pack(weight)
    back = reader_of(weight).read(parts)
    assert torch.equal(back.codes.code_OK, weight.codes.code_OK)
    assert torch.equal(back.codes.scale_OG.float(), weight.codes.scale_OG.float())
    assert symmetric or torch.equal(back.codes.zero_OG, weight.codes.zero_OG)
    assert (back.shape, back.dtype, back.order_I) == (weight.shape, dtype, None)
    again = pack(back)
    assert again.keys() == parts.keys()
    assert all(same(again[part], parts[part]) for part in parts)


def test_on_disk_it_is_as_described():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]], dtype=torch.uint8)
    scale, zero = torch.tensor([[0.5]], dtype=FP16), torch.tensor([[15]], dtype=torch.uint8)
    parts = pack(Quantized(Uniform(4, 9, codes, scale, zero), (1, 9), FP32))
    assert {part: tensor.dtype for part, tensor in parts.items()} == {
        "weight_packed": torch.int32, "weight_scale": FP32, "weight_shape": torch.int64, "weight_zero_point": torch.int32,
    }  # fmt: skip
    assert parts["weight_packed"].tolist() == [[0x87654321 - 2**32, 9]]
    assert parts["weight_zero_point"].tolist() == [[15]]
    assert parts["weight_shape"].tolist() == [1, 9]


# --- what it cannot hold


def test_what_it_cannot_hold_is_refused_in_one_line():
    good = random_weight(4, 24, 4, 8, False, FP16, seed=0)
    keep_OI = torch.ones(4, 24, dtype=torch.bool)
    none = torch.zeros(4, dtype=torch.int64)
    outliers = Outliers(none, none[:0], torch.zeros(0, dtype=FP16))
    table = Table(4, good.codes.code_OK, torch.zeros(4, 16, dtype=FP16))
    fine = torch.full_like(good.codes.scale_OG, 1 + 2**-10)
    wide = torch.full_like(good.codes.scale_OG.bfloat16(), 2.0**17)
    for weight, message in [
        (replace(good, codes=table), r"not on a uniform grid: .* uniform codes of 2 to 8 bits"),
        (replace(good, codes=replace(good.codes, bits=1)), r"of 1 bits: .* uniform codes of 2 to 8 bits"),
        (replace(good, codes=replace(good.codes, group_size=10)), "24 input features do not divide into groups of 10"),
        (replace(good, keep_OI=keep_OI), "a mask of kept weights"),
        (replace(good, order_I=torch.arange(24)), "columns in another order"),
        (replace(good, outliers=outliers), "outliers"),
        (
            replace(good, codes=replace(good.codes, scale_OG=fine), dtype=BF16),
            "float16 numbers that bfloat16, the model's",
        ),
        (replace(good, codes=replace(good.codes, scale_OG=wide)), "bfloat16 numbers that float16, the model's dtype"),
        (replace(good, codes=replace(good.codes, scale_OG=fine * torch.nan)), "does not have"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            pack(weight)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("half", "dtype"), [(FP16, FP32), (BF16, FP32), (FP16, BF16), (BF16, FP16)], ids=str)
def test_scales_of_another_dtype_are_taken_where_they_fit(half, dtype, library):
    compressor, scheme_of = library
    weight = random_weight(9, 32, 4, 16, False, BF16, seed=3)
    weight = replace(weight, dtype=dtype, codes=replace(weight.codes, scale_OG=torch.full((9, 2), 3 / 64, dtype=half)))
    parts = pack(weight)
    assert parts["weight_scale"].dtype == dtype
    assert same(compressor.decompress(parts, scheme_of(weight))["weight"], weight.dequantize())


# --- what config.json says


def test_alike_linears_are_named_by_their_class():
    config = quantization_config({"a": Scheme(4, 128, True), "b": Scheme(4, 128, True)}, ["lm_head", "c"])
    assert config["ignore"] == ["lm_head", "c"]
    assert config["config_groups"] == {
        "group_0": {
            "format": "pack-quantized",
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    }  # fmt: skip
    assert "dequantize" not in config


def test_linears_that_differ_are_named_one_by_one():
    schemes = {
        "a": Scheme(4, 128, True),
        "b": Scheme(8, None, True),
        "c": Scheme(4, 128, True),
        "d": Scheme(4, 64, False),
    }
    groups = quantization_config(schemes, ["lm_head"])["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["a", "c"], ["b"], ["d"]]
    assert [group["weights"]["strategy"] for group in groups.values()] == ["group", "channel", "group"]


def test_a_config_is_what_compressed_tensors_makes_of_it(library):
    from compressed_tensors.quantization import QuantizationConfig

    schemes = {"a": Scheme(4, 128, False), "b": Scheme(8, None, True)}
    config = quantization_config(schemes, ["lm_head"])
    parsed = QuantizationConfig.model_validate(config).model_dump(mode="json")
    assert {key: parsed[key] for key in config} == config


# --- what others wrote


def test_the_fixtures_are_there():
    assert [folder.name for folder in FOLDERS] == ["0.13.0", "0.20.0", "0.8.1"]


@EACH
def test_every_release_is_read_to_the_bit(folder):
    """Without the library. 0.13 wrote weight_g_idx, 0.8 kept zero points one by one."""
    stored = load_file(folder / "model.safetensors")
    assert (f"{UP}.weight_g_idx" in stored) == (folder.name == "0.13.0")
    assert (stored[f"{UP}.weight_zero_point"].dtype == torch.int8) == (folder.name == "0.8.1")
    weights = open_weights(folder, json.loads((folder / "config.json").read_text()))
    wanted = load_file(folder / "dense.safetensors.expected")
    assert weights.packed.keys() == wanted.keys()
    assert all(same(weights[name], wanted[name]) for name in wanted)
    assert "model.layers.0.self_attn.o_proj.weight" in weights


@EACH
def test_load_runs_the_model(folder):
    model = secateur.load(folder, "dense")
    wanted = load_file(folder / "dense.safetensors.expected")
    found = dict(model.named_parameters())
    assert all(same(found[name].detach(), wanted[name]) for name in wanted)
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(2, 26).view(2, 12)).logits).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [12, 36])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_the_library_compresses_is_read(bits, group_size, symmetric, dtype, library):
    compressor, scheme_of = library
    W_OI = torch.randn(20, 36, generator=torch.Generator().manual_seed(5)).to(dtype)
    ours = round_to_grid(W_OI, bits, group_size, symmetric)
    state = {"weight": W_OI, "weight_scale": ours.codes.scale_OG.to(dtype)}
    if not symmetric:
        state["weight_zero_point"] = (ours.codes.zero_OG.short() - 2 ** (bits - 1)).to(torch.int8)
    parts = compressor.compress(state, scheme_of(ours))
    read_OI = reader_of(ours).unpack(parts)
    assert same(read_OI, compressor.decompress(parts, scheme_of(ours))["weight"])
    assert (read_OI - W_OI).abs().max() < 1.1 * ours.codes.scale_OG.max()


def ordered(bits=4, symmetric=False):
    """A weight whose inputs are in no order, its tensors, and the dense weight that they stand for."""
    weight = random_weight(6, 24, bits, 8, symmetric, FP32, seed=1)
    order_I = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    shuffled = replace(weight, codes=replace(weight.codes, code_OK=weight.codes.code_OK[:, order_I]))
    parts = {**pack(shuffled), "weight_g_idx": (order_I // 8).to(torch.int32)}
    return reader_of(weight), parts, weight.dequantize()[:, order_I]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_in_another_order(bits, symmetric):
    reader, parts, dense_OI = ordered(bits, symmetric)
    assert same(reader.unpack(parts), dense_OI)
    in_order = {**parts, "weight_g_idx": torch.arange(24, dtype=torch.int32) // 8}
    never_set = {**parts, "weight_g_idx": torch.full((24,), -1, dtype=torch.int32)}
    plain = {part: tensor for part, tensor in parts.items() if part != "weight_g_idx"}
    assert same(reader.unpack(in_order), reader.unpack(plain))
    assert same(reader.unpack(never_set), reader.unpack(plain))


def test_bits_after_the_last_code_do_not_matter():
    """Nothing says what they are; compressed-tensors sets them to zero and does not look at them."""
    weight = random_weight(3, 5, 4, 5, False, FP16, seed=0)
    parts = pack(weight)
    parts["weight_packed"] |= -(2**20)
    parts["weight_zero_point"] |= -(2**12)
    assert same(reader_of(weight).unpack(parts), weight.dequantize())


# --- what strangers write


def int32(*shape):
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"])
def test_a_missing_part_is_named(part):
    reader, parts, _ = ordered()
    del parts[part]
    with pytest.raises(ValueError, match=part):
        reader.unpack(parts)


DAMAGED = {
    "codes of another dtype": ("weight_packed", lambda t: t.long(), "'weight_packed' has dtype torch.int64"),
    "codes as a vector": ("weight_packed", lambda t: t.flatten(), "'weight_packed' .*shape"),
    "codes of experts": ("weight_packed", lambda t: t[None], "'weight_packed' .*shape"),
    "a row too few": ("weight_packed", lambda t: t[1:], "says 6 rows, but its weight_packed 5"),
    "a word too few": ("weight_packed", lambda t: t[:, 1:], "weight_packed has 2 words for 24 weights of a row"),
    "a word too many": ("weight_packed", lambda t: torch.cat([t, t], 1), "weight_packed has 6 words for 24"),
    "no words": ("weight_packed", lambda t: t[:, :0], "weight_packed has 0 words for 24"),
    "scales of integers": ("weight_scale", lambda t: t.int(), "'weight_scale' has dtype torch.int32"),
    "scales of float64": ("weight_scale", lambda t: t.double(), "'weight_scale' has dtype torch.float64"),
    "scales of float8": ("weight_scale", lambda t: t.to(torch.float8_e4m3fn), "'weight_scale' has dtype torch.float8"),
    "one scale": ("weight_scale", lambda t: t[0, 0], "'weight_scale' .*shape"),
    "a row of scales too few": ("weight_scale", lambda t: t[1:], "weight_packed 6 and its weight_scale 5"),
    "a group too few": ("weight_scale", lambda t: t[:, 1:], "weight_scale has 2 columns for 24 weights of a row"),
    "no groups": ("weight_scale", lambda t: t[:, :0], "weight_scale has 0 columns"),
    "a scale that is not a number": (
        "weight_scale",
        lambda t: t * torch.nan,
        "weight_scale holds values that are not fin",
    ),
    "an infinite scale": ("weight_scale", lambda t: t * torch.inf, "weight_scale holds values that are not finite"),
    "a shape of floats": ("weight_shape", lambda t: t.float(), "'weight_shape' has dtype torch.float32"),
    "a shape of three": ("weight_shape", lambda t: torch.cat([t, t[:1]]), "'weight_shape' .*shape"),
    "a negative shape": ("weight_shape", lambda t: -t, "not two positive sizes"),
    "no weights": ("weight_shape", lambda t: t * 0, "not two positive sizes"),
    "exabytes": ("weight_shape", lambda t: t * 2**60, "not two positive sizes"),
    "a wide shape": ("weight_shape", lambda t: t * torch.tensor([1, 2**26]), "weight_packed has 3 words"),
    "a tall shape": ("weight_shape", lambda t: t * torch.tensor([2**28, 1]), "says 1610612736 rows"),
    "a shape the other way round": ("weight_shape", lambda t: t.flip(0), "says 24 rows"),
    "zero points of floats": ("weight_zero_point", lambda t: t.float(), "weight_zero_point has dtype torch.float32"),
    "zero points too few": ("weight_zero_point", lambda t: t[:0], r"weight_zero_point .* shape \[0, 3\]"),
    "zero points of another weight": (
        "weight_zero_point",
        lambda t: torch.cat([t, t]),
        r"shape \[2, 3\], which does not",
    ),
    "zero points of fewer groups": (
        "weight_zero_point",
        lambda t: t[:, 1:],
        r"shape \[1, 2\], which does not hold 4 bits",
    ),
    "zero points the other way round": ("weight_zero_point", lambda t: t.T, r"shape \[3, 1\]"),
    "unpacked and too large": ("weight_zero_point", lambda t: torch.full((6, 3), 8, dtype=torch.int8), "int8"),
    "unpacked and too small": ("weight_zero_point", lambda t: torch.full((6, 3), -9, dtype=torch.int8), "int8"),
    "unpacked and too few": ("weight_zero_point", lambda t: torch.zeros((5, 3), dtype=torch.int8), "int8"),
    "an order of floats": ("weight_g_idx", lambda t: t.float(), "weight_g_idx has dtype torch.float32"),
    "an order too short": ("weight_g_idx", lambda t: t[1:], r"weight_g_idx .* shape \[23\], .* each of 24"),
    "a group beyond the last": ("weight_g_idx", lambda t: t + 1, "not from 0 to 2"),
    "a group before the first": ("weight_g_idx", lambda t: t - 1, "not from 0 to 2"),
    "an enormous group": ("weight_g_idx", lambda t: t.long() + 2**62, "not from 0 to 2"),
    "groups of other sizes": ("weight_g_idx", lambda t: t * 0, "does not give every group 8 input features"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_named(what):
    part, damage, message = DAMAGED[what]
    reader, parts, _ = ordered()
    with pytest.raises(ValueError, match=message):
        reader.unpack({**parts, part: damage(parts[part])})


def test_a_weight_of_a_scheme_that_the_config_does_not_have():
    parts = pack(random_weight(8, 32, 8, 16, False, FP16, seed=0))
    for scheme, message in [
        (
            Scheme(4, 16, False),
            r"8 words for 32 weights of a row, but config.json says 4 bits in groups of 16, with zero",
        ),
        (Scheme(8, None, False), "2 columns for 32 weights of a row, but config.json says 8 bits per output channel"),
        (Scheme(8, 24, False), "2 columns for 32 weights of a row, but config.json says 8 bits in groups of 24"),
        (Scheme(8, 16, True), "a weight_zero_point, but config.json says 8 bits in groups of 16, symmetric"),
        (Scheme(8, 16, False, ordered=True), "no weight_g_idx, but config.json says .* in activation order"),
    ]:
        with pytest.raises(ValueError, match=message):
            PackQuantized((scheme,)).unpack(parts)


def test_each_weight_finds_its_scheme():
    weights = [
        random_weight(6, 24, bits, size, symmetric, FP16, seed=0)
        for bits in (4, 8) for size in (8, 12, 99) for symmetric in (True, False)
    ]  # fmt: skip
    reader = reader_of(*weights)
    for weight in weights:
        assert Scheme.of(reader.read(pack(weight))) == Scheme.of(weight)


def test_a_weight_that_may_be_of_either_is_refused():
    """Three codes of 4 or of 8 bits take one word."""
    narrow, wide = (random_weight(2, 3, bits, 3, True, FP16, seed=0) for bits in (4, 8))
    assert same(reader_of(narrow).unpack(pack(narrow)), narrow.dequantize())
    with pytest.raises(ValueError, match="may be of 4 bits per output channel, symmetric or of 8 bits"):
        reader_of(narrow, wide).unpack(pack(narrow))


def copy_of(folder, out, tensors=None, **changes):
    """A copy with other tensors, or other keys in its section."""
    shutil.copytree(folder, out)
    content = json.loads((out / "config.json").read_text())
    content["quantization_config"].update(changes)
    (out / "config.json").write_text(json.dumps(content))
    if tensors is not None:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_a_damaged_folder_is_refused_by_the_name_of_its_weight(tmp_path):
    tensors = load_file(FOLDERS[1] / "model.safetensors")
    tensors[f"{UP}.weight_scale"][3, 0] = torch.nan
    del tensors[f"{DOWN}.weight_packed"]
    folder = copy_of(FOLDERS[1], tmp_path / "broken", tensors)
    weights = open_weights(folder, json.loads((folder / "config.json").read_text()))
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight cannot be decoded from layout 'pack-quantized': its weight_sc"
    ):
        weights[f"{UP}.weight"]
    with pytest.raises(CheckpointError, match=r"down_proj\.weight cannot be decoded .*'weight_packed' is missing"):
        weights[f"{DOWN}.weight"]


def test_a_truncated_file_is_refused(tmp_path):
    folder = copy_of(FOLDERS[1], tmp_path / "broken")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        secateur.load(folder)


@pytest.mark.parametrize(
    "name", ["input_scale", "weight_global_scale", "output_scale", "input_zero_point", "weight_bias"]
)
def test_a_tensor_that_is_not_known_is_refused(name):
    stored = {f"{UP}.{part}": tensor for part, tensor in pack(random_weight(8, 32, 4, 16, True, BF16, 0)).items()}
    config = quantization_config({UP: Scheme(4, 16, True)}, [])
    assert packed_weights({**stored, f"{UP}.bias": torch.zeros(8)}, config).keys() == {f"{UP}.weight"}
    with pytest.raises(CheckpointError, match=rf"{UP}\.{name} lies beside a weight in pack-quantized and is not known"):
        packed_weights({**stored, f"{UP}.{name}": torch.zeros(1)}, config)


GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True}


def section(weights=None, **changes):
    """A section of one config group: changes are to the group, those in `weights` to its weights."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**GROUP, **(weights or {})}, **changes}},
    }


@pytest.mark.parametrize(
    ("weights", "scheme"),
    [
        ({}, Scheme(4, 16, True)),
        ({"num_bits": 8, "symmetric": False}, Scheme(8, 16, False)),
        ({"strategy": "channel", "group_size": None}, Scheme(4, None, True)),
        ({"strategy": "channel", "group_size": -1}, Scheme(4, None, True)),
        ({"strategy": None, "group_size": -1}, Scheme(4, None, True)),
        ({"strategy": None}, Scheme(4, 16, True)),
        ({"actorder": "weight", "observer": "mse"}, Scheme(4, 16, True)),
        ({"actorder": False}, Scheme(4, 16, True)),
        ({"actorder": "group"}, Scheme(4, 16, True, ordered=True)),
        ({"actorder": "group", "strategy": "channel", "group_size": None}, Scheme(4, None, True)),
    ],
    ids=str,
)
def test_schemes_that_are_read(weights, scheme):
    (packed,) = packed_weights({"a.weight_packed": int32(1)}, section(weights)).values()
    assert packed.layout.schemes == (scheme,)


ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
REFUSED = {
    "9 bits": (section({"num_bits": 9}), "num_bits 9: secateur reads integer weights of 2 to 8 bits"),
    "bits that are no number": (section({"num_bits": "4"}), "num_bits '4'"),
    "floats": (section({"type": "float"}), "type 'float'"),
    "one scale a tensor": (section({"strategy": "tensor", "group_size": None}), "strategy 'tensor'"),
    "one scale a tensor, unsaid": (section({"strategy": None, "group_size": None}), "strategy 'tensor'"),
    "blocks": (section({"strategy": "block", "group_size": None, "block_structure": [128, 128]}), "strategy 'block'"),
    "groups of no size": (section({"group_size": None}), "group_size None"),
    "groups of 0": (section({"group_size": 0}), "group_size 0"),
    "groups of a list": (section({"group_size": [16]}), r"group_size \[16\]"),
    "channels in groups": (section({"strategy": "channel"}), "group_size 16"),
    "symmetry of another kind": (section({"symmetric": "yes"}), "symmetric 'yes'"),
    "dynamic": (section({"dynamic": True}), "dynamic True"),
    "another order": (section({"actorder": "random"}), "actorder 'random'"),
    "activations": (section(input_activations=ACTIVATIONS), "input_activations {'num_bits': 8"),
    "outputs": (section(output_activations=ACTIVATIONS), "output_activations {'num_bits': 8"),
    "a group in another format": (section(format="float-quantized"), "format 'float-quantized'"),
    "no weights": ({**section(), "config_groups": {"group_0": {"weights": None}}}, "'group_0' .* no 'weights'"),
    "a preset": ({**section(), "config_groups": {"W4A16": ["Linear"]}}, "'W4A16' .* no 'weights'"),
    "no groups": ({**section(), "config_groups": {}}, "no usable 'config_groups'"),
    "groups in a list": ({**section(), "config_groups": [GROUP]}, "no usable 'config_groups'"),
    "a quantized cache": ({**section(), "kv_cache_scheme": ACTIVATIONS}, "has kv_cache_scheme as well"),
    "a transform": ({**section(), "transform_config": {"config_groups": {"u": {}}}}, "has transform_config as well"),
    "something new": ({**section(), "moe_sparsity_config": {"layers": 1}}, "has moe_sparsity_config as well"),
    "another format": ({**section(), "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
    "formats of several kinds": ({**section(), "format": "mixed-precision"}, "format 'mixed-precision'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_read_is_refused(what):
    config, message = REFUSED[what]
    with pytest.raises(CheckpointError, match=message) as caught:
        CompressedTensors.packed_weights({"a.weight_packed": int32(1)}, config)
    assert "secateur reads" in str(caught.value) or "no usable" in message
    assert "\n" not in str(caught.value)


def test_empty_sections_do_not_stand_in_the_way():
    nothing = {"sparsity_config": {}, "transform_config": {}, "kv_cache_scheme": None, "moe_sparsity_config": None}
    dense = {"sparsity_config": {"format": "dense", "global_sparsity": 0.1}}
    for more in (nothing, dense):
        assert CompressedTensors.packed_weights({"a.weight_packed": int32(1)}, {**section(), **more}).keys() == {
            "a.weight"
        }
