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
"""Figures of each evaluation epoch, in TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from monai.engines import Evaluator
from torch.utils.tensorboard import SummaryWriter

from monai_ifim.fisher import InputFisher
from monai_ifim.handlers.handler import IFIMHandler, listen
from monai_ifim.handlers.metric import IFIMMetric
from monai_ifim.handlers.result import Case, IFIMResult
from monai_ifim.visualize import plot_components, plot_curves, plot_lambda_histogram, plot_removals, plot_spectrum

__all__ = ["IFIMFigureHandler", "case_figures", "result_figures"]


class IFIMFigureHandler:
    """Draw what an :class:`IFIMHandler` or :class:`IFIMMetric` measured, for TensorBoard, at each evaluation epoch.

    Figures: the sensitivity curves with 95 % intervals, the spectrum, the greatest eigenvalue of right and wrong
    predictions, the components of the most and least sensitive images and of a fixed few, and the removal experiment
    where it was asked for. The curves are there as scalars too, under ``<prefix>curve_<endpoint>/<arm>_<strength>``, so
    that epochs can be compared. With several processes, that of rank 0 draws.

    Args:
        ifim: the handler or metric that measures; it must be attached to the same evaluator.
        summary_writer: a TensorBoard writer; default a new one.
        log_dir: where a new one writes.

    Example::

        ifim:
          _target_: monai_ifim.handlers.IFIMHandler
        +validate#handlers:
        - '@ifim'
        - _target_: monai_ifim.handlers.IFIMFigureHandler
          ifim: '@ifim'
          log_dir: '@output_dir'
    """

    def __init__(
        self, ifim: IFIMHandler | IFIMMetric, summary_writer: Any = None, log_dir: str | Path = "./runs"
    ) -> None:
        self.ifim = ifim
        self.log_dir = log_dir
        self._writer = summary_writer
        self._prefix = "ifim_"

    def attach(self, engine: Evaluator) -> None:
        """Draw at the end of each evaluation epoch of this evaluator.

        Args:
            engine: a MONAI ``Evaluator``.
        """
        metric = listen(self.ifim, engine, self.draw, "IFIMFigureHandler")
        self._prefix = metric.prefix

    def draw(self, result: IFIMResult) -> None:
        """Write the figures and the scalars of one epoch."""
        if self._writer is None:  # not before, so that processes that draw nothing write no file
            self._writer = SummaryWriter(log_dir=str(self.log_dir))
        group = self._prefix.rstrip("_/")
        for name, figure in result_figures(result).items():
            self._writer.add_figure(f"{group}/{name}", figure, result.epoch)
        for number, cases in enumerate(_by_shape(result.cases)):
            name = "components" if number == 0 else f"components_{number + 1}"
            self._writer.add_figure(f"{group}/{name}", _components(cases), result.epoch)
        table = result.curve_table
        table = table[(table.arm != "unperturbed") & table.value.notna()]
        for endpoint, arm, strength, value in zip(table.endpoint, table.arm, table.strength, table.value):
            self._writer.add_scalar(f"{self._prefix}curve_{endpoint}/{arm}_{strength:g}", value, result.epoch)
        self._writer.flush()


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


def case_figures(result: IFIMResult) -> dict[int, Figure]:
    """One figure a shown image, by its position in the data set; none for images without two or three axes."""
    return {case.position: _components([case]) for cases in _by_shape(result.cases) for case in cases}


def _by_shape(cases: list[Case]) -> list[list[Case]]:
    groups: dict[torch.Size, list[Case]] = {}
    for case in cases:
        if case.image.ndim in (3, 4):
            groups.setdefault(case.image.shape, []).append(case)
    return list(groups.values())


def _components(cases: list[Case]) -> Figure:
    images = torch.stack([case.image for case in cases])
    masks = None if cases[0].mask is None else torch.stack([case.mask for case in cases if case.mask is not None])
    return plot_components(
        images,
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
