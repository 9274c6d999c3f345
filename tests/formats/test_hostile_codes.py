"""Codes of others, changed by somebody who wants no good: a ValueError, or a weight of numbers."""

from pathlib import Path

import foreign_codes
import pytest
import torch
from hostile import NUMBERS, TORCH_DTYPES
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries
from safetensors.torch import load_file

from secateur.foreign.awq import AWQWeight
from secateur.foreign.gptq_format import GPTQWeight
from secateur.foreign.mlx_codes import MLXCodes
from secateur.formats.layouts.layout import LAYOUTS
from secateur.model.source import open_source

FIXTURES = Path(__file__).parents[1] / "fixtures"
LIBRARY = load_file(FIXTURES / "gptq_awq.safetensors")
MOST = 2**22  # weights; the sound ones have a few thousand
KINDS = ["gptq", "gptq v1", "awq", "mlx", *sorted(folder.name for folder in (FIXTURES / "sparse_quantized").iterdir())]


def sample(kind):
    """A decoder and what it decodes."""
    if kind.startswith("gptq") or kind == "awq":
        case = {"gptq": "4-v2-order", "gptq v1": "3-v1-order", "awq": "awq"}[kind]
        tensors = {name.partition(".")[2]: tensor for name, tensor in LIBRARY.items() if name.startswith(f"{case}.")}
        del tensors["expected"]
        decoder = AWQWeight(16) if kind == "awq" else GPTQWeight(int(case[0]), 16, int(case[3]), symmetric=False)
        return decoder, tensors
    if kind == "mlx":
        code_OI, _, scale_OG = foreign_codes.random_codes(32, 64, 32, 4, 0)
        return MLXCodes(4, 32), foreign_codes.mlx(code_OI, scale_OG, 4, torch.arange(64) // 32)[0]
    weights = open_source(str(FIXTURES / "sparse_quantized" / kind)).weights
    weight = weights.packed["model.layers.0.self_attn.q_proj.weight"]
    return weight.layout, {part: tensor.clone() for part, tensor in weight.tensors(weights.stored).items()}


SAMPLES = {kind: sample(kind) for kind in KINDS}


def holds_integers(tensor):
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool)


def spoil(tensors, data):
    part = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[part]
    what = data.draw(st.sampled_from(["gone", "value", "bits", "shape", "dtype", "another"]))
    if what == "gone":
        del tensors[part]
    elif what == "another":
        tensors[part] = tensors[data.draw(st.sampled_from(sorted(tensors)))].clone()
    elif what == "value" and tensor.numel() and holds_integers(tensor):
        info = torch.iinfo(tensor.dtype)
        flat = tensor.flatten().tolist()
        place = data.draw(st.integers(0, len(flat) - 1))
        flat[place] = data.draw(st.sampled_from([n for n in NUMBERS if info.min <= n <= info.max]))
        tensors[part] = torch.tensor(flat, dtype=torch.int64).to(tensor.dtype).reshape(tensor.shape)
    elif what == "shape":
        shape = [data.draw(st.sampled_from([0, 1, 2, 3, 16, 64])) for _ in range(data.draw(st.integers(0, 3)))]
        tensors[part] = torch.zeros(shape, dtype=torch.uint8).to(tensor.dtype)
    elif what == "dtype":
        tensors[part] = torch.zeros(tensor.shape, dtype=data.draw(st.sampled_from(TORCH_DTYPES)))
    else:
        draw = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
        top = 2 if tensor.dtype == torch.bool else 256
        noise = torch.randint(0, top, (tensor.numel() * tensor.element_size(),), generator=draw, dtype=torch.uint8)
        tensors[part] = noise.view(tensor.dtype).reshape(tensor.shape) if tensor.numel() else tensor


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_one_line_or_a_weight_of_numbers(kind):
    @tries(60)
    @given(data=st.data())
    def attempt(data):
        decoder, sound = SAMPLES[kind]
        tensors = dict(sound)
        for _ in range(data.draw(st.integers(1, 2))):
            if tensors:
                spoil(tensors, data)
        try:
            W_OI = decoder.unpack(tensors)
            found = decoder.ours(tensors)
            described = decoder.describe(tensors)
        except ValueError as error:
            lines = str(error).splitlines()
        else:
            lines = []
        assert len(lines) < 2
        if lines:
            return
        assert W_OI.ndim == 2
        assert W_OI.numel() < MOST
        assert described.shape == tuple(W_OI.shape)
        if found is not None:
            layout, parts = found
            assert layout.name in LAYOUTS
            ours = layout.unpack(parts)
            assert torch.equal(ours + 0, W_OI + 0)

    attempt()
