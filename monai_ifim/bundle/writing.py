# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Files written whole or not at all, and never through a link."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_all(files: Mapping[Path, str]) -> None:
    """Write text files in ASCII, each whole or not at all; a link in the place of one is replaced, not followed.

    Letters that ASCII has not are escaped with a backslash.

    Raises:
        OSError: When one cannot be written.
    """
    made: dict[Path, str] = {}
    try:
        for target, text in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            number, made[target] = tempfile.mkstemp(prefix=".ifim.", suffix=".new", dir=target.parent)
            with open(number, "w", encoding="ascii", errors="backslashreplace", newline="\n") as stream:
                stream.write(text)
            os.chmod(made[target], 0o666 & ~_mask())
        for target, temporary in made.items():
            os.replace(temporary, target)
    except OSError as error:
        raise OSError(f"The overlay could not be written ({error}). Use --output to write elsewhere.") from error
    finally:
        for temporary in made.values():
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _mask() -> int:
    """What new files may not be, which can be read only by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
