# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Warnings that a caller can take over, without a touch on Python's warning filters.

``warnings.catch_warnings`` makes Python forget which warnings it has shown: inside a run that is watched, everybody
else's would be shown again.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

__all__ = ["notice", "notices_to"]

_PACKAGE = Path(__file__).parent

Listener = Callable[[str, type[Warning]], None]

_LISTENER: ContextVar[Listener | None] = ContextVar("notices", default=None)


def notice(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside this package that called it, or tell whoever took the notices over."""
    listener = _LISTENER.get()
    if listener is None:
        warnings.warn(message, category, stacklevel=_frames_inside())
    else:
        listener(message, category)


def _frames_inside() -> int:
    """How many frames, this one not counted, lead to the first one outside the package."""
    frame, count = sys._getframe(1), 1
    while frame.f_back is not None and Path(frame.f_code.co_filename).is_relative_to(_PACKAGE):
        frame, count = frame.f_back, count + 1
    return count


@contextmanager
def notices_to(listener: Listener) -> Iterator[None]:
    """Take over what :func:`notice` says inside.

    Example:
        >>> with notices_to(lambda message, category: print(category.__name__, message)):
        ...     notice("short of memory")
        UserWarning short of memory
    """
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)
