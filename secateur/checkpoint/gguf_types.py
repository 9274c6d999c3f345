"""The types of GGUF's that a user may ask for, and weights rounded on their grids."""

from __future__ import annotations

from torch import Tensor

from secateur.core.stack import Stack
from secateur.core.stats import InputStats, Level
from secateur.errors import UsageError
from secateur.formats.layouts.block_codes import Blocks
from secateur.formats.layouts.block_types import BLOCK_TYPES, BlockType
from secateur.quant.rtn import RTN

#: Codes stay as they are.
AUTO = "auto"
_TYPES = (AUTO, *BLOCK_TYPES)


def check_type(option: str, name: str) -> str:
    """The name of a type as GGUF spells it. Raises UsageError where there is none of that name."""
    found = AUTO if name.lower() == AUTO else name.upper()
    if found not in _TYPES:
        raise UsageError(f"`{option}` {name!r} is not known: it can be {', '.join(_TYPES)}")
    return found


def rounded(W_OI: Tensor, form: BlockType) -> Blocks:
    """A float32 weight on the grid of a type that divides its rows."""
    stack = Stack.of([W_OI], InputStats.empty(W_OI.shape[1], Level.NONE))
    blocks: Blocks = RTN(grid=form.name.lower()).quantize(stack)[0].codes  # type: ignore[assignment]
    return blocks
