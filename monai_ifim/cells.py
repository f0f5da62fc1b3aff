# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Any text in a cell of a CSV file, and back: a spreadsheet shows it as text, and every program reads the file.

Excel and LibreOffice run what begins as a formula does, so that such a text gets an apostrophe in front. What UTF-8
or a reader of CSV files cannot hold, a NUL or half of a surrogate pair (as Python makes of file names in another
encoding), becomes its escape, ``\\udc80``. Texts that look like one of the two already are marked, too, so that each
text comes back as it was; all others stand there as they are.
"""

from __future__ import annotations

import re
from functools import lru_cache

# What a formula begins with, also in its full-width form, after anything that a spreadsheet may skip.
_FORMULA = r"(?:[\t\r\n]|[\s\x00-\x1f\ufeff]*[-=+@\uff0d\uff1d\uff0b\uff20])"
_TO_MARK = re.compile(rf"'*{_FORMULA}")
_MARKED = re.compile(rf"'+{_FORMULA}")
_ESCAPED = r"u(?:d[89a-f][0-9a-f]{2}|0000|000d)"
_TO_ESCAPE = re.compile(rf"(\\*)([\ud800-\udfff\x00\r]|{_ESCAPED})")
_ESCAPES = re.compile(rf"(\\+)({_ESCAPED})")


@lru_cache  # the same names stand in many rows
def to_cell(text: str) -> str:
    r"""A text as it stands in a cell.

    Example:
        >>> [to_cell(text) for text in ("scan 1.png", "=1+1", "'=1+1", "a\udc80")]
        ['scan 1.png', "'=1+1", "''=1+1", 'a\\udc80']
    """
    text = f"'{text}" if _TO_MARK.match(text) else text
    return _TO_ESCAPE.sub(_escape, text)


def from_cell(cell: str) -> str:
    """The text of a cell of :func:`to_cell`.

    Example:
        >>> [from_cell(cell) for cell in ("scan 1.png", "'=1+1", "''=1+1")]
        ['scan 1.png', '=1+1', "'=1+1"]
    """
    text = _ESCAPES.sub(_unescape, cell)
    return text[1:] if _MARKED.match(text) else text


def _escape(found: re.Match[str]) -> str:
    """Backslashes in front are doubled; one more makes an escape of the character."""
    slashes, what = found.groups()
    return 2 * slashes + (what if len(what) > 1 else f"\\u{ord(what):04x}")


def _unescape(found: re.Match[str]) -> str:
    slashes, what = found.groups()
    return "\\" * (len(slashes) // 2) + (chr(int(what[1:], 16)) if len(slashes) % 2 else what)
