# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Figures of each evaluation epoch, in TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from monai.engines import Evaluator
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from monai_ifim.handlers.figure_times import FigureTimes
from monai_ifim.handlers.layout import metrics_beside, own_metrics, scalar_layout
from monai_ifim.handlers.listening import listen
from monai_ifim.handlers.optional import InRun, LeftOut, kept_apart
from monai_ifim.handlers.options import FIGURE_OPTIONS, documented
from monai_ifim.handlers.routes import IFIMHandler, IFIMMetric
from monai_ifim.handlers.steps import step_of
from monai_ifim.results import IFIMResult
from monai_ifim.visualize import as_png, draw_pictures


@documented(FIGURE_OPTIONS)
class IFIMFigureHandler:
    """Draw what an :class:`IFIMHandler` or :class:`IFIMMetric` measured, for TensorBoard, at each evaluation epoch.

    Figures: the sensitivity curves with 95 % intervals, the spectrum, the greatest eigenvalue of right and wrong
    predictions, the components of the most and least sensitive images and of a fixed few, and removals and
    realistic changes where asked for. The curves are there as scalars too, under
    ``<prefix>curve_<endpoint>/<direction>_<strength>``, so that epochs can be compared. TensorBoard's page of custom
    scalars has the numbers to read first, ``coupling_transfer`` with its interval as a band. The metrics are written
    here where no TensorBoardStatsHandler of the evaluator writes them into the same folder. With several processes,
    that of rank 0 draws.

    {options}

    Raises:
        TypeError: When ``summary_writer`` cannot take images and scalars.
        ValueError: When ``figure_interval`` is neither a whole number, 1 or more, nor ``"best"``.

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
        self,
        ifim: IFIMHandler | IFIMMetric,
        summary_writer: Any = None,
        log_dir: str | Path = "./runs",
        global_epoch_transform: Callable[[int], int] | None = None,
        figure_interval: int | Literal["best"] = 1,
    ) -> None:
        missing = [name for name in ("add_image", "add_scalar", "flush") if not hasattr(summary_writer, name)]
        if summary_writer is not None and missing:
            raise TypeError(
                f"summary_writer must be a TensorBoard SummaryWriter, or be left out; got a "
                f"{type(summary_writer).__name__}, which has no {missing[0]}."
            )
        self.ifim = ifim
        self.log_dir = log_dir
        self.global_epoch_transform = global_epoch_transform
        self.figure_times = FigureTimes(figure_interval)
        self._writer = summary_writer
        self._prefix = "ifim_"
        self._last: int | None = None
        self._warned = self._laid_out = False

    def attach(self, engine: Evaluator) -> None:
        """Draw at the end of each evaluation epoch of this evaluator. A second time does nothing.

        Args:
            engine: a MONAI ``Evaluator``.

        Raises:
            OSError: When ``log_dir`` cannot be made or written.
        """
        # TensorBoard also writes to addresses (s3://)
        folder = Path(self.log_dir) if self._writer is None and "://" not in str(self.log_dir) else None
        use = InRun(self._draw, engine, "IFIMFigureHandler")
        self._prefix = listen(self.ifim, engine, use, use.who, folder, "log_dir", self.figure_times.late).prefix

    def draw(self, result: IFIMResult) -> None:
        """Write the scalars and the figures of one epoch.

        Raises:
            LeftOut: When all was written but some figures, which say why.
        """
        if causes := self._draw(result):
            raise LeftOut(causes)

    def _draw(self, result: IFIMResult, engine: Evaluator | None = None) -> dict[str, Exception]:
        """The figures that had to be left out, with the errors."""
        if self._writer is None:  # not before, so that processes that draw nothing write no file
            self._writer = SummaryWriter(log_dir=str(self.log_dir))
        if self.global_epoch_transform is not None:
            step = self.global_epoch_transform(result.epoch)
        else:
            step = result.epoch if engine is None else step_of(engine, result.epoch)
        if step == self._last and engine is not None and not self._warned:
            self._warned = True
            engine.logger.warning(
                f"IFIMFigureHandler writes at step {step} once more, over what stands there: the evaluator's epoch "
                "does not count up. Give global_epoch_transform, as 'lambda _: trainer.state.epoch'. This is said once."
            )
        self._last = step
        self._write_headline(result, step, engine)
        table = result.curve_table
        table = table[(table.direction != "unperturbed") & table.value.notna()]
        for endpoint, name, strength, value in zip(table.endpoint, table.direction, table.strength, table.value):
            self._writer.add_scalar(f"{self._prefix}curve_{endpoint}/{name}_{strength:g}", value, step)
        if not self.figure_times.due(engine):
            self._writer.flush()
            return {}
        pictures = draw_pictures(result)
        panels = {f"components_{number}": panel for number, panel in enumerate(pictures.panels, start=1)}
        if panels:
            panels = {"components": panels.pop("components_1")} | panels
        causes = dict(pictures.failed)
        for name, picture in {**pictures.figures, **panels}.items():
            with kept_apart(causes, name):
                encode = partial(pictures.figure_png, name) if name in pictures.figures else partial(as_png, picture)
                self._add_picture(f"{self._prefix.rstrip('_/')}/{name}", picture, encode, step)
        self._writer.flush()
        return causes

    def _add_picture(self, tag: str, picture: np.ndarray, encode: Callable[[], bytes], step: int) -> None:
        """A picture (H, W, 3), as the PNG file that it may be already where the writer takes one."""
        file_writer = getattr(self._writer, "file_writer", None)
        if type(self._writer) is not SummaryWriter or file_writer is None:
            self._writer.add_image(tag, picture, step, dataformats="HWC")
            return
        height, width, channels = picture.shape
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=encode())
        file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def _write_headline(self, result: IFIMResult, step: int, engine: Evaluator | None) -> None:
        """The layout of the page of custom scalars, once, and its numbers where nobody else writes them."""
        beside = metrics_beside(engine, self._writer)
        if not self._laid_out and hasattr(self._writer, "add_custom_scalars"):
            own = own_metrics(engine, self._prefix) if beside and engine is not None else ()
            self._writer.add_custom_scalars(scalar_layout(result, self._prefix, own))
            self._laid_out = True
        if not beside:
            for name, value in result.metrics.items():
                self._writer.add_scalar(self._prefix + name, value, step)
