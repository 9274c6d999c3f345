"""The kernel against plain torch and numpy, bit for bit, with every instruction set this machine has."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries

from secateur.kernels import expand as kernels
from secateur.kernels.expand import (
    compress_bitmap,
    compress_bitmap_torch,
    count_rows,
    expand_bitmap,
    expand_bitmap_torch,
)

NATIVE_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OTHER_DTYPES = [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ISAS = range(kernels._isa + 1)

needs_native = pytest.mark.skipif(not kernels.HAVE_NATIVE, reason="installed without a compiler")


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(BITS[tensor.element_size()])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits_of(a), bits_of(b))


def weights(rows: int, columns: int, density: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bits, so with NaN, infinities and subnormals, under a random mask; some zeros are minus zero."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    random_bytes = torch.randint(0, 256, (rows * columns * size,), dtype=torch.uint8, generator=generator)
    W_OI = random_bytes.view(dtype).view(rows, columns)
    drop_OI = torch.rand(rows, columns, generator=generator) >= density
    bits_of(W_OI)[drop_OI] = 0
    if dtype.is_floating_point:
        minus_OI = drop_OI & (torch.rand(rows, columns, generator=generator) < 0.3)
        bits_of(W_OI)[minus_OI] = 128 if size == 1 else torch.iinfo(BITS[size]).min
    return W_OI


def without_minus_zero(W_OI: torch.Tensor) -> torch.Tensor:
    """The same weights with plain zeros, by another way than the one under test."""
    bits_OI = bits_of(W_OI).clone()
    if W_OI.dtype.is_floating_point:
        bits_OI[bits_OI == (128 if W_OI.element_size() == 1 else torch.iinfo(bits_OI.dtype).min)] = 0
    return bits_OI.view(W_OI.dtype)


def check_round_trip(W_OI: torch.Tensor) -> None:
    clean_OI = without_minus_zero(W_OI)
    keep_OI = (bits_of(clean_OI) != 0).numpy()
    values, bitmask_OB = compress_bitmap(W_OI)
    assert np.array_equal(bitmask_OB.numpy(), np.packbits(keep_OI, axis=1, bitorder="little"))
    assert same(values, bits_of(clean_OI)[torch.from_numpy(keep_OI)].view(W_OI.dtype))
    assert count_rows(bitmask_OB, W_OI.shape[1]).tolist() == keep_OI.sum(1).tolist()
    assert same(expand_bitmap(values, bitmask_OB, W_OI.shape[1]), clean_OI)

    torch_values, torch_bitmask_OB = compress_bitmap_torch(W_OI)
    assert same(torch_values, values)
    assert torch.equal(torch_bitmask_OB, bitmask_OB)
    assert same(expand_bitmap_torch(values, bitmask_OB, W_OI.shape[1]), clean_OI)


@tries(120)
@given(
    rows=st.integers(0, 20),
    columns=st.integers(0, 70) | st.sampled_from([127, 128, 255, 256]),
    density=st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0]),
    dtype=st.sampled_from(NATIVE_DTYPES),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 2**31),
)
def test_native_equals_torch_and_numpy(rows, columns, density, dtype, isa, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_isa", isa)
        check_round_trip(weights(rows, columns, density, dtype, seed))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_every_mask_byte(isa, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_isa", isa)
    bitmask_OB = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 3)
    values = torch.arange(1, 256 * 4 * 3 + 1, dtype=torch.int32).view(torch.float32)
    values = values if dtype == torch.float32 else torch.arange(1, 256 * 4 * 3 + 1, dtype=torch.int16).view(dtype)
    assert same(expand_bitmap(values, bitmask_OB, 24), expand_bitmap_torch(values, bitmask_OB, 24))
    check_round_trip(expand_bitmap(values, bitmask_OB, 24))


@pytest.mark.parametrize("dtype", OTHER_DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 1), (5, 8), (7, 67)])
def test_other_dtypes(dtype, rows, columns):
    check_round_trip(weights(rows, columns, 0.5, dtype))


@pytest.mark.parametrize("dtype", [*NATIVE_DTYPES, torch.float64])
def test_special_values_are_kept_exactly(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    row = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), tiny, -tiny, tiny / 4, -tiny / 4, 1.0, -1.0]
    W_OI = torch.tensor([row, row[::-1]], dtype=dtype)
    values, bitmask_OB = compress_bitmap(W_OI)
    assert values.numel() == 18
    assert bitmask_OB.tolist() == [[0b11111100, 0b111], [0b11111111, 0b001]]
    assert same(expand_bitmap(values, bitmask_OB, 11), without_minus_zero(W_OI))


def test_subnormals_survive_flushing():
    W_OI = torch.tensor([[1e-40, 0.0]])
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        assert compress_bitmap(W_OI)[0].numel() == compress_bitmap_torch(W_OI)[0].numel() == 1
    finally:
        torch.set_flush_denormal(False)


def test_float8_without_minus_zero_keeps_its_nan():
    W_OI = torch.tensor([[0, 0x80, 5]], dtype=torch.uint8).view(torch.float8_e4m3fnuz)
    values, bitmask_OB = compress_bitmap(W_OI)
    assert bits_of(values).tolist() == [0x80, 5]
    assert same(expand_bitmap(values, bitmask_OB, 3), W_OI)


def test_parameters_and_read_only_masks():
    W_OI = torch.nn.Parameter(weights(4, 9, 0.5, torch.float32))
    values, bitmask_OB = compress_bitmap(W_OI)
    assert not values.requires_grad
    assert same(expand_bitmap(values, bitmask_OB, 9), without_minus_zero(W_OI.detach()))


@pytest.fixture
def three_threads(monkeypatch):
    """Small pieces, so that every thread gets some, of uneven sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(kernels, "_BYTES_PER_PIECE", 1 << 10)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_threads(isa, dtype, three_threads, monkeypatch):
    monkeypatch.setattr(kernels, "_isa", isa)
    for seed in range(5):
        check_round_trip(weights(1013, 77, 0.5, dtype, seed))
    check_round_trip(weights(3, 4099, 0.5, dtype))


def test_called_from_several_threads(three_threads):
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for _ in range(5):
                check_round_trip(weights(257, 77, 0.5, torch.bfloat16, seed))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_threads_after_a_fork(three_threads):
    W_OI = without_minus_zero(weights(1013, 77, 0.5, torch.bfloat16))
    values, bitmask_OB = compress_bitmap(W_OI)
    expected = bits_of(W_OI).numpy().tobytes()

    def child() -> None:
        # numpy, because torch's own threads do not survive the fork either.
        expanded = bits_of(expand_bitmap(values, bitmask_OB, 77)).numpy().tobytes()
        sys.exit(0 if expanded == expected else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(20)
    process.kill()
    assert process.exitcode == 0


GOOD = (torch.ones(3, dtype=torch.bfloat16), torch.tensor([[0b101, 0], [0, 0b10]], dtype=torch.uint8), 10)


@pytest.mark.parametrize("expand", [expand_bitmap, expand_bitmap_torch])
@pytest.mark.parametrize(
    ("position", "bad", "message"),
    [
        (0, torch.ones(2, dtype=torch.bfloat16), "3 bits set but there are 2 values"),
        (0, torch.ones(4, dtype=torch.bfloat16), "3 bits set but there are 4 values"),
        (0, torch.ones(0, dtype=torch.bfloat16), "3 bits set but there are 0 values"),
        (0, torch.ones(1, 3, dtype=torch.bfloat16), "contiguous vector"),
        (0, torch.ones(6, dtype=torch.bfloat16)[::2], "contiguous vector"),
        (0, torch.ones(3, dtype=torch.complex128), "complex128"),
        (0, torch.ones(3, dtype=torch.bfloat16, device="meta"), "on meta"),
        (1, torch.tensor([[0b101, 0], [0, 0b110]], dtype=torch.uint8), "beyond the last of its 10 columns"),
        (1, torch.tensor([[0b101, 0x80], [0, 0]], dtype=torch.uint8), "beyond the last of its 10 columns"),
        (1, torch.zeros(2, 2, dtype=torch.int8), "uint8"),
        (1, torch.zeros(4, dtype=torch.uint8), r"not \[4\]"),
        (1, torch.zeros(2, 3, dtype=torch.uint8), r"not \[2, 3\]"),
        (1, torch.zeros(2, 2, dtype=torch.uint8).T, "not contiguous"),
        (2, 17, r"not \[2, 2\]"),
        (2, 8, r"not \[2, 2\]"),
        (2, -1, r"not \[2, 2\]"),
        (2, 9, "beyond the last of its 9 columns"),
    ],
)
def test_bad_inputs(expand, position, bad, message):
    good = list(GOOD)
    assert expand(*good).float().sum() == 3
    good[position] = bad
    with pytest.raises(ValueError, match=message) as raised:
        expand(*good)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("compress", [compress_bitmap, compress_bitmap_torch])
@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 3).T, torch.ones(2, 2, dtype=torch.complex128)])
def test_bad_weights(compress, bad):
    with pytest.raises(ValueError, match="weights"):
        compress(bad)


@pytest.mark.parametrize("native", [True, False])
def test_count_rows(native, monkeypatch):
    monkeypatch.setattr(kernels, "HAVE_NATIVE", native and kernels.HAVE_NATIVE)
    mask_OB = torch.randint(0, 256, (9, 21), dtype=torch.uint8)
    assert count_rows(mask_OB, 168).tolist() == [sum(byte.bit_count() for byte in row) for row in mask_OB.tolist()]
    assert count_rows(mask_OB[:0], 168).tolist() == []
    mask_OB[:, -1] = 0b1000
    assert count_rows(mask_OB, 164).numel() == 9
    with pytest.raises(ValueError, match="beyond"):
        count_rows(mask_OB, 163)


def test_without_the_kernel(monkeypatch):
    monkeypatch.setattr(kernels, "HAVE_NATIVE", False)
    check_round_trip(weights(5, 19, 0.5, torch.bfloat16))


class Fenced:
    """Tensors that end right before a page that must not be touched: one byte too far and the process dies."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.kept: list[mmap.mmap] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        count = tensor.numel() * tensor.element_size()
        room = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(-1, room + mmap.PAGESIZE)
        self.kept.append(pages)
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        fence = ctypes.c_void_p(start + room)
        assert self.libc.mprotect(fence, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        if count == 0:
            return tensor
        copy = torch.frombuffer(pages, dtype=torch.uint8, offset=room - count, count=count).view(tensor.dtype)
        return copy.view(tensor.shape).copy_(tensor)


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_beyond_the_ends_is_touched(isa, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_isa", isa)
    fenced = Fenced()
    for rows, columns, density in [(1, 1, 1.0), (2, 8, 0.5), (3, 31, 0.1), (3, 33, 1.0), (5, 64, 0.9), (4, 70, 0.5)]:
        W_OI = fenced(without_minus_zero(weights(rows, columns, density, dtype)))
        values, bitmask_OB = (fenced(tensor) for tensor in compress_bitmap(W_OI))
        assert same(expand_bitmap(values, bitmask_OB, columns), W_OI)
        counts_O = count_rows(bitmask_OB, columns)
        expanded_OI, packed = fenced(torch.zeros_like(W_OI)), fenced(torch.zeros_like(values))
        kernels._run_rows(kernels._EXPAND, values, bitmask_OB, expanded_OI, counts_O)
        kernels._run_rows(kernels._PACK, packed, bitmask_OB, W_OI, counts_O)
        assert same(expanded_OI, W_OI)
        assert same(packed, values)


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("values_left", [0, 1, 7, 8, 37, 199])
@pytest.mark.parametrize("step", [kernels._EXPAND, kernels._PACK])
def test_a_mask_that_changes_after_it_was_counted(step, values_left, dtype, isa, monkeypatch):
    monkeypatch.setattr(kernels, "_isa", isa)
    fenced = Fenced()
    # Every bit is set by now, those beyond the last column too, but when counted there were only so many.
    bitmask_OB = fenced(torch.full((5, 6), 0xFF, dtype=torch.uint8))
    counts_O = torch.tensor([values_left, 0, 0, 0, 0])
    values, W_OI = fenced(torch.ones(values_left, dtype=dtype)), fenced(torch.zeros(5, 41, dtype=dtype))
    with pytest.raises(ValueError, match="changed while"):
        kernels._run_rows(step, values, bitmask_OB, W_OI, counts_O)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_unaligned_tensors(isa, dtype, monkeypatch):
    """As a memory-mapped file may hold them."""
    monkeypatch.setattr(kernels, "_isa", isa)
    W_OI = without_minus_zero(weights(7, 43, 0.5, dtype))
    values, bitmask_OB = compress_bitmap(W_OI)
    raw = bytearray(1) + bytearray(bits_of(values).numpy().tobytes())
    odd = torch.frombuffer(raw, dtype=dtype, offset=1)
    assert odd.data_ptr() % 2 == 1
    assert same(expand_bitmap(odd, bitmask_OB, 43), W_OI)
