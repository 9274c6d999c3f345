"""Every backend computes what the dense weight in float64 does.

O: output features, I: input features, T: tokens.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import load_coded, load_sparse

from secateur.kernels.plain import dense_weight

KINDS = ["packed-int", "spqr", "codebook"]
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    O=st.integers(1, 9),
    I=st.integers(1, 70),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([2, 3, 16, 99]),
    masked=st.sampled_from(["", "some", "hardly"]),
    symmetric=st.booleans(),
    outliers=st.sampled_from(["", "none at all", "some", "a full row"]),
    order=st.booleans(),
    scale_bits=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=SEEDS,
)
def test_what_kernels_take_is_what_the_layout_unpacks_to(kind, O, I, **options):
    weight, W_OI = load_coded(kind, O, I, **options)
    # The order in which outliers are added may differ in the last bit.
    torch.testing.assert_close(dense_weight(weight), W_OI, rtol=0 if W_OI.dtype == torch.float32 else 0.01, atol=0)


@pytest.mark.parametrize("pattern", [None, (2, 4), (4, 8)])
def test_pruned_weights_too(pattern):
    weight, W_OI = load_sparse(7, 40, 0.3, torch.bfloat16, pattern)
    assert torch.equal(dense_weight(weight), W_OI)
