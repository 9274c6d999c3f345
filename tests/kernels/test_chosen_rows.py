"""Rows of packed weights, in any order: those of the dense weight, to the bit.

O: output features, I: input features.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_examples import tries
from random_weights import load_coded, load_sparse

from secateur.kernels.chosen_rows import chosen_rows


@tries(100)
@given(
    kind=st.sampled_from(["packed-int", "packed-int", "packed-int", "spqr", "codebook"]),
    O=st.integers(1, 9),
    I=st.integers(1, 70),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([2, 3, 16, 99]),
    masked=st.sampled_from(["", "", "some"]),
    symmetric=st.booleans(),
    outliers=st.sampled_from(["", "some"]),
    order=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rows=st.lists(st.integers(0, 8), max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_they_are_rows_of_the_dense_weight(kind, O, I, rows, **options):
    weight, _ = load_coded(kind, O, I, **options)
    row_N = torch.tensor([row % O for row in rows], dtype=torch.long)
    assert torch.equal(chosen_rows(weight, row_N), weight.dense()[row_N])


def test_of_pruned_weights_too():
    weight, W_OI = load_sparse(7, 40, 0.3, torch.bfloat16)
    assert torch.equal(chosen_rows(weight, torch.tensor([6, 0, 6])), W_OI[[6, 0, 6]])


def test_many_rows_are_unpacked_some_at_a_time():
    weight, W_OI = load_coded("packed-int", 5, 4096, bits=6, group_size=32)
    row_N = torch.randint(0, 5, (300,))
    assert torch.equal(chosen_rows(weight, row_N), W_OI[row_N])


@pytest.mark.parametrize("row", [-1, 5])
def test_rows_that_are_not_there_are_refused(row):
    weight, _ = load_coded("packed-int", 5, 9)
    with pytest.raises(IndexError, match="are asked for, and there are 5"):
        chosen_rows(weight, torch.tensor([0, row]))
