# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The pictures of an evaluation epoch, drawn once for all who show them."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from monai_ifim.fisher import InputFisher
from monai_ifim.results import Case, IFIMResult
from monai_ifim.visualize.curves import plot_curves, plot_removals
from monai_ifim.visualize.panels import plot_components
from monai_ifim.visualize.spectrum import plot_lambda_histogram, plot_spectrum

_DPI = 100
# A figure cannot be higher than 65 536 pixels, and nobody scrolls so far.
CASES_IN_A_PANEL = 12


@dataclass(frozen=True)
class Pictures:
    """Pictures as arrays (H, W, 3), uint8.

    Attributes:
        figures: those over all images, by name.
        panels: components of the shown images, below each other; one array for each shape of the images, or several.
        cases: the same of each shown image alone, by its position in the data set.
    """

    figures: dict[str, np.ndarray]
    panels: list[np.ndarray]
    cases: dict[int, np.ndarray]


_DRAWN: MutableMapping[IFIMResult, Pictures] = WeakKeyDictionary()


def draw_pictures(result: IFIMResult) -> Pictures:
    """All that there is to see of an epoch; drawn at the first call, the same arrays at every further one."""
    if result not in _DRAWN:
        figures = {name: as_array(figure) for name, figure in result_figures(result).items()}
        panels, cases = [], {}
        for shown, figure in case_panels(result.cases):
            panel = as_array(figure)
            panels.append(panel)
            for case, part in zip(shown, figure.subfigs):
                # a figure may be a part of a pixel higher than its picture
                top, bottom = (max(0, round(len(panel) - edge)) for edge in (part.bbox.y1, part.bbox.y0))
                cases[case.position] = panel[top:bottom]
        _DRAWN[result] = Pictures(figures, panels, cases)
    return _DRAWN[result]


def result_figures(result: IFIMResult) -> dict[str, Figure]:
    """The figures over all images, by name."""
    figures = {}
    if len(result.curves):  # not where every image was left out
        figures["curves"] = plot_curves(result.curve_table)
    if len(result.images):
        figures["spectrum"] = plot_spectrum(result.eigenvalues)
        figures["histogram"] = plot_lambda_histogram(result.images)
    if len(result.removals):
        figures["removals"] = plot_removals(result.removal_table)
    return figures


def case_panels(cases: Sequence[Case]) -> list[tuple[list[Case], Figure]]:
    """Figures of the components of shown images of one shape each; none of images without two or three axes."""
    groups: dict[torch.Size, list[Case]] = {}
    for case in cases:
        if case.image.ndim in (3, 4):
            groups.setdefault(case.image.shape, []).append(case)
    starts = [(group, start) for group in groups.values() for start in range(0, len(group), CASES_IN_A_PANEL)]
    pieces = [group[start : start + CASES_IN_A_PANEL] for group, start in starts]
    return [(piece, _components(piece)) for piece in pieces]


def as_array(figure: Figure) -> np.ndarray:
    """A figure as an array (H, W, 3), uint8, of one size whatever resolution the user has set."""
    figure.set_dpi(_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _components(cases: list[Case]) -> Figure:
    masks = None if cases[0].mask is None else torch.stack([case.mask for case in cases if case.mask is not None])
    return plot_components(
        torch.stack([case.image for case in cases]),
        InputFisher.concatenate([case.fisher for case in cases]),
        titles=[f"{case.why}\n{_short(Path(case.name).name)}" for case in cases],
        masks=masks,
        spacing=torch.stack([_spacing(case) for case in cases]),
    )


def _spacing(case: Case) -> torch.Tensor:
    """Distance between neighbours along each axis, in mm; 1 where there is no affine matrix."""
    axes = case.image.ndim - 1
    if case.affine is None:
        return torch.ones(axes)
    spacing = torch.linalg.vector_norm(case.affine[:-1, :axes].double(), dim=0)
    return torch.where((spacing > 0) & torch.isfinite(spacing), spacing, 1.0)


def _short(name: str) -> str:
    """A name with the middle left out where it would run out of the figure."""
    return name if len(name) <= 50 else f"{name[:24]}…{name[-24:]}"
