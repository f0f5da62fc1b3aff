# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Warnings that a caller can take over, without a touch on Python's warning filters.

``warnings.catch_warnings`` makes Python forget which warnings it has shown: inside a run that is watched, everybody
else's would be shown again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["notice", "notices_to"]

Listener = Callable[[str, type[Warning]], None]

_LISTENER: ContextVar[Listener | None] = ContextVar("notices", default=None)


def notice(message: str, category: type[Warning] = UserWarning, stacklevel: int = 2) -> None:
    """Warn, or tell whoever took the notices over; ``stacklevel`` as in ``warnings.warn``."""
    listener = _LISTENER.get()
    if listener is None:
        warnings.warn(message, category, stacklevel=stacklevel + 1)
    else:
        listener(message, category)


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
