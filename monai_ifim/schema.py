# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What values read from JSON must be: checked once, so that whoever uses them need not doubt them.

A schema is one of the kinds below; a list of one schema, for a list of any length; a dictionary of schemas by key, of
which those that end with ``?`` may be missing (others than these are not looked at); or the kind :class:`Each`.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_DEEPEST = 20


@dataclass(frozen=True)
class Kind:
    """A kind of value: what it is, in words, and whether a value is one."""

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Each:
    """A dictionary of any keys, with values of one schema."""

    schema: Any


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_finite(value: Any) -> bool:
    # abs first: greater integers cannot become a float
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_shallow(value: Any, depth: int = 0) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    known = not isinstance(value, (int, float)) or isinstance(value, bool) or _is_finite(value)
    return depth <= _DEEPEST and known and all(_is_shallow(item, depth + 1) for item in inner)


TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
WHOLE = Kind("a whole number from 0", _is_whole)
WHOLE_OR_NONE = Kind("a whole number from 0, or null", lambda value: value is None or _is_whole(value))
FINITE = Kind("a finite number, or null", lambda value: value is None or _is_finite(value))
NUMBER = Kind('a number, "inf", "-inf" or null', lambda value: FINITE.holds(value) or value in ("inf", "-inf"))
AMOUNT = Kind("a finite number from 0", lambda value: _is_finite(value) and value >= 0)
POSITIVE = Kind("a number above 0", lambda value: _is_finite(value) and value > 0)
ANYTHING = Kind(f"text, finite numbers and lists and objects of such, {_DEEPEST} levels deep at most", _is_shallow)
RANGE = Kind(
    "null, or two numbers",
    lambda value: value is None or (isinstance(value, list) and len(value) == 2 and all(map(NUMBER.holds, value))),
)


def check(value: Any, schema: Any, place: str = "it") -> None:
    """Refuse a value that is not what a schema says.

    Args:
        value: as read from JSON.
        schema: see above.
        place: what the value is called.

    Raises:
        ValueError: When it is not, naming the first place.

    Example:
        >>> check({"used": -1}, {"used": WHOLE}, "images")
        Traceback (most recent call last):
        ...
        ValueError: images.used must be a whole number from 0, got -1
    """
    if isinstance(schema, Kind):
        if not schema.holds(value):
            raise ValueError(f"{place} must be {schema.words}, got {_shown(value)}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise ValueError(f"{place} must be a list, got {_shown(value)}")
        for number, item in enumerate(value):
            check(item, schema[0], f"{place}[{number}]")
    elif not isinstance(value, dict):
        raise ValueError(f"{place} must be an object with keys and values, got {_shown(value)}")
    elif isinstance(schema, Each):
        for key, item in value.items():
            check(item, schema.schema, f"{place}[{_shown(key)}]")
    else:
        for key, part in schema.items():
            name = key.removesuffix("?")
            if name in value:
                check(value[name], part, name if place == "it" else f"{place}.{name}")
            elif name == key:
                raise ValueError(f"{place} lacks {name}")


def _shown(value: Any) -> str:
    text = reprlib.repr(value)
    return "infinity" if text == "inf" else text if len(text) < 80 else f"{text[:77]}..."
