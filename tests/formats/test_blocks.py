"""Blocks as GGUF files know them: the layout, and the bytes of files, each against the package gguf's own reading."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf_blocks_of import TYPES, random_blocks, slowly
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries

from secateur.core.quantized import Quantized
from secateur.foreign.gguf_blocks import read_blocks, write_blocks
from secateur.formats.layouts.block_types import BLOCK_TYPES, type_for
from secateur.formats.layouts.layout import layout_from_config
from secateur.kernels.backends import linear, prepare

gguf = pytest.importorskip("gguf")


def weight_of(blocks, dtype=torch.float32):
    return Quantized(blocks, tuple(blocks.code_OI.shape), dtype)


def same_bits(one, other):
    return np.array_equal(np.asarray(one).view(np.int32), np.asarray(other).view(np.int32))


@pytest.mark.parametrize("name", TYPES)
def test_the_table_of_types_is_that_of_the_package(name):
    form, number = BLOCK_TYPES[name], gguf.GGMLQuantizationType[name]
    assert (form.number, form.block_size, form.nbytes) == (int(number), *gguf.GGML_QUANT_SIZES[number])


@pytest.mark.parametrize("name", TYPES)
def test_any_bytes_are_what_the_package_says_and_come_back(name):
    draw, form = np.random.default_rng(0), BLOCK_TYPES[name]
    raw = draw.integers(0, 256, (5, 2 * form.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    blocks = read_blocks(name, torch.from_numpy(raw))
    found = blocks.values().numpy()
    assert ((found.view(np.int32) == expected.view(np.int32)) | (np.isnan(found) & np.isnan(expected))).all()
    assert np.array_equal(write_blocks(blocks).numpy(), raw)


@pytest.mark.parametrize("name", TYPES)
def test_values_are_those_of_the_slow_reading(name):
    blocks = random_blocks(name, 2, 2)
    assert same_bits(blocks.values(), slowly(blocks).astype(np.float32))


@tries(40)
@given(
    st.sampled_from(TYPES),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 999),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_a_layout_keeps_everything(name, O, blocks, seed, dtype):
    found = random_blocks(name, O, blocks, seed)
    weight = weight_of(found, getattr(torch, dtype))
    layout = found.layout(weight.dtype)
    parts = layout.pack(weight)
    assert layout_from_config(layout.to_config()) == layout
    assert sum(tensor.nbytes for part, tensor in parts.items() if part != "shape") == write_blocks(found).numel()
    again = layout.read(parts)
    assert torch.equal(write_blocks(again.codes), write_blocks(found))
    assert torch.equal(layout.unpack(parts), weight.dequantize())
    stored = layout.store(layout.load(parts))
    assert all(torch.equal(stored[part].to(tensor.dtype), tensor) for part, tensor in parts.items())
    assert set(stored) == set(parts)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_kernels_compute_with_it(name, backend):
    blocks = random_blocks(name, 37, 3, seed=1)
    if blocks.scale_code_OG is not None and blocks.offset_OB is not None:
        # Where a scale is zero and its offset is not, there is no zero point: see the next test.
        blocks = replace(blocks, scale_code_OG=blocks.scale_code_OG.clamp(min=1))
    if blocks.offset_OB is not None:
        blocks = replace(blocks, offset_OB=torch.where(blocks.scale_OB == 0, 0, blocks.offset_OB))
    layout = blocks.layout(torch.float32)
    weight = layout.load(layout.pack(weight_of(blocks)))
    assert bool(weight.kernels) is not bool(BLOCK_TYPES[name].levels)
    W_OI = blocks.values().double()
    ready = prepare(weight, backend)
    for tokens in (1, 3, 20):
        x_TI = torch.randn(tokens, W_OI.shape[1], generator=torch.Generator().manual_seed(tokens))
        expected = x_TI.double() @ W_OI.T
        bound = (x_TI.double().abs() @ (W_OI.abs() + 1).T) * 2**-17
        assert ((linear(ready, x_TI).double() - expected).abs() <= bound).all()
    rows = weight.rows(5, 9)
    assert torch.equal(rows.dense(), weight.dense()[5:9])


def test_groups_of_equal_weights_are_no_work_for_the_kernels_but_right():
    blocks = random_blocks("Q4_K", 3, 1, seed=2)
    blocks = replace(blocks, scale_code_OG=torch.zeros_like(blocks.scale_code_OG), offset_OB=torch.ones(3, 1).half())
    layout = blocks.layout(torch.float32)
    weight = layout.load(layout.pack(weight_of(blocks)))
    assert weight.kernels == ""
    assert torch.equal(weight.dense(), blocks.values())
    assert (weight.dense() == -blocks.offset_code_OG.float().repeat_interleave(32, 1)).all()


def test_fallbacks_are_those_of_llama_cpp():
    found = {name: type_for(name, 576).name for name in TYPES}
    assert found == {
        **{name: name for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")},
        "Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL",
    }  # fmt: skip
    assert all(type_for(name, 512).name == name and type_for(name, 100) is None for name in TYPES)


def _parts(name="Q4_K"):
    blocks = random_blocks(name, 3, 2)
    layout = blocks.layout(torch.float32)
    return layout, layout.pack(weight_of(blocks))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scale": torch.zeros(6)}, "tensor 'scale' has dtype torch.float32"),
        ({"scale": torch.zeros(5).half()}, "its scale has 5 values for 6 blocks"),
        ({"scale": torch.full((6,), torch.inf).half()}, "its scale holds values that are not finite"),
        ({"offset": torch.full((6,), torch.nan).half()}, "its offset holds values that are not finite"),
        ({"offset": None}, "tensor 'offset' is missing"),
        ({"scale_codes": torch.zeros(3, dtype=torch.uint8)}, "its scale_codes has 3 bytes"),
        ({"offset_codes": None}, "tensor 'offset_codes' is missing"),
        ({"codes": torch.zeros(8, dtype=torch.uint8)}, "its codes has 8 bytes"),
        ({"codes": torch.zeros(1, dtype=torch.uint8)}, "truncated"),
        ({"shape": torch.tensor([3, 511])}, "rows of 511 weights are not whole blocks of 256"),
        ({"shape": torch.tensor([2**31, 512])}, "shape"),
        ({"order": torch.arange(512).to(torch.uint16)}, "it has a part 'order'"),
    ],
)
def test_hostile_parts_are_refused(change, said):
    layout, parts = _parts()
    hostile = {part: tensor for part, tensor in {**parts, **change}.items() if tensor is not None}
    for verb in (layout.load, layout.read, layout.describe):
        with pytest.raises(ValueError, match=said):
            verb(hostile)


def test_a_part_that_a_type_does_not_have_is_refused():
    layout, parts = _parts("Q4_0")
    with pytest.raises(ValueError, match="it has a part 'offset', which type Q4_0 does not"):
        layout.load({**parts, "offset": parts["scale"]})


def test_an_order_or_a_mask_has_no_place():
    blocks = random_blocks("Q4_0", 2, 1)
    layout = blocks.layout(torch.float32)
    with pytest.raises(ValueError, match="order of their own"):
        layout.pack(replace(weight_of(blocks), order_I=torch.arange(32)))
    with pytest.raises(ValueError, match="mask of kept weights"):
        layout.pack(replace(weight_of(blocks), keep_OI=torch.ones(2, 32, dtype=torch.bool)))


@pytest.mark.parametrize("config", [{"type": "Q9_K"}, {"type": 4}, {}, {"type": "q4_k"}])
def test_configs_that_make_no_sense_are_refused(config):
    from secateur.errors import CheckpointError

    with pytest.raises(CheckpointError, match="parameters that make no sense: type is"):
        layout_from_config({"layout": "blocks", "dtype": "float32", **config})
