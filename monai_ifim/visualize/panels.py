# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Panels of images and their components."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
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
_MASK_ON_IMAGE, _MASK_ON_EIGENVECTOR = "#F0E442", "#000000"
_WIDTH = 9.0
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
        >>> [axis.get_title() for axis in figure.axes if axis.images]
        ['image', 'high component', 'low component', 'leading eigenvector']
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
    further = 0.5 if segmented is None else 1.0  # for the name, above, and shares, below
    inches = [sum(rows) * (_WIDTH / 4 - 0.5) + 0.1 * len(rows) + further for rows in heights]
    figure = Figure(figsize=(_WIDTH, max(sum(inches), 1.0)))
    if batch == 0:
        return figure
    subfigures = figure.subfigures(batch, 1, squeeze=False, height_ratios=inches)[:, 0]
    for row, subfigure in enumerate(subfigures):
        leading = fisher.eigenvectors[row, 0]
        mask = None if masks is None else masks[row].as_subclass(Tensor).cpu().ne(0).any(dim=0).numpy()
        name = f"image {row}" if titles is None else titles[row].replace("\n", " · ").replace("$", r"\$")
        name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
        spectrum = fisher.skipped.get(row) or rf"$\lambda_1$ = {as_number(float(fisher.eigenvalues[row, 0]), 2)}"
        subfigure.suptitle(f"{name}   ({spectrum})", fontsize=10.5, x=0.01, ha="left")
        panels = _Panels(
            subfigure, _drawable(leading), fisher.channel_mask, mask, distances[row], heights[row], inches[row]
        )
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
    """The panels of one image: of volumes one row a plane."""

    def __init__(
        self,
        figure: SubFigure,
        leading: Tensor,
        channel_mask: Tensor | None,
        mask: np.ndarray | None,
        spacing: np.ndarray,
        heights: Sequence[float],
        inches: float,
    ) -> None:
        energy = leading.double().flatten(1).square().sum(dim=1).nan_to_num()
        self.figure, self.leading, self.channel_mask, self.mask = figure, leading, channel_mask, mask
        self.channel, self.channels, self.inches, self.heights = int(energy.argmax()), len(energy), inches, heights
        self.places = places_of(leading[self.channel].numpy(), spacing)

    def grid(self, above: float, below: float) -> np.ndarray:
        """Empty panels (planes, 4), with these inches above and below."""
        # fixed places: a layout engine takes longer than all the drawing
        room = {"left": 0.06, "right": 0.94, "bottom": below / self.inches, "top": 1 - above / self.inches}
        options = {**room, "wspace": 0.39, "hspace": 0.06}
        rows = len(self.places)
        panels = self.figure.subplots(rows, 4, squeeze=False, height_ratios=self.heights, gridspec_kw=options)
        for axis, place in zip(panels[:, 0], self.places):
            axis.set_ylabel(place.name, fontsize=8)
        return panels

    def draw_components(self, parts: Sequence[Tensor]) -> None:
        """The image, its components and its leading eigenvector."""
        panels = self.grid(above=0.5, below=0.08)
        for column, (title, values) in enumerate(zip(_COLUMNS, (*parts, self.leading))):
            colours = self._in_colour(values) if column == 0 else None
            pictures = self._draw(panels[:, column], values, signed=column > 0, colours=colours)
            if self.mask is not None and column in (0, 3):
                self._draw_mask(panels[:, column], _MASK_ON_EIGENVECTOR if column else _MASK_ON_IMAGE)
            label = "" if colours is not None or self.channels == 1 else f"\n{self._which_channel}"
            panels[0, column].set_title(title + label, fontsize=9.5)
            if colours is None:
                draw_colour_bar(panels[len(panels) // 2, column], pictures[-1])

    def draw_segmented(self, image: Tensor, found: Segmented) -> None:
        """The image, its leading eigenvector, and what the change does to the outlines."""
        panels = self.grid(above=0.7, below=0.32)
        sides = [sign * found.step * self.leading for sign in (1, -1)]
        changed = [self._perturbed(image, change, found) for change in sides]
        colours = self._in_colour(image)
        for column, values in enumerate((image, image, *changed)):
            shown = self._in_colour(values) if column != 1 else None
            pictures = self._draw(panels[:, column], values, signed=False, colours=shown)
            if column == 0 and colours is None:
                draw_colour_bar(panels[len(panels) // 2, 0], pictures[-1])
        slices = self._slices(self.leading)
        limits = colour_limits(slices, signed=True)
        for axis, shown, place in zip(panels[:, 1], slices, self.places):
            over = draw_slice(axis, shown, limits, SIGNED, place)
        draw_colour_bar(panels[len(panels) // 2, 1], over, "0.3")
        maps = [plain_tensor(part).numpy() for part in (found.before, *found.after)]
        label = None if found.label is None else plain_tensor(found.label).numpy()
        classes = max(int(part.max()) for part in (*maps, *([] if label is None else [label])))
        for row, place in enumerate(self.places):
            # the full outline over the dashed one, which shows where the two differ
            for column, full in ((0, label), (2, maps[1]), (3, maps[2])):
                if column:
                    draw_changed(panels[row, column], maps[0], maps[column - 1], place)
                draw_regions(panels[row, column], maps[0], place, classes, BEFORE)
                if full is not None:
                    draw_regions(panels[row, column], full, place, classes)
        if self.mask is not None:
            self._draw_mask(panels[:, 1], _MASK_ON_IMAGE)
        size = f"{100 * found.strength:.3g} %"
        outlines = ["- - predicted" if label is None else "— label   - - predicted", "", *["- - before   — after"] * 2]
        for column, (title, words) in enumerate(zip(_SEGMENTED, outlines)):
            panels[0, column].set_title(f"{title.format(size)}\n{words}".rstrip(), fontsize=9)
        for column, share in ((2, found.changed[0]), (3, found.changed[1])):
            panels[-1, column].set_xlabel(f"another class: {100 * share:.2g} % of voxels", fontsize=8, color=CHANGED)
        if self.channels > 1:
            panels[-1, 1].set_xlabel(self._which_channel, fontsize=8)

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

    def _draw(
        self, axes: np.ndarray, values: Tensor, signed: bool, colours: np.ndarray | None = None
    ) -> list[AxesImage]:
        """The slices of a column, on one scale."""
        slices = self._slices(values)
        limits = colour_limits(slices, signed)
        pictures = []
        for axis, shown, place in zip(axes, slices, self.places):
            shown = shown if colours is None else colours
            pictures.append(draw_slice(axis, shown, limits, "RdBu_r" if signed else "gray", place))
            axis.set(xticks=[], yticks=[])
        return pictures

    def _draw_mask(self, axes: np.ndarray, colour: str) -> None:
        assert self.mask is not None
        for axis, place in zip(axes, self.places):
            draw_contour(axis, place.of(self.mask), colour)
