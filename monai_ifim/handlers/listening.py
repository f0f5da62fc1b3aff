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
from monai_ifim.results import IFIMResult


def listen(
    ifim: Any, engine: Evaluator, use: Callable[[IFIMResult], Any], who: str, folder: Path | None, option: str
) -> Watcher:
    """Hand what ``ifim`` measures at each evaluation epoch to ``use``, whichever of them is attached first.

    What fails in ``use`` is reported once, and does not stop the run. A second call with the same does nothing. Returns
    ``ifim``.

    Raises:
        OSError: When the folder that this option names cannot be made or written.
        TypeError: When ``ifim`` is neither an :class:`IFIMHandler` nor an :class:`IFIMMetric`.
    """
    if folder is not None and process_rank() == 0:  # which alone writes
        _check_writable(folder, f"{option} of {who}")
    if not isinstance(ifim, Watcher):
        raise TypeError(f"ifim of {who} must be an IFIMHandler or IFIMMetric, got {type(ifim).__name__}.")
    listener = _Listener(ifim, engine, use, who)
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
    reported: bool = field(default=False, compare=False)

    def __call__(self, engine: Evaluator, result: IFIMResult) -> None:
        try:
            if engine is self.engine:
                self.use(result)
        except Exception:
            if not self.reported:
                engine.logger.exception(
                    f"{self.who} failed at epoch {result.epoch}; the run goes on, and this is said once."
                )
            self.reported = True

    def check(self, engine: Evaluator) -> None:
        if not self.ifim.watches(engine):
            raise ValueError(
                f"The ifim of {self.who} is not attached to this evaluator. Put the same object into its val_handlers "
                "(IFIMHandler) or additional_metrics (IFIMMetric; MONAI ignores them where there is no key metric)."
            )


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
