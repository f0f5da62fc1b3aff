# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Energy maps of leading eigenvectors, alone and over many images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, SubFigure

from monai_ifim.visualize.slices import PLANES, Panel, Place, draw_colour_bar, draw_contour, places_of

_COLOURS = "magma"
_OUTLINE = "#56B4E9"
_IN_A_ROW = 4
_LONGEST = 30  # of a title, which must not run into the next


def plot_maps(
    maps: Mapping[str, np.ndarray], shape: Sequence[int], outlined: Sequence[np.ndarray] = (), seen_through: bool = True
) -> Figure:
    """A figure of energy maps, by title: how many times the energy of an even spread each cell holds.

    All have one colour scale, by the square root, so that a weak second place shows. Of images of two axes each is
    drawn as arrays are, the first axis downwards; of volumes as slices through its peak and, where ``seen_through``, as
    means along each axis; of signals as a curve.

    Args:
        maps: (*cells) each, of sum 1.
        shape: of the images in pixels, for the true proportions.
        outlined: places (*cells), bool.
        seen_through: of volumes, whether means along each axis are drawn, too.

    Example:
        >>> figure = plot_maps({"mean": np.full((4, 4), 1 / 16)}, (40, 40))
        >>> figure.axes[0].get_title()
        'mean'
    """
    scaled = {title: values * values.size for title, values in maps.items()}
    greatest = max((float(np.nanmax(values)) for values in scaled.values()), default=1.0)
    axes = len(shape)
    spacing = np.asarray(shape) / next(iter(maps.values())).shape
    if axes == 1:
        return _curves(scaled)
    if axes == 2:
        columns = min(len(scaled), _IN_A_ROW)
        rows = ceil(len(scaled) / columns)
        height = float(np.clip(shape[0] / shape[1], 0.4, 2.0))
        figure = Figure(figsize=(2.7 * columns + 0.3, rows * (2.1 * height + 0.55)), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel in panels[len(scaled) :]:
            panel.set_axis_off()
        for panel, (title, values) in zip(panels, scaled.items()):
            [place] = places_of(values, spacing)
            _draw(panel, values, place, greatest, [place.of(cells) for cells in outlined])
            panel.set_title(_plain(title), fontsize=8)
        return figure
    if axes != 3:
        raise ValueError(f"Maps of one, two or three axes can be drawn, got {axes}.")
    figure = Figure(figsize=(9.0, len(scaled) * (4.6 if seen_through else 2.5)))
    parts = figure.subfigures(len(scaled), 1, squeeze=False)[:, 0]
    for part, (title, values) in zip(parts, scaled.items()):
        _volume(part, _plain(title), values, spacing, greatest, outlined, seen_through)
    return figure


def _volume(
    part: SubFigure,
    title: str,
    values: np.ndarray,
    spacing: np.ndarray,
    greatest: float,
    outlined: Sequence[np.ndarray],
    seen_through: bool,
) -> None:
    part.suptitle(title, fontsize=10, x=0.01, ha="left")
    rows = 2 if seen_through else 1
    panels = part.subplots(rows, 3, squeeze=False, gridspec_kw={"top": 0.86, "wspace": 0.35, "hspace": 0.3})
    for panel, place in zip(panels[0], places_of(values, spacing)):
        _draw(panel, values, place, greatest, [place.of(cells) for cells in outlined])
        panel.set_title(place.name.replace("\n", " ").replace("slice", "cells"), fontsize=8)
    if not seen_through:
        return
    means = [values.mean(axis=cut).T for cut, _, _ in PLANES.values()]
    most = max(float(mean.max()) for mean in means)
    for panel, mean, place, (plane, (cut, _, _)) in zip(panels[1], means, places_of(values, spacing), PLANES.items()):
        _panel(panel, mean, place, most)
        for cells in outlined:
            draw_contour(Panel.whole(panel), cells.any(axis=cut).T, _OUTLINE)
        panel.set_title(f"{plane}, mean over all cells behind", fontsize=8)


def _draw(panel: Axes, values: np.ndarray, place: Place, greatest: float, outlined: Sequence[np.ndarray]) -> None:
    _panel(panel, place.of(values), place, greatest)
    for cells in outlined:
        draw_contour(Panel.whole(panel), cells, _OUTLINE)


def _panel(panel: Axes, shown: np.ndarray, place: Place, greatest: float) -> None:
    picture = panel.imshow(
        shown,
        cmap=_COLOURS,
        norm=PowerNorm(0.5, 0, greatest),
        origin=place.origin,
        aspect=place.aspect,
        interpolation="nearest",
    )
    panel.set_xticks([])
    panel.set_yticks([])
    draw_colour_bar(Panel.whole(panel), picture)


def _curves(scaled: Mapping[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(9.0, 3.0), layout="constrained")
    panel = figure.subplots()
    for title, values in scaled.items():
        panel.step((np.arange(len(values)) + 0.5) / len(values), values, where="mid", label=_plain(title))
    panel.set_xlabel("place along the signal")
    panel.set_ylabel("times an even spread")
    panel.set_title(next(iter(scaled)) if len(scaled) == 1 else "", fontsize=9)
    panel.legend(fontsize=8)
    return figure


def _plain(title: str) -> str:
    title = title if len(title) <= _LONGEST else f"{title[: _LONGEST // 2]}…{title[-_LONGEST // 2 :]}"
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in title).replace(
        "$", r"\$"
    )
