# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What an error does: on all processes the same, and either it stops the run or it is reported and the run goes on."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import ignite.distributed as idist

from monai_ifim.handlers.processes import process_count, process_rank

OnError = Literal["raise", "continue"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Failure:
    """An error as text, which holds none of the images that the frames of the error hold."""

    message: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        message = "".join(traceback.format_exception_only(error)).strip()
        return cls(message, "".join(traceback.format_exception(error)))


class WatchError(RuntimeError):
    """One or several processes could not measure; the same error on all of them, with the ranks and messages."""

    def __init__(self, failure: _Failure) -> None:
        super().__init__(f"{failure.message}\n\n{failure.trace}")
        self.failure = failure


class LostProcessError(RuntimeError):
    """Another process did not come by, so that the processes are out of step."""


class Agreement:
    """Errors while measuring: kept where they must wait for the other processes, then raised or reported.

    Attributes:
        communicate: whether all processes come by, where there are several. Otherwise each stands alone.
        failure: the error that is kept.
    """

    def __init__(self, on_error: OnError = "raise") -> None:
        self.on_error = on_error
        self.communicate = True
        self.failure: _Failure | None = None
        self._said: set[str] = set()

    @property
    def together(self) -> bool:
        """Whether there are several processes, and all come by."""
        return self.communicate and process_count() > 1

    @contextmanager
    def careful(self) -> Iterator[None]:
        """Keep an error for :meth:`gathered`, unless it may stop this process at once."""
        try:
            yield
        except Exception as error:
            if self.on_error == "raise" and not self.together:
                raise
            self.failure = _Failure.of(error)

    def gathered(self, make: Callable[[], _T]) -> list[_T]:
        """What each process makes, in the order of ranks; of this process alone, where they do not communicate.

        Raises:
            WatchError: When a process failed, now or earlier in :meth:`careful`; the same on all of them. What fails
                now on a process that stands alone is raised as it is.
            LostProcessError: When a process did not come by.
        """
        if not self.together:
            if self.failure is not None:
                raise WatchError(self.failure)
            return [make()]
        mine: _T | None = None
        if self.failure is None:
            try:
                mine = make()
            except Exception as error:
                self.failure = _Failure.of(error)
        try:
            everyone = cast("list[tuple[_Failure | None, _T]]", idist.all_gather((self.failure, mine)))
        except Exception as error:
            raise LostProcessError(
                f"Rank {process_rank()} lost another process while iFIM gathered its numbers ({error}). That process "
                "died, failed outside iFIM or waits elsewhere; its own output says why."
            ) from error
        failures = {rank: failure for rank, (failure, _) in enumerate(everyone) if failure is not None}
        if failures:
            raise WatchError(_of_ranks(failures))
        return [value for _, value in everyone]

    def settle(self, log: Callable[[str], None], error: BaseException) -> None:
        """Report an error (on rank 0, where it is of all), once for each message; raise it where it ends the run."""
        if self.on_error == "raise" or isinstance(error, LostProcessError) or not isinstance(error, Exception):
            raise error
        if self.together and process_rank() != 0:
            return
        failure = error.failure if isinstance(error, WatchError) else _Failure.of(error)
        self.once(
            log,
            f"iFIM has no numbers of this evaluation; the run goes on, and this is said once. {failure.message}",
            f"\n{failure.trace}",
        )

    def once(self, log: Callable[[str], None], message: str, more: str = "") -> None:
        """Log a message, with more lines behind it, unless it was said before."""
        if message not in self._said:
            self._said.add(message)
            log(message + more)


def _of_ranks(failures: dict[int, _Failure]) -> _Failure:
    ranks: dict[str, list[int]] = {}
    for rank, failure in failures.items():
        ranks.setdefault(failure.message, []).append(rank)
    listed = [f"on rank {', '.join(map(str, where))}: {message}" for message, where in ranks.items()]
    first = min(failures)
    return _Failure(f"iFIM failed {'; '.join(listed)}", f"Rank {first}: {failures[first].trace}")
