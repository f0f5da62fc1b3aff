# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""How far a long computation is: a bar for who asks for one, or words for whoever took them over; else nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from tqdm import tqdm

__all__ = ["Counter", "counted", "progress_to"]

# A bar in a file is a line each time; on a screen it is drawn over.
_SECONDS_IN_A_FILE = 10.0

Words = Callable[[], str]  # asked for where somebody reads them only, since numbers on a GPU must be waited for
Listener = Callable[[int, Words], None]

_LISTENER: ContextVar[Listener | None] = ContextVar("progress", default=None)


class Counter(Protocol):
    """Is told that ``steps`` more are done, and where in the next one the computation is."""

    def __call__(self, steps: int, words: Words = str) -> None: ...  # noqa: D102


@contextmanager
def counted(what: str, total: int, unit: str, show: bool) -> Iterator[Counter]:
    """A counter of ``total`` steps.

    Args:
        what: is computed, before the bar.
        total: number of steps.
        unit: what one step is.
        show: draw a bar on the standard error stream; where that is no screen, a line every 10 seconds.

    Example:
        >>> told = []
        >>> with progress_to(lambda steps, words: told.append((steps, words()))):
        ...     with counted("spectra", 2, "image", show=False) as count:
        ...         count(1)
        ...         count(0, lambda: "product 3")
        >>> told
        [(1, ''), (0, 'product 3')]
    """
    listener = _LISTENER.get()
    if not show:

        def tell(steps: int, words: Words = str) -> None:
            if listener is not None:
                listener(steps, words)

        yield tell
        return
    seconds = 0.1 if sys.stderr.isatty() else _SECONDS_IN_A_FILE
    with tqdm(desc=what, total=total, unit=unit, mininterval=seconds, maxinterval=seconds, miniters=0) as bar:

        def update(steps: int, words: Words = str) -> None:
            if words():
                bar.set_postfix_str(words(), refresh=False)
            bar.update(steps)
            if listener is not None:
                listener(steps, words)

        yield update


@contextmanager
def progress_to(listener: Listener) -> Iterator[None]:
    """Have a listener told of every step that is counted inside, and of the words between two steps."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)
