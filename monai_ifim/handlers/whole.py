# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""A folder that is replaced as a whole: whoever stops the writer, and whenever, an old or a new one is in its place.

The new folder is written beside its place, under a hidden name. Linux exchanges the two in one step (``renameat2``), so
that there is no moment without a folder. Other systems, and file systems that cannot exchange, need two steps: between
them nothing is in its place; an error or an interrupt there is undone at once, and a kill by the next write, which also
clears what killed writers have left. A lock on each hidden folder, which ends with its process, tells the rests of the
dead from the work of the living; where the system has no such locks, rests stay.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
_HERE = -100  # AT_FDCWD: paths are relative to the working directory
# Letters that a file system allows, less what a folder's name gets while it is written.
LONGEST_NAME = 255 - len("..12345678.new")


@contextmanager
def replaced_as_a_whole(folder: Path, last: str) -> Iterator[Path]:
    """An empty folder to be filled, which is put in the place of ``folder`` when all inside went well.

    Where it did not, what was there stays. When a folder is removed, its file ``last`` goes last, for readers that are
    on their way to it.

    Raises:
        OSError: When the folder cannot be made or put into its place.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_rests(folder, last)
    new, descriptor = folder, None
    try:
        while new == folder or not _is_at(descriptor, new):  # cleared by another, before it was locked
            _close(descriptor)
            new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.new")
            new.mkdir()
            descriptor = _locked(new, wait=True)
        yield new
        _put(new, folder)
    finally:
        if new != folder:
            for rest in (new, new.with_suffix(".old")) if folder.exists() else (new,):
                _remove(rest, last)
        _close(descriptor)


def _put(new: Path, folder: Path) -> None:
    """Put a folder into its place; what was there, if anything, then has its name."""
    try:
        _exchange(new, folder)
    except FileNotFoundError:  # nothing is there
        os.rename(new, folder)
    except OSError:
        _put_in_two_steps(new, folder)


def _put_in_two_steps(new: Path, folder: Path) -> None:
    old = new.with_suffix(".old")
    try:
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
    if old.exists():
        os.rename(old, new)


def _exchange(one: Path, other: Path) -> None:
    """Exchange two folders in one step; OSError where that cannot be done."""
    rename = _renameat2()
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


@cache
def _renameat2() -> Any:
    """The function of the C library; None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return found


def _clear_rests(folder: Path, last: str) -> None:
    """Clear what killed writers left beside a folder; where they left nothing in its place, put back what was there."""
    if fcntl is None:
        return
    ours = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.(new|old)", re.DOTALL)
    for name in sorted(os.listdir(folder.parent), key=lambda name: not name.endswith(".old")):
        rest = folder.parent / name
        if not ours.fullmatch(name) or rest.is_symlink() or not rest.is_dir():
            continue
        descriptor = _locked(rest, wait=False)
        if descriptor is not None:
            with suppress(OSError):
                if name.endswith(".old") and not folder.exists():
                    os.rename(rest, folder)
            _remove(rest, last)
            _close(descriptor)


def _locked(folder: Path, wait: bool) -> int | None:
    """A descriptor that locks a folder until it is closed or the process ends; None where that cannot be had."""
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return descriptor
    except OSError:  # another has it, or there are no locks on this file system
        _close(descriptor)
        return None


def _is_at(descriptor: int | None, folder: Path) -> bool:
    """Whether a folder is still there, and the one that was locked, if it was."""
    try:
        return os.path.samestat(os.stat(folder), os.fstat(descriptor) if descriptor is not None else os.stat(folder))
    except FileNotFoundError:
        return False


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _remove(folder: Path, last: str) -> None:
    """Remove a folder, if it is there, and as far as that is possible."""
    with suppress(OSError):
        for inner in sorted(folder.iterdir(), key=lambda path: path.name == last):
            if inner.is_dir() and not inner.is_symlink():
                shutil.rmtree(inner, ignore_errors=True)
            else:
                inner.unlink()
    shutil.rmtree(folder, ignore_errors=True)
