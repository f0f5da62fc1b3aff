# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Panels of images and their components."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.transforms import ScaledTranslation
from numpy.typing import ArrayLike
from torch import Tensor

from monai_ifim.fisher import InputFisher
from monai_ifim.model import plain_tensor, varied
from monai_ifim.perturbation import perturb
from monai_ifim.results import Segmented
from monai_ifim.visualize.slices import (
    BEFORE,
    CHANGED,
    PLANES,
    SIGNED,
    Panel,
    colour_limits,
    draw_changed,
    draw_colour_bar,
    draw_contour,
    draw_regions,
    draw_slice,
    places_of,
)
from monai_ifim.visualize.wording import as_number

_COLUMNS = ("image", "high component", "low component", "leading eigenvector")
_SEGMENTED = ("image", "leading eigenvector\non the image", "changed by {} along it", "changed by {} against it")
# By name each picture would make its own.
_SIGNED, _UNSIGNED = colormaps["RdBu_r"], colormaps["gray"]
_MASK_ON_IMAGE, _MASK_ON_EIGENVECTOR = "#F0E442", "#000000"
# Inches: of the figure, of the room for a panel, and around the panels. The numbers of a colour bar stand between them.
_WIDTH, _SIDE, _LEFT, _BETWEEN, _BETWEEN_ROWS = 9.0, 1.53, 0.55, 0.57, 0.1
# The room for a plane, height over width, is kept within these: a thin slab still gets some (its name needs it), a long
# one not too much.
_HEIGHTS = (0.6, 1.4)


def plot_components(
    images: Tensor,
    fisher: InputFisher,
    titles: Sequence[str] | None = None,
    reference: float | Tensor = 0.0,
    masks: Tensor | None = None,
    spacing: ArrayLike | Tensor | None = None,
    segmented: Sequence[Segmented] | None = None,
) -> Figure:
    """A figure of each image with its high and low components and its leading eigenvector.

    Components have a signed, symmetric colour scale of their own, so that their sizes must be read from the colour
    bars. Images of two axes are drawn as arrays are, the first axis downwards; of three channels (that the channel mask
    of the spectrum lets vary), they are drawn in colour. Of volumes the slice of each axis through the peak of the
    leading eigenvector is drawn (the voxel of greatest magnitude; the middle one without an eigenvector), named as in
    RAS orientation (axes to the right, to the front, upwards), the later axis upwards. Of several channels the one with
    most of the eigenvector's energy is drawn, the same for all panels of an image.

    Of segmentations the panels are the image with the outlines of the label and of what is predicted, the eigenvector
    over the image, and the image after the change with the outlines that are predicted before and after it, for both
    signs. Each class has a colour of its own.

    Args:
        images: (B, C_in, H, W) or (B, C_in, H, W, D).
        fisher: their spectrum.
        titles: one an image.
        reference: ``x0`` of the split.
        masks: (B, 1 or C_in, *spatial), drawn as a contour on image and eigenvector.
        spacing: (spatial axes,) or (B, spatial axes), in mm, for the true proportions; default 1.
        segmented: one an image, where the outputs are segmentations.

    Raises:
        ValueError: When a shape does not fit.

    Example:
        >>> import torch
        >>> from monai_ifim import input_fisher
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)).eval()
        >>> images = torch.randn(1, 1, 8, 8)
        >>> figure = plot_components(images, input_fisher(network, images), titles=["case 17"])
        >>> figure.subfigs[0].get_suptitle()[:7], len(figure.axes[0].get_images())  # four, and three colour bars
        ('case 17', 8)
    """
    batch, axes = len(images), images.ndim - 2
    if axes not in (2, 3):
        raise ValueError(f"images must be (B, C_in, H, W) or (B, C_in, H, W, D), got {tuple(images.shape)}.")
    for given, what in ((titles, "titles"), (segmented, "segmented")):
        if given is not None and len(given) != batch:
            raise ValueError(f"{what} must be {batch}, one an image, got {len(given)}.")
    distances = np.ones(axes) if spacing is None else np.asarray(spacing, dtype=float)
    if distances.shape not in ((axes,), (batch, axes)) or not (np.isfinite(distances) & (distances > 0)).all():
        raise ValueError(
            f"spacing must be positive, of shape ({axes},) or ({batch}, {axes}), got {np.array2string(distances)}."
        )
    distances = np.broadcast_to(distances, (batch, axes))
    shapes = [(batch, channels, *images.shape[2:]) for channels in dict.fromkeys((1, images.shape[1]))]
    if masks is not None and tuple(masks.shape) not in shapes:
        raise ValueError(f"masks must have the shape {' or '.join(map(str, shapes))}, got {tuple(masks.shape)}.")

    high, low = fisher.split(images, reference=reference)
    # height over width of each plane
    planes = [(right, up) for _, right, up in PLANES.values()] if axes == 3 else [(1, 0)]
    extents = np.asarray(images.shape[2:]) * distances
    heights = [[float(np.clip(extent[up] / extent[right], *_HEIGHTS)) for right, up in planes] for extent in extents]
    # for name and titles, above, and shares, below
    above, below = (0.72, 0.1) if segmented is None else (0.82, 0.3)
    inches = [sum(rows) * _SIDE + _BETWEEN_ROWS * (len(rows) - 1) + above + below for rows in heights]
    figure = Figure(figsize=(_WIDTH, max(sum(inches), 1.0)))
    if batch == 0:
        return figure
    # one for all images: axes take longer to make than what is in them
    shared = figure.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(0, sum(inches)))
    shared.set_axis_off()
    floors = sum(inches) - np.cumsum(inches)
    subfigures = figure.subfigures(batch, 1, squeeze=False, height_ratios=inches)[:, 0]
    for row, subfigure in enumerate(subfigures):
        leading = fisher.eigenvectors[row, 0]
        mask = None if masks is None else masks[row].as_subclass(Tensor).cpu().ne(0).any(dim=0).numpy()
        name = f"image {row}" if titles is None else titles[row].replace("\n", " · ")
        name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
        spectrum = fisher.skipped.get(row) or f"λ₁ = {as_number(float(fisher.eigenvalues[row, 0]), 2)}"
        # a name is no formula
        title: dict[str, Any] = {"fontsize": 10.5, "ha": "left", "va": "top", "parse_math": False}
        subfigure.suptitle(f"{name}   ({spectrum})", x=0.01, y=1 - 0.08 / inches[row], **title)
        floor = floors[row] + below
        panels = _Panels(shared, floor, _drawable(leading), fisher.channel_mask, mask, distances[row], heights[row])
        if segmented is None:
            panels.draw_components([_drawable(part) for part in (images[row], high[row], low[row])])
        else:
            panels.draw_segmented(_drawable(images[row]), segmented[row])
    return figure


def _drawable(values: Tensor) -> Tensor:
    """On the CPU, of 32 bits at least: matplotlib and NumPy do not know all others."""
    values = values.detach().as_subclass(Tensor).cpu()
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _Panels:
    """The panels of one image above a floor, all in the same axes, in inches: of volumes one row a plane."""

    def __init__(
        self,
        axes: Axes,
        floor: float,
        leading: Tensor,
        channel_mask: Tensor | None,
        mask: np.ndarray | None,
        spacing: np.ndarray,
        heights: Sequence[float],
    ) -> None:
        energy = leading.double().flatten(1).square().sum(dim=1).nan_to_num()
        self.leading, self.channel_mask, self.mask = leading, channel_mask, mask
        self.channel, self.channels = int(energy.argmax()), len(energy)
        self.places = places_of(leading[self.channel].numpy(), spacing)
        shapes = [place.of(leading[self.channel].numpy()).shape for place in self.places]
        tops = floor + np.cumsum([height * _SIDE + _BETWEEN_ROWS for height in reversed(heights)])[::-1] - _BETWEEN_ROWS
        lefts = _LEFT + (_SIDE + _BETWEEN) * np.arange(4)
        self.panels = np.empty((len(self.places), 4), dtype=object)
        for (row, column), _ in np.ndenumerate(self.panels):
            height = heights[row] * _SIDE
            room = (lefts[column], tops[row] - height, _SIDE, height)
            self.panels[row, column] = Panel.within(axes, room, shapes[row], self.places[row])
        corners = [(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]
        frames = [(panel.frame - axes.transData).transform(corners) for panel in self.panels.flat]
        axes.add_collection(LineCollection(frames, colors="black", linewidths=0.8, zorder=3), autolim=False)
        for panel, place in zip(self.panels[:, 0], self.places):
            self._write(panel, place.name, (0, 0.5), (-0.05, 0), 8, rotation=90, ha="right", va="center")

    def _write(
        self, panel: Panel, text: str, at: tuple[float, float], away: tuple[float, float], size: float, **look: Any
    ) -> None:
        """Text beside a panel: some inches away from a place of its frame."""
        shift = ScaledTranslation(*away, panel.axes.figure.dpi_scale_trans)
        panel.axes.text(*at, text, fontsize=size, transform=panel.frame + shift, **look)

    def _write_above(self, column: int, text: str, size: float) -> None:
        self._write(self.panels[0, column], text, (0.5, 1), (0, 0.07), size, ha="center", va="bottom")

    def _write_below(self, column: int, text: str, colour: str = "black") -> None:
        self._write(self.panels[-1, column], text, (0.5, 0), (0, -0.06), 8, ha="center", va="top", color=colour)

    def draw_components(self, parts: Sequence[Tensor]) -> None:
        """The image, its components and its leading eigenvector."""
        for column, (title, values) in enumerate(zip(_COLUMNS, (*parts, self.leading))):
            colours = self._in_colour(values) if column == 0 else None
            picture = self._draw(column, values, signed=column > 0, colours=colours)
            if self.mask is not None and column in (0, 3):
                self._draw_mask(column, _MASK_ON_EIGENVECTOR if column else _MASK_ON_IMAGE)
            label = "" if colours is not None or self.channels == 1 else f"\n{self._which_channel}"
            self._write_above(column, title + label, 9.5)
            if colours is None:
                self._draw_colour_bar(column, picture)

    def draw_segmented(self, image: Tensor, found: Segmented) -> None:
        """The image, its leading eigenvector, and what the change does to the outlines."""
        sides = [sign * found.step * self.leading for sign in (1, -1)]
        changed = [self._perturbed(image, change, found) for change in sides]
        colours = self._in_colour(image)
        for column, values in enumerate((image, image, *changed)):
            shown = self._in_colour(values) if column != 1 else None
            picture = self._draw(column, values, signed=False, colours=shown)
            if column == 0 and colours is None:
                self._draw_colour_bar(column, picture)
        slices = self._slices(self.leading)
        limits = colour_limits(slices, signed=True)
        for panel, shown, place in zip(self.panels[:, 1], slices, self.places):
            over = draw_slice(panel, shown, limits, SIGNED, place)
        self._draw_colour_bar(1, over, "0.3")
        maps = [plain_tensor(part).numpy() for part in (found.before, *found.after)]
        label = None if found.label is None else plain_tensor(found.label).numpy()
        classes = max(int(part.max()) for part in (*maps, *([] if label is None else [label])))
        for row, place in enumerate(self.places):
            # the full outline over the dashed one, which shows where the two differ
            for column, full in ((0, label), (2, maps[1]), (3, maps[2])):
                if column:
                    draw_changed(self.panels[row, column], maps[0], maps[column - 1], place)
                draw_regions(self.panels[row, column], maps[0], place, classes, BEFORE)
                if full is not None:
                    draw_regions(self.panels[row, column], full, place, classes)
        if self.mask is not None:
            self._draw_mask(1, _MASK_ON_IMAGE)
        size = f"{100 * found.strength:.3g} %"
        outlines = ["- - predicted" if label is None else "— label   - - predicted", "", *["- - before   — after"] * 2]
        for column, (title, words) in enumerate(zip(_SEGMENTED, outlines)):
            self._write_above(column, f"{title.format(size)}\n{words}".rstrip(), 9)
        for column, share in ((2, found.changed[0]), (3, found.changed[1])):
            self._write_below(column, f"another class: {100 * share:.2g} % of voxels", CHANGED)
        if self.channels > 1:
            self._write_below(1, self._which_channel)

    @property
    def _which_channel(self) -> str:
        return f"channel {self.channel + 1} of {self.channels}"

    def _perturbed(self, image: Tensor, change: Tensor, found: Segmented) -> Tensor:
        return perturb(image.unsqueeze(0), change.unsqueeze(0).to(image), found.clip, self.channel_mask)[0][0]

    def _in_colour(self, image: Tensor) -> np.ndarray | None:
        """The image (H, W, 3) from 0 to 1, all channels together, so that hues stay; None where it has no colours."""
        colours = varied(image.unsqueeze(0), self.channel_mask)[0]
        if len(colours) != 3 or image.ndim != 3:
            return None
        return Normalize()(np.ma.masked_invalid(colours.movedim(0, -1).numpy())).filled(0)

    def _slices(self, values: Tensor) -> list[np.ndarray]:
        return [place.of(values[self.channel].numpy()) for place in self.places]

    def _draw(self, column: int, values: Tensor, signed: bool, colours: np.ndarray | None = None) -> AxesImage:
        """The slices of a column, on one scale; the last one."""
        slices = self._slices(values)
        limits = colour_limits(slices, signed)
        for panel, shown, place in zip(self.panels[:, column], slices, self.places):
            shown = shown if colours is None else colours
            picture = draw_slice(panel, shown, limits, _SIGNED if signed else _UNSIGNED, place)
        return picture

    def _draw_colour_bar(self, column: int, picture: AxesImage, behind: str = "white") -> None:
        draw_colour_bar(self.panels[len(self.panels) // 2, column], picture, behind)

    def _draw_mask(self, column: int, colour: str) -> None:
        assert self.mask is not None
        for panel, place in zip(self.panels[:, column], self.places):
            draw_contour(panel, place.of(self.mask), colour)
