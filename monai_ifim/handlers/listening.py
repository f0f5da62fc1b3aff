# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""From what measures to those who draw or write the results."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ignite.engine import Events
from monai.engines import Evaluator

from monai_ifim.handlers.processes import process_rank
from monai_ifim.handlers.watcher import Watcher
from monai_ifim.interrupts import deferred
from monai_ifim.model import preserve_state
from monai_ifim.results import IFIMResult


def listen(
    ifim: Any,
    engine: Evaluator,
    use: Callable[[IFIMResult], Any],
    who: str,
    folder: Path | None,
    option: str,
    late: bool = False,
) -> Watcher:
    """Hand what ``ifim`` measures at each evaluation epoch to ``use``, whichever of them is attached first.

    What fails in ``use`` is reported once, and does not stop the run. A second call with the same does nothing. With
    ``late``, it is handed over when all else of the epoch is done, so that ``engine.state.best_metric`` is of this
    epoch. Returns ``ifim``.

    Raises:
        OSError: When the folder that this option names cannot be made or written.
        TypeError: When ``ifim`` is neither an :class:`IFIMHandler` nor an :class:`IFIMMetric`.
    """
    if folder is not None and process_rank() == 0:  # which alone writes
        _check_writable(folder, f"{option} of {who}")
    if not isinstance(ifim, Watcher):
        raise TypeError(f"ifim of {who} must be an IFIMHandler or IFIMMetric, got {type(ifim).__name__}.")
    listener = _Listener(ifim, engine, use, who, late)
    if listener not in ifim.listeners:
        ifim.listeners.append(listener)
        engine.add_event_handler(Events.STARTED, listener.check)
    return ifim


@dataclass
class _Listener:
    ifim: Watcher
    engine: Evaluator
    use: Callable[[IFIMResult], Any]
    who: str
    late: bool = False
    reported: bool = field(default=False, compare=False)
    waiting: IFIMResult | None = field(default=None, compare=False)

    def __call__(self, engine: Evaluator, result: IFIMResult) -> None:
        if engine is not self.engine:
            return
        if self.late:
            self.waiting = result
        else:
            self.hand_over(engine, result)

    def hand_over(self, engine: Evaluator, result: IFIMResult) -> None:
        try:
            self.use(result)
        except Exception:
            if not self.reported:
                engine.logger.exception(
                    f"{self.who} failed at epoch {result.epoch}; the run goes on, and this is said once."
                )
            self.reported = True

    @deferred
    def at_end(self, engine: Evaluator) -> None:
        result, self.waiting = self.waiting, None
        if result is not None:
            with preserve_state(self.ifim.recorder.network):
                self.hand_over(engine, result)

    def check(self, engine: Evaluator) -> None:
        if not self.ifim.watches(engine):
            raise ValueError(
                f"The ifim of {self.who} is not attached to this evaluator. Put the same object into its val_handlers "
                "(IFIMHandler) or additional_metrics (IFIMMetric; MONAI ignores them where there is no key metric)."
            )
        self.waiting = None  # of an evaluation that an error ended
        if self.late and not engine.has_event_handler(self.at_end, Events.EPOCH_COMPLETED):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.at_end)  # behind all that were attached


def _check_writable(folder: Path, option: str) -> None:
    """Refuse a folder that cannot be made or written, before an evaluation has run. Nothing is made."""
    folder = folder.resolve()
    try:
        place = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(
            f"{option} is {folder}, which cannot be made or written ({error}). Choose a folder that can."
        ) from error
