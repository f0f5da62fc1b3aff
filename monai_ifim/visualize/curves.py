# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Curves of each endpoint against the size of the change."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from monai_ifim.perturbation import ENDPOINTS, Endpoint
from monai_ifim.visualize.style import NEUTRAL, DirectionStyle, direction_styles, empty_axes, few_ticks

_PANELS_A_ROW = 3
# A curve this many decades below the greatest value is of no use to the eye, and would squeeze the others.
_DECADES = 10
# Within 10 % the quadratic prediction is said to hold; a ratio beyond the outer limits says no more than that it fails.
_RATIO_HOLDS = (0.9, 1.1)
_RATIO_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10)


def plot_curves(table: pd.DataFrame, title: str | None = None) -> Figure:
    """A figure of each endpoint against the strength of the change, one line a direction, with bands for the intervals.

    Titles and axes are those of :data:`monai_ifim.perturbation.ENDPOINTS`. The quadratic prediction of the KL
    divergence is dashed, and off the axis where it is zero, as outside the eigenspace. What the unperturbed images have
    too, such as accuracy, has their value as a dotted line.

    Args:
        table: of :func:`monai_ifim.statistics.curve_table`, with the columns ``direction, strength, endpoint, value,
            low, high, count``. It has a panel for each of its endpoints.
        title: of the figure.

    Raises:
        ValueError: When a column is missing.

    Example:
        >>> row = {"direction": "high", "endpoint": "kl", "count": 9}
        >>> table = pd.DataFrame([{**row, "strength": s, "value": s, "low": s, "high": 2 * s} for s in (0.01, 0.1)])
        >>> [axis.get_ylabel() for axis in plot_curves(table).axes if axis.lines]
        ['KL divergence (nats)']
    """
    figure = _plot(table, ("direction", "strength"), "strength: RMS of the change / contrast of the image", title)
    strengths = sorted(table.strength[table.direction != "unperturbed"].unique())
    for axis in figure.axes:
        if axis.lines:
            axis.set_xscale("log")
            axis.set_xticks(strengths, [f"{strength:g}" for strength in strengths])
            axis.set_xticks([], minor=True)
            axis.set_xlim(strengths[0] / 1.3, strengths[-1] * 1.3)
    return figure


def plot_removals(table: pd.DataFrame, title: str | None = None) -> Figure:
    """A figure of each endpoint against the removed fraction of the high and of the low component; not norm-matched.

    Args:
        table: of :func:`monai_ifim.statistics.removal_table`, with the columns ``component, fraction, endpoint, value,
            low, high, count``.
        title: of the figure; the default says that the changes differ in size.

    Raises:
        ValueError: When a column is missing.

    Example:
        >>> row = {"component": "high", "endpoint": "size", "low": 0.1, "high": 0.3, "count": 9}
        >>> table = pd.DataFrame([{**row, "fraction": t, "value": t / 5} for t in (0.0, 0.5, 1.0)])
        >>> plot_removals(table).axes[0].get_title()
        'Size of the change'
    """
    title = "Removal of a component. NOT norm-matched: the changes differ in size" if title is None else title
    figure = _plot(table, ("component", "fraction"), "removed fraction t of the component", title)
    for axis in figure.axes:
        if axis.lines:
            axis.set_xlim(0, 1.04)
    return figure


def plot_realistic(table: pd.DataFrame, title: str | None = None) -> Figure:
    """A figure of each endpoint against the severity of realistic changes, at their own size; not norm-matched.

    Args:
        table: of :func:`monai_ifim.statistics.realistic_table`, with the columns ``change, severity, endpoint, value,
            low, high, count``.
        title: of the figure; the default says that the changes differ in size.

    Raises:
        ValueError: When a column is missing.

    Example:
        >>> row = {"change": "blur", "endpoint": "share", "low": 0.1, "high": 0.3, "count": 9}
        >>> table = pd.DataFrame([{**row, "severity": t, "value": 0.2} for t in (1.0, 2.0)])
        >>> plot_realistic(table).axes[0].get_title()
        'Inside the leading eigenspace'
    """
    title = "Realistic changes. NOT norm-matched: they differ in size" if title is None else title
    return _plot(table, ("change", "severity"), "severity", title)


def _plot(table: pd.DataFrame, columns: tuple[str, str], x_label: str, title: str | None) -> Figure:
    """The figure of a table; ``columns`` are those of the directions and of the horizontal axis."""
    needed = [*columns, "endpoint", "value", "low", "high", "count"]
    if missing := [name for name in needed if name not in table]:
        raise ValueError(f"The table has no column {', '.join(missing)}; it needs {', '.join(needed)}.")
    table = table[needed].rename(columns=dict(zip(columns, ("direction", "x")))).sort_values("x")
    unperturbed, table = table[table.direction == "unperturbed"], table[table.direction != "unperturbed"]
    measured = set(table.endpoint[table.value.notna()])
    endpoints = [endpoint for endpoint in ENDPOINTS.values() if endpoint.title and endpoint.name in measured]
    if not endpoints:  # an evaluation without a usable image must not fail at its figures
        figure = Figure(figsize=(7, 2), layout="constrained")
        empty_axes(figure.subplots(), "no image was perturbed, so there is no curve")
        return figure
    styles = direction_styles(table.direction)
    numbers = table[["x", "value", "low", "high"]].to_numpy(float)
    places = table.groupby(["endpoint", "direction"]).indices
    curves = {place: numbers[rows].T for place, rows in places.items()}
    # the legend stands in the cells that no panel needs, or in a low row of its own
    rows, free = -(-len(endpoints) // _PANELS_A_ROW), -len(endpoints) % _PANELS_A_ROW
    heights = [2.35] * rows + [0.35] * (free == 0)
    above, below, between = 0.65 if title else 0.35, 0.58, 0.5
    height = sum(heights) + between * (len(heights) - 1) + above + below
    figure = Figure(figsize=(9, height))
    # fixed places: a layout engine takes longer than all the drawing
    room = {"left": 0.08, "right": 0.985, "bottom": below / height, "top": 1 - above / height}
    spaces = {"wspace": 0.29, "hspace": between * len(heights) / sum(heights)}
    grid = figure.add_gridspec(len(heights), _PANELS_A_ROW, height_ratios=heights, **room, **spaces)
    for index, endpoint in enumerate(endpoints):
        axis = figure.add_subplot(grid[divmod(index, _PANELS_A_ROW)])
        shown = table[table.endpoint == endpoint.name]
        before = unperturbed.value[unperturbed.endpoint == endpoint.name].dropna()
        # where the bands of directions that do nothing lie on each other they must not turn into a block
        alpha = 0.03 if len(before) else 0.12
        bands: list[tuple[np.ndarray, DirectionStyle]] = []
        for order, (name, style) in enumerate(styles.items()):
            if (curve := curves.get((endpoint.name, name))) is not None:
                bands += [(corners, style) for corners in _draw_direction(axis, curve, name, style, order)]
        fills, edges = ([to_rgba(style.colour, part) for _, style in bands] for part in (alpha, 0.5))
        # one for all bands, which takes a fifth of the time
        polygons = PolyCollection([corners for corners, _ in bands], facecolors=fills, edgecolors=edges, linewidths=0.6)
        axis.add_collection(polygons)
        for name in styles if endpoint.name == "kl" else ():
            if (predicted := curves.get(("kl_quadratic", name))) is not None:
                look: dict[str, Any] = {"label": f"{name}, predicted", "color": styles[name].colour, "linewidth": 1.3}
                axis.plot(*predicted[:2], "--", **look)
        for value in before:
            axis.axhline(value, label="unperturbed", color=NEUTRAL, linestyle=":", linewidth=1.8)
        _finish(axis, endpoint, shown, from_zero=not len(before))
    handles: list[Artist] = [
        Line2D([], [], color=style.colour, marker=style.marker, linewidth=2, label=name)
        for name, style in styles.items()
    ]
    if (table.endpoint == "kl_quadratic").any():
        handles.append(Line2D([], [], color=NEUTRAL, linestyle="--", label="quadratic prediction"))
    if len(unperturbed):
        handles.append(Line2D([], [], color=NEUTRAL, linestyle=":", linewidth=1.8, label="unperturbed"))
    handles.append(Patch(color=NEUTRAL, alpha=0.3, linewidth=0, label="95 % interval"))
    room_of_legend = grid[-1, -free or 0 :].get_position(figure).bounds
    looks: dict[str, Any] = {"ncols": 1 if free else 5, "fontsize": 10, "frameon": False}
    figure.legend(handles=handles, loc="center", bbox_to_anchor=room_of_legend, **looks)
    counts = table["count"][table.endpoint == endpoints[0].name]
    span = f"{counts.min():g}" if counts.nunique() == 1 else f"{counts.min():g} to {counts.max():g}"
    figure.supxlabel(f"{x_label}   (n = {span})", fontsize=10)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _draw_direction(axis: Axes, curve: np.ndarray, name: str, style: DirectionStyle, order: int) -> list[np.ndarray]:
    """Draw a curve (x, value, low and high); the later ones are thinner, so that an equal one under them still shows.

    Returns:
        The corners of its bands: one, but where intervals are missing.
    """
    x, values, low, high = curve
    if len(x) == 1:  # where a band has no width
        axis.vlines(x, low, high, color=style.colour, alpha=0.6, linewidth=2)
    (line,) = axis.plot(x, values, label=name, color=style.colour, marker=style.marker)
    line.set(linewidth=max(2.8 - 0.4 * order, 1.0), markersize=max(7.5 - 0.8 * order, 4.5))
    known = np.flatnonzero(np.isfinite(low) & np.isfinite(high))
    runs = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1) if len(known) else []
    return [np.column_stack([x[[*run, *run[::-1]]], [*low[run], *high[run[::-1]]]]) for run in runs]


def _finish(axis: Axes, endpoint: Endpoint, shown: pd.DataFrame, from_zero: bool) -> None:
    """Names, scales and limits of a panel; ``from_zero`` where no change is a zero of the endpoint."""
    axis.set_title(endpoint.title, fontsize=10.5, y=1)
    axis.set_ylabel(endpoint.axis, fontsize=9.5)
    # fixed, or all numbers beside the axes are measured for it, even where there is no label
    axis.yaxis.set_label_coords(-0.19, 0.5)
    axis.xaxis.set_label_coords(0.5, -0.1)
    axis.tick_params(labelsize=8.5)
    axis.grid(alpha=0.25)
    numbers = shown[["value", "low", "high"]].to_numpy(dtype=float)
    numbers = numbers[np.isfinite(numbers)]
    positive = numbers[numbers > 0]
    if not endpoint.log_axis and from_zero and (numbers < 0).any():
        axis.axhline(0, color=NEUTRAL, linewidth=0.8)
    elif not endpoint.log_axis and from_zero:
        axis.set_ylim(0, 1.08 * numbers.max(initial=0.0) or 1.0)
    if not endpoint.log_axis or len(positive) == 0:
        return
    axis.set_yscale("log", nonpositive="clip")
    least, greatest = float(positive.min()), float(positive.max())
    if endpoint.name == "kl_ratio":
        limits = float(np.clip(least / 1.1, 0.1, 0.5)), float(np.clip(greatest * 1.1, 2, 10))
        axis.axhspan(*_RATIO_HOLDS, color=NEUTRAL, alpha=0.18, linewidth=0)
        axis.axhline(1, color=NEUTRAL, linewidth=0.8)
        axis.set_yticks(_RATIO_TICKS, [f"{tick:g}" for tick in _RATIO_TICKS])
        axis.set_yticks([], minor=True)
    else:
        limits = max(least / 2, 2 * greatest / 10**_DECADES), 2 * greatest
    axis.set_ylim(*limits)
    if endpoint.name != "kl_ratio":
        few_ticks(axis)
    if outside := direction_styles(shown.direction[shown.value.notna() & ~shown.value.between(*limits)]):
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
        text = textwrap.fill(f"partly off this axis: {', '.join(outside)}", 38)
        axis.text(0.98, 0.03, text, transform=axis.transAxes, fontsize=8, color=NEUTRAL, ha="right", bbox=box)
