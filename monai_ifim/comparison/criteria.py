# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What two models are judged by: criteria that are stated beforehand, in a YAML or JSON file."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_ifim.checks import is_number
from monai_ifim.files import SUFFIXES, load
from monai_ifim.statistics import COMPARED, Statistic, compared_endpoint

_DEFAULTS = Path(__file__).with_name("criteria.yaml")
_STATISTICS = ("mean", "median")
_FAILING = ("worse", "undecided")
_MOST = 100
# Has neither a direction nor a strength.
_SPECTRUM = "log10_lambda_max"


@dataclass(frozen=True)
class Criterion:
    """One question to two models.

    Attributes:
        name: of the criterion.
        endpoint: what is compared; one of :data:`monai_ifim.statistics.COMPARED`, or one of its classes.
        direction: of the change; ``"unperturbed"`` for none, ``""`` for the spectrum.
        strength: of the change; None for the reference strength.
        statistic: over the set, ``"mean"`` or ``"median"``.
        margin: differences of less do not matter; above 0, in the unit of the endpoint.
        fails_on: the verdicts that fail.
    """

    name: str
    endpoint: str
    direction: str
    strength: float | None
    statistic: Statistic
    margin: float
    fails_on: tuple[str, ...]


def read_criteria(file: str | Path | None = None) -> list[Criterion]:
    """The criteria of a file; those of the package where none is given.

    Raises:
        ValueError: When the file cannot be read, or is no list of criteria, naming every mistake.

    Example:
        >>> [criterion.name for criterion in read_criteria()][:2]
        ['accuracy', 'accuracy after the change']
    """
    file = _DEFAULTS if file is None else Path(file)
    if file.suffix not in SUFFIXES:
        raise ValueError(f"Criteria are in a file whose name ends in {' or '.join(SUFFIXES)}, got {file}.")
    try:
        content = load(file)
    except ValueError as error:
        raise ValueError(f"{file} has no criteria: {error}.") from error
    if not isinstance(content, list) or not 0 < len(content) <= _MOST:
        raise ValueError(f"{file} must hold a list of 1 to {_MOST} criteria, each with endpoint, direction and margin.")
    mistakes, criteria = [], []
    for number, item in enumerate(content, 1):
        found = list(_mistakes(item))
        mistakes += [f"criterion {number}: {mistake}" for mistake in found]
        if not found:
            criteria.append(_criterion(item))
    names = [criterion.name for criterion in criteria]
    mistakes += [
        f"{names.count(name)} criteria are called {name!r}" for name in dict.fromkeys(names) if names.count(name) > 1
    ]
    if mistakes:
        raise ValueError(f"{file} cannot be used:\n- " + "\n- ".join(mistakes))
    return criteria


def _criterion(item: dict[str, Any]) -> Criterion:
    """From what has no mistakes."""
    point, fails_on = compared_endpoint(item["endpoint"]), item.get("fails_on", ["worse"])
    strength = item.get("strength")
    place = [item["endpoint"], item.get("direction", ""), "" if strength is None else f"{strength:g}"]
    return Criterion(
        name=item.get("name", " ".join(filter(None, place))),
        endpoint=item["endpoint"],
        direction=item.get("direction", ""),
        strength=None if strength is None else float(strength),
        statistic=item.get("statistic", point.statistic if point is not None else "mean"),
        margin=float(item["margin"]),
        fails_on=(fails_on,) if isinstance(fails_on, str) else tuple(fails_on),
    )


def _mistakes(item: Any) -> Iterator[str]:
    """Every mistake of one criterion, in words."""
    if not isinstance(item, dict):
        yield f"it must be a list of keys and values, got {reprlib.repr(item)}"
        return
    for key in item:
        if key not in Criterion.__dataclass_fields__:
            yield f"{reprlib.repr(key)} is unknown; the keys are {', '.join(Criterion.__dataclass_fields__)}"
    for key in ("endpoint", "margin"):
        if key not in item:
            yield f"it lacks {key}"
    for key, (words, holds) in _KINDS.items():
        if key in item and not holds(item[key]):
            yield f"{key} must be {words}, got {reprlib.repr(item[key])}"
    if _is_endpoint(item.get("endpoint")):
        yield from _mismatches(item)


def _mismatches(item: dict[str, Any]) -> Iterator[str]:
    """Values that do not go together."""
    endpoint, direction = item["endpoint"], item.get("direction")
    point = compared_endpoint(endpoint)
    if endpoint == _SPECTRUM and direction is not None:
        yield f"{endpoint} has no direction"
    if endpoint != _SPECTRUM and direction is None:
        yield "it lacks direction, such as high, or unperturbed for the images as they are"
    if item.get("strength") is not None and (endpoint == _SPECTRUM or direction == "unperturbed"):
        yield "it has a strength, and nothing is changed"
    if direction == "unperturbed" and point is not None and not point.unperturbed:
        yield f"{endpoint} is measured of a change only, not of unperturbed images"
    if point is not None and point.counted and item.get("statistic") == "median":
        yield f"the median of {endpoint} is that of single decisions, and says nothing: use the mean"


def _is_endpoint(value: Any) -> bool:
    point = compared_endpoint(value) if isinstance(value, str) else None
    return point is not None and bool(point.worse)


def _is_positive(value: Any) -> bool:
    return is_number(value) and 0 < value < math.inf


_NUMBER = "a number above 0 (with a point, as in 0.05 or 1.0e-3: YAML takes 1e-3 for text)"
# By key: what its value must be, in words, and whether one is.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a text", lambda value: isinstance(value, str) and 0 < len(value) <= 200),
    "endpoint": (
        f"one of {', '.join(name for name, point in COMPARED.items() if point.worse)}",
        _is_endpoint,
    ),
    "direction": ("a text", lambda value: isinstance(value, str) and value != ""),
    "strength": (_NUMBER, lambda value: value is None or _is_positive(value)),
    "statistic": (" or ".join(_STATISTICS), lambda value: value in _STATISTICS),
    "margin": (_NUMBER, _is_positive),
    "fails_on": (
        f"a list of {' and '.join(_FAILING)}",
        lambda value: value in _FAILING or (isinstance(value, list) and all(one in _FAILING for one in value)),
    ),
}
