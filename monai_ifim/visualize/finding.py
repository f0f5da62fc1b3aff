# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What was found, in one sentence: what a change along the images' own patterns does, and along those of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from monai_ifim.results import ResultTables
from monai_ifim.visualize.wording import as_number, as_percent, is_segmented

# An endpoint, and what a change does by it, before and behind the number; behind that of another image's pattern.
_EFFECTS = {
    "changed": ("changes the class of", " of the voxels", "of"),
    "flip_rate": ("flips", " of the decisions, a mean over its two signs", ""),
    "shift": ("moves the outputs by", ", in their own units", "by"),
    "kl": ("moves the prediction by", " nats of KL divergence", "by"),
}

# What three decimals do not show.
_SMALL_DICE = 0.001


class _Numbers(NamedTuple):
    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return bool(np.isfinite([self.low, self.high]).all()) and self.low != self.high

    def interval(self, shown: Callable[[float], str]) -> str:
        """Behind a blank and in brackets; empty where there is none."""
        return f" (95 % interval: {shown(self.low)} to {shown(self.high)})" if self.known else ""

    def drop(self) -> str:
        """Of Dice, in brackets, with its interval where there is one."""
        if self.known and max(map(abs, self)) < _SMALL_DICE:
            return f"(mean drop and its 95 % interval: less than {_SMALL_DICE} in size)"
        between = f"; 95 % interval: {_as_dice(self.low)} to {_as_dice(self.high)}" if self.known else ""
        return f"(mean drop {_as_dice(self.value)}{between})"


def finding(tables: ResultTables) -> str:
    """The first sentence of the report, at the reference strength, by the endpoint that says most to a reader.

    Of segmentations that is Dice where there are labels, else the voxels that change; of classifiers the decisions, of
    regression the outputs. Intervals of Dice are those of its drop, in pairs, since cases differ more than changes do.
    """
    thing, another = ("image", "another image's")
    if is_segmented(tables.curves):
        thing, another = ("case", "another case's")
    size = as_percent(tables.strength)
    start = f"A change of {size} of the contrast along the most sensitive pattern of each {thing}"
    found = _dice(tables) or _effect(tables)
    if found is None:
        return f"{start} was not measured."
    first, other = found
    end = f"along {another} pattern {other}" if other else f"{another} pattern was not tried"
    return f"{start} {first}; {end}."


def _dice(tables: ResultTables) -> tuple[str, str] | None:
    """What becomes of Dice along the own pattern, and along another one; None where it was not measured."""
    after, drop = _numbers(tables, "high", "dice"), _numbers(tables, "high", "dice_drop")
    if after is None or drop is None:
        return None
    verb = "lowers Dice" if drop.low > 0 else "raises Dice" if drop.high < 0 else "does not clearly change Dice,"
    if not drop.known:
        verb = "changes Dice"
    before, same = _as_dice(after.value + drop.value), _as_dice(after.value)
    if before == same:  # as far as it is shown
        verb = {"lowers Dice": "hardly lowers Dice,", "raises Dice": "hardly raises Dice,"}.get(verb, verb)
        verb = "hardly changes Dice," if not drop.known else verb
        first = f"{verb} which stays at {same} {drop.drop()}"
    else:
        first = f"{verb} from {before} to {same} {drop.drop()}"
    after, drop = _numbers(tables, "transfer", "dice"), _numbers(tables, "transfer", "dice_drop")
    if after is None or drop is None:
        return first, ""
    return first, f"it is {_as_dice(after.value)} {drop.drop()}"


def _effect(tables: ResultTables) -> tuple[str, str] | None:
    """The size of the effect along the own pattern, and along another one; None where none was measured."""
    for endpoint, (before, behind, again) in _EFFECTS.items():
        own, other = (_numbers(tables, direction, endpoint) for direction in ("high", "transfer"))
        if own is None:
            continue
        percent = endpoint in ("changed", "flip_rate")
        shown = as_percent if percent else as_number
        first = f"{before} {shown(own.value)}{behind}{own.interval(shown)}"
        if other is None:
            return first, ""
        return first, f"{again} {shown(other.value)}{other.interval(shown)}".strip()
    return None


def _as_dice(value: float) -> str:
    """Three decimals, as differences of Dice are read; of what these do not show, the first digit that is not zero."""
    if 1e-6 <= abs(value) < _SMALL_DICE / 2:
        return np.format_float_positional(float(f"{value:.1g}"), trim="-").replace("-", "\N{MINUS SIGN}")
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "\N{MINUS SIGN}")  # + 0.0: zero has no sign


def _numbers(tables: ResultTables, direction: str, endpoint: str) -> _Numbers | None:
    """An endpoint of a direction at the reference strength; None where it was not measured."""
    rows = tables.curves[(tables.curves.direction == direction) & (tables.curves.endpoint == endpoint)]
    rows = rows[np.isclose(rows.strength, tables.strength, atol=0) & rows.value.notna()]
    return None if rows.empty else _Numbers(*rows.iloc[0][["value", "low", "high"]].astype(float))
