"""Random weights in every form that a checkpoint may have them in.

O: output features, I: input features, K: stored weights of a row, G: groups of a row, T: tiles of rows.
"""

from dataclasses import replace

import torch

from secateur.core.quantized import Outliers, Quantized
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.choose import layout_for
from secateur.formats.layouts.codebook import Table
from secateur.formats.layouts.nm import NMBits
from secateur.formats.layouts.packed_int import Uniform
from secateur.formats.layouts.two_level_int import TwoLevel

FP16, FP32 = torch.float16, torch.float32


def make(kind, O, I, bits=4, group_size=4, masked="", half=FP16, dtype=FP32, symmetric=False, outliers="", order=False,
         scale_bits=3, tile_rows=2, spare=0, seed=0):  # fmt: skip
    """A random weight. Beyond the end of a row its codes are rubbish, and `spare` of them are beyond the end of the longest."""
    draw = torch.Generator().manual_seed(seed)

    def codes(bits, *shape):
        return torch.randint(0, 2**bits, shape, generator=draw, dtype=torch.uint8)

    keep_OI = None
    if masked:
        shares = torch.tensor({"some": [0.0, 0.3, 0.6, 1.0], "hardly": [0.0] * 8 + [0.5], "nothing": [0.0]}[masked])
        keep_OI = torch.rand(O, I, generator=draw) < shares[torch.randint(0, len(shares), (O, 1), generator=draw)]
    K = I if keep_OI is None else int(keep_OI.sum(1).max()) + spare
    G = -(-K // group_size)
    code_OK = codes(bits, O, K)
    if kind == "packed-int":
        scale_OG = (torch.rand(O, G, generator=draw) + 0.01).to(half)
        found = Uniform(bits, group_size, code_OK, scale_OG, None if symmetric else codes(bits, O, G))
    elif kind == "spqr":
        # So that no weight is beyond float16, whatever the codes.
        second_TG4 = (torch.randn(-(-O // tile_rows), G, 4, generator=draw) / 2 ** max(scale_bits - 4, 0)).to(half)
        scale_codes = codes(scale_bits, O, G), codes(scale_bits, O, G)
        found = TwoLevel(bits, group_size, scale_bits, tile_rows, code_OK, *scale_codes, second_TG4)
    else:
        found = Table(bits, code_OK, torch.randn(O, 2**bits, generator=draw).to(half))
    weight = Quantized(found, (O, I), dtype, keep_OI, torch.randperm(I, generator=draw) if order else None)
    if not outliers or kind == "packed-int":
        return weight
    share = {"none at all": 0.0, "some": 0.2, "a full row": 0.0}[outliers]
    chosen_OI = torch.rand(O, I, generator=draw) < share
    chosen_OI[O // 2] |= outliers == "a full row"
    return replace(weight, outliers=Outliers.of(torch.randn(O, I, generator=draw), chosen_OI & kept(weight), half))


def places(weight):
    """Of every row, the columns of what is stored, in stored order."""
    O, I = weight.shape
    order = list(range(I)) if weight.order_I is None else weight.order_I.tolist()
    keep = [[True] * I] * O if weight.keep_OI is None else weight.keep_OI.tolist()
    return [[order[i] for i in range(I) if row[i]] for row in keep]


def kept(weight):
    """Which weights of the dense matrix are stored."""
    return torch.tensor([[column in row for column in range(weight.shape[1])] for row in places(weight)])


def load_coded(*args, **options):
    """Such a weight as kernels take it, and the dense weight that its layout unpacks to."""
    weight = make(*args, **options)
    layout = layout_for(weight)
    parts = layout.pack(weight)
    return layout.load(parts), layout.unpack(parts)


def load_sparse(O, I, density=0.5, dtype=FP32, pattern=None, seed=0):
    """A random pruned weight as kernels take it, and the same dense. With `pattern` (N, M) its density is N / M."""
    draw = torch.Generator().manual_seed(seed)
    W_OI = torch.randn(O, I, generator=draw).to(dtype)
    if pattern is None:
        W_OI[torch.rand(O, I, generator=draw) >= density] = 0
        layout = Bitmap()
    else:
        n, m = pattern
        rank_OI = torch.rand(O, I // m, m, generator=draw).argsort(2).argsort(2).view(O, I)
        W_OI[rank_OI >= n] = 0
        layout = NMBits(n, m)
    return layout.load(layout.pack(W_OI)), W_OI
