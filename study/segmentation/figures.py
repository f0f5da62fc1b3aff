# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of segmentations, of the leading eigenvector, and of what a change along it does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from monai_ifim import InputFisher
from monai_ifim.perturbation import change_at_unit_strength, image_contrast
from monai_ifim.visualize import plot_curves
from study.segmentation.cases import CLASSES, Case
from study.segmentation.measure import Measured

__all__ = ["draw_cases", "draw_curves"]

_SHOWN = ("kl", "kl_ratio", "changed", "volume_change", "overlap", "dice")
_COLOURS = ("tab:orange", "tab:cyan")


def draw_curves(measured: Measured, title: str, file: Path) -> None:
    """The curves over the cases, with intervals.

    Args:
        measured: of one network.
        title: of the figure.
        file: a PNG file.
    """
    table = measured.table
    _save(plot_curves(table[table.endpoint.isin(_SHOWN)], title), file)


def draw_cases(
    network: nn.Module, cases: Sequence[Case], fisher: InputFisher, strength: float, file: Path
) -> list[int]:
    """A row a case, at the slice through the peak of its leading eigenvector; the numbers of these slices.

    Args:
        network: in evaluation mode.
        cases: those to draw.
        fisher: their spectra.
        strength: of the change along the eigenvector, in units of the image's contrast.
        file: a PNG file.
    """
    figure = Figure(figsize=(12.5, 3.1 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), 4, squeeze=False)
    slices = []
    for row, (case, vector) in enumerate(zip(cases, fisher.eigenvectors[:, 0])):
        image = case.tensor.unsqueeze(0)
        change = strength * change_at_unit_strength(vector.unsqueeze(0), image_contrast(image))
        with torch.no_grad():
            before, *after = (network(image + sign * change).argmax(dim=1)[0] for sign in (0, 1, -1))
        at = int(vector[0].abs().flatten().argmax()) % vector.shape[-1]
        slices.append(at)
        _show(axes[row, 0], image[0, 0], at, f"{case.name}, slice {at}\nlabel (full), prediction (dashed)")
        _outline(axes[row, 0], case.label[0], at, "solid")
        _outline(axes[row, 0], before, at, "dashed")
        _show(axes[row, 1], image[0, 0], at, "leading eigenvector\nred +, blue -")
        greatest = float(vector.abs().max())
        values = _slice(vector[0], at)
        weight = np.clip(3 * np.abs(values) / greatest, 0, 1)
        axes[row, 1].imshow(values, cmap="seismic", vmin=-greatest, vmax=greatest, alpha=weight, origin="lower")
        for column, (sign, segmented) in enumerate(zip("+-", after), start=2):
            moved = image + (1 if sign == "+" else -1) * change
            share = float((segmented != before).double().mean())
            title = f"changed by {sign}{strength:.0%} of the contrast\n{share:.1%} of the voxels change class"
            _show(axes[row, column], moved[0, 0], at, title)
            _outline(axes[row, column], before, at, "dashed")
            _outline(axes[row, column], segmented, at, "solid")
    names = ", ".join(f"{name}: {colour.removeprefix('tab:')}" for name, colour in zip(CLASSES[1:], _COLOURS))
    figure.suptitle(f"{names}. Right: prediction before (dashed) and after the change (full)", fontsize=10)
    _save(figure, file)
    return slices


def _slice(values: Tensor, at: int) -> np.ndarray:
    return np.asarray(values[..., at].T)


def _show(axis: Axes, image: Tensor, at: int, title: str) -> None:
    axis.imshow(_slice(image, at), cmap="gray", vmin=-2, vmax=3, origin="lower")
    axis.set_title(title, fontsize=9)
    axis.set_axis_off()


def _outline(axis: Axes, labels: Tensor, at: int, line: str) -> None:
    for number, colour in enumerate(_COLOURS, start=1):
        inside = _slice(labels == number, at).astype(float)
        if inside.any():
            axis.contour(inside, levels=[0.5], colors=colour, linewidths=1.2, linestyles=line)


def _save(figure: Figure, file: Path) -> None:
    FigureCanvasAgg(figure)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)
