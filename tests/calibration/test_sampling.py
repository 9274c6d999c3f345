"""How the tokens of a text that the model writes itself are drawn."""

import math

import pytest
import torch

from secateur.calibration.sampling import _draw
from secateur.errors import SecateurError


def drawn(p_V, rows=20000, seed=0):
    return _draw(torch.tensor([p_V]).expand(rows, -1), torch.Generator().manual_seed(seed))


def test_tokens_are_drawn_as_often_as_their_probability_says():
    p_V = [0.0, 0.25, 0.0, 0.7, 0.05, 0.0]
    counts_V = drawn(p_V).bincount(minlength=6)
    assert counts_V[torch.tensor(p_V) == 0].sum() == 0
    for count, p in zip(counts_V.tolist(), p_V, strict=True):
        assert abs(count / 20000 - p) < 5 * math.sqrt(p * (1 - p) / 20000) + 1e-9


def test_probabilities_need_not_sum_to_one():
    """As those of a large vocabulary do in float32."""
    assert drawn([0.0, 1e-3, 0.0]).unique().tolist() == [1]
    assert drawn([1.0001, 0.0]).unique().tolist() == [0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_distribution_is_refused(bad):
    with pytest.raises(SecateurError, match=r"predictions are not finite: it is damaged; choose a text by `source`"):
        drawn([0.5, bad, 0.5], rows=2)
