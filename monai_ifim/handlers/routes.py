# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The two ways into an evaluator: as an ignite metric, which communicates between processes, and as a handler."""

from __future__ import annotations

import threading
import warnings
from typing import Any

from ignite.engine import Events
from ignite.metrics import Metric
from monai.engines import Evaluator

from monai_ifim.handlers.options import OPTIONS, documented
from monai_ifim.handlers.processes import process_count, process_rank
from monai_ifim.handlers.watcher import Functions, Watcher


class _Route(Watcher):
    """One evaluation at a time; and copies, which are made anew from the options, with the last result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._lock = threading.RLock()
        self._measured: int | None = None  # the evaluator whose epoch is open
        self._overtaken: set[int] = set()  # those whose epoch was open when that of another one began

    def __getstate__(self) -> dict[str, Any]:
        return {"options": super().__getstate__(), "result": self.result, "metric_details": self.metric_details}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state["options"])
        self.result, self.metric_details = state["result"], state["metric_details"]

    def begin(self, engine: Evaluator) -> None:
        with self._lock:
            if self._measured is not None:
                self._overtaken.add(self._measured)
            self._overtaken.discard(id(engine))
            self._measured = id(engine)
            super().begin(engine)

    def prepare(self, engine: Evaluator) -> None:
        with self._lock:
            if self._measures(engine):
                super().prepare(engine)

    def observe(self, engine: Evaluator) -> None:
        with self._lock:
            if self._measures(engine):
                super().observe(engine)

    def finish(self, engine: Evaluator) -> None:
        with self._lock:
            if self._measures(engine):
                self._measured = None
                super().finish(engine)

    def _measures(self, engine: Evaluator) -> bool:
        """Whether the open epoch is that of this evaluator; an error where it was, and another one began."""
        if id(engine) in self._overtaken:
            message = (
                "Another evaluation began before this one was at its end, and one object measures one at a time. Give "
                "each evaluator that runs inside another one, or in a thread of its own, its own IFIMHandler or "
                "IFIMMetric."
            )
            self.agreement.settle(engine.logger.error, ValueError(message))
        return self._measured == id(engine)


@documented(OPTIONS)
class IFIMMetric(_Route, Metric):
    """Input-dependent Fisher information of an evaluator's network, and what perturbations do to its predictions.

    For ``key_val_metric`` or ``additional_metrics`` of a MONAI evaluator (which ignores the latter where there is no
    key metric; see :class:`IFIMHandler` for ``val_handlers``). Each evaluation epoch it computes, for a fixed choice of
    images, the spectrum of the iFIM (:func:`monai_ifim.input_fisher`) and the effect of equally large changes along
    several directions (:func:`monai_ifim.sensitivity_curves`), and writes scalars into ``engine.state.metrics`` (see
    :func:`monai_ifim.statistics.summarise`, with ``prefix``) and values of each image into
    ``engine.state.metric_details`` (NaN for images that were not chosen). The state of the network and all random
    states are preserved. The tables of the last evaluation are in ``result``.

    {options}

    Raises:
        TypeError: When ``network`` cannot be called.
        ValueError: When an option is out of range.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        Metric.__init__(self)

    def update(self, output: Any) -> None:
        """Not used: the images are seen when they are still a batch (see :meth:`observe`)."""

    def attach(self, engine: Evaluator, name: str) -> None:  # type: ignore[override]
        """Attach to a MONAI evaluator, under any name; the metrics have their own names. A second time does nothing.

        Args:
            engine: a MONAI ``Evaluator``.
            name: as in ``additional_metrics: {name: IFIMMetric()}``. As the key metric it must be one of the metrics'
                names.

        Raises:
            ValueError: When the engine has several networks, another IFIMMetric has the same prefix there, ``name`` is
                the key metric's and no metric that this one logs at every epoch, or the loader of this process is empty
                and others would wait for it.
        """
        always = self.interval == 1 and self.on_error == "raise"
        if getattr(engine.state, "key_metric_name", None) == name and not (always and self.logs(name)):
            raise ValueError(
                f"The key metric is named '{name}'. As the key metric, IFIMMetric needs interval=1, on_error='raise' "
                f"and the name of one of its numbers, for instance '{self.prefix}lambda_max'; or put it into "
                "additional_metrics."
            )
        if process_count() > 1 and engine.state.epoch_length == 0:
            raise ValueError(
                f"The loader of rank {process_rank()} is empty. MONAI skips the evaluation there, and the other "
                "ranks would wait for it. Give each rank one batch at least (DistributedSampler pads), or use "
                "IFIMHandler, which does not communicate."
            )
        self.watch(engine)

    def detach(self, engine: Evaluator) -> None:  # type: ignore[override]
        """Detach from the evaluator."""
        for event, function in self.functions():
            if engine.has_event_handler(function, event):
                engine.remove_event_handler(function, event)

    def functions(self) -> Functions:  # noqa: D102
        return [*super().functions(), (Events.EPOCH_COMPLETED, self.completed)]

    def completed(self, engine: Evaluator, name: str = "") -> None:  # type: ignore[override]
        """Write the numbers of the epoch into ``engine.state``; ``name`` is not used, the metrics have their own."""
        self.finish(engine)


@documented(OPTIONS)
class IFIMHandler(_Route):
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
        if process_count() > 1 and not self.watches(engine):
            warnings.warn(
                "IFIMHandler does not communicate: each process logs the iFIM of its own images. Use IFIMMetric in "
                "key_val_metric or additional_metrics for the numbers of all processes.",
                stacklevel=2,
            )
        self.watch(engine)

    def functions(self) -> Functions:  # noqa: D102
        last = (Events.ITERATION_COMPLETED, self._finish_at_last_iteration), (Events.EPOCH_COMPLETED, self.finish)
        return [*super().functions(), *last]

    def _finish_at_last_iteration(self, engine: Evaluator) -> None:
        length = engine.state.epoch_length
        if length is not None and engine.state.iteration % length == 0:
            self.finish(engine)
