# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Where the time of an evaluation goes: the evaluation itself, and each part of what iFIM adds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Profile:
    """Wall time of an epoch, in seconds, by part, if wanted; on a GPU each part then waits for what it started."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.seconds: dict[str, float] = {}
        self._begin = 0.0

    def start(self) -> None:
        """Begin an epoch."""
        self.seconds = {}
        self._begin = self._now()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add what happens inside to a part."""
        begin = self._now()
        try:
            yield
        finally:
            if self.wanted:
                self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - begin

    def finish(self) -> None:
        """Give what is left of the epoch to the part ``evaluation``: all that iFIM did not add."""
        if self.wanted:
            self.seconds["evaluation"] = self._now() - self._begin - sum(self.seconds.values())

    def table(self) -> str:
        """The parts as lines of text, with their shares of the evaluation itself."""
        whole = self.seconds.get("evaluation", 0.0)
        lines = [f"{'part':<14}{'seconds':>9}{'of the evaluation':>19}"]
        for name, value in self.seconds.items():
            share = f"{value / whole:.2f}" if whole > 0 else ""
            lines.append(f"{name:<14}{value:>9.3f}{share:>19}")
        return "\n".join(lines)

    def _now(self) -> float:
        if self.wanted and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter() if self.wanted else 0.0
