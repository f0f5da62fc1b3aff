# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Slices of images, and what is drawn on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, ListedColormap, Normalize, to_rgb
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from matplotlib.transforms import Affine2D, Transform

# Of volumes: the axis that is cut, the one that is drawn to the right, and the one that is drawn upwards.
PLANES = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}
# Outlines of what was predicted before a change.
BEFORE: Any = (0, (2.5, 1.8))
# One a class, from the second on again; they stand out from grey, and from the colours of the eigenvector.
_CLASSES = ("#F0E442", "#00D2A0", "#FF9DE2", "#7FDBFF", "#FFB000", "#C8FF5A")

# Slices of fewer voxels have outlines along the edges of these.
_FINE = 256

# Voxels whose predicted class changes.
CHANGED = "#FF2D95"


def _signed_over_an_image() -> ListedColormap:
    """Blue and red, the more opaque the greater the magnitude, so that the image shows where there is little."""
    size = np.linspace(-1, 1, 255)
    colours = np.where(size[:, None] < 0, (0.25, 0.55, 1.0), (1.0, 0.25, 0.2))
    return ListedColormap(np.column_stack([colours, np.abs(size) ** 0.75]), "signed_over_an_image")


SIGNED = _signed_over_an_image()


@dataclass(frozen=True)
class Place:
    """A slice through an image.

    Attributes:
        cut: the axis; -1 of images of two axes.
        index: on it.
        aspect: a voxel's height over its width.
        name: of the slice.
        origin: where the first row is drawn.
    """

    cut: int
    index: int
    aspect: float
    name: str
    origin: Literal["upper", "lower"]

    def of(self, values: np.ndarray) -> np.ndarray:
        """The slice (up, right) of values (*spatial); images of two axes as they are."""
        return values if self.cut < 0 else values.take(self.index, axis=self.cut).T


def places_of(leading: np.ndarray, spacing: np.ndarray) -> list[Place]:
    """The slices to draw: through the peak of the leading eigenvector (*spatial), or the middle where it is zero."""
    if leading.ndim == 2:
        return [Place(-1, 0, spacing[0] / spacing[1], "", "upper")]
    magnitude = np.nan_to_num(np.abs(leading))
    there = bool(magnitude.any())
    peak = np.unravel_index(magnitude.argmax(), leading.shape) if there else [side // 2 for side in leading.shape]
    places = []
    for plane, (cut, right, up) in PLANES.items():
        name = f"{plane}\nslice {peak[cut] + 1} of {leading.shape[cut]}" + (",\nthrough the peak" if there else "")
        places.append(Place(cut, int(peak[cut]), spacing[up] / spacing[right], name, "lower"))
    return places


def colour_limits(slices: Sequence[np.ndarray], signed: bool) -> tuple[float, float]:
    """One scale for all slices: symmetric where the sign matters."""
    values = np.concatenate([part.ravel() for part in slices])
    values = values[np.isfinite(values)]
    if signed or len(values) == 0:
        greatest = float(np.abs(values).max(initial=0.0)) or 1.0
        return -greatest if signed else 0.0, greatest
    return float(values.min()), float(values.max())


@dataclass(frozen=True)
class Panel:
    """Where a slice is drawn. Several may share axes, which take longer to make and to draw than all that is in them.

    Attributes:
        axes: that hold what is drawn.
        voxels: from (right, up) of the slice, in voxels, to the figure.
        frame: from the unit square to the figure; the slice fills it.
    """

    axes: Axes
    voxels: Transform
    frame: Transform

    @classmethod
    def within(cls, axes: Axes, room: tuple[float, float, float, float], shape: Sequence[int], place: Place) -> Panel:
        """A slice of a shape (up, right) in its true proportions, in the middle of a room.

        Args:
            axes: in whose data coordinates, of equal scales, the room is.
            room: left, bottom, width and height.
            shape: (up, right) of the slice.
            place: of the slice.

        Example:
            >>> from matplotlib.figure import Figure
            >>> place = places_of(np.ones((4, 8)), np.array([1.0, 1.0]))[0]
            >>> panel = Panel.within(Figure().add_axes((0, 0, 1, 1), xlim=(0, 9)), (1, 0, 6, 5), (4, 8), place)
            >>> (panel.voxels - panel.axes.transData).transform([(-0.5, -0.5), (7.5, 3.5)]).tolist()
            [[1.0, 4.0], [7.0, 1.0]]
        """
        left, bottom, width, height = room
        rows, columns = shape[:2]
        side = min(width / columns, height / (rows * place.aspect))  # of a voxel, to the right
        size = np.array([columns * side, rows * place.aspect * side])
        corner = np.array([left, bottom]) + (np.array([width, height]) - size) / 2
        frame = Affine2D().scale(*size).translate(*corner) + axes.transData
        voxels = Affine2D().translate(0.5, 0.5).scale(1 / columns, 1 / rows)
        if place.origin == "upper":
            voxels.scale(1, -1).translate(0, 1)
        return cls(axes, voxels + frame, frame)

    @classmethod
    def whole(cls, axes: Axes) -> Panel:
        """Axes that were made for one slice."""
        return cls(axes, axes.transData, axes.transAxes)


def draw_slice(
    panel: Panel,
    shown: np.ndarray,
    limits: tuple[float, float],
    colours: str | Colormap,
    place: Place,
) -> AxesImage:
    """A slice (up, right), or one in colour (up, right, 3), voxel by voxel and in its true proportions."""
    rows, columns = shown.shape[:2]
    ends = (rows - 0.5, -0.5) if place.origin == "upper" else (-0.5, rows - 0.5)
    picture = AxesImage(
        panel.axes,
        cmap=colours,
        norm=Normalize(*limits),
        origin=place.origin,
        extent=(-0.5, columns - 0.5, *ends),
        interpolation="nearest",
    )
    picture.set_data(shown)
    picture.set_transform(panel.voxels)
    panel.axes.add_image(picture)
    return picture


def draw_colour_bar(panel: Panel, picture: AxesImage, behind: str = "white") -> None:
    """The colours of a picture, to the right of its panel, over a colour of their own."""
    left, right, bottom, top = 1.04, 1.09, 0.05, 0.95
    colours = picture.cmap(np.linspace(0, 1, 128))
    opaque = colours[:, 3:] * colours[:, :3] + (1 - colours[:, 3:]) * to_rgb(behind)
    bar = AxesImage(panel.axes, origin="lower", extent=(left, right, bottom, top))
    bar.set_data(opaque[:, None])
    bar.set(transform=panel.frame, clip_on=False)
    panel.axes.add_image(bar)
    ticks, labels, factor = _numbered(*picture.get_clim())
    heights = bottom + (top - bottom) * np.asarray(picture.norm(np.asarray(ticks)))
    outline = [(left, bottom), (right, bottom), (right, top), (left, top), (left, bottom)]
    lines = [outline, *([(right, height), (right + 0.025, height)] for height in heights)]
    panel.axes.add_collection(
        LineCollection(lines, colors="black", linewidths=0.7, transform=panel.frame, clip_on=False), autolim=False
    )
    for height, label in zip(heights, labels):
        panel.axes.text(right + 0.035, height, label, va="center", fontsize=7, transform=panel.frame)
    if factor:
        panel.axes.text(left, top + 0.03, factor, fontsize=6.5, transform=panel.frame)


def _numbered(low: float, high: float) -> tuple[list[float], list[str], str]:
    """Round numbers between two others, their short labels, and the factor or summand that all labels share."""
    numbers = ScalarFormatter()
    numbers.set_powerlimits((-3, 4))  # else they would run into the next panel
    numbers.create_dummy_axis()
    assert numbers.axis is not None
    numbers.axis.set_view_interval(low, high)
    ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    return ticks, numbers.format_ticks(ticks), numbers.get_offset()


def draw_contour(panel: Panel, mask: np.ndarray, colour: str, line: Any = "-", width: float = 1.4) -> None:
    """The outline of a mask (up, right); nothing where it is empty."""
    if not mask.any():  # not in this slice
        return
    parts = max(1, _FINE // max(mask.shape))
    padded = np.pad(mask.astype(float), 1)  # closed also where the mask reaches the edge
    padded = padded.repeat(parts, axis=0).repeat(parts, axis=1)  # along the edges of voxels, not from middle to middle
    up, right = ((np.arange(parts * (side + 2)) + 0.5) / parts - 1.5 for side in mask.shape)
    panel.axes.autoscale(False)  # the frame stays that of the image
    options: dict[str, Any] = {"linewidths": width, "linestyles": [line], "transform": panel.voxels}
    panel.axes.contour(right, up, padded, levels=[0.5], colors=colour, **options)


def draw_changed(panel: Panel, before: np.ndarray, after: np.ndarray, place: Place) -> None:
    """The voxels of which two maps (1 or C, *spatial) say something else, as a veil."""
    changed = place.of((before != after).any(axis=0))
    veil = draw_slice(panel, np.zeros(changed.shape), (0, 1), ListedColormap([CHANGED]), place)
    veil.set_alpha(0.55 * changed)


def draw_regions(panel: Panel, maps: np.ndarray, place: Place, classes: int, line: Any = "-") -> None:
    """The outlines of one map of ``classes`` (1, *spatial), or of one of 0 and 1 for each label (C, *spatial)."""
    slices = [place.of(part) for part in maps]
    regions = [slices[0] == number for number in range(1, classes + 1)] if len(maps) == 1 else [s != 0 for s in slices]
    for number, region in enumerate(regions):
        draw_contour(panel, region, _CLASSES[number % len(_CLASSES)], line, width=1.2)
