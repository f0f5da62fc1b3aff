# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""How far a long evaluation is, as lines of a log."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS_BETWEEN = 10.0


class ProgressLog:
    """A listener of :func:`monai_ifim.progress.progress_to` that says how far an evaluation is, every 10 seconds.

    Args:
        say: writes a line; default nowhere.
        seconds: least time before the first line, and between two.

    Example:
        >>> log = ProgressLog(print, seconds=0.0)
        >>> log.expect("chosen images measured", total=4, done=1)
        >>> log(1)
        iFIM: 2 of 4 chosen images measured
        >>> log(0, lambda: "product 3")
        iFIM: 2 of 4 chosen images measured (product 3)
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None, seconds: float = SECONDS_BETWEEN) -> None:
        self.say, self.seconds = say, seconds
        self.what, self.total, self.done = "", 0, 0
        self._last = time.monotonic()

    def expect(self, what: str, total: int, done: int = 0) -> None:
        """What is counted from now on, and how many of these there are."""
        self.what, self.total, self.done = what, total, done

    def __call__(self, steps: int, words: Callable[[], str] = str) -> None:
        """Count ``steps`` more; ``words`` tell where in the next one the computation is."""
        self.done += steps
        now = time.monotonic()
        if now - self._last >= self.seconds:
            self._last = now
            detail = f" ({words()})" if words() else ""
            self.say(f"iFIM: {min(self.done, self.total)} of {self.total} {self.what}{detail}")
