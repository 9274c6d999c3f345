"""Scales and offsets for groups of weights on the grids that GGUF files know (see `BlockType`), by least squared error.

O: output features, G: groups of a block, S: weights of one group. Groups come transposed, as `[G, S, O]`, so that what is
computed for all rows at once is contiguous.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from secateur.formats.layouts.block_types import BlockType

# The ranges that a search tries, as shares of the one that reaches the outermost weight.
_SHARES = tuple(1.1 - 0.05 * step for step in range(13))
# How far from the nearest code of a scale the search goes: its neighbours often serve the group better.
_NEIGHBOURS = (-1, 0, 1)
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Groups:
    """The grids of some groups in every row; scale and offset broadcast against weights, whatever their dimensions.

    Attributes:
        form: the type.
        scale: float32, of either sign; where it is 0 the weights stand for minus the offset.
        offset: float32; None for a type without.
    """

    form: BlockType
    scale: Tensor
    offset: Tensor | None

    def code(self, w: Tensor) -> Tensor:
        """The code of the nearest level, as float32."""
        inverse = torch.where(self.scale.abs() >= _TINY, 1 / self.scale, 0)
        if self.form.levels:
            return torch.bucketize((w * inverse).contiguous(), _borders(self.form.levels).to(w.device)).float()
        top = 2**self.form.bits - 1
        if self.offset is None:
            return (w * inverse).add_((top + 1) // 2).round_().clamp_(0, top)
        return (w + self.offset).mul_(inverse).round_().clamp_(0, top)

    def level(self, code: Tensor) -> Tensor:
        """What codes stand for before they are scaled and moved."""
        if self.form.levels:
            return torch.tensor(self.form.levels, dtype=torch.float32, device=code.device)[code.long()]
        return code if self.form.has_offset else code - 2 ** (self.form.bits - 1)

    def value(self, code: Tensor) -> Tensor:
        """What codes stand for."""
        found = self.level(code) * self.scale
        return found if self.offset is None else found.sub_(self.offset)

    def round(self, w: Tensor, levels: int) -> Tensor:
        """What the nearest level stands for; how many `levels` there are is the type's to say."""
        return self.value(self.code(w))

    def error(self, w_GSO: Tensor, importance: Tensor) -> Tensor:
        """Σ importance · (ŵ − w)² of each group, `[G, O]`."""
        return self.value(self.code(w_GSO)).sub_(w_GSO).square_().mul_(importance).sum(1)


@lru_cache(maxsize=4)
def _borders(levels: tuple[int, ...]) -> Tensor:
    return torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(levels)])


def fit_groups_freely(form: BlockType, w_GSO: Tensor, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """The best scale and offset of each group as if they were stored as they are: `[G, O]` each."""
    best: tuple[Tensor, Tensor | None] | None = None
    least_GO = w_GSO.new_full((w_GSO.shape[0], w_GSO.shape[2]), torch.inf)
    for scale_GO, offset_GO in _tries(form, w_GSO):
        for _ in range(1 + form.has_offset):
            scale_GO, offset_GO = _refit(form, w_GSO, importance, scale_GO, offset_GO)
        error_GO = _groups(form, scale_GO, offset_GO).error(w_GSO, importance)
        better_GO = error_GO < least_GO
        least_GO = torch.where(better_GO, error_GO, least_GO)
        best = _where(better_GO, (scale_GO, offset_GO), best)
    assert best is not None
    return best


def _groups(form: BlockType, scale_GO: Tensor, offset_GO: Tensor | None) -> Groups:
    return Groups(form, scale_GO[:, None], None if offset_GO is None else offset_GO[:, None])


def _where(
    better: Tensor, one: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None] | None
) -> tuple[Tensor, Tensor | None]:
    if other is None:
        return one
    offset = None if one[1] is None or other[1] is None else torch.where(better, one[1], other[1])
    return torch.where(better, one[0], other[0]), offset


def _tries(form: BlockType, w_GSO: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Scales and offsets that a search begins with."""
    if form.has_offset:
        low_GO, high_GO = w_GSO.amin(1), w_GSO.amax(1)
        if form.scale_bits:  # codes of offsets have no sign
            low_GO = low_GO.clamp(max=0)
        for share in _SHARES:
            yield (high_GO - low_GO) * (share / (2**form.bits - 1)), -low_GO * share
        return
    # The outermost weight lies at either end of the grid, of which one reaches further.
    peak_GO = w_GSO.gather(1, w_GSO.abs().argmax(1, keepdim=True))[:, 0]
    first = form.levels[0] if form.levels else -(2 ** (form.bits - 1))
    last = form.levels[-1] if form.levels else 2 ** (form.bits - 1) - 1
    for share in _SHARES:
        yield peak_GO * (share / first), None
        yield peak_GO * (share / last), None


def _refit(
    form: BlockType, w_GSO: Tensor, importance: Tensor, scale_GO: Tensor, offset_GO: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scale and offset of least squares for the codes that the given ones lead to."""
    groups = _groups(form, scale_GO, offset_GO)
    level_GSO = groups.level(groups.code(w_GSO))
    weighted_GSO = level_GSO * importance
    square_GO, product_GO = (weighted_GSO * level_GSO).sum(1), (weighted_GSO * w_GSO).sum(1)
    if offset_GO is None:
        return torch.where(square_GO > 0, product_GO / square_GO, scale_GO), None
    total_GO = importance.expand_as(w_GSO).sum(1)
    first_GO, mean_GO = weighted_GSO.sum(1), (w_GSO * importance).sum(1)
    determinant_GO = total_GO * square_GO - first_GO.square()
    slope_GO = (total_GO * product_GO - first_GO * mean_GO) / determinant_GO
    moved_GO = (first_GO * slope_GO - mean_GO) / total_GO
    if form.scale_bits:
        through_zero_GO = moved_GO < 0
        slope_GO = torch.where(through_zero_GO, product_GO / square_GO, slope_GO)
        moved_GO = moved_GO.clamp(min=0)
    sound_GO = (determinant_GO > 0) & torch.isfinite(slope_GO) & torch.isfinite(moved_GO) & (slope_GO > 0)
    return torch.where(sound_GO, slope_GO, scale_GO), torch.where(sound_GO, moved_GO, offset_GO)


@dataclass(frozen=True)
class Coded:
    """What is stored of the scales of a block in every row.

    Attributes:
        scale_O, offset_O: of the block, in float16's values.
        c_GO, m_GO: codes of the groups' scales and offsets, float32; None for a type without.
    """

    scale_O: Tensor
    offset_O: Tensor | None
    c_GO: Tensor | None = None
    m_GO: Tensor | None = None

    def groups(self, form: BlockType) -> Groups:
        """The grids that come of it, with a dimension for the weights of a group."""
        if self.c_GO is None:
            return _groups(form, self.scale_O[None], None if self.offset_O is None else self.offset_O[None])
        offset_GO = None if self.offset_O is None or self.m_GO is None else self.offset_O * self.m_GO
        return _groups(form, self.scale_O * (self.c_GO - form.scale_zero), offset_GO)


def fit_block(form: BlockType, w_GSO: Tensor, importance: Tensor) -> Coded:
    """The scales of one block of every row.

    Args:
        form: the type.
        w_GSO: float32.
        importance: what the squared error of each weight counts, `[G, S, O]` or `[G, S, 1]`.
    """
    # What counts nothing at all still needs a grid.
    importance = torch.where(importance.amax(1, keepdim=True) > 0, importance, 1)
    scale_GO, offset_GO = fit_groups_freely(form, w_GSO, importance)
    if not form.scale_bits:
        return Coded(_half(scale_GO[0]), None if offset_GO is None else _half(offset_GO[0]))
    top = 2**form.scale_bits - 1
    if form.scale_zero:
        # The largest has the code that reaches furthest, whichever sign that gives the others.
        peak_O = scale_GO.gather(0, scale_GO.abs().argmax(0, keepdim=True))[0]
        scale_O = peak_O / -form.scale_zero
    else:
        scale_O = scale_GO.amax(0) / top
    offset_O = None if offset_GO is None else offset_GO.amax(0) / top
    coded = _code(form, w_GSO, importance, scale_GO, offset_GO, scale_O, offset_O)
    # Scales of the block that fit best with these codes, and codes that fit best with those.
    again = _code(form, w_GSO, importance, scale_GO, offset_GO, *_refit_block(form, w_GSO, importance, coded))
    better_O = _block_error(form, again, w_GSO, importance) < _block_error(form, coded, w_GSO, importance)
    return Coded(
        torch.where(better_O, again.scale_O, coded.scale_O),
        _choose(better_O, again.offset_O, coded.offset_O),
        _choose(better_O, again.c_GO, coded.c_GO),
        _choose(better_O, again.m_GO, coded.m_GO),
    )


def _choose(better_O: Tensor, one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else torch.where(better_O, one, other)


def _block_error(form: BlockType, coded: Coded, w_GSO: Tensor, importance: Tensor) -> Tensor:
    return coded.groups(form).error(w_GSO, importance).sum(0)


def _half(x: Tensor) -> Tensor:
    return x.clamp(-65504, 65504).half().float()


def _code(
    form: BlockType,
    w_GSO: Tensor,
    importance: Tensor,
    scale_GO: Tensor,
    offset_GO: Tensor | None,
    scale_O: Tensor,
    offset_O: Tensor | None,
) -> Coded:
    """The codes of scales and offsets of least error, near those that were wanted."""
    scale_O, offset_O = _half(scale_O), None if offset_O is None else _half(offset_O)
    top = 2**form.scale_bits - 1
    middle_GO = (_ratio(scale_GO, scale_O) + form.scale_zero).round_()
    best: Coded | None = None
    least_GO = torch.full_like(scale_GO, torch.inf)
    for step in _NEIGHBOURS:
        c_GO = (middle_GO + step).clamp_(0, top)
        m_GO = None
        if offset_O is not None and offset_GO is not None:
            # The offset that is best with this scale, for the codes that it leads to.
            groups = _groups(form, scale_O * (c_GO - form.scale_zero), offset_GO)
            excess_GSO = groups.level(groups.code(w_GSO)).mul_(groups.scale).sub_(w_GSO).mul_(importance)
            wanted_GO = excess_GSO.sum(1) / importance.expand_as(w_GSO).sum(1)
            m_GO = _ratio(wanted_GO, offset_O).round_().clamp_(0, top)
        tried = Coded(scale_O, offset_O, c_GO, m_GO)
        error_GO = tried.groups(form).error(w_GSO, importance)
        better_GO = error_GO < least_GO
        least_GO = torch.where(better_GO, error_GO, least_GO)
        if best is None:
            best = tried
        best = Coded(scale_O, offset_O, _choose(better_GO, c_GO, best.c_GO), _choose(better_GO, m_GO, best.m_GO))
    assert best is not None
    return best


def _ratio(x: Tensor, unit: Tensor) -> Tensor:
    return torch.where(unit != 0, x / unit, 0)


def _refit_block(form: BlockType, w_GSO: Tensor, importance: Tensor, coded: Coded) -> tuple[Tensor, Tensor | None]:
    """The block's scale and offset of least squares for codes as they are."""
    assert coded.c_GO is not None
    groups = coded.groups(form)
    unit_GSO = groups.level(groups.code(w_GSO)).mul_((coded.c_GO - form.scale_zero)[:, None])
    weighted_GSO = unit_GSO * importance
    square_O, product_O = (weighted_GSO * unit_GSO).sum((0, 1)), (weighted_GSO * w_GSO).sum((0, 1))
    if coded.offset_O is None or coded.m_GO is None:
        return torch.where(square_O > 0, product_O / square_O, coded.scale_O), None
    m_G1O = coded.m_GO[:, None]
    cross_O = (weighted_GSO * m_G1O).sum((0, 1))
    m_square_O = (importance * m_G1O.square()).expand_as(w_GSO).sum((0, 1))
    m_product_O = (importance * m_G1O * w_GSO).sum((0, 1))
    determinant_O = square_O * m_square_O - cross_O.square()
    slope_O = (product_O * m_square_O - cross_O * m_product_O) / determinant_O
    offset_O = (cross_O * product_O - square_O * m_product_O) / determinant_O
    sound_O = (determinant_O > 0) & torch.isfinite(slope_O) & torch.isfinite(offset_O) & (slope_O > 0) & (offset_O >= 0)
    return torch.where(sound_O, slope_O, coded.scale_O), torch.where(sound_O, offset_O, coded.offset_O)
