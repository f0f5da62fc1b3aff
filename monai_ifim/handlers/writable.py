# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether a folder can be written, asked before an evaluation has run."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_writable(folder: str | Path, option: str) -> None:
    """Refuse a folder that cannot be made or written. Nothing is made.

    Args:
        folder: may be there or not.
        option: what the user gave, for the message.

    Raises:
        OSError: When it, or the nearest folder above it that is there, cannot be written.

    Example:
        >>> check_writable(tempfile.gettempdir(), "output_dir")
    """
    folder = Path(folder).resolve()
    try:
        place = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(
            f"{option} is {folder}, which cannot be made or written ({error}). Choose a folder that can."
        ) from error
