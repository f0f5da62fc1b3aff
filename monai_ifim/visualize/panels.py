# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Panels of images and their components."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from monai_ifim.fisher import InputFisher

__all__ = ["plot_components"]


def plot_components(
    images: Tensor, fisher: InputFisher, titles: Sequence[str] | None = None, reference: float | Tensor = 0.0
) -> Figure:
    """One row an image: the image, its high and low components, and its leading eigenvector.

    The first channel is shown; of a volume, the middle slice of the last axis. Components have a signed, symmetric
    colour scale of their own, so that their sizes must be read from the colour bars.

    Args:
        images: (B, C_in, H, W[, D]).
        fisher: their spectrum.
        titles: one an image.
        reference: ``x0`` of the split.

    Returns:
        A matplotlib figure, without a window.

    Raises:
        ValueError: When the images are not two- or three-dimensional.
    """
    if images.ndim not in (4, 5):
        raise ValueError(f"images must be (B, C_in, H, W) or (B, C_in, H, W, D), got {tuple(images.shape)}.")
    high, low = fisher.split(images, reference=reference)
    columns = {"image": images, "high component": high, "low component": low, "leading eigenvector": None}
    figure = Figure(figsize=(2.6 * len(columns), 2.4 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for row in range(len(images)):
        for column, (name, values) in enumerate(columns.items()):
            shown = _slice(fisher.eigenvectors[row, 0] if values is None else values[row])
            axis = axes[row, column]
            limit = float(np.abs(shown).max()) or 1.0
            signed = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
            picture = axis.imshow(shown, **({"cmap": "gray"} if name == "image" else signed))
            figure.colorbar(picture, ax=axis, shrink=0.8)
            axis.set(xticks=[], yticks=[], title=name if row == 0 else "")
        label = titles[row] if titles is not None else f"image {row}"
        axes[row, 0].set_ylabel(f"{label}\n$\\lambda_1$ = {float(fisher.eigenvalues[row, 0]):.2g}")
    return figure


def _slice(values: Tensor) -> np.ndarray:
    """The first channel of (C, H, W[, D]) as (H, W)."""
    plane = values[0].detach().cpu().numpy()
    return plane[..., plane.shape[-1] // 2] if plane.ndim == 3 else plane
