# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Differences of two models: the verdicts, in units of their margins, and every endpoint against the strength."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from monai_ifim.statistics import COMPARED, compared_endpoint
from monai_ifim.visualize.style import NEUTRAL, direction_styles, empty_axes

_PANELS_A_ROW = 3
_VERDICT_COLOURS = {"worse": "#D55E00", "undecided": "#777777", "equivalent": "#0072B2", "better": "#009E73"}
# In margins; an interval that goes on beyond is cut.
_FARTHEST = 6.0


def plot_verdicts(criteria: pd.DataFrame) -> Figure:
    """A figure with a line a criterion: its difference and interval in units of the margin, worse to the right.

    Args:
        criteria: of :func:`monai_ifim.statistics.judge`, with a further column ``name``.

    Example:
        >>> row = {"name": "Dice", "endpoint": "dice", "difference": -0.04, "low": -0.05, "high": -0.03, "margin": 0.02}
        >>> [axis] = plot_verdicts(pd.DataFrame([row | {"verdict": "worse"}])).axes
        >>> axis.get_yticklabels()[0].get_text(), [round(float(x), 2) for x in axis.lines[-1].get_xdata()]
        ('Dice', [2.0])
    """
    figure = Figure(figsize=(9, 1.5 + 0.42 * len(criteria)), layout="constrained")
    axis = figure.subplots()
    axis.axvspan(-1, 1, color=NEUTRAL, alpha=0.13, linewidth=0)
    axis.axvline(0, color=NEUTRAL, linewidth=0.8)
    points = criteria.endpoint.map(compared_endpoint)
    worse = np.array([-1 if point is not None and point.worse == "smaller" else 1 for point in points])
    numbers = (
        criteria[["low", "difference", "high"]].to_numpy(dtype=float) * (worse / criteria.margin.to_numpy())[:, None]
    )
    finite = np.abs(numbers[np.isfinite(numbers)])
    reach = float(np.clip(1.1 * finite.max(initial=0), 1.6, _FARTHEST))
    for place, (row, verdict) in enumerate(zip(numbers, criteria.verdict)):
        colour = _VERDICT_COLOURS[verdict]
        low, high = np.sort(row[[0, 2]])
        axis.hlines(place, max(low, -reach), min(high, reach), color=colour, linewidth=2.5)
        for end in (low, high):
            if abs(end) > reach:
                axis.plot([np.sign(end) * reach], [place], ">" if end > 0 else "<", color=colour, clip_on=False)
        if abs(row[1]) <= reach:  # else the arrow stands for it
            axis.plot(row[1:2], [place], "o", color=colour, markersize=8)
    names = [textwrap.shorten(str(name), 48) for name in criteria.name]
    axis.set_yticks(range(len(criteria)), names, fontsize=10)
    axis.set_ylim(len(criteria) - 0.4, -0.6)
    axis.set_xlim(-reach, reach)
    axis.set_xlabel(
        "difference in units of the margin, counted towards the worse (grey: inside it);  ← better    worse →"
    )
    handles = [
        Line2D([], [], color=colour, marker="o", linewidth=2.5, label=verdict)
        for verdict, colour in _VERDICT_COLOURS.items()
        if verdict in set(criteria.verdict)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return figure


def plot_differences(table: pd.DataFrame) -> Figure:
    """A figure with a panel an endpoint: the difference of two models against the strength, one line a direction.

    Args:
        table: of :func:`monai_ifim.statistics.compare_models`.

    Example:
        >>> row = {"endpoint": "kl", "direction": "high", "strength": 0.1, "difference": 1.0, "low": 0.5, "high": 1.5}
        >>> [axis.get_title() for axis in plot_differences(pd.DataFrame([row])).axes if axis.lines]
        ['Change of the prediction']
    """
    table = table[(table.strength > 0) & table.difference.notna()]
    points = [point for name, point in COMPARED.items() if name in set(table.endpoint)]
    if not points:
        figure = Figure(figsize=(7, 2), layout="constrained")
        empty_axes(figure.subplots(), "no direction and strength is in both runs")
        return figure
    styles, strengths = direction_styles(table.direction), sorted(table.strength.unique())
    rows = -(-(len(points) + 1) // _PANELS_A_ROW)
    figure = Figure(figsize=(9, 2.7 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, _PANELS_A_ROW, squeeze=False).ravel()
    step = 1.04  # directions stand beside each other, so that their intervals can be told apart
    for axis, point in zip(axes, points):
        shown = table[table.endpoint == point.name]
        axis.axhline(0, color=NEUTRAL, linewidth=0.8)
        for order, (name, style) in enumerate(styles.items()):
            part = shown[shown.direction == name].sort_values("strength")
            x = part.strength.to_numpy() * step ** (order - (len(styles) - 1) / 2)
            axis.vlines(x, part.low, part.high, color=style.colour, linewidth=1.6)
            axis.plot(x, part.difference, color=style.colour, marker=style.marker, markersize=5, linewidth=0.8)
        axis.set_title(point.title, fontsize=10.5)
        axis.set_ylabel(textwrap.fill(f"difference of {point.axis}", 34), fontsize=9)
        axis.tick_params(labelsize=8.5)
        axis.grid(alpha=0.25)
        axis.set_xscale("log")
        axis.set_xticks(strengths, [f"{strength:g}" for strength in strengths])
        axis.set_xticks([], minor=True)
        axis.set_xlim(strengths[0] / 1.4, strengths[-1] * 1.4)
    for axis in axes[len(points) :]:
        axis.set_axis_off()
    handles = [Line2D([], [], color=style.colour, marker=style.marker, label=name) for name, style in styles.items()]
    axes[len(points)].legend(handles=handles, loc="center", fontsize=10, frameon=False)
    figure.supxlabel("strength: RMS of the change / contrast of the image", fontsize=10)
    return figure
