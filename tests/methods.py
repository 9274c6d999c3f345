"""Methods as functions of weights and statistics, which is how their tests think of them.

O: output features, I: input features.
"""

from functools import partial

import torch

from secateur.core.registry import PRUNERS, REFINERS
from secateur.core.stack import Stack
from secateur.prune.reconstruct import reconstruct as _reconstruct


def stack(W_OI, stats, rows=(), dtype=torch.float32, fisher_OI=None):
    """One linear, or several with so many rows each."""
    return Stack(W_OI.float(), stats, tuple(rows) or (len(W_OI),), dtype, fisher_OI)


def prune(method, W_OI, stats, pattern, rows=()):
    """By a pruner, or by the one of a name with its defaults."""
    method = PRUNERS[method]() if isinstance(method, str) else method
    return method.prune(stack(W_OI, stats, rows), pattern)


magnitude, wanda, sparsegpt, alps = (partial(prune, name) for name in ("magnitude", "wanda", "sparsegpt", "alps"))


def dsnot(W_OI, keep_OI, stats, pattern):
    return REFINERS["dsnot"]().refine(stack(W_OI, stats), keep_OI, pattern)


def reconstruct(W_OI, keep_OI, stats, start_OI=None):
    return _reconstruct(stack(W_OI, stats), keep_OI, start_OI)


def quantize(method, W_OI, stats, rows=(), dtype=torch.float32, pruned=None, fisher_OI=None):
    return method.quantize(stack(W_OI, stats, rows, dtype, fisher_OI), pruned)
