# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Panels of images and their components."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from numpy.typing import ArrayLike
from torch import Tensor

from monai_ifim.fisher import InputFisher
from monai_ifim.model import varied

_COLUMNS = ("image", "high component", "low component", "leading eigenvector")
# Of volumes: the axis that is cut, the one that is drawn to the right, and the one that is drawn upwards.
PLANES = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}
_MASK_ON_IMAGE, _MASK_ON_EIGENVECTOR = "#F0E442", "#000000"
_WIDTH = 9.0
# The room for a plane, height over width, is kept within these: a thin slab still gets some, a long one not too much.
_HEIGHTS = (0.35, 1.4)


def plot_components(
    images: Tensor,
    fisher: InputFisher,
    titles: Sequence[str] | None = None,
    reference: float | Tensor = 0.0,
    masks: Tensor | None = None,
    spacing: ArrayLike | Tensor | None = None,
) -> Figure:
    """A figure of each image with its high and low components and its leading eigenvector.

    Components have a signed, symmetric colour scale of their own, so that their sizes must be read from the colour
    bars. Images of two axes are drawn as arrays are, the first axis downwards; of three channels (that the channel mask
    of the spectrum lets vary), they are drawn in colour. Of volumes the middle slice of each axis is drawn, named as in
    RAS orientation (axes to the right, to the front, upwards), the later axis upwards. Of several channels the one with
    most of the eigenvector's energy is drawn, the same for all panels of an image.

    Args:
        images: (B, C_in, H, W) or (B, C_in, H, W, D).
        fisher: their spectrum.
        titles: one an image.
        reference: ``x0`` of the split.
        masks: (B, 1 or C_in, *spatial), drawn as a contour on image and eigenvector.
        spacing: (spatial axes,) or (B, spatial axes), in mm, for the true proportions; default 1.

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
    if titles is not None and len(titles) != batch:
        raise ValueError(f"titles must be {batch}, one an image, got {len(titles)}.")
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
    inches = [sum(rows) * (_WIDTH / 4 - 0.5) + 0.1 * len(rows) + 0.5 for rows in heights]
    figure = Figure(figsize=(_WIDTH, max(sum(inches), 1.0)))
    if batch == 0:
        return figure
    subfigures = figure.subfigures(batch, 1, squeeze=False, height_ratios=inches)[:, 0]
    for row, subfigure in enumerate(subfigures):
        leading = fisher.eigenvectors[row, 0]
        parts = [_drawable(part) for part in (images[row], high[row], low[row], leading)]
        mask = None if masks is None else masks[row].as_subclass(Tensor).cpu().ne(0).any(dim=0).numpy()
        name = f"image {row}" if titles is None else titles[row].replace("\n", " · ").replace("$", r"\$")
        name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
        spectrum = fisher.skipped.get(row) or rf"$\lambda_1$ = {float(fisher.eigenvalues[row, 0]):.2g}"
        subfigure.suptitle(f"{name}   ({spectrum})", fontsize=10.5, x=0.01, ha="left")
        colours = _drawable(varied(images[row : row + 1].detach().as_subclass(Tensor), fisher.channel_mask)[0])
        _draw_image(subfigure, parts, colours, mask, distances[row], heights[row], inches[row])
    return figure


def _drawable(values: Tensor) -> Tensor:
    """On the CPU, of 32 bits at least: matplotlib and NumPy do not know all others."""
    values = values.detach().as_subclass(Tensor).cpu()
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _draw_image(
    figure: SubFigure,
    parts: Sequence[Tensor],
    colours: Tensor,
    mask: np.ndarray | None,
    spacing: np.ndarray,
    heights: Sequence[float],
    inches: float,
) -> None:
    """The panels of one image: of volumes one row a plane."""
    energy = parts[-1].double().flatten(1).square().sum(dim=1)
    channel, channels = int(energy.argmax()), len(energy)
    planes = list(PLANES.items()) if len(spacing) == 3 else [("", (-1, 1, 0))]
    # fixed places: a layout engine takes longer than all the drawing
    places = {"left": 0.05, "right": 0.94, "bottom": 0.08 / inches, "top": 1 - 0.5 / inches, "wspace": 0.34}
    panels = figure.subplots(
        len(planes), len(parts), squeeze=False, height_ratios=heights, gridspec_kw={**places, "hspace": 0.06}
    )
    for column, (title, values) in enumerate(zip(_COLUMNS, parts)):
        in_colour = column == 0 and len(colours) == 3 and len(spacing) == 2
        slices = [middle_slice(values[channel].numpy(), cut) for _, (cut, _, _) in planes]
        low, high = colour_limits(slices, signed=column > 0)
        if in_colour:  # from 0 to 1, all channels together, so that hues stay
            slices = [Normalize()(np.ma.masked_invalid(colours.movedim(0, -1).numpy())).filled(0)]
        for axis, shown, (plane, (cut, right, up)) in zip(panels[:, column], slices, planes):
            picture = axis.imshow(
                shown, cmap="RdBu_r" if column else "gray", vmin=low, vmax=high, origin="upper" if cut < 0 else "lower"
            )
            picture.set_interpolation("nearest")
            axis.set_aspect(spacing[up] / spacing[right])
            if mask is not None and column in (0, len(parts) - 1):
                _contour(axis, middle_slice(mask, cut), _MASK_ON_EIGENVECTOR if column else _MASK_ON_IMAGE)
            axis.set(xticks=[], yticks=[])
            if cut >= 0 and column == 0:
                size = values.shape[1 + cut]
                axis.set_ylabel(f"{plane}\nslice {size // 2 + 1} of {size}", fontsize=8.5)
        label = "" if in_colour or channels == 1 else f"\nchannel {channel + 1} of {channels}"
        panels[0, column].set_title(title + label, fontsize=9.5)
        if not in_colour:
            beside = panels[len(planes) // 2, column].inset_axes([1.04, 0.05, 0.05, 0.9])
            figure.colorbar(picture, cax=beside).ax.tick_params(labelsize=7.5)


def colour_limits(slices: Sequence[np.ndarray], signed: bool) -> tuple[float, float]:
    """One scale for all slices: symmetric where the sign matters."""
    values = np.concatenate([part.ravel() for part in slices])
    values = values[np.isfinite(values)]
    if signed or len(values) == 0:
        greatest = float(np.abs(values).max(initial=0.0)) or 1.0
        return -greatest if signed else 0.0, greatest
    return float(values.min()), float(values.max())


def middle_slice(values: np.ndarray, cut: int) -> np.ndarray:
    """The middle slice, (up, right); images of two axes as they are."""
    return values if cut < 0 else values.take(values.shape[cut] // 2, axis=cut).T


def _contour(axis: Axes, mask: np.ndarray, colour: str) -> None:
    if not mask.any():  # not in this slice
        return
    padded = np.pad(mask.astype(float), 1)  # closed also where the mask reaches the edge
    right, up = np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1)
    axis.autoscale(False)  # the frame stays that of the image
    axis.contour(right, up, padded, levels=[0.5], colors=colour, linewidths=1.4)
