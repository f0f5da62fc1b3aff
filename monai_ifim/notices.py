# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
