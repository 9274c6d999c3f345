"""Counts of how large inputs are, and the thresholds that they give."""

import numpy as np
import pytest
import torch

from secateur.core.histogram import Histogram, scores


def counted(*pieces, scale_I=None):
    found = Histogram(scale_I=scale_I)
    for x_TI in pieces:
        found.add(x_TI)
    return found


@pytest.mark.parametrize("draw", [torch.randn, lambda *s: torch.randn(*s) ** 5, lambda *s: torch.rand(*s) + 1])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.5, 0.95])
def test_the_threshold_of_a_share_is_its_quantile(draw, share):
    torch.manual_seed(0)
    x_TI = draw(500, 40)
    threshold = counted(x_TI).threshold(share)
    assert threshold == pytest.approx(np.quantile(x_TI.abs().numpy(), share), rel=0.03)
    # Within a bin of 4 % sizes are taken to lie evenly.
    assert (x_TI.abs() <= threshold).float().mean().item() == pytest.approx(share, abs=0.012)


def test_counts_of_halves_add_up():
    torch.manual_seed(0)
    a_TI, b_TI = torch.randn(7, 5), torch.randn(3, 5) * (torch.rand(3, 5) > 0.5)
    whole, both = counted(torch.cat([a_TI, b_TI])), counted(a_TI) + counted(b_TI)
    assert torch.equal(whole.count_B, both.count_B)
    assert (whole.zeros, whole.total) == (both.zeros, both.total) == (int((b_TI == 0).sum()), 50)


def test_zeros_are_below_any_threshold():
    x_TI = torch.tensor([[0.0, 0.0, 0.0, 1.0, 2.0]])
    sizes = counted(x_TI)
    assert sizes.zero_share == 0.6
    assert sizes.threshold(0.5) == sizes.threshold(0.6) == 0
    assert 0.9 < sizes.threshold(0.8) < 1.1


def test_features_may_have_factors():
    x_TI, scale_I = torch.tensor([[1.0, -2.0], [4.0, 0.5]]), torch.tensor([4.0, 1.0])
    assert torch.equal(scores(x_TI, scale_I), torch.tensor([[4.0, 2.0], [16.0, 0.5]]))
    assert torch.equal(counted(x_TI, scale_I=scale_I).count_B, counted(x_TI * scale_I).count_B)


def test_sizes_beyond_all_bins_count_in_the_last_ones():
    sizes = counted(torch.tensor([[1e-30, 1e30, 1.0]]).double())
    assert sizes.total == 3
    assert sizes.threshold(0.33) < 1e-5
    assert sizes.threshold(1.0) > 4000
    assert Histogram().threshold(0.5) == 0  # of nothing
