# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""From what measures to those who draw or write the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ignite.engine import Events
from monai.engines import Evaluator

from monai_ifim.handlers.watcher import Watcher
from monai_ifim.results import IFIMResult


def listen(ifim: Any, engine: Evaluator, use: Callable[[IFIMResult], Any], who: str) -> Watcher:
    """Hand what ``ifim`` measures at each evaluation epoch to ``use``, whichever of them is attached first.

    What fails in ``use`` is reported once, and does not stop the run. A second call with the same does nothing.

    Returns:
        ``ifim``.

    Raises:
        TypeError: When ``ifim`` is neither an :class:`IFIMHandler` nor an :class:`IFIMMetric`.
    """
    if not isinstance(ifim, Watcher):
        raise TypeError(f"ifim of {who} must be an IFIMHandler or IFIMMetric, got {type(ifim).__name__}.")
    listener = _Listener(ifim, engine, use, who)
    if listener not in ifim.listeners:
        ifim.listeners.append(listener)
        engine.add_event_handler(Events.STARTED, listener.check)
    return ifim


class _Listener:
    """Hands the results of one evaluator on."""

    def __init__(self, ifim: Watcher, engine: Evaluator, use: Callable[[IFIMResult], Any], who: str) -> None:
        self.ifim, self.engine, self.use, self.who = ifim, engine, use, who
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
        if not self.ifim.watches(engine):
            raise ValueError(
                f"The ifim of {self.who} is not attached to this evaluator. Put the same object into its val_handlers "
                "(IFIMHandler) or additional_metrics (IFIMMetric; MONAI ignores them where there is no key metric)."
            )
