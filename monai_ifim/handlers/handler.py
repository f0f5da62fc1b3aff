# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The iFIM metric for ``val_handlers``, where an overlay can add it to any bundle."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from ignite.engine import Events
from monai.engines import Evaluator, IterationEvents

from monai_ifim.handlers.metric import IFIMMetric
from monai_ifim.handlers.processes import process_count
from monai_ifim.handlers.result import IFIMResult

__all__ = ["IFIMHandler", "listen"]


class IFIMHandler:
    """Attach an :class:`IFIMMetric` from a list of handlers, wherever it stands in it, with or without a key metric.

    The numbers are taken at the last iteration of the epoch, so that every handler of ``EPOCH_COMPLETED``
    (StatsHandler, TensorBoardStatsHandler, CheckpointSaver, ...) finds those of the same epoch. Where the length of the
    loader is not known, that is at ``EPOCH_COMPLETED``, and only handlers further down in the list find them. With
    several processes this route never communicates: each logs the numbers of its own images. Use :class:`IFIMMetric`
    there.

    Args:
        options: those of :class:`IFIMMetric`.

    Example::

        val_handlers:
        - _target_: monai_ifim.handlers.IFIMHandler
          predictive: softmax
          max_images: 64
    """

    def __init__(self, **options: Any) -> None:
        self.metric = IFIMMetric(**options)
        self.metric.agreement.communicate = False
        self._finished = False

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
        self.metric.watch(engine)
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
            self.metric.completed(engine, name="ifim")


def listen(ifim: Any, engine: Evaluator, use: Callable[[IFIMResult], Any], who: str) -> IFIMMetric:
    """Hand what ``ifim`` measures at each evaluation epoch to ``use``, whichever of them is attached first.

    What fails in ``use`` is reported once, and does not stop the run. A second call with the same does nothing.

    Returns:
        The metric behind ``ifim``.

    Raises:
        TypeError: When ``ifim`` is neither an :class:`IFIMHandler` nor an :class:`IFIMMetric`.
    """
    metric = ifim.metric if isinstance(ifim, IFIMHandler) else ifim
    if not isinstance(metric, IFIMMetric):
        raise TypeError(f"ifim of {who} must be an IFIMHandler or IFIMMetric, got {type(ifim).__name__}.")
    listener = _Listener(metric, engine, use, who)
    if listener not in metric.listeners:
        metric.listeners.append(listener)
        engine.add_event_handler(Events.STARTED, listener.check)
    return metric


class _Listener:
    """Hands the results of one evaluator on."""

    def __init__(self, metric: IFIMMetric, engine: Evaluator, use: Callable[[IFIMResult], Any], who: str) -> None:
        self.metric, self.engine, self.use, self.who = metric, engine, use, who
        self._reported = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Listener) and other.engine is self.engine and other.use == self.use

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, engine: Evaluator, result: IFIMResult) -> None:
        if engine is not self.engine:
            return
        try:
            self.use(result)
        except Exception:
            if not self._reported:
                engine.logger.exception(
                    f"{self.who} failed at epoch {result.epoch}; the run goes on, and this is said once."
                )
            self._reported = True

    def check(self, engine: Evaluator) -> None:
        if not engine.has_event_handler(self.metric.observe, IterationEvents.FORWARD_COMPLETED):
            raise ValueError(
                f"The ifim of {self.who} is not attached to this evaluator. Put the same object into its val_handlers "
                "(IFIMHandler) or additional_metrics (IFIMMetric; MONAI ignores them where there is no key metric)."
            )
