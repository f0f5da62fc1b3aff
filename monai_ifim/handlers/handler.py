# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The iFIM for ``val_handlers``, where an overlay can add it to any bundle."""

from __future__ import annotations

import warnings

from ignite.engine import Events
from monai.engines import Evaluator

from monai_ifim.handlers.options import OPTIONS, documented
from monai_ifim.handlers.processes import process_count
from monai_ifim.handlers.watcher import Watcher


@documented(OPTIONS)
class IFIMHandler(Watcher):
    """What :class:`IFIMMetric` does, from a list of handlers, wherever it stands in it, with or without a key metric.

    The numbers are taken at the last iteration of the epoch, so that every handler of ``EPOCH_COMPLETED``
    (StatsHandler, TensorBoardStatsHandler, CheckpointSaver, ...) finds those of the same epoch. Where the length of the
    loader is not known, that is at ``EPOCH_COMPLETED``, and only handlers further down in the list find them. With
    several processes this route never communicates: each logs the numbers of its own images. Use :class:`IFIMMetric`
    there. The tables of the last evaluation are in ``result``.

    {options}

    Raises:
        TypeError: When ``network`` cannot be called.
        ValueError: When an option is out of range.

    Example::

        val_handlers:
        - _target_: monai_ifim.handlers.IFIMHandler
          likelihood: softmax
          max_images: 64
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.agreement.communicate = False
        self._finished = False

    @property
    def metric(self) -> Watcher:
        """What measures: the handler itself."""
        return self

    def attach(self, engine: Evaluator) -> None:
        """Attach to a MONAI evaluator. A second time does nothing.

        Args:
            engine: a MONAI ``Evaluator``.

        Raises:
            ValueError: When the engine has several networks, and none was given; or another iFIM has the same prefix
                there.
        """
        if engine.has_event_handler(self._finish, Events.EPOCH_COMPLETED):
            return  # the same overlay was listed twice
        if process_count() > 1:
            warnings.warn(
                "IFIMHandler does not communicate: each process logs the iFIM of its own images. Use IFIMMetric in "
                "key_val_metric or additional_metrics for the numbers of all processes.",
                stacklevel=2,
            )
        self.watch(engine)
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._finish_at_last_iteration)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _start(self, engine: Evaluator) -> None:
        self._finished = False

    def _finish_at_last_iteration(self, engine: Evaluator) -> None:
        length = engine.state.epoch_length
        if length is not None and engine.state.iteration % length == 0:
            self._finish(engine)

    def _finish(self, engine: Evaluator) -> None:
        if not self._finished:
            self._finished = True
            self.finish(engine)
