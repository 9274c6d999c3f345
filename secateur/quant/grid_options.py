"""Options that the methods with grids share."""

from typing import Any

from secateur.core.options import option
from secateur.core.quantized import BITS
from secateur.quant.grid import ROW

MOST_OUTLIERS = 0.2
ORDERS = ("natural", "activation", "permuted")


def bits_option(default: int, choices: tuple[int, ...] = BITS, hint: str = "") -> Any:
    return option(default, "Bits of a code.", choices=choices, hint=hint)


def group_size_option(default: int, words: tuple[str, ...] = (ROW,)) -> Any:
    return option(default, "Number of weights that share a scale.", low=2, words=words)


def symmetric_option() -> Any:
    return option(False, "Zero points in the middle of the grid.", opposite="asymmetric")


def search_range_option() -> Any:
    return option(True, "Range of each group's grid chosen by squared error.")


def order_option(default: str) -> Any:
    return option(default, "Order in which columns are rounded.", choices=ORDERS)


def outlier_share_option(default: float | None) -> Any:
    return option(default, "Fraction of weights kept in 16 bits as outliers.", low=0, high=MOST_OUTLIERS, share=True)
