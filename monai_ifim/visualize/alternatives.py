# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What is seen in a picture, for those who do not see it: the numbers that it shows, in a sentence or two."""

from __future__ import annotations

from typing import Any

import pandas as pd

from monai_ifim.perturbation import ENDPOINTS
from monai_ifim.statistics import compared_endpoint
from monai_ifim.visualize.wording import as_interval, as_number, as_percent

# Of the endpoints of a figure the first two of these that were measured; tables have the others.
_TOLD = ("kl", "flip_rate", "changed", "shift", "size")


def curves_text(table: pd.DataFrame, line: str = "direction", x: str = "strength") -> str:
    """Of curves: two endpoints of each line, at each place.

    Args:
        table: with the columns ``line`` and ``x``, ``endpoint`` and ``value``.
        line: what one line is of.
        x: along the horizontal axis.

    Example:
        >>> rows = [("high", 0.01, "kl", 0.1), ("high", 0.1, "kl", 0.4)]
        >>> curves_text(pd.DataFrame(rows, columns=["direction", "strength", "endpoint", "value"]))
        'Curves against the strength, one line a direction. KL divergence (nats) at 0.01, 0.1: high 0.1, 0.4.'
    """
    parts = [f"Curves against the {x}, one line a {line}."]
    for name in [name for name in _TOLD if name in set(table.endpoint)][:2]:
        point, rows = ENDPOINTS[name], table[table.endpoint == name].sort_values(x)
        shown = as_percent if point.percent else as_number
        lines = [f"{each} {', '.join(map(shown, part.value))}" for each, part in rows.groupby(line, sort=False)]
        places = ", ".join(map(as_number, sorted(set(rows[x]))))
        parts.append(f"{point.axis[:1].upper()}{point.axis[1:]} at {places}: {'; '.join(lines)}.")
    return " ".join(parts)


def spectrum_text(images: pd.DataFrame) -> str:
    """Of the eigenvalues of all images.

    Example:
        >>> spectrum_text(pd.DataFrame({"lambda_max": [1.0, 2.0, 4.0]}))
        'Eigenvalues of 3 images on a logarithmic scale. The greatest of each lie between 1 and 4, median 2.'
    """
    low, middle, high = (as_number(images.lambda_max.quantile(share)) for share in (0, 0.5, 1))
    start = f"Eigenvalues of {len(images)} images on a logarithmic scale."
    return f"{start} The greatest of each lie between {low} and {high}, median {middle}."


def histogram_text(images: pd.DataFrame) -> str:
    """Of the histogram of the greatest eigenvalue.

    Example:
        >>> histogram_text(pd.DataFrame({"lambda_max": [1.0, 2.0, 4.0], "correct": [1.0, 1.0, 0.0]}))
        'Histogram of the greatest eigenvalue of 3 images. Medians: right predictions 1.5; wrong predictions 4.'
    """
    start = f"Histogram of the greatest eigenvalue of {len(images)} images."
    kinds = {"right": images[images.correct == 1], "wrong": images[images.correct == 0]} if "correct" in images else {}
    medians = [f"{kind} predictions {as_number(rows.lambda_max.median())}" for kind, rows in kinds.items() if len(rows)]
    return f"{start} Medians: {'; '.join(medians)}." if medians else f"{start} {spectrum_text(images).split('. ')[1]}"


def verdicts_text(criteria: pd.DataFrame) -> str:
    """Of the verdicts of a comparison: each difference with its interval, and its margin.

    Example:
        >>> row = {"name": "Dice", "endpoint": "dice", "difference": -0.04, "low": -0.05, "high": -0.03, "margin": 0.02}
        >>> verdicts_text(pd.DataFrame([row | {"verdict": "worse"}]))
        'Differences in units of their margins. Dice: worse, −0.04 (−0.05 to −0.03), margin 0.02.'
    """
    rows = [
        f"{row['name']}: {row['verdict']}, {_difference(row)}, margin {as_number(row['margin'])}"
        for row in criteria.to_dict("records")
    ]
    return f"Differences in units of their margins. {'; '.join(rows)}."


def differences_text(table: pd.DataFrame) -> str:
    """Of the differences of two models: those along high at the greatest strength.

    Example:
        >>> row = {"endpoint": "kl", "direction": "high", "strength": 0.1, "difference": 1.0, "low": 0.5, "high": 1.5}
        >>> differences_text(pd.DataFrame([row])).partition(". ")[2]
        'Along high at 0.1: Change of the prediction 1 (0.5 to 1.5).'
    """
    start = "Differences against the strength, one line a direction."
    rows = table[(table.direction == "high") & table.difference.notna()]
    if rows.empty:
        return f"{start} None was measured along high."
    greatest = rows.strength.max()
    told = [
        f"{point.title} {_difference(row)}"
        for row in rows[rows.strength == greatest].to_dict("records")
        if (point := compared_endpoint(row["endpoint"])) is not None
    ]
    return f"{start} Along high at {as_number(greatest)}: {'; '.join(told)}."


def _difference(row: dict[Any, Any]) -> str:
    point = compared_endpoint(row["endpoint"])
    return as_interval(row["difference"], row["low"], row["high"], percent=point is not None and point.percent)
