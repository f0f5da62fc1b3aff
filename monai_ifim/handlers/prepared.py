# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The further inputs that an evaluator's ``prepare_batch`` gave, taken from its own call."""

from __future__ import annotations

from typing import Any

from monai.engines import Evaluator, default_prepare_batch

from monai_ifim.handlers.inputs import FurtherInputs


class Prepared:
    """A ``prepare_batch`` that keeps the further inputs of its last call.

    The evaluator keeps image and label only, and a second call could draw other random numbers, or change the batch
    once more. So this takes the place of the function for the time between the start of an iteration and the end of the
    forward pass.

    Args:
        original: the function.

    Attributes:
        inputs: of the last call; none before.

    Example:
        >>> prepared = Prepared(lambda batch: (batch, None, (3,), {}))
        >>> _ = prepared("images")
        >>> prepared.inputs.arguments
        (3,)
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self.inputs = FurtherInputs()

    def __call__(self, *arguments: Any, **keyword_arguments: Any) -> Any:
        """What the function gives."""
        prepared = self.original(*arguments, **keyword_arguments)
        self.inputs = FurtherInputs(tuple(prepared[2]), prepared[3]) if len(prepared) == 4 else FurtherInputs()
        return prepared

    @classmethod
    def put_on(cls, engine: Evaluator) -> Prepared:
        """Take the function's place; where another one has it already, that."""
        function = getattr(engine, "prepare_batch", default_prepare_batch)
        if isinstance(function, cls):
            return function
        prepared = cls(function)
        if function is not default_prepare_batch:  # which gives no further inputs
            engine.prepare_batch = prepared
        return prepared

    @staticmethod
    def take_off(engine: Evaluator) -> None:
        """Give the function its place back."""
        prepared = getattr(engine, "prepare_batch", None)
        if isinstance(prepared, Prepared):
            engine.prepare_batch = prepared.original
