# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Slices of images, and what is drawn on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, ScalarFormatter

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


def draw_slice(
    axis: Axes,
    shown: np.ndarray,
    limits: tuple[float, float],
    colours: str | Colormap,
    place: Place,
) -> AxesImage:
    """A slice (up, right), or one in colour (up, right, 3), voxel by voxel and in its true proportions."""
    low, high = limits
    picture = axis.imshow(shown, cmap=colours, vmin=low, vmax=high, origin=place.origin, aspect=place.aspect)
    picture.set_interpolation("nearest")
    return picture


def draw_colour_bar(axis: Axes, picture: AxesImage, behind: str = "white") -> None:
    """The colours of a picture, to the right of its panel, over a colour of their own."""
    beside = axis.inset_axes((1.04, 0.05, 0.05, 0.9))
    beside.set_facecolor(behind)
    figure = axis.get_figure(root=False)
    assert figure is not None
    numbers = ScalarFormatter()
    numbers.set_powerlimits((-3, 4))  # else they would run into the next panel
    figure.colorbar(picture, cax=beside, format=numbers, ticks=MaxNLocator(6))
    beside.tick_params(labelsize=7, pad=1.5)
    beside.yaxis.set_offset_position("left")  # the factor begins above the bar, and does not lie in the panel
    beside.yaxis.offsetText.set_fontsize(6.5)


def draw_contour(axis: Axes, mask: np.ndarray, colour: str, line: Any = "-", width: float = 1.4) -> None:
    """The outline of a mask (up, right); nothing where it is empty."""
    if not mask.any():  # not in this slice
        return
    parts = max(1, _FINE // max(mask.shape))
    padded = np.pad(mask.astype(float), 1)  # closed also where the mask reaches the edge
    padded = padded.repeat(parts, axis=0).repeat(parts, axis=1)  # along the edges of voxels, not from middle to middle
    up, right = ((np.arange(parts * (side + 2)) + 0.5) / parts - 1.5 for side in mask.shape)
    axis.autoscale(False)  # the frame stays that of the image
    axis.contour(right, up, padded, levels=[0.5], colors=colour, linewidths=width, linestyles=[line])


def draw_changed(axis: Axes, before: np.ndarray, after: np.ndarray, place: Place) -> None:
    """The voxels of which two maps (1 or C, *spatial) say something else, as a veil."""
    changed = place.of((before != after).any(axis=0))
    veil = draw_slice(axis, np.zeros(changed.shape), (0, 1), ListedColormap([CHANGED]), place)
    veil.set_alpha(0.55 * changed)


def draw_regions(axis: Axes, maps: np.ndarray, place: Place, classes: int, line: Any = "-") -> None:
    """The outlines of one map of ``classes`` (1, *spatial), or of one of 0 and 1 for each label (C, *spatial)."""
    slices = [place.of(part) for part in maps]
    regions = [slices[0] == number for number in range(1, classes + 1)] if len(maps) == 1 else [s != 0 for s in slices]
    for number, region in enumerate(regions):
        draw_contour(axis, region, _CLASSES[number % len(_CLASSES)], line, width=1.2)
