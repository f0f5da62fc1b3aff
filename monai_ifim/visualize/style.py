# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Colours and markers that mean the same in every figure."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from monai_ifim.visualize.wording import as_power_of_ten

# Where no direction is meant: reference lines, and what all directions have in common.
NEUTRAL = "0.35"


class DirectionStyle(NamedTuple):
    """How a direction is drawn: its colour in hexadecimal RGB, which web pages read too, and its matplotlib marker."""

    colour: str
    marker: str


# The palette of M. Okabe, K. Ito, "Color Universal Design" (2008), without its yellow, which is faint on white. Markers
# differ too, so that no reader depends on colour.
_KNOWN = {
    "high": DirectionStyle("#D55E00", "o"),
    "transfer": DirectionStyle("#CC79A7", "D"),
    "low_matched": DirectionStyle("#0072B2", "s"),
    "low": DirectionStyle("#56B4E9", "v"),
    "random": DirectionStyle("#009E73", "^"),
    "high_image": DirectionStyle("#E69F00", "P"),
    "low_image": DirectionStyle("#000000", "X"),
}
# For directions of the user's own.
_SPARE = (
    DirectionStyle("#882255", "*"),
    DirectionStyle("#999933", "p"),
    DirectionStyle("#332288", "h"),
    DirectionStyle("#777777", "<"),
    DirectionStyle("#117733", "d"),
    DirectionStyle("#AA4499", ">"),
    DirectionStyle("#44AA99", "H"),
)


def direction_styles(directions: Iterable[str]) -> dict[str, DirectionStyle]:
    """The style of each direction, in the order in which directions are listed everywhere.

    The directions of the package have fixed styles; other directions get the spare ones in alphabetical order, so that
    they look the same in all figures of one set of directions.

    Example:
        >>> list(direction_styles(["random", "motion", "high"]))
        ['high', 'random', 'motion']
        >>> direction_styles(["high"])["high"].colour
        '#D55E00'
    """
    given = set(directions)
    known = {name: style for name, style in _KNOWN.items() if name in given}
    return known | dict(zip(sorted(given - set(known)), cycle(_SPARE)))


def empty_axes(axis: Axes, text: str) -> None:
    """Say why there is nothing to see."""
    axis.set_axis_off()
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", fontsize=11, color=NEUTRAL)


def few_ticks(axis: Axes) -> None:
    """Ticks of a vertical logarithmic axis, whose limits are set: at powers of ten alone wherever these are enough.

    The ticks between them, and formulas for the numbers, take longer to draw than the curves.
    """
    low, high = axis.get_ylim()
    if high > 100 * low:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: as_power_of_ten(value)))
    else:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 4 * low else MaxNLocator(6))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.yaxis.set_minor_locator(NullLocator())
