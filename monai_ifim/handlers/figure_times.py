# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""At which evaluations there are figures."""

from __future__ import annotations

from typing import Any, Literal

from monai.engines import Evaluator

from monai_ifim.checks import is_whole

BEST: Literal["best"] = "best"


class FigureTimes:
    """Draws at the first evaluation, and then at every n-th or where the key metric is the best so far.

    Args:
        figure_interval: n, or ``"best"``. Evaluations without a key metric are then all drawn.

    Raises:
        ValueError: When it is neither.
    """

    def __init__(self, figure_interval: Any) -> None:
        if figure_interval != BEST and not is_whole(figure_interval, 1):
            raise ValueError(
                f"figure_interval must be a whole number, 1 or more, or '{BEST}', got {figure_interval!r}."
            )
        self.figure_interval = figure_interval
        self._evaluations = 0
        self._best_metric: Any = None

    @property
    def late(self) -> bool:
        """Whether the key metric must be known before."""
        return bool(self.figure_interval == BEST)

    def due(self, engine: Evaluator | None) -> bool:
        """Whether this evaluation is drawn; to be asked once of each. By hand, without an engine, always."""
        if engine is None:
            return True
        number, self._evaluations = self._evaluations, self._evaluations + 1
        if not self.late:
            return bool(number % self.figure_interval == 0)
        before, self._best_metric = self._best_metric, getattr(engine.state, "best_metric", None)
        # another object, since the epoch is 1 each time where an evaluator is run by hand
        return number == 0 or self._best_metric is not before or engine.state.key_metric_name is None
