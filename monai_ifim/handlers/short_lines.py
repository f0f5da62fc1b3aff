# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A line of few numbers in the log: MONAI's StatsHandler prints all that stands in ``engine.state.metrics``."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ignite.engine import Engine
from monai.engines import Evaluator
from monai.handlers import StatsHandler
from monai.utils import is_scalar

from monai_ifim.handlers.steps import handlers_of

MOST_NUMBERS = 8
LEAST_OF_OURS = 3  # where the evaluator has many numbers of its own


def shorten(engine: Evaluator, ours: Iterable[str], headline: Sequence[str]) -> bool:
    """Have the next line of each StatsHandler of an evaluator show the headline only, of these numbers of ours.

    The evaluator's own numbers come first, all of them; ours fill the line up to eight numbers. Handlers with a printer
    of their own are left alone. ``engine.state.metrics`` stays as it is.

    Returns:
        Whether there is such a handler.
    """
    found = False
    for handler in handlers_of(engine):
        if not isinstance(handler, StatsHandler):
            continue
        if handler.epoch_print_logger is None:
            handler.epoch_print_logger = _ShortLine(handler, frozenset(), ())
        if isinstance(handler.epoch_print_logger, _ShortLine):
            line: _ShortLine = handler.epoch_print_logger
            shown = dict.fromkeys([*line.headline, *headline])  # another one may have a prefix of its own
            handler.epoch_print_logger = _ShortLine(handler, line.ours | set(ours), tuple(shown))
            found = True
    return found


@dataclass(frozen=True)
class _ShortLine:
    """Prints one line in place of a StatsHandler's, which then prints as before again."""

    handler: StatsHandler
    ours: frozenset[str]
    headline: tuple[str, ...]

    def __call__(self, engine: Engine) -> None:
        self.handler.epoch_print_logger = None
        metrics = engine.state.metrics
        own = sorted(metrics.keys() - self.ours, key=lambda name: (name.startswith("ifim_"), name))
        key = [name for name in [getattr(engine.state, "key_metric_name", None)] if name in self.ours]
        room = max(MOST_NUMBERS - len(own), LEAST_OF_OURS)
        ours = [name for name in dict.fromkeys([*key, *self.headline]) if name in metrics][:room]
        epoch = self.handler.global_epoch_transform(engine.state.epoch)
        numbers = "".join(self._written(name, metrics[name]) for name in [*own, *ours])
        if numbers:
            self.handler.logger.info(f"Epoch[{epoch}] Metrics -- {numbers}")
        rest: Any = SimpleNamespace(state=copy.copy(engine.state))
        rest.state.metrics = {}  # printed above; behind it come the key metric and what else is asked for
        self.handler.epoch_completed(rest)

    def _written(self, name: str, value: Any) -> str:
        return self.handler.key_var_format.format(name, value) if is_scalar(value) else f"{name}: {value}"
