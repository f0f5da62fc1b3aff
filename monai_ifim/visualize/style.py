# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Colours and markers that mean the same in every figure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from matplotlib.axes import Axes

__all__ = ["NEUTRAL", "ArmStyle", "arm_styles", "empty_axes"]

# Where no arm is meant: reference lines, and what all arms have in common.
NEUTRAL = "0.35"


class ArmStyle(NamedTuple):
    """How an arm is drawn.

    Attributes:
        colour: hexadecimal RGB, which web pages read too.
        marker: a marker of matplotlib.
    """

    colour: str
    marker: str


# The palette of M. Okabe, K. Ito, "Color Universal Design" (2008), without its yellow, which is faint on white. Markers
# differ too, so that no reader depends on colour.
_KNOWN = {
    "high": ArmStyle("#D55E00", "o"),
    "transfer": ArmStyle("#CC79A7", "D"),
    "low_matched": ArmStyle("#0072B2", "s"),
    "low": ArmStyle("#56B4E9", "v"),
    "random": ArmStyle("#009E73", "^"),
    "high_image": ArmStyle("#E69F00", "P"),
    "low_image": ArmStyle("#000000", "X"),
}
# For arms of the user's own.
_SPARE = (ArmStyle("#882255", "*"), ArmStyle("#999933", "p"), ArmStyle("#332288", "h"), ArmStyle("#777777", "<"))


def arm_styles(arms: Iterable[str]) -> dict[str, ArmStyle]:
    """The style of each arm, in the order in which arms are listed everywhere.

    The arms of the package have fixed styles; other arms get the spare ones in alphabetical order, so that they look
    the same in all figures of one set of arms.

    Example:
        >>> list(arm_styles(["random", "motion", "high"]))
        ['high', 'random', 'motion']
        >>> arm_styles(["high"])["high"].colour
        '#D55E00'
    """
    given = set(arms)
    styles = {arm: style for arm, style in _KNOWN.items() if arm in given}
    for index, arm in enumerate(sorted(given - set(_KNOWN))):
        styles[arm] = _SPARE[index % len(_SPARE)]
    return styles


def empty_axes(axis: Axes, text: str) -> None:
    """Say why there is nothing to see."""
    axis.set_axis_off()
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", fontsize=11, color=NEUTRAL)
