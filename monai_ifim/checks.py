# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What counts as a number where a caller gives one: true, text and arrays of several do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

__all__ = ["MOST", "is_list", "is_number", "is_whole"]

# The greatest whole number of any option: that of torch's seeds and sizes.
MOST = 2**63 - 1


def is_number(value: Any) -> bool:
    """Whether it is one real number, of Python, numpy or torch; NaN and infinity are.

    Example:
        >>> import numpy as np
        >>> is_number(np.float32(1)), is_number(True), is_number("1"), is_number(np.ones(1))
        (True, False, False, False)
    """
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: Any, least: int, most: int = MOST) -> bool:
    """Whether it is a whole number in this range; 2.0 is one.

    Example:
        >>> is_whole(2, 1), is_whole(2.0, 1), is_whole(1.5, 1), is_whole(0, 1), is_whole(float("nan"), 1)
        (True, True, False, False, False)
    """
    return is_number(value) and bool(least <= value <= most) and int(value) == value


def is_list(values: Any) -> bool:
    """Whether it has an order of its own, and is no text.

    Example:
        >>> is_list([0.1]), is_list("0.1"), is_list(0.1)
        (True, False, False)
    """
    one = isinstance(values, (str, bytes, bytearray, Mapping)) or getattr(values, "ndim", None) == 0
    return isinstance(values, Iterable) and not one
