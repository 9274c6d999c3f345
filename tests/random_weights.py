"""Random weights in every form that a checkpoint may have them in.

O: output features, I: input features, K: stored weights of a row, G: groups of a row, T: tiles of rows.
"""

from dataclasses import dataclass, replace

import torch

from secateur.core.quantized import Outliers, Quantized
from secateur.formats.layouts.bitmap import Bitmap
from secateur.formats.layouts.choose import layout_for
from secateur.formats.layouts.codebook import Table
from secateur.formats.layouts.nm import NMBits
from secateur.formats.layouts.packed_int import Uniform
from secateur.formats.layouts.ternary_dict import TernaryCodes
from secateur.formats.layouts.trellis_rings import Trellis
from secateur.formats.layouts.two_level_int import TwoLevel
from secateur.kernels.bits import bytes_of
from secateur.solvers.trellis import ring_of

FP16, FP32 = torch.float16, torch.float32


@dataclass(frozen=True)
class Form:
    """What a random weight is like; `spare` codes are beyond the end of the longest row."""

    bits: int = 4
    group_size: int = 4
    masked: str = ""
    half: torch.dtype = FP16
    dtype: torch.dtype = FP32
    symmetric: bool = False
    outliers: str = ""
    order: bool = False
    scale_bits: int = 3
    tile_rows: int = 2
    spare: int = 0
    seed: int = 0


def make(kind, O, I, *given, **options):
    """A random weight of a `Form`. Beyond the end of a row its codes are rubbish."""
    form = Form(*given, **options)
    draw = torch.Generator().manual_seed(form.seed)
    keep_OI = _mask(form.masked, O, I, draw)
    K = I if keep_OI is None else int(keep_OI.sum(1).max()) + form.spare
    found = _codes(kind, O, K, form, draw)
    weight = Quantized(found, (O, I), form.dtype, keep_OI, torch.randperm(I, generator=draw) if form.order else None)
    if not form.outliers or kind == "packed-int":
        return weight
    share = {"none at all": 0.0, "some": 0.2, "a full row": 0.0}[form.outliers]
    chosen_OI = torch.rand(O, I, generator=draw) < share
    chosen_OI[O // 2] |= form.outliers == "a full row"
    difference_OI = torch.randn(O, I, generator=draw)
    return replace(weight, outliers=Outliers.of(difference_OI, chosen_OI & kept(weight), form.half))


def _mask(masked, O, I, draw):
    if not masked:
        return None
    shares = torch.tensor({"some": [0.0, 0.3, 0.6, 1.0], "hardly": [0.0] * 8 + [0.5], "nothing": [0.0]}[masked])
    return torch.rand(O, I, generator=draw) < shares[torch.randint(0, len(shares), (O, 1), generator=draw)]


def _codes(kind, O, K, form, draw):
    def codes(bits, *shape):
        return torch.randint(0, 2**bits, shape, generator=draw, dtype=torch.uint8)

    bits, G = form.bits, -(-K // form.group_size)
    code_OK = codes(bits, O, K)
    if kind == "packed-int":
        scale_OG = (torch.rand(O, G, generator=draw) + 0.01).to(form.half)
        return Uniform(bits, form.group_size, code_OK, scale_OG, None if form.symmetric else codes(bits, O, G))
    if kind == "spqr":
        # So that no weight is beyond float16, whatever the codes.
        tiles, spread = -(-O // form.tile_rows), 2 ** max(form.scale_bits - 4, 0)
        second_TG4 = (torch.randn(tiles, G, 4, generator=draw) / spread).to(form.half)
        scale_codes = codes(form.scale_bits, O, G), codes(form.scale_bits, O, G)
        return TwoLevel(bits, form.group_size, form.scale_bits, form.tile_rows, code_OK, *scale_codes, second_TG4)
    return Table(bits, code_OK, torch.randn(O, 2**bits, generator=draw).to(form.half))


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


def load_trellis(O, I, bits=3, state_bits=12, ring=None, block=128, whole=False, seed=0):
    """A random weight in trellis codes as kernels take it. `whole`: the scales of its inputs are whole numbers."""
    draw = torch.Generator().manual_seed(seed)
    if ring is None:
        ring, state_bits = ring_of(O, bits, state_bits)
    codes = torch.randint(0, 256, (O // ring, I, bytes_of(ring, bits)), generator=draw, dtype=torch.uint8)
    if ring * bits % 8:
        codes[..., -1] &= 2 ** (ring * bits % 8) - 1
    scale_out, scale_in = (torch.randn(n, generator=draw).to(FP16) for n in (O, I))
    if whole:
        scale_in = torch.tensor([-2, -1, 1, 2]).half()[torch.randint(0, 4, (I,), generator=draw)]
    shape = torch.tensor([O, I])
    parts = {"codes": codes, "scale_in": scale_in, "scale_out": scale_out, "shape": shape}
    return Trellis(bits, state_bits, ring, block, FP32).load(parts)


def load_ternary(O, I, zeros=0.8, whole=False, seed=0):
    """A random ternary weight as kernels take it. `whole`: its values are whole numbers."""
    draw = torch.Generator().manual_seed(seed)
    other_OI = torch.randint(1, 3, (O, I), generator=draw)
    symbol_OI = torch.where(torch.rand(O, I, generator=draw) < zeros, 0, other_OI).to(torch.uint8)
    low_O, high_O = -torch.rand(O, generator=draw).half(), torch.rand(O, generator=draw).half()
    if whole:
        low_O, high_O = -torch.ones(O).half(), 2 * torch.ones(O).half()
    weight = Quantized(TernaryCodes(symbol_OI, low_O, high_O), (O, I), FP32)
    return layout_for(weight).load(layout_for(weight).pack(weight))
