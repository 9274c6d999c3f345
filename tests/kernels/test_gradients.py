"""Gradients go through packed weights: the same as through dense ones, whatever the backend and however many tokens.

O: output features, I: input features, T: tokens.
"""

import copy

import pytest
import torch
from conftest import PACKED
from random_weights import load_coded, load_sparse
from transformers import AutoModelForCausalLM

import secateur
from secateur.kernels import linear, packed, prepare
from secateur.kernels.cpu import cpu_backend

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
has_cpu = pytest.mark.skipif(cpu_backend.missing() is not None, reason=str(cpu_backend.missing()))
BACKENDS = [pytest.param("cpu", marks=has_cpu), "torch", "dense"]
# The `cpu` backend goes another way from nine tokens on.
TOKENS = [1, 8, 9, 40]
IDS_NS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(3))
O, I = 24, 70

WEIGHTS = {
    "bitmap": lambda dtype: load_sparse(O, I, dtype=dtype),
    "nm": lambda dtype: load_sparse(O, 72, dtype=dtype, pattern=(2, 4)),
    "packed-int": lambda dtype: load_coded("packed-int", O, I, dtype=dtype),
    "packed-int, reordered": lambda dtype: load_coded("packed-int", O, I, dtype=dtype, order=True),
    "spqr": lambda dtype: load_coded("spqr", O, I, bits=3, dtype=dtype, outliers="some", order=True, tile_rows=5),
    "codebook": lambda dtype: load_coded("codebook", O, I, bits=3, dtype=dtype, outliers="some"),
    "sparse-int": lambda dtype: load_coded("packed-int", O, I, dtype=dtype, masked="some", order=True),
    "sparse-int of spqr": lambda dtype: load_coded("spqr", O, I, dtype=dtype, masked="some", outliers="some"),
}


def check_gradients(ready, W_OI, T, dtype):
    """That gradients of inputs and bias are those that float64 gives, but for the rounding of the dtype."""
    draw = torch.Generator().manual_seed(T)
    x_TI = torch.randn(T, W_OI.shape[1], generator=draw).to(dtype).requires_grad_()
    bias_O = torch.randn(len(W_OI), generator=draw).to(dtype).requires_grad_()
    grad_TO = torch.randn(T, len(W_OI), generator=draw).to(dtype)
    linear(ready, x_TI, bias_O).backward(grad_TO)
    wanted_TI, wanted_O = grad_TO.double() @ W_OI.double(), grad_TO.double().sum(0)
    for found, wanted in ((x_TI.grad, wanted_TI), (bias_O.grad, wanted_O)):
        assert found.dtype == dtype
        allowed = 8 * torch.finfo(dtype).eps * (grad_TO.double().abs() @ W_OI.double().abs()).max()
        assert (found.double() - wanted).abs().max() <= allowed
    return x_TI.grad


@pytest.mark.thin(3)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_gradients_are_those_of_the_dense_weight(kind, backend, T, dtype, monkeypatch):
    monkeypatch.setattr(packed, "_WEIGHTS_AT_ONCE", 10 * I)  # several pieces, and a rest
    weight, W_OI = WEIGHTS[kind](dtype)
    check_gradients(prepare(weight, backend, dtype=dtype), W_OI, T, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend):
    weight, W_OI = WEIGHTS["bitmap"](FP32)
    ready = prepare(weight, backend)
    x_TI, bias_O = torch.randn(3, I), torch.randn(O, requires_grad=True)
    linear(ready, x_TI, bias_O).sum().backward()
    assert torch.equal(bias_O.grad, torch.full((O,), 3.0))
    x_NTI = torch.randn(2, 3, I, requires_grad=True)
    linear(ready, x_NTI).sum().backward()
    torch.testing.assert_close(x_NTI.grad, W_OI.sum(0).expand(2, 3, I))
    with torch.no_grad():
        assert not linear(ready, x_NTI, bias_O).requires_grad
    with torch.inference_mode():
        assert linear(ready, x_NTI, bias_O).is_inference()
    empty = torch.randn(0, I, requires_grad=True)
    linear(ready, empty, bias_O).sum().backward()
    assert empty.grad.shape == (0, I)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend):
    ready = prepare(WEIGHTS["bitmap"](FP32)[0], backend)
    x_TI = torch.randn(3, I, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(ready, x_TI).square().sum(), x_TI, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def loss_of(model):
    return model(IDS_NS, labels=IDS_NS).loss


def gradients(model):
    """Of the embeddings, which lie behind all packed linears, of norms and of biases."""
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.thin(4)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_gradients_of_a_model(packed_of, family, layout, backend):
    """As it is loaded, with torch's defaults."""
    if backend == "cpu" and cpu_backend.missing():
        pytest.skip(str(cpu_backend.missing()))
    path = packed_of(family, layout)
    with secateur.backend(backend):
        packed = AutoModelForCausalLM.from_pretrained(path)
    with secateur.backend("dense"):
        dense = AutoModelForCausalLM.from_pretrained(path)
    found, wanted = gradients(packed), gradients(dense)
    assert found.keys() == {name for name, _ in packed.named_parameters()}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4 * float(wanted[name].abs().max()))


@has_cpu
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(packed_of, reentrant):
    model = AutoModelForCausalLM.from_pretrained(packed_of("qwen2", "packed-int"))
    wanted = gradients(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


@pytest.mark.slow
@has_cpu
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled(packed_of, compiler):
    model = AutoModelForCausalLM.from_pretrained(packed_of("qwen2", "spqr"))
    wanted = gradients(model)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=compiler)
    found = gradients(compiled)
    for name in wanted:
        torch.testing.assert_close(found[f"_orig_mod.{name}"], wanted[name], rtol=1e-3, atol=1e-5)


def test_autocast(packed_of):
    """What a trainer with `bf16=True` does: activations in bfloat16 beside weights in float32."""
    model = secateur.load(packed_of("llama", "packed-int"))
    model.requires_grad_(True)
    wanted = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    model.zero_grad()
    loss.backward()
    found = model.model.embed_tokens.weight.grad
    name = "model.embed_tokens.weight"
    assert (found - wanted[name]).norm() < 0.05 * wanted[name].norm()


def test_memory_does_not_grow_with_what_is_unpacked():
    """A backward pass keeps nothing dense: one piece at a time, and not one a linear."""
    weight, _ = load_coded("packed-int", 512, 4096)
    ready = prepare(weight, "torch")
    x_TI = torch.randn(2, 4096, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(ready, x_TI).sum().backward()
    assert all(tensor.numel() < 512 * 4096 for tensor in kept)
    assert weight.dense().numel() == 512 * 4096
