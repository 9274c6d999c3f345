"""The layout `dictionary`: what is packed comes back to the bit and computes the same, and nothing hostile is believed.

O: output features, I: input features, K: atoms, T: tokens.
"""

import numpy as np
import pytest
import torch

from secateur.composite_layouts.dictionary import Dictionary, Factor, Factors, Plain
from secateur.core.pruned import Pruned
from secateur.core.quantized import Quantized
from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.errors import CheckpointError
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.choose import layout_for
from secateur.formats.layouts.layout import layout_from_config
from secateur.formats.layouts.packed_weight import StoredForm
from secateur.kernels.backends import linear, prepare
from secateur.quant.rtn import RTN

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = {"plain": (16, 16, True), "svd": (16, 16, False), "coded": (8, 4, True), "coded-svd": (5, 8, False)}


def factor(M_RC, bits, keep_RC, half):
    if bits == 16:
        return Factor.of(Plain() if keep_RC is None else Bitmap(), M_RC.to(half))
    nothing = InputStats.empty(M_RC.shape[1], Level.NONE)
    pruned = None if keep_RC is None else Pruned(M_RC, keep_RC)
    [weight] = RTN(bits, 16, symmetric=True).quantize(Stack.of([M_RC], nothing), pruned)
    return Factor.of(layout_for(weight), weight)


def make(O, I, K, kind="plain", dtype=FP32, half=FP16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    atom_bits, coefficient_bits, sparse = KINDS[kind]
    D_KI, S_OK = torch.randn(K, I, generator=generator), torch.randn(O, K, generator=generator)
    keep_OK = torch.rand(O, K, generator=generator) < 0.5 if sparse else None
    if keep_OK is not None:
        keep_OK[0, 0] = True
        S_OK = S_OK * keep_OK
    factors = Factors(factor(D_KI, atom_bits, None, half), factor(S_OK, coefficient_bits, keep_OK, half))
    return Quantized(factors, (O, I), dtype)


def twin_matrix(parts, prefix, config):
    """A factor in float64, bit by bit, as docs/format.md has it."""
    own = {part.removeprefix(f"{prefix}_"): tensor for part, tensor in parts.items() if part.startswith(prefix)}
    if config["layout"] == "dense":
        return own["values"].double().numpy()
    rows, columns = own["shape"].tolist()
    keep = np.ones((rows, columns), dtype=bool)
    if "bitmask" in own:
        bits = np.unpackbits(own["bitmask"].numpy(), axis=1, bitorder="little")
        keep = bits[:, :columns].astype(bool)
    if config["layout"] == "bitmap":
        values = own["compressed"].double().numpy()
    else:
        codes = config.get("codes", config)
        b, size = codes["bits"], codes["group_size"]
        assert codes["symmetric"]
        values, at, group = [], 0, 0
        scales = own["scale"].double().tolist()
        for row in keep:
            stream = "".join(
                format(byte, "08b")[::-1] for byte in own["codes"][at : at + -(-row.sum() * b // 8)].tolist()
            )
            for k in range(row.sum()):
                code = int(stream[k * b : k * b + b][::-1], 2)
                values.append((code - 2 ** (b - 1)) * scales[group + k // size])
            at += -(-row.sum() * b // 8)
            group += -(-row.sum() // size)
    matrix = np.zeros((rows, columns))
    matrix[keep] = values
    return matrix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("O", "I", "K"), [(12, 20, 9), (1, 1, 1), (7, 65, 17), (33, 8, 64)])
def test_a_weight_lies_in_the_files_as_it_is_said_to(kind, O, I, K):
    weight = make(O, I, K, kind)
    layout = layout_for(weight)
    config = layout.to_config()
    assert layout_from_config(config) == layout
    parts = layout.pack(weight)
    assert set(parts) <= set(Dictionary.parts)
    twin = twin_matrix(parts, "coefficients", config["coefficients"]) @ twin_matrix(parts, "atoms", config["atoms"])
    found = layout.unpack(parts)
    assert np.abs(found.double().numpy() - twin).max() <= 1e-5 * max(np.abs(twin).max(), 1)
    assert torch.equal(found, weight.dequantize())
    loaded = layout.load(parts)
    assert torch.equal(loaded.dense(), found)
    form = StoredForm(layout, {part: (tensor.dtype, tensor.shape) for part, tensor in parts.items()})
    again = form(loaded)
    assert again.keys() == parts.keys()
    assert all(torch.equal(again[part], parts[part]) for part in parts)
    told = layout.describe(parts)
    assert (told.layout, told.shape, told.count, told.finite) == ("dictionary", (O, I), O * I, True)
    assert told.bytes == sum(tensor.nbytes for tensor in parts.values())


@pytest.mark.thin(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("T", [1, 3, 12])
def test_backends_compute_with_it(kind, dtype, T):
    O, I, K = 48, 70, 33
    weight = make(O, I, K, kind, dtype, BF16 if dtype == BF16 else FP16)
    loaded = layout_for(weight).load(layout_for(weight).pack(weight))
    generator = torch.Generator().manual_seed(1)
    x_TI, bias_O = torch.randn(T, I, generator=generator).to(dtype), torch.randn(O, generator=generator).to(dtype)
    D_KI, S_OK = (f.values().double() for f in (weight.codes.atoms, weight.codes.coefficients))
    wanted_TO = x_TI.double() @ (S_OK @ D_KI).T + bias_O.double()
    # What goes from the one to the other is rounded as inputs are.
    size = (x_TI.double().abs() @ D_KI.abs().T @ S_OK.abs().T).max()
    for backend in ("torch", "cpu", "dense"):
        ready = prepare(loaded, backend, dtype=dtype)
        found_TO = linear(ready, x_TI, bias_O)
        assert found_TO.dtype == dtype
        assert (found_TO.double() - wanted_TO).abs().max() < 2 * torch.finfo(dtype).eps * size, backend
        x = x_TI.clone().requires_grad_()
        linear(ready, x, bias_O).sum().backward()
        exact_TI = torch.ones(T, O).double() @ S_OK @ D_KI
        assert (x.grad.double() - exact_TI).abs().max() < 4 * torch.finfo(dtype).eps * (S_OK.abs() @ D_KI.abs()).sum(
            0
        ).max()


def without(part):
    return lambda parts: parts.pop(part)


def put(part, change):
    return lambda parts: parts.update({part: change(parts[part])})


DAMAGES = {
    **{f"no {part}": ("plain", without(part), "is missing") for part in
       ("shape", "atoms_values", "coefficients_bitmask", "coefficients_compressed", "coefficients_shape")},
    "no scales": ("coded", without("atoms_scale"), "'scale' is missing .atoms"),
    "other outputs": ("plain", put("shape", lambda t: t + torch.tensor([1, 0])), "whose product is no"),
    "other inputs": ("plain", put("shape", lambda t: t + torch.tensor([0, 1])), "whose product is no"),
    "huge": ("plain", put("shape", lambda t: torch.tensor([2**40, 3])), "not two positive sizes"),
    "one atom less": ("plain", put("atoms_values", lambda t: t[1:]), "whose product is no"),
    "one atom more": ("svd", put("coefficients_values", lambda t: t[:, 1:]), "whose product is no"),
    "flat atoms": ("plain", put("atoms_values", lambda t: t.flatten()), "'values' has dtype"),
    "atoms of integers": ("plain", put("atoms_values", lambda t: t.to(torch.int16)), "'values' has dtype torch.int16"),
    "no atoms": ("plain", put("atoms_values", lambda t: t[:0]), "'values' has dtype"),
    "NaN in atoms": ("plain", put("atoms_values", lambda t: t * torch.nan), "atoms hold values that are not finite"),
    "infinite coefficients": (
        "plain", put("coefficients_compressed", lambda t: t / 0), "coefficients hold values that are not finite"),
    "a bit too many": ("plain", put("coefficients_bitmask", lambda t: t | 1), "coefficients"),
    "truncated codes": ("coded", put("coefficients_codes", lambda t: t[1:]), "coefficients"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_parts_are_refused(name):
    kind, change, says = DAMAGES[name]
    weight = make(12, 20, 9, kind)
    layout = layout_for(weight)
    parts = layout.pack(weight)
    change(parts)
    for read in (layout.load, layout.unpack, layout.describe):
        with pytest.raises(ValueError, match=says):
            read(parts)


def test_products_beyond_their_dtype_are_refused():
    weight = make(12, 20, 9, dtype=FP16)
    layout = layout_for(weight)
    parts = layout.pack(weight)
    for part in ("atoms_values", "coefficients_compressed"):
        parts[part] = parts[part] * 1000
    with pytest.raises(ValueError, match=r"beyond torch.float16"):
        layout.load(parts)


ENTRY = make(4, 6, 3, "coded").codes.layout(FP32).to_config()


@pytest.mark.parametrize("key", ["atoms", "coefficients", "dtype"])
@pytest.mark.parametrize(
    "value",
    [
        *(None, 1, "dense", [], {}, {"layout": "x"}, {"layout": []}, {"layout": "nm", "n": 2, "m": 4}),
        *({"layout": "dictionary"}, {"layout": "packed-int", "bits": 9}, {"layout": "sparse-int", "codes": {}}),
        {"layout": "sparse-int", "codes": {"layout": "codebook", "bits": 3, "dtype": "float32"}},
    ],
)
def test_parameters_that_make_no_sense_are_refused(key, value):
    assert layout_from_config(ENTRY).to_config() == ENTRY
    with pytest.raises(CheckpointError, match="'dictionary' with parameters that make no sense"):
        layout_from_config({**ENTRY, key: value})


def test_atoms_have_no_mask():
    with pytest.raises(CheckpointError, match="make no sense"):
        layout_from_config({**ENTRY, "atoms": {"layout": "bitmap"}})


def test_what_it_does_not_hold_is_not_packed():
    weight = make(12, 20, 9)
    with pytest.raises(ValueError, match="this layout is"):
        Dictionary(Plain(), Plain(), FP32).pack(weight)
    for more in ({"keep_OI": torch.ones(12, 20, dtype=torch.bool)}, {"order_I": torch.arange(20)}):
        with pytest.raises(ValueError, match="does not store"):
            layout_for(weight).pack(Quantized(weight.codes, (12, 20), FP32, **more))
