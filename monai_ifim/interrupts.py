# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Interrupts that wait for a moment at which nothing is half done.

A signal handler that raises (Ctrl-C, a time limit) can do so between any two steps, also between the ``__exit__`` of a
``with`` and what it restores, in code of others as well. So such handlers are called at :func:`safe_point` instead, or
at the end.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGVTALRM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]

_handlers: dict[int, Any] = {}  # the callers', while their signals wait
_last: dict[int, Any] = {}  # the same, afterwards
_waiting: list[tuple[int, Any]] = []


def deferred(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """A decorator: signals with a Python handler wait for a safe point, or for the end of the function.

    The second one while one waits is answered at once, so that nobody waits in vain. Other threads than the main one
    get no signals. A signal without a Python handler (SIGKILL, or SIGTERM by default) ends the process as always.

    Example:
        >>> @deferred
        ... def twice(number):
        ...     return 2 * number
        >>> twice(2)
        4
    """

    @wraps(function)
    def inside(*arguments: _P.args, **keyword_arguments: _P.kwargs) -> _T:
        if _handlers or threading.current_thread() is not threading.main_thread():
            return function(*arguments, **keyword_arguments)
        try:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler) and handler is not _wait:
                    _handlers[number] = _last[number] = handler
                    signal.signal(number, _wait)
            return function(*arguments, **keyword_arguments)
        finally:
            _give_back()

    return inside


def safe_point() -> None:
    """Answer a signal that waits; its handler may raise."""
    if _waiting and threading.current_thread() is threading.main_thread():
        number, frame = _waiting.pop(0)
        _handlers[number](number, frame)


def _wait(number: int, frame: Any) -> None:
    if number not in _handlers:  # somebody kept this function as the handler that was there
        _last[number](number, frame)
    elif _waiting:
        _handlers[number](number, frame)
    else:
        _waiting.append((number, frame))


def _give_back() -> None:
    handlers = dict(_handlers)
    error: BaseException | None = None
    while _handlers:
        try:  # a handler that is back may raise before the others are
            for number in list(_handlers):
                if signal.getsignal(number) is _wait:  # else somebody set another one meanwhile
                    signal.signal(number, _handlers[number])
                del _handlers[number]
        except BaseException as raised:
            error = raised
    waiting, _waiting[:] = list(_waiting), []
    for number, frame in waiting:
        handlers[number](number, frame)
    if error is not None:
        raise error


def _forget() -> None:
    """In a child process: what waits is the parent's to answer, and nothing waits here."""
    _waiting.clear()
    _give_back()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
