# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The pictures of an evaluation epoch, drawn once for all who show them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from monai_ifim.fisher import InputFisher
from monai_ifim.results import Case, IFIMResult
from monai_ifim.visualize.curves import plot_curves, plot_realistic, plot_removals
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
        failed: the errors of those that could not be drawn, by name.
    """

    figures: dict[str, np.ndarray]
    panels: list[np.ndarray]
    cases: dict[int, np.ndarray]
    failed: dict[str, Exception] = field(default_factory=dict)
    _encoded: dict[str, bytes] = field(default_factory=dict)

    def figure_png(self, name: str) -> bytes:
        """A figure as a PNG file; encoded once for all who show it."""
        if name not in self._encoded:
            self._encoded[name] = as_png(self.figures[name])
        return self._encoded[name]


_DRAWN: MutableMapping[IFIMResult, Pictures] = WeakKeyDictionary()


def draw_pictures(result: IFIMResult) -> Pictures:
    """All that there is to see of an epoch; drawn at the first call, the same arrays at every further one.

    One that cannot be drawn does not take the others with it.
    """
    if result not in _DRAWN:
        drawn = Pictures({}, [], {}, {})
        for name, draw in result_figures(result).items():
            try:
                drawn.figures[name] = as_array(draw())
            except Exception as error:
                drawn.failed[name] = error
        for piece in pieces(result.cases):
            _draw_cases(piece, drawn)
        _DRAWN[result] = drawn
    return _DRAWN[result]


def result_figures(result: IFIMResult) -> dict[str, Callable[[], Figure]]:
    """What draws the figures over all images, by name."""
    figures: dict[str, Callable[[], Figure]] = {}
    if len(result.curves):  # not where every image was left out
        figures["curves"] = lambda: plot_curves(result.curve_table)
    if len(result.images):
        figures["spectrum"] = lambda: plot_spectrum(result.eigenvalues)
        figures["histogram"] = lambda: plot_lambda_histogram(result.images)
    if len(result.removals):
        figures["removals"] = lambda: plot_removals(result.removal_table)
    if len(result.realistic):
        figures["realistic"] = lambda: plot_realistic(result.realistic_table)
    return figures


def pieces(cases: Sequence[Case]) -> list[list[Case]]:
    """The shown images that share a panel: of one shape, and not too many; none without two or three axes."""
    groups: dict[tuple[torch.Size, bool, bool], list[Case]] = {}
    for case in cases:
        if case.image.ndim in (3, 4):
            groups.setdefault((case.image.shape, case.mask is None, case.segmented is None), []).append(case)
    starts = [(group, start) for group in groups.values() for start in range(0, len(group), CASES_IN_A_PANEL)]
    return [group[start : start + CASES_IN_A_PANEL] for group, start in starts]


def _draw_cases(cases: list[Case], drawn: Pictures) -> None:
    """Add a panel of these cases to what was drawn; where it cannot be, one of each case."""
    try:
        figure = components_figure(cases)
        panel = as_array(figure)
    except Exception as error:
        if len(cases) == 1:
            drawn.failed[f"case_{cases[0].stem}"] = error
        else:
            for case in cases:
                _draw_cases([case], drawn)
        return
    drawn.panels.append(panel)
    for case, part in zip(cases, figure.subfigs):
        # a figure may be a part of a pixel higher than its picture
        top, bottom = (max(0, round(len(panel) - edge)) for edge in (part.bbox.y1, part.bbox.y0))
        drawn.cases[case.position] = panel[top:bottom]


def as_array(figure: Figure, dpi: float = _DPI) -> np.ndarray:
    """A figure as an array (H, W, 3), uint8, of one size whatever resolution the user has set."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        for words in ("Glyph", "Matplotlib currently does not support"):  # letters of file names that the font lacks
            warnings.filterwarnings("ignore", words, UserWarning)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def as_png(picture: np.ndarray) -> bytes:
    """A picture (H, W, 3), uint8, as a PNG file."""
    file = io.BytesIO()
    # a twentieth larger than at the default level, in half the time
    Image.fromarray(picture).save(file, "png", compress_level=3)
    return file.getvalue()


def components_figure(cases: Sequence[Case]) -> Figure:
    """The panel of shown images of one shape."""
    masks = None if cases[0].mask is None else torch.stack([case.mask for case in cases if case.mask is not None])
    return plot_components(
        torch.stack([case.image for case in cases]),
        InputFisher.concatenate([case.fisher for case in cases]),
        titles=[f"{case.why}\n{_short(Path(case.name).name)}" for case in cases],
        masks=masks,
        spacing=torch.stack([_spacing(case) for case in cases]),
        segmented=None if cases[0].segmented is None else [case.segmented for case in cases if case.segmented],
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
