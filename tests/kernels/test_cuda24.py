"""The backend `cuda-2:4`: on the CPU with a stand-in for the two libraries that takes only what they take, and on a GPU.

O: output features, I: input features, T: tokens.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
from random_weights import load_coded, load_sparse
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as to_cutlass
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass as to_dense

from secateur import kernels
from secateur.errors import UsageError
from secateur.formats.layouts.nm import NMBits
from secateur.kernels.cuda24 import cuda24_backend
from secateur.kernels.cuda24.cuda24_backend import SemiStructured, TensorCoreWeight

BF16, FP16 = torch.bfloat16, torch.float16
CPU = torch.device("cpu")
TWO_OF_FOUR = (2, 4)
BACKEND = SemiStructured()
FASTEST = cuda24_backend._fastest
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=[SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS])
def library(request, monkeypatch):
    """Torch's tensor of either library, on the CPU: it keeps the weight dense, and refuses what the library would."""
    cls = request.param
    library = SimpleNamespace(cls=cls, fastest=5 if cls is SparseSemiStructuredTensorCUSPARSELT else 0, calls=[])

    def from_dense(W_OI):
        rule = cls._DTYPE_SHAPE_CONSTRAINTS[W_OI.dtype]
        assert W_OI.is_contiguous()
        assert W_OI.shape[0] % rule.sparse_min_rows == W_OI.shape[1] % rule.sparse_min_cols == 0
        assert (W_OI.view(-1, 4) != 0).sum(1).amax() <= 2
        if cls is SparseSemiStructuredTensorCUTLASS:  # its conversion runs anywhere
            assert torch.equal(to_dense(*to_cutlass(W_OI)), W_OI)
        parts = dict.fromkeys(["meta", "packed_t", "meta_t", "compressed_swizzled_bitmask"])
        return cls(W_OI.shape, packed=W_OI, **parts)

    def multiply(self, B, *, bias=None, should_transpose_dense=False, **_):
        x_TI = B if should_transpose_dense else B.t()
        assert bias is None
        assert x_TI.is_contiguous()
        assert len(x_TI) > 0
        assert len(x_TI) % cls._DTYPE_SHAPE_CONSTRAINTS[B.dtype].dense_min_rows == 0
        library.calls.append((self.alg_id_cusparselt, self.fuse_transpose_cusparselt))
        y_TO = x_TI @ self.packed.T
        return y_TO if should_transpose_dense else y_TO.t()

    monkeypatch.setattr(cls, "from_dense", staticmethod(from_dense))
    monkeypatch.setattr(cls, "_mm", multiply)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cls is SparseSemiStructuredTensorCUSPARSELT)
    monkeypatch.setattr(cuda24_backend, "_fastest", lambda O, I, dtype, device: library.fastest)
    return library


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, as far as `why_not` asks. Its attributes can be changed."""
    gpu = SimpleNamespace(capability=(9, 0), cusparselt=True, available=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu.available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu.capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: gpu.cusparselt)
    return gpu


def assert_multiplies(y, x, W_OI, bias_O=None):
    """That y is x W^T + bias, but for the rounding of the inputs' dtype."""
    wanted = x.double() @ W_OI.double().T + (0 if bias_O is None else bias_O.double())
    assert y.shape == wanted.shape
    assert y.dtype == x.dtype
    if y.numel():
        error = (y.double() - wanted).abs().amax() / wanted.abs().amax()
        assert error < (0.01 if x.dtype == BF16 else 0.001)


def prepared(weight, device="cpu", dtype=BF16):
    """As `kernels.prepare`, but wherever the stand-in is."""
    device = torch.device(device)
    return kernels.Prepared(BACKEND, BACKEND.prepare(weight, device, dtype), weight.shape, device)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("T", [0, 1, 8, 13, 300])
@pytest.mark.parametrize(("O", "I"), [(7, 40), (33, 68), (64, 128)])
def test_it_computes_what_the_dense_weight_does(library, O, I, T, dtype):
    weight, W_OI = load_sparse(O, I, dtype=dtype, pattern=TWO_OF_FOUR)
    ready = prepared(weight, dtype=dtype)
    x_TI, bias_O = torch.randn(T, I).to(dtype), torch.randn(O).to(dtype)
    assert_multiplies(kernels.linear(ready, x_TI), x_TI, W_OI)
    assert_multiplies(kernels.linear(ready, x_TI, bias_O), x_TI, W_OI, bias_O)
    assert len(library.calls) == 2


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("T", [0, 1, 9, 300])
def test_gradients_and_the_weight_come_back_out_of_it(library, T, sparse, monkeypatch):
    """Also where dense is faster, and the weight has stayed dense."""
    monkeypatch.setattr(cuda24_backend, "_COLUMNS_AT_ONCE", 30)
    if not sparse:
        library.fastest = None
    weight, W_OI = load_sparse(33, 68, dtype=BF16, pattern=TWO_OF_FOUR)
    weight.values_V[5] = 0
    W_OI = weight.dense()
    ready = prepared(weight)
    x_TI, bias_O = torch.randn(T, 68).to(BF16).requires_grad_(), torch.randn(33).to(BF16).requires_grad_()
    grad_TO = torch.randn(T, 33).to(BF16)
    kernels.linear(ready, x_TI, bias_O).backward(grad_TO)
    assert_multiplies(x_TI.grad, grad_TO, W_OI.T)
    torch.testing.assert_close(bias_O.grad, grad_TO.float().sum(0).to(BF16))
    found = BACKEND.packed(ready.weight)
    assert torch.equal(found.dense(), W_OI)
    # What is stored for it is what our own packing stores.
    assert NMBits(2, 4).store(found).keys() == (wanted := NMBits(2, 4).pack(W_OI)).keys()
    assert all(torch.equal(NMBits(2, 4).store(found)[part], wanted[part]) for part in wanted)


def test_the_input_may_have_any_strides_and_dimensions(library):
    weight, W_OI = load_sparse(16, 64, dtype=BF16, pattern=TWO_OF_FOUR)
    ready = prepared(weight)
    wide, tall = torch.randn(8, 128).to(BF16), torch.randn(64, 8).to(BF16)
    # Rows that are 128 apart: contiguous neither before nor after `reshape`.
    assert_multiplies(kernels.linear(ready, wide[:, :64]), wide[:, :64], W_OI)
    assert_multiplies(kernels.linear(ready, tall.T), tall.T, W_OI)
    x = torch.randn(2, 3, 64).to(BF16)
    assert_multiplies(kernels.linear(ready, x), x, W_OI)


def test_weights_are_padded_to_what_the_library_takes(library):
    weight, W_OI = load_sparse(33, 68, dtype=BF16, pattern=TWO_OF_FOUR)
    found = BACKEND.prepare(weight, CPU, BF16)
    assert isinstance(found.W_OI, library.cls)
    wanted = (48, 80) if library.cls is SparseSemiStructuredTensorCUSPARSELT else (64, 128)
    assert tuple(found.W_OI.shape) == wanted
    assert torch.equal(found.W_OI.packed[:33, :68], W_OI)
    assert found.W_OI.packed.count_nonzero() == W_OI.count_nonzero()


def test_weights_in_float32_become_what_the_inputs_are(library):
    weight, W_OI = load_sparse(16, 64, pattern=TWO_OF_FOUR)
    x_TI = torch.randn(4, 64).to(FP16)
    assert_multiplies(kernels.linear(prepared(weight, dtype=FP16), x_TI), x_TI, W_OI.half())


def test_zeros_among_the_kept_weights_are_allowed(library):
    weight, W_OI = load_sparse(16, 64, dtype=BF16, pattern=TWO_OF_FOUR)
    weight.values_V[::3] = 0
    W_OI[W_OI != 0] = weight.values_V[: 16 * 32]
    assert W_OI.count_nonzero() < 16 * 32
    x_TI = torch.randn(4, 64).to(BF16)
    assert_multiplies(kernels.linear(prepared(weight), x_TI), x_TI, W_OI)


def test_the_fastest_algorithm_is_for_many_tokens_only(library):
    weight, _ = load_sparse(16, 64, dtype=BF16, pattern=TWO_OF_FOUR)
    ready = prepared(weight)
    for T in (300, 16, 300):
        kernels.linear(ready, torch.randn(T, 64).to(BF16))
    assert library.calls == [(library.fastest, True), (0, True), (library.fastest, True)]


def test_weights_stay_dense_where_that_is_faster(library, monkeypatch):
    library.fastest = None
    weight, W_OI = load_sparse(33, 68, dtype=BF16, pattern=TWO_OF_FOUR)
    ready = prepared(weight)
    monkeypatch.delattr(cuda24_backend, "pad")  # nothing is copied for a library that is not used
    assert type(ready.weight.W_OI) is torch.Tensor
    assert torch.equal(ready.weight.W_OI, W_OI)
    x_TI, bias_O = torch.randn(5, 68).to(BF16), torch.randn(33).to(BF16)
    assert_multiplies(kernels.linear(ready, x_TI, bias_O), x_TI, W_OI, bias_O)
    assert not library.calls


def test_torch_does_not_warn_that_its_tensor_is_a_prototype(library, monkeypatch):
    weight, _ = load_sparse(16, 64, dtype=BF16, pattern=TWO_OF_FOUR)
    monkeypatch.setattr(library.cls, "_PROTOTYPE_WARNING_SHOWN", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BACKEND.prepare(weight, CPU, BF16)
    assert library.cls._PROTOTYPE_WARNING_SHOWN


@pytest.mark.parametrize(
    ("dense", "sparse", "wanted"),
    [
        (3.0, {0: 2.0}, 0),
        (3.0, {0: 2.0, 1: 4.0, 7: 1.0, 8: 1.5}, 7),
        (3.0, {0: 4.0, 39: 2.9}, 39),
        (3.0, {0: 4.0, 1: 3.5}, None),
    ],
)
def test_dense_and_all_algorithms_are_timed(library, monkeypatch, dense, sparse, wanted):
    """`sparse`: what each algorithm takes; those that are not named do not exist."""

    def milliseconds(x_TI, W_OI):
        assert x_TI.shape == (2040, 128)
        if not isinstance(W_OI, library.cls):
            return dense
        if W_OI.alg_id_cusparselt not in sparse:
            raise RuntimeError("CUDA error: invalid value")
        return sparse[W_OI.alg_id_cusparselt]

    monkeypatch.setattr(cuda24_backend, "_milliseconds", milliseconds)
    if library.cls is SparseSemiStructuredTensorCUTLASS:
        wanted = 0 if sparse[0] < dense else None
    before = torch.get_rng_state()
    assert FASTEST.__wrapped__(64, 128, BF16, CPU) == wanted
    assert torch.equal(before, torch.get_rng_state())


def test_a_library_that_cannot_multiply_says_so(library, monkeypatch):
    def milliseconds(x_TI, W_OI):
        if isinstance(W_OI, library.cls):
            raise RuntimeError("CUDA error: architecture mismatch")
        return 1.0

    monkeypatch.setattr(cuda24_backend, "_milliseconds", milliseconds)
    with pytest.raises(RuntimeError, match="architecture mismatch"):
        FASTEST.__wrapped__(64, 128, BF16, CPU)


def test_a_shape_is_timed_once(library, monkeypatch):
    timed = []
    FASTEST.cache_clear()
    monkeypatch.setattr(cuda24_backend, "_fastest", FASTEST)
    monkeypatch.setattr(cuda24_backend, "_milliseconds", lambda x_TI, W_OI: timed.append(type(W_OI)) or 1.0)
    for O, I in [(33, 68), (40, 72), (64, 128), (64, 192)]:
        weight, _ = load_sparse(O, I, dtype=BF16, pattern=TWO_OF_FOUR)
        BACKEND.prepare(weight, CPU, BF16)
    FASTEST.cache_clear()
    # What cuSPARSELt pads to is (48, 80) for the first two, and CUTLASS to (64, 128) for the first three.
    shapes, algorithms = (3, 40) if library.cls is SparseSemiStructuredTensorCUSPARSELT else (2, 1)
    assert timed.count(library.cls) == shapes * algorithms


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ((4, 8), "pattern 4:8, and it takes 2:4 only: use triton"),
        ((1, 4), "pattern 1:4, and it takes 2:4 only: use triton"),
        (None, "no N:M pattern, and it takes 2:4 only: use triton"),
        ("quantized", "quantized, and it takes 2:4 weights that are not: use triton"),
    ],
)
def test_other_weights_are_refused(gpu, kind, message):
    weight, _ = load_coded("packed-int", 8, 16) if kind == "quantized" else load_sparse(8, 16, dtype=BF16, pattern=kind)
    with pytest.raises(UsageError, match=f"'cuda-2:4' cannot be used: .*{message}"):
        kernels.prepare(weight, "cuda-2:4", device="cuda", dtype=BF16)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"dtype": torch.float32}, "computes in bfloat16 and float16, not float32: use triton or dense"),
        ({}, {"device": "cpu"}, "needs a CUDA device, not cpu: use auto or dense"),
        ({"available": False}, {}, "no CUDA device here: use dense"),
        ({"capability": (7, 5)}, {}, "compute capability 7.5, and sparse tensor cores begin at 8.0: use dense"),
        ({"cusparselt": False}, {}, "no cuSPARSELt, and its CUTLASS kernels take .* 8.x, not 9.0: use triton or dense"),
    ],
)
def test_where_it_cannot_run_it_names_what_can(gpu, change, options, message):
    vars(gpu).update(change)
    weight, _ = load_sparse(8, 16, dtype=BF16, pattern=TWO_OF_FOUR)
    with pytest.raises(UsageError, match=f"'cuda-2:4' cannot be used: .*{message}"):
        kernels.prepare(weight, "cuda-2:4", **{"device": "cuda", "dtype": BF16, **options})


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("capability", "cusparselt"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)]
)
def test_auto_chooses_it(gpu, capability, cusparselt, dtype):
    gpu.capability, gpu.cusparselt = capability, cusparselt
    weight, _ = load_sparse(8, 16, dtype=BF16, pattern=TWO_OF_FOUR)
    assert kernels.choose(weight, "auto", torch.device("cuda"), dtype).name == "cuda-2:4"


@needs_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("O", "I"), [(256, 512), (200, 340), (1000, 4096)])
def test_on_a_gpu(monkeypatch, O, I, dtype):
    # Small weights would stay dense.
    monkeypatch.setattr(cuda24_backend, "_fastest", lambda O, I, dtype, device: 0)
    weight, W_OI = load_sparse(O, I, dtype=dtype, pattern=TWO_OF_FOUR)
    ready = kernels.prepare(weight, "cuda-2:4", device="cuda", dtype=dtype)
    assert isinstance(ready.weight.W_OI, torch.sparse.SparseSemiStructuredTensor)
    for T in (0, 1, 3, 16, 64, 1000):
        x_TI, bias_O = torch.randn(T, I).to(dtype), torch.randn(O).to(dtype)
        y_TO = kernels.linear(ready, x_TI.cuda(), bias_O.cuda())
        assert_multiplies(y_TO.cpu(), x_TI, W_OI, bias_O)


@needs_gpu
def test_on_a_gpu_with_the_algorithm_it_finds_and_half_the_memory():
    weight, W_OI = load_sparse(4096, 4096, dtype=BF16, pattern=TWO_OF_FOUR)
    kernels.prepare(weight, "cuda-2:4", device="cuda", dtype=BF16)  # times the shape
    before = torch.cuda.memory_allocated()
    ready = kernels.prepare(weight, "cuda-2:4", device="cuda", dtype=BF16)
    taken = torch.cuda.memory_allocated() - before
    assert isinstance(ready.weight, TensorCoreWeight)
    # 9/16 of the dense bytes, unless this GPU was faster with dense.
    assert taken <= W_OI.nbytes * (1.01 if ready.weight.algorithm is None else 0.57)
    for T in (1, 64, 255, 256, 2048):
        x_TI = torch.randn(T, 4096).to(BF16)
        wanted_TO = x_TI.cuda().double() @ W_OI.cuda().double().T
        error = (kernels.linear(ready, x_TI.cuda()).double() - wanted_TO).abs().amax() / wanted_TO.abs().amax()
        assert error < 0.01
