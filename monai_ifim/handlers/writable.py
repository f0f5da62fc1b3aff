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
"""Whether a folder can be written, asked before an evaluation has run."""

from __future__ import annotations

import tempfile
from pathlib import Path

__all__ = ["check_writable"]


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
