# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""At which step an evaluation stands in a log: where its neighbours in the evaluator put it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from monai.engines import Evaluator
from monai.handlers import TensorBoardStatsHandler


def step_of(engine: Evaluator, epoch: int) -> int:
    """The step of an evaluation, by the ``global_epoch_transform`` of MONAI's handlers in the same evaluator.

    An evaluator that is run by hand has epoch 1 every time; its TensorBoardStatsHandler is then told the trainer's.
    Those of TensorBoardStatsHandler count, or where there is none those of StatsHandler and its like; of several, the
    first that is not the evaluator's epoch.
    """
    # of its own: ignite's metrics have attributes of any name
    neighbours = [handler for handler in handlers_of(engine) if callable(vars(handler).get("global_epoch_transform"))]
    in_tensorboard = [handler for handler in neighbours if isinstance(handler, TensorBoardStatsHandler)]
    steps = [handler.global_epoch_transform(epoch) for handler in in_tensorboard or neighbours]
    return next((step for step in steps if step != epoch), epoch)


def handlers_of(engine: Evaluator) -> Iterator[Any]:
    """The objects whose methods listen to an engine, behind filters of events too; one may come several times."""
    for listed in engine._event_handlers.values():
        for function, *_ in listed:
            handler = getattr(inspect.unwrap(function), "__self__", None)
            if hasattr(handler, "__dict__"):
                yield handler
