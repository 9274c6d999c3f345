"""KL divergence of distributions, also where only the likeliest outcomes of one are known.

B: distributions taken at a time, T: outcomes kept of each, V: all outcomes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl(log_p_BT: Tensor, log_q_BV: Tensor, kept_BT: Tensor | None = None, log_rest_B: Tensor | None = None) -> Tensor:
    """KL(p ‖ q) of each, in nats; `q` is whole.

    Where of p only the likeliest outcomes are known, all others count as one, which gives no more than the whole divergence
    would be. An outcome that p rules out adds nothing, though it be −∞ in both.

    Args:
        kept_BT: which outcomes `log_p_BT` is of; None: of all in their order.
        log_rest_B: the log-probability of all others together.
    """
    if kept_BT is None or log_rest_B is None:
        return _terms(log_p_BT, log_q_BV).sum(1)
    known_B = _terms(log_p_BT, log_q_BV.gather(1, kept_BT)).sum(1)
    return known_B + _terms(log_rest_B, log_rest(log_q_BV, kept_BT))


def log_rest(log_p_BV: Tensor, kept_BT: Tensor) -> Tensor:
    """The log-probability of all outcomes but some. Not 1 − Σp: of what is left so little is to be known exactly."""
    return log_p_BV.scatter(1, kept_BT, -torch.inf).logsumexp(1)


def _terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return (log_p - log_q).mul_(p).masked_fill_(p == 0, 0)
