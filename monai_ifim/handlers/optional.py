# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Outputs that may fail without taking others with them: each is left out with its own reason, which is said once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from monai.engines import Evaluator

from monai_ifim.results import IFIMResult


class LeftOut(RuntimeError):
    """Some outputs could not be written; all others were.

    Args:
        causes: what was left out, with its error.
    """

    def __init__(self, causes: Mapping[str, Exception]) -> None:
        super().__init__("; ".join(_by_reason(causes).values()))
        self.causes = dict(causes)


@contextmanager
def kept_apart(causes: dict[str, Exception], what: str) -> Iterator[None]:
    """Keep an error of what happens inside under its name."""
    try:
        yield
    except Exception as error:
        causes[what] = error


@dataclass(frozen=True)
class InRun:
    """Writes the results of an evaluator; what had to be left out is logged, once for each reason.

    Args:
        write: writes what it can of a result, and returns what it left out, with the errors.
        engine: the evaluator.
        who: writes.
    """

    write: Callable[[IFIMResult, Evaluator], Mapping[str, Exception]]
    engine: Evaluator
    who: str
    _said: set[str] = field(default_factory=set, compare=False)

    def __call__(self, result: IFIMResult) -> None:  # noqa: D102
        causes = self.write(result, self.engine)
        for reason, line in _by_reason(causes).items():
            if reason not in self._said:
                self.engine.logger.warning(
                    f"{self.who} left out at epoch {result.epoch}: {line}. All else was written; this is said once."
                )
                first = next(error for error in causes.values() if _reason(error) == reason)
                self.engine.logger.debug(reason, exc_info=first)
                self._said.add(reason)


def _by_reason(causes: Mapping[str, Exception]) -> dict[str, str]:
    """For each reason, what was left out for it, and the reason."""
    found: dict[str, list[str]] = {}
    for what, error in causes.items():
        found.setdefault(_reason(error), []).append(what)
    return {
        reason: f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} ({reason})"
        for reason, names in found.items()
    }


def _reason(error: Exception) -> str:
    return f"{error}" if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: {error}"
